"""The transport of messages: addresses, TLS, tokens."""
