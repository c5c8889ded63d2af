"""How a server fares under load."""
