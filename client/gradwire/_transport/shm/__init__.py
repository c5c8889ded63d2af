"""Jobs in memory shared with the server."""
