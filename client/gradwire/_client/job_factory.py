"""Everything about a client that is not I/O."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from gradwire._api.errors import ClientStateError, ContractError, InputError
from gradwire._api.options import (
    Metadata,
    MetadataPairs,
    Options,
    parse_metadata,
    parse_timeout,
    parse_transport,
)
from gradwire._api.types import Receipt, ServerInfo
from gradwire._api.verify import VerifyLike, parse_verify
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._core.job_plan import Plan, plan_arrays
from gradwire._core.outputs import given_outputs, named_outputs
from gradwire._core.unary import fits_one_message
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.retry import Attempts, Retries, RetriesLike, parse_retries
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob
from gradwire._transport.address import parse_addresses
from gradwire._transport.bearer_token import TokenLike
from gradwire._transport.endpoint import Endpoint, Endpoints
from gradwire._transport.grpc import fork_support
from gradwire._transport.shm.policy import ShmPolicy
from gradwire._transport.tls import Tls
from gradwire_protocol import limits
from gradwire_protocol.limits import RESUME
from gradwire_protocol.matrices import Matrix

ClientT = TypeVar("ClientT")

COMPUTE = f"/{limits.SERVICE}/Compute"
OPEN_REGION = f"/{limits.SERVICE}/OpenRegion"
COMPUTE_STREAM = f"/{limits.SERVICE}/ComputeStream"
GET_SERVER_INFO = f"/{limits.SERVICE}/GetServerInfo"

_SMALL = 16
"""So many times the bytes of a checkpoint that was not asked for are those of the
rows between two of them, at least."""

_LEAST_APART_BYTES = 16 * limits.MIB
"""And these at least."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How jobs travel. Results do not depend on it, and a test says so."""

    chunk_bytes: int = limits.DEFAULT_BLOCK_BYTES
    """Largest payload of a stream's message, in both directions."""

    unary: bool | None = None
    """Whether jobs go through Compute; None: the small ones do."""


class BaseClient:
    """What both clients have in common."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        transport: str = "auto",
        tls: Tls | bool | None = None,
        token: TokenLike | None = None,
        retries: RetriesLike = True,
        verify: VerifyLike = None,
    ) -> None:
        self._retries = Retries(parse_retries(retries))
        self._verify = parse_verify(verify)
        self._features: frozenset[str] = frozenset()
        self._memory = ResultPool()
        self._addresses = parse_addresses(address)
        self._address = self._addresses.text
        # Where there are several, each has a client of its own.
        self._endpoint = Endpoint(self._addresses.first, tls, token)
        self._endpoints = None
        if self._addresses.several:
            self._endpoints = Endpoints(self._addresses, tls, token)
        self._timeout_s = parse_timeout(timeout_s, "timeout_s")
        self._metadata = parse_metadata(metadata)
        self._require_private(self._metadata)
        self._closed = False
        self._pid = os.getpid()
        self._local = threading.local()
        self._tuning = Tuning()
        wanted = parse_transport(transport)
        if self._addresses.several:
            if wanted == "shm":
                raise InputError(
                    'transport is "shm", and memory is shared with one server: give'
                    " one address"
                )
            wanted = "tcp"
        self._sharing = ShmPolicy(wanted, self._address)

    @property
    def address(self) -> str:
        """The server's address, as it was given; of several, all of them."""
        return self._address

    def _learn_of(self, clients: Sequence[BaseClient]) -> None:
        """Of several servers, take what all offer that have said what they do."""
        offered = [each._features for each in clients if each._features]
        if offered:
            self._features = frozenset.intersection(*offered)

    def _require_private(self, metadata: MetadataPairs) -> None:
        (self._endpoints or self._endpoint).require_private(metadata)

    def _lookup(self, address: str, known: Mapping[str, ClientT]) -> ClientT:
        if address not in known:
            raise InputError(
                f"address is {address!r}; this client's servers are {', '.join(known)}"
            )
        return known[address]

    @property
    def last_receipt(self) -> Receipt | None:
        """What became of the job that this thread was last done with here.

        None before the first. Where several coroutines share a client, the
        receipt on the result itself is the surer one.
        """
        return getattr(self._local, "receipt", None)

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<gradwire.{type(self).__name__} of {self._address}{state}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(
            f"a gradwire.{kind} holds a connection and cannot be pickled or copied:"
            f" hand over its address, {self._address!r}, and make a client of it there"
        )

    def _require_open(self) -> None:
        if self._closed:
            raise ClientStateError(
                f"this {type(self).__name__} of {self._address} was closed: make"
                " another"
            )

    def _require_calls(self) -> None:
        """Check that this process can make calls."""
        if fork_support.lost is not None:
            raise ClientStateError(fork_support.lost)

    def _remember_receipt(self, receipt: Receipt) -> Receipt:
        self._local.receipt = receipt
        return receipt

    def _array_job(
        self,
        given: Mapping[Matrix, object],
        out: Any,
        returns: tuple[Matrix, ...],
        options: Options,
    ) -> ArrayJob:
        """A job from the arguments of a method that returns `returns`."""
        copies = HostCopies()
        plan, operands = plan_arrays(given, self._with_defaults(options), copies)
        if plan.chunk_bytes != self._tuning.chunk_bytes:
            plan = replace(plan, chunk_bytes=self._tuning.chunk_bytes)
        made = given_outputs(plan, operands, named_outputs(out, returns))
        unary = self._tuning.unary
        if unary is None:
            unary = fits_one_message(plan)
        return ArrayJob(
            plan,
            operands,
            made,
            unary=unary,
            memory=self._memory,
            copies=copies,
            checkpoint_rows=self._checkpoint_rows(plan.options),
        )

    def _row_job(
        self,
        reader: RowReader,
        held: ReplayBuffer,
    ) -> StreamJob:
        """A stream's job, now that its first item is known, if it has any."""
        plan = replace(reader.plan(held.first), chunk_bytes=self._tuning.chunk_bytes)
        checkpoint_rows = self._checkpoint_rows(plan.options)
        if checkpoint_rows == 0 and plan.options.checkpoint_rows is None:
            checkpoint_rows = self._checkpoint_rows_held(plan, held)
        return StreamJob(
            plan,
            reader.w,
            held,
            reader.copies,
            checkpoint_rows,
            check=reader.check,
        )

    def _held_rows(self, reader: RowReader, rows: object) -> ReplayBuffer:
        """Room for a stream's rows, as far as they may be needed again."""
        policy = self._retries.policy
        if policy.attempts == 1:
            return ReplayBuffer(reader)
        again = rows if isinstance(rows, Sequence) else None
        return ReplayBuffer(reader, policy.held_bytes, again)

    def _checkpoint_rows_held(self, plan: Plan, held: ReplayBuffer) -> int:
        """How often a stream asks for checkpoints of its own accord; 0: never.

        So often that the rows behind the last one are held, with those that are
        on their way, if they cannot be had again; but not so often that the
        checkpoints are much beside the rows.
        """
        row_bytes = plan.upload_bytes(1) - plan.upload_bytes(0)
        dtype = plan.options.dw_accumulator or plan.dtype.sums_in
        apart = max(_LEAST_APART_BYTES, _SMALL * plan.n * plan.k * dtype.itemsize)
        most_apart = self._retries.policy.held_bytes // 4
        if held.repeatable or not row_bytes or apart > most_apart:
            return 0
        return max(1, apart // row_bytes)

    def _checkpoint_rows(self, options: Options) -> int | None:
        """How often a job asks for checkpoints; None: never.

        By default for the one alone that a server sends which stops: it costs
        nothing before.
        """
        if self._retries.policy.attempts == 1:
            return None
        if options.checkpoint_rows is not None:
            return options.checkpoint_rows
        return 0 if RESUME in self._features else None

    def _attempts(self, options: Options) -> Attempts:
        """Those of a job that begins now."""
        return Attempts(self._retries, options.timeout_s, options.job_id)

    def _with_defaults(self, options: Options) -> Options:
        self._require_private(options.metadata)
        if self._timeout_s is None and not self._metadata and self._verify is None:
            return options
        return replace(
            options,
            verify=self._verify if options.verify is None else options.verify,
            timeout_s=options.timeout_s or self._timeout_s,
            metadata=self._metadata + options.metadata,
        )

    def _shares(self, job: ArrayJob) -> bool:
        """Whether a job shall go through shared memory."""
        if self._tuning.unary or job.plan.options.checksum:
            return False
        return self._sharing.should_use(job)

    def _require_contract(self, info: ServerInfo) -> ServerInfo:
        if info.contract != limits.CONTRACT:
            raise ContractError(
                f"the server at {self._address} (gradwire {info.version}) speaks"
                f" {info.contract or 'no contract that it names'}, and this client"
                f" speaks {limits.CONTRACT}: one of them has to be updated"
            )
        self._sharing.learn(info)
        self._features = frozenset(info.features)
        return info
