"""Elements on TCP connections beside the call."""
