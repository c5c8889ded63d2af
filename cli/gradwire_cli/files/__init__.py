"""Matrices in files: operands to read, results to write."""
