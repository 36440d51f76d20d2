"""The HTTP server under load: its cost, long runs with clients that leave, and invalid requests."""
