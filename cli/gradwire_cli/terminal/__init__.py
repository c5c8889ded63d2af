"""Terminal input and output: tables, units, logs, signals."""
