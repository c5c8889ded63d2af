"""The server of a command: at an address, or private in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from gradwire import Client
from gradwire_cli.errors import CommandError
from gradwire_cli.options import Security
from gradwire_cli.terminal.signals import signals_call


@contextmanager
def connected(
    addresses: Sequence[str],
    security: Security,
    connect_timeout_s: float,
    timeout_s: float | None,
) -> Iterator[tuple[Client, str]]:
    """Connect to the servers at `addresses`, or to a private server.

    Args:
        addresses: Addresses of the servers; empty for a private server in this
            process.
        security: TLS and credentials for the addresses.
        connect_timeout_s: Seconds to wait for an answer.
        timeout_s: Seconds for each job.

    Yields:
        The client, and a name of its servers for messages.

    Raises:
        ConnectError: No gradwire server answers at the address.
        CommandError: A private server cannot start.
    """
    with ExitStack() as stack:
        name = ", ".join(addresses) or "a private server in this process"
        if not addresses:
            at = [stack.enter_context(_private_server())]
            tls, token = None, None
        else:
            at, tls, token = list(addresses), security.wanted, security.token
        client = Client(
            at,
            connect_timeout_s=connect_timeout_s,
            timeout_s=timeout_s,
            tls=tls,
            token=token,
        )
        stack.enter_context(signals_call(client.close))
        stack.enter_context(client)
        yield client, name


@contextmanager
def _private_server() -> Iterator[str]:
    # Imported here: a command with --address needs no server package.
    from gradwire_server import BackendError, ListenError, start_in_thread  # noqa: PLC0415

    # Errors of jobs reach the command as exceptions. Unexpected errors are only
    # in the log.
    logging.getLogger("gradwire_server").setLevel(logging.ERROR)
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start_in_thread())
        except (ListenError, BackendError) as error:
            raise CommandError(f"cannot start a private server: {error}") from error
        yield server.addresses[0]
