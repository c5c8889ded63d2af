"""Jobs whose elements come and leave on direct connections."""
