"""The bench over links with a given rate and delay."""
