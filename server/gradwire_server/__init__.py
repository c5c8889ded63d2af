"""gradwire server."""
