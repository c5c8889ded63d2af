"""The server of a command: at an address, or private in this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypedDict, Unpack

from gradwire import Client
from gradwire_cli.errors import CommandError
from gradwire_cli.options import Security
from gradwire_cli.terminal.signals import signals_call


class _Options(TypedDict, total=False):
    transport: str


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
    with (
        reachable(addresses, security, connect_timeout_s, timeout_s) as (
            client_of,
            name,
        ),
        client_of() as client,
    ):
        yield client, name


@contextmanager
def reachable(
    addresses: Sequence[str],
    security: Security,
    connect_timeout_s: float,
    timeout_s: float | None,
) -> Iterator[tuple[Callable[..., AbstractContextManager[Client]], str]]:
    """Yield how to connect to the servers at `addresses`, or to a private server.

    Args:
        addresses: As for `connected`.
        security: As for `connected`.
        connect_timeout_s: As for `connected`.
        timeout_s: As for `connected`.

    Yields:
        A function of options of `gradwire.connect` that connects another client, to
        all servers or to the one at `address`, and a name of the servers for messages.

    Raises:
        CommandError: A private server cannot start.
    """
    with ExitStack() as stack:
        name = ", ".join(addresses) or "a private server in this process"
        if not addresses:
            at = [stack.enter_context(_private_server())]
            tls, token = None, None
        else:
            at, tls, token = list(addresses), security.wanted, security.token

        clients: list[Client] = []
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            for client in clients:
                client.close()

        @contextmanager
        def client_of(
            *, address: str | None = None, **options: Unpack[_Options]
        ) -> Iterator[Client]:
            client = Client(
                at if address is None else address,
                connect_timeout_s=connect_timeout_s,
                timeout_s=timeout_s,
                tls=tls,
                token=token,
                **options,
            )
            clients.append(client)
            if stopped.is_set():
                client.close()
            with client:
                yield client

        stack.enter_context(signals_call(stop))
        yield client_of, name


@contextmanager
def _private_server() -> Iterator[str]:
    # Imported here: a command with --address needs no server package.
    from gradwire_server import BackendError, ListenError, start_in_thread  # noqa: PLC0415

    with ExitStack() as stack:
        # Errors of jobs reach the command as exceptions. Unexpected errors are only
        # in the log.
        log = logging.getLogger("gradwire_server")
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        try:
            server = stack.enter_context(start_in_thread())
        except (ListenError, BackendError) as error:
            raise CommandError(f"cannot start a private server: {error}") from error
        yield server.addresses[0]
