"""Where the server listens, and the files that it watches."""
