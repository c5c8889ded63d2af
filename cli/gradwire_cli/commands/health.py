"""``gradwire health``."""

from __future__ import annotations

import sys

import grpc
from cyclopts import App
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire._api.options import parse_timeout
from gradwire._transport.endpoint import Endpoint
from gradwire._transport.grpc.grpc_errors import connect_error
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.options import (
    DEFAULT_ADDRESS,
    PLAINTEXT,
    Address,
    Seconds,
    SecurityOptions,
)

app = App(
    name="health",
    help="""
    Ask a server whether it accepts jobs.

    For probes of containers and load balancers. Uses gRPC's standard health
    protocol. Exits with 0 if the server accepts jobs, and with 1 if it does not
    or is unreachable.
    """,
)


@app.default
def health(
    *,
    address: Address = DEFAULT_ADDRESS,
    security: SecurityOptions = PLAINTEXT,
    timeout: Seconds = 5.0,
) -> ExitStatus:
    """Ask a server whether it accepts jobs.

    Args:
        address: Server address: HOST:PORT or unix:PATH.
        security: TLS and credentials.
        timeout: Time limit for the answer.
    """
    address = address or DEFAULT_ADDRESS
    status = ask(Endpoint(address, security.wanted, security.token), timeout)
    if status != "SERVING":
        raise CommandError(f"the server at {address} accepts no jobs: it is {status}")
    sys.stdout.write(f"the server at {address} accepts jobs: it is SERVING\n")
    return ExitStatus.OK


def ask(endpoint: Endpoint, timeout_s: float) -> str:
    """The name of the server's health status (``SERVING``, ``NOT_SERVING``).

    Raises:
        ConnectError: The server did not answer.
    """
    with endpoint.channel() as channel:
        try:
            check = endpoint.authorized(health_pb2_grpc.HealthStub(channel).Check)
            answer = check(
                health_pb2.HealthCheckRequest(),
                timeout=parse_timeout(timeout_s, "the timeout"),
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise CommandError(
                    f"the server at {endpoint} does not speak the health protocol; "
                    "a gradwire server needs the extra gradwire[server] for it"
                ) from error
            raise connect_error(error, endpoint, timeout_s) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
