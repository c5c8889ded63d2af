"""Jobs whose matrices lie in memory that the server shares."""
