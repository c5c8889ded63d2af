"""The backends: NumPy, CuPy, and their common interface."""
