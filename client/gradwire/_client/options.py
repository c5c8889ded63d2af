"""The options of a client."""

from __future__ import annotations

from typing import TypedDict

from gradwire._api.options import BlockRows, Metadata
from gradwire._api.verify import VerifyLike
from gradwire._resilience.retry import RetriesLike
from gradwire._transport.bearer_token import TokenLike
from gradwire._transport.tls import Tls


class ClientOptions(TypedDict, total=False):
    """The options of `connect`, `Client` and `AsyncClient`; see `connect`."""

    connect_timeout_s: float | None
    wait_for_ready_s: float | None
    timeout_s: float | None
    metadata: Metadata
    transport: str
    tls: Tls | bool | None
    token: TokenLike | None
    retries: RetriesLike
    verify: VerifyLike
    block_rows: BlockRows | None
