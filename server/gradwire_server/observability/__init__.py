"""What is told of jobs while they run."""
