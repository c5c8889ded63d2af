"""Reports of a run: statistics, tables, bounds and figures."""
