"""Attention kernels: batches, programs that attend them, peers, copies, correctness, kernel sizes."""
