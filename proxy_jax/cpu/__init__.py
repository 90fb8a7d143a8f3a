"""What CPUs run besides XLA's own programs."""
