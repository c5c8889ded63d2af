"""A job from its header to its last result."""
