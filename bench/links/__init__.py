"""The bench behind links of a given rate and delay."""
