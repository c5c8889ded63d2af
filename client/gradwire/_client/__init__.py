"""The clients: they turn arguments into jobs, and jobs into calls."""
