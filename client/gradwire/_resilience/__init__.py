"""Jobs over all of their attempts: retries, choice of servers, buffered rows."""
