"""What is trained: each module has `build`, `batch` and `loss`."""
