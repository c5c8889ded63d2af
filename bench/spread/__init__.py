"""The bench of jobs that are spread over several servers."""
