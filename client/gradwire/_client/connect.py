"""The function `connect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from gradwire._api.options import check_names
from gradwire._client._sync.client import Client
from gradwire._client.options import ClientOptions


def connect(address: str | Sequence[str], **options: Unpack[ClientOptions]) -> Client:
    """Connect to a server, or to several servers.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``. Or several of them, or
            ``dns:///HOST:PORT`` for every address of a DNS name: each job goes to the
            server with the fewest jobs of this client. A server that fails is left
            out for a while, and its job is tried on another, as `retries` says
            (docs/several-servers.md).
        **options: All of them are optional.

    Keyword Args:
        connect_timeout_s: Seconds that the server has to answer: 10 by default;
            None: no limit.
        wait_for_ready_s: Seconds to wait for a server that does not listen yet, or that
            does not accept jobs yet, for example because it starts together with this
            program. None, the default: connecting fails at once.
        timeout_s: Seconds for every call that does not say itself; None, the
            default: no limit.
        metadata: Sent with every call: ``{"traceparent": "00-..."}``.
        transport: How elements are sent. ``"grpc"``: in messages of the call.
            ``"direct"``: on TCP connections beside the call, which take half the
            processor time.
            ``"shm"``: in memory shared with the server; see `Client.empty`.
            ``"auto"``, the default: in shared memory if the server allows it and is
            known to be on this host; else on direct connections if the server has
            them and the job has at least 4 MiB of operands or of results, and a known
            number of rows, or a session's tensor has at least 4 MiB; else in messages,
            also for a minute after direct connections failed. With several servers,
            never in shared memory.
        tls: None, the default: plaintext, for this host and for networks that you
            trust; an ``authorization`` in the metadata is refused for other hosts.
            True: TLS, to a server with a certificate of an authority that the system
            trusts. A `Tls` names other authorities, and the client's certificate.
        token: Sent with every call to a server that asks for a token: a string, or
            a function that returns one. The function is called for each call, so the
            token can be renewed; its exceptions are raised by the call. An
            `AsyncClient` calls it on the event loop, which it must not block. A
            token is refused if it would go to another host in plaintext.
        retries: When a failed call is retried. True, the default: with `RetryPolicy`'s
            defaults. False: never. Or a `RetryPolicy`.
        verify: Default of the option `verify` of every call; see `Client.gradients`.
        block_rows: Default of the option `block_rows` of every call. None: the
            server's own row blocks.

    Returns:
        A client, once the server has answered.

    Raises:
        InputError: An argument is invalid, or a file of `tls` or the token cannot
            be used.
        ConnectError: No server answers at the address (at any, if there are several).
            Or something else than a gradwire server answers, or a server with an
            unknown version of the contract (`ContractError`). Or the server is not
            trusted (`TlsError`). Or ``transport="shm"``, and the server shares no
            memory. Or ``transport="direct"``, and the server has no direct
            connections.

    Example:
        >>> with gradwire.connect("gpu-node:50051") as client:
        ...     y, dx, dw = client.gradients(x, w, dy)
    """
    check_names("connect", options, ClientOptions)
    return Client(address, **options).__enter__()
