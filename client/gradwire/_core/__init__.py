"""The messages of one job, without I/O."""
