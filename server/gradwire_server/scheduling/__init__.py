"""Choice of a job's device, and the order of row blocks on it."""
