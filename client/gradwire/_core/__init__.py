"""One job's conversation with a server, without I/O."""
