"""Jobs over all of their attempts: retries, servers, rows that are needed again."""
