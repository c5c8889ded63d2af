"""Benchmarks of gradwire on a GPU host."""
