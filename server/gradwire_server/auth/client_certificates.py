"""Tenants identified by TLS certificates.

The handshake has already verified the certificate's signature and the client's
possession of its key, before any call.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from gradwire_server.admission.tenancy import is_name
from gradwire_server.auth.errors import RefusedError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
LetIn: TypeAlias = Callable[[Context], Awaitable[None]]

_COMMON_NAME = "x509_common_name"
_OTHER_NAMES = "x509_subject_alternative_name"


def tenant_of(context: Context) -> str | None:
    """Return the tenant named by a call's client certificate; None without one.

    The tenant is the common name or, without one (as with SPIFFE), the only subject
    alternative name.

    Raises:
        RefusedError: The certificate names no tenant.
    """
    found = context.auth_context()
    if not found or found.get("transport_security_type") in (None, [b"insecure"]):
        return None
    names = [*found.get(_COMMON_NAME, ())] or [*found.get(_OTHER_NAMES, ())]
    if not names:
        return None
    name = names[0].decode(errors="replace")
    if len(names) > 1 or not is_name(name):
        raise RefusedError("the certificate names no tenant")
    return name


def after(let_in: LetIn, handler: Handler) -> Handler:
    """Return the same method, preceded by a check of the call.

    Args:
        let_in: Ends the call if it is refused. It needs the connection, and an
            interceptor has no access to it.
        handler: The method.
    """
    kind, make = _KINDS[
        bool(handler.request_streaming), bool(handler.response_streaming)
    ]
    method = getattr(handler, kind)

    async def call(request: Any, context: Context) -> Any:
        await let_in(context)
        return await method(request, context)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        await let_in(context)
        async for response in method(request, context):
            yield response

    wrapped: Handler = make(
        generate if inspect.isasyncgenfunction(method) else call,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


_KINDS: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
