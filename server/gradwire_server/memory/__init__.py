"""Memory that outlives a job."""
