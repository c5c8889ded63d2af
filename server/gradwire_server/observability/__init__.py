"""The access log and the timeline of row blocks."""
