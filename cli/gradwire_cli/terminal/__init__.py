"""What people see and type: tables, units, logs, signals."""
