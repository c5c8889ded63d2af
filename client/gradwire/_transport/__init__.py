"""How messages travel: addresses, TLS, tokens."""
