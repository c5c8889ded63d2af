"""Streamed jobs: operands arrive row block by row block."""
