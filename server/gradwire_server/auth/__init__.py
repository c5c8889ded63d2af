"""Authentication: tokens, JWTs and certificates, and their tenants."""

from gradwire_server.auth.interceptor import AuthInterceptor, make_auth_interceptor

__all__ = ["AuthInterceptor", "make_auth_interceptor"]
