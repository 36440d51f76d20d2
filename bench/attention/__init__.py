"""What bench.kernels is made of: batches, programs that attend them, peers, copies, correctness, kernel sizes."""
