"""Load test of a server."""
