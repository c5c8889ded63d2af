"""What a GPU host makes of gradwire."""
