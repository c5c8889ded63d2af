"""What computes: NumPy, CuPy, and what they have in common."""
