"""Direct connections: elements of a call on TCP connections beside it."""
