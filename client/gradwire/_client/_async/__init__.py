"""The client for event loops, written by hand."""
