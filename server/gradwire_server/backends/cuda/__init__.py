"""NVIDIA GPUs, with CuPy."""
