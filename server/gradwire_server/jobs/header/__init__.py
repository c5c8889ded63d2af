"""Parsing and checks of job headers."""
