"""Small parts measured alone: the host half, the sampler, the calls of one request."""
