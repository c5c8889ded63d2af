"""Listening addresses, TLS, and files that may change."""
