"""Figures of a run: statistics, tables, bars and pictures."""
