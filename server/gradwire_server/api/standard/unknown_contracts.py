"""The answer to clients of another version of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from gradwire_protocol.error_details import ErrorDetails, encode
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import CONTRACT, SERVICE
from gradwire_protocol.version import VERSION


class OtherContracts(grpc.GenericRpcHandler):
    """Refuses calls of `gradwire.*` services that this server does not have."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return a handler that refuses; None for other packages' services."""
        method = handler_call_details.method
        if isinstance(method, bytes):
            method = method.decode(errors="replace")
        if not method.startswith("/gradwire."):
            return None

        async def refuse(
            _: AsyncIterator[bytes],
            context: grpc.aio.ServicerContext[bytes, bytes],
        ) -> None:
            reason = Reason.CONTRACT_UNKNOWN
            message = (
                f"{method[:_SHOWN]} is not served here: this is gradwire "
                f"{VERSION}, which speaks {SERVICE}"
            )
            details = ErrorDetails(reason, metadata={"served": CONTRACT})
            trailer = encode(reason.status, message, details)
            await context.abort(reason.status, message, trailer)

        return grpc.stream_stream_rpc_method_handler(refuse)


_SHOWN = 128
"""Characters of a method's name to repeat; metadata has little room."""
