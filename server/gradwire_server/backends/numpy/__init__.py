"""The CPU, with NumPy's BLAS."""
