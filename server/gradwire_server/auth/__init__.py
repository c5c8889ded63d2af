"""Who may call: tokens, JWTs, and the tenants whose they are."""

from gradwire_server.auth.interceptor import AuthInterceptor, make_auth_interceptor

__all__ = ["AuthInterceptor", "make_auth_interceptor"]
