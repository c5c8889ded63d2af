"""A job whose operands arrive row block by row block."""
