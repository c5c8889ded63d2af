"""Callers' arrays: read as operands, filled with results, copied from devices."""
