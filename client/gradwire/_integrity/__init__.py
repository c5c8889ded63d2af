"""Verification of results on the client, with random sums."""
