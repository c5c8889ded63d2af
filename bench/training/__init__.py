"""Training through sessions: bytes and milliseconds of a step."""
