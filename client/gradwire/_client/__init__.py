"""The clients: what joins arguments, jobs and calls."""
