"""The server that a command talks to: one at an address, or one of its own."""

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
    """A client of the servers at `addresses`, or of a private one in this process.

    Args:
        addresses: Of the servers; none: of a private one.
        security: How those at the addresses and its caller prove who they are.
        connect_timeout_s: Seconds that they have to answer.
        timeout_s: Seconds for each job.

    Yields:
        The client, and what to call its servers.

    Raises:
        ConnectError: No gradwire server answers at the address.
        CommandError: No private server can be started.
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
    # Not at the top: a command that is given an address needs no server.
    from gradwire_server import BackendError, ListenError, start_in_thread  # noqa: PLC0415

    # Its jobs' errors reach the command as exceptions. What nobody foresaw
    # stands only in the log.
    logging.getLogger("gradwire_server").setLevel(logging.ERROR)
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start_in_thread())
        except (ListenError, BackendError) as error:
            raise CommandError(f"no private server can run here: {error}") from error
        yield server.addresses[0]
