"""A server's load, read from its metrics."""
