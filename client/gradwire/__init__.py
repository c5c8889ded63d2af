"""gradwire."""
