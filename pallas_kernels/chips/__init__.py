"""Facts of the hardware that kernels need, and the one answer to which hardware is here."""
