"""The CPU, through NumPy's BLAS."""
