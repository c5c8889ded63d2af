"""Matrices in files: operands that are read, results that are written."""
