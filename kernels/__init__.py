"""Device work: kernels and their torch reference twins."""
