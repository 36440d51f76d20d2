"""TPU kernels and whole models through the real TPU compiler, without a TPU."""
