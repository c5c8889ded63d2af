"""Authentication of every call, before any of it is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import grpc

from gradwire_protocol.error_details import ErrorDetails, encode
from gradwire_protocol.error_reasons import Reason
from gradwire_server.admission import tenancy
from gradwire_server.admission.tenancy import Limits
from gradwire_server.auth import client_certificates
from gradwire_server.auth.client_certificates import Context, Handler
from gradwire_server.auth.errors import RefusedError
from gradwire_server.auth.jwts import Expected, parse_keys
from gradwire_server.auth.tokens import Tokens, parse_tokens
from gradwire_server.errors import CredentialsError
from gradwire_server.observability.calls import CallObserver
from gradwire_server.settings import Settings
from gradwire_server.transports.file_watch import FileError, WatchedFiles, watch_file

Continuation: TypeAlias = Callable[
    [grpc.HandlerCallDetails], Awaitable["Handler | None"]
]

HEADER = "authorization"
_HEALTH = "/grpc.health.v1.Health/"


class TokenRegistry(Protocol):
    """Maps tokens to tenants."""

    def tenant_of(self, token: str) -> str | None:
        """Return a token's tenant, or None if the token is not registered here."""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls with credentials that prove a tenant.

    A refused call is answered before any of its messages is read or any memory is
    counted for it.

    Args:
        registers: Token registries, in order of lookup.
        limits: A tenant's limits; the tokens file may override them.
        tokens: The tokens file.
        certificates: Whether the certificate of a client without a token names its
            tenant.
        health_open: Whether health checks need no credentials.
        observer: Is told of refused calls.
    """

    def __init__(
        self,
        registers: Sequence[WatchedFiles[Any]],
        limits: Limits,
        tokens: WatchedFiles[Tokens] | None,
        *,
        certificates: bool,
        health_open: bool,
        observer: CallObserver,
    ) -> None:
        self._observer = observer
        self._certificates = certificates
        self._registers = registers
        self._limits = limits
        self._tokens = tokens
        self._health_open = health_open

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Return the method's handler, or a handler that refuses the call."""
        method = _text(handler_call_details.method)
        if self._health_open and method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = [_text(value) for key, value in metadata if key == HEADER]
        if not given and self._certificates:
            handler = await continuation(handler_call_details)
            let_in = partial(self._let_in_by_certificate, method)
            return (
                None if handler is None else client_certificates.after(let_in, handler)
            )
        try:
            tenancy.current.set(self._tenant_of(given))
        except RefusedError as refused:
            # Always with streamed requests: for a single request gRPC reads the
            # whole message before it calls the handler.
            return grpc.stream_stream_rpc_method_handler(
                partial(self._refuse_unread, method, refused)
            )
        return await continuation(handler_call_details)

    def limits_of(self, tenant: str) -> Limits:
        """Return a tenant's limits."""
        if self._tokens is None:
            return self._limits
        return self._tokens.value.limits_of(tenant, self._limits)

    async def _let_in_by_certificate(self, method: str, context: Context) -> None:
        try:
            name = client_certificates.tenant_of(context)
            if name is None:
                raise _none_given()
        except RefusedError as refused:
            await self._refuse(method, refused, context)
        else:
            tenancy.current.set(name)

    async def _refuse_unread(
        self,
        method: str,
        refused: RefusedError,
        _: AsyncIterator[bytes],
        context: Context,
    ) -> None:
        await self._refuse(method, refused, context)

    async def _refuse(
        self, method: str, refused: RefusedError, context: Context
    ) -> None:
        """End a call, and report the refusal."""
        reason = Reason.CREDENTIALS_INVALID
        self._observer.credentials_refused(method, context.peer(), refused.why)
        trailer = encode(reason.status, refused.told, ErrorDetails(reason))
        await context.abort(reason.status, refused.told, trailer)

    def _tenant_of(self, given: Sequence[str]) -> str:
        if not given:
            raise _none_given()
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
            raise RefusedError(
                "the metadata authorization is not one Bearer TOKEN",
                why="authorization is not one Bearer TOKEN",
            )
        for register in self._registers:
            known: TokenRegistry = register.value
            name = known.tenant_of(token.strip())
            if name is not None:
                return name
        raise RefusedError(why="an unknown token")


def make_auth_interceptor(
    settings: Settings, observer: CallObserver
) -> AuthInterceptor | None:
    """Return the interceptor for the settings, or None without authentication.

    Args:
        settings: The operator's settings.
        observer: Is told of refused calls.

    Raises:
        CredentialsError: The settings are inconsistent, or a file cannot be used.
    """
    registers: list[WatchedFiles[Any]] = []
    tokens: WatchedFiles[Tokens] | None = None
    expected = _expected(settings)
    try:
        if settings.auth_tokens is not None:
            tokens = watch_file(settings.auth_tokens, "the tokens file", parse_tokens)
            registers.append(tokens)
        if settings.auth_jwks is not None and expected is not None:
            parse = partial(parse_keys, expected=expected)
            registers.append(watch_file(settings.auth_jwks, "the key set", parse))
    except FileError as error:
        raise CredentialsError(str(error)) from None
    limits = Limits(
        settings.tenant_max_jobs,
        settings.tenant_memory_limit,
        settings.tenant_max_queue,
        settings.tenant_keep_limit,
        settings.tenant_max_sessions,
    )
    if settings.auth_certificates and settings.tls_client_ca is None:
        raise CredentialsError(
            "auth_certificates is set without tls_client_ca: clients show no "
            "certificates then"
        )
    if registers or settings.auth_certificates:
        return AuthInterceptor(
            registers,
            limits,
            tokens,
            certificates=settings.auth_certificates,
            health_open=not settings.auth_health,
            observer=observer,
        )
    without = "a limit of tenants" if limits != Limits() else None
    if settings.auth_health:
        without = "auth_health"
    if without is not None:
        raise CredentialsError(
            f"{without} is given, and nobody is asked who they are: give "
            "auth_tokens, auth_jwks or auth_certificates"
        )
    return None


def _expected(settings: Settings) -> Expected | None:
    """Return the required claims of JWTs; None if JWTs are not accepted."""
    audience, issuer = settings.auth_jwt_audience, settings.auth_jwt_issuer
    claim = settings.auth_jwt_claim
    if settings.auth_jwks is None:
        if audience or issuer:
            raise CredentialsError(
                "auth_jwt_audience and auth_jwt_issuer are for JWTs, and there is no "
                "auth_jwks"
            )
        return None
    if not audience or not issuer or not claim:
        raise CredentialsError(
            "auth_jwks needs auth_jwt_audience, auth_jwt_issuer and auth_jwt_claim: "
            "an issuer's tokens may be for others"
        )
    return Expected(audience, issuer, claim)


def _none_given() -> RefusedError:
    return RefusedError(
        "this server asks for credentials: send the metadata authorization: "
        "Bearer TOKEN",
        why="no credentials",
    )


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
