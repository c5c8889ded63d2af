"""Who may call: tokens, JWTs, and the tenants whose they are."""

from gradwire_server.auth.interceptor import Gate, gate_of

__all__ = ["Gate", "gate_of"]
