"""The files in deploy/, used by the programs that they are for."""
