"""The faults of the suite: how often each is tried, and its outcome.

    python -m tests.thorough.faults.table

writes `docs/faults.md` from this table. A test compares the page with the table, and
the tests of the suite check the table's counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PAGE = Path(__file__).parents[3] / "docs" / "faults.md"


@dataclass(frozen=True)
class Fault:
    """What happens to a job."""

    what: str
    """What happens, and when."""
    every: int
    """In how many ways `make test-faults` tries it."""
    sampled: int
    """How many ways, evenly spread, are tried on every change."""
    seen: str
    """What the user sees."""

    def cases(self, every: Sequence[T], extent: str) -> list[T]:
        """The cases to try: all, or an evenly spread sample.

        Raises:
            AssertionError: The number of cases differs from the table's.
        """
        assert len(every) == self.every, (self.what, len(every))
        if extent == "every":
            return list(every)
        step = (len(every) - 1) / max(self.sampled - 1, 1)
        return [every[round(step * i)] for i in range(self.sampled)]


FAULTS = {
    "cut-message": Fault(
        "the connection breaks after a message: after every message, in both "
        "directions, of a job with all results, of one with Y alone and of one with "
        "dW alone, with `Client` and `AsyncClient`",
        336,
        56,
        "the results, with the same bits; `receipt.retried` says `UNAVAILABLE`",
    ),
    "cut-told": Fault(
        "the same with `retries=False`",
        168,
        20,
        "`ConnectionLostError`; the client's next jobs succeed as soon as gRPC has "
        "reconnected",
    ),
    "reset": Fault(
        "a proxy resets the call, and keeps the connection: with each of HTTP/2's 14 "
        "codes, after every message, in both directions, of the same jobs, with both "
        "clients",
        4704,
        24,
        "the results, with the same bits; `receipt.retried` says `UNAVAILABLE`",
    ),
    "cut-byte": Fault(
        "the connection breaks after a byte: after every third of the first 4,000 "
        "bytes of a job's requests and 4,200 of its responses, headers and frames "
        "included",
        2733,
        36,
        "the results, with the same bits",
    ),
    "cut-stream": Fault(
        "the connection breaks after a message of a stream with rows from a "
        "generator: after every message, in both directions, with both clients",
        176,
        26,
        "every row block once and in order, and dW, with the same bits: the stream "
        "continues where it stopped",
    ),
    "cut-direct": Fault(
        "a direct connection breaks after a byte: after every 211th of a job's "
        "operands and of its results, and around Attach and the first header, with "
        "both clients",
        1616,
        28,
        "the results, with the same bits, on direct connections; `receipt.retried` "
        'says `UNAVAILABLE` or `CONNECTION_LOST`. With `transport="direct"`, '
        "`ConnectError` if it breaks while it is opened",
    ),
    "cut-direct-stream": Fault(
        "the same for a stream with rows from a generator",
        1616,
        24,
        "every row block once and in order, and dW, with the same bits",
    ),
    "cut-direct-session": Fault(
        "the same for a job in a session, with X that is kept, and dW and dB that stay "
        "there; or the call's connection breaks after a message",
        804,
        16,
        "the results, with the same bits; the session has counted the contribution "
        "once",
    ),
    "silent-wire": Fault(
        "every packet is lost, each way, in the middle of a job on direct connections; "
        "nobody is told (needs root and network namespaces)",
        2,
        2,
        "`DeadlineError`, on time. With time left, the results, with the same bits: "
        "from another server when gRPC's keepalive has ended the call, or once the "
        "packets come through again. The server frees the job's memory after "
        "`idle-timeout`",
    ),
    "flip": Fault(
        "a bit flips, with `checksum=True`: in every fifth of the same bytes, so in "
        "elements, in message fields and in HTTP/2 frames",
        1640,
        20,
        "the results, with the same bits; or an SDK error (only elements have a "
        "checksum; a damaged message or frame is not retried). Never a wrong result",
    ),
    "flip-tls": Fault(
        "a bit flips, over TLS and without checksums: in every 97th of the same bytes",
        86,
        12,
        "the results, with the same bits; or `DeadlineError`, if the bit was in a "
        "record's length. Never a wrong result",
    ),
    "flip-elements": Fault(
        "a bit of a message's elements flips, with `checksum=True`: in every message "
        "with elements",
        78,
        20,
        "the results, with the same bits; `receipt.retried` says `CHECKSUM_MISMATCH`",
    ),
    "server-killed": Fault(
        "the server is killed (SIGKILL), and another server takes over the address: at "
        "every message of a job except the header and the last",
        79,
        4,
        "the results, with the same bits, from the other server",
    ),
    "server-killed-waiting": Fault(
        "the same while the job waits in the queue",
        1,
        1,
        "the results, with the same bits, from the other server",
    ),
    "server-drained": Fault(
        "the server is asked to stop (SIGTERM) with `grace` 0, and another server "
        "takes over the address: at the same messages",
        79,
        3,
        "the results, with the same bits, started on one server and finished on the "
        "other; `receipt.retried` says `DRAINING`, unless everything had been sent",
    ),
    "client-killed": Fault(
        "the client is killed (SIGKILL): at the same messages",
        79,
        3,
        "nothing; the server's log says `CANCELLED`, or `OK` if everything had been "
        "sent",
    ),
    "client-stopped": Fault(
        "the client is suspended (SIGSTOP) for longer than `idle-timeout`: at the same "
        "messages",
        79,
        2,
        "`ClientIdleError` when the client continues; or the results, if everything "
        "had been sent",
    ),
    "server-stopped": Fault(
        "the server is suspended (SIGSTOP) for longer than the call's `timeout_s`: at "
        "the same messages",
        79,
        2,
        "`DeadlineError`, on time; the next job succeeds once the server continues",
    ),
    "server-resumed": Fault(
        "the server is suspended for longer than its own `idle-timeout`, and "
        "continues: at the same messages",
        79,
        3,
        "the results, with the same bits: the server does not count its own suspension "
        "as idle time of its clients",
    ),
    "disk-full": Fault(
        "files cannot grow any further while `gradwire compute` writes: before the "
        "first byte of a result, and at every row of the largest result",
        43,
        2,
        "one sentence (`... npy cannot be written: File too large`), status 1, and no "
        "result files, complete or partial",
    ),
    "device-memory": Fault(
        "the device is out of memory: at every step of the three jobs (opening, W, "
        "each row block, dW)",
        22,
        22,
        "`DeviceOutOfMemoryError`; the next job succeeds",
    ),
    "clock-jumps": Fault(
        "the server's wall clock jumps an hour forward or back at every reading: the "
        "three jobs, an idle client, and a deadline",
        3,
        3,
        "the results, with the same bits; idle timeouts and deadlines are on time",
    ),
}


@dataclass(frozen=True)
class BehindProxy:
    """What happens behind a real proxy, and is tried by `make test-proxies`."""

    what: str
    """What happens."""
    tests: tuple[str, ...]
    """The tests, as module of `tests/proxies` and function."""
    tried: int
    """In how many ways: proxies, clients, and ways of a job."""
    seen: str
    """What the user sees."""


BEHIND_PROXIES = (
    BehindProxy(
        "a server is killed (SIGKILL), or asked to stop (SIGTERM) with `grace` 0, in "
        "the middle of a stream",
        ("test_faults.test_a_stream_goes_on_at_the_other_server",),
        16,
        "every row block once and in order, and dW, with the same bits, finished on "
        "the other server",
    ),
    BehindProxy(
        "a server drains (SIGTERM) and ends while jobs come, in one message and in "
        "streams",
        ("test_faults.test_jobs_go_on_while_a_server_drains",),
        16,
        "the results, with the same bits",
    ),
    BehindProxy(
        "a server is dead for longer than two health checks",
        ("test_faults.test_health_checks_take_a_dead_server_out",),
        3,
        "nothing, even with `retries=False`",
    ),
    BehindProxy(
        "a server with a running stream drains",
        ("test_faults.test_a_server_that_drains_gets_no_new_calls_and_ends_its_own",),
        2,
        "nothing: the stream ends there, and new calls go to the other server",
    ),
    BehindProxy(
        "a job waits in the queue for longer than the proxy's idle timeout",
        ("test_faults.test_a_job_that_waits_is_not_idle",),
        4,
        "the results",
    ),
    BehindProxy(
        "both servers are gone, and one comes back",
        ("test_errors.test_no_server_behind_a_proxy_is_told_as_such",),
        4,
        "`UnavailableError` (the proxy before ... has no server available); then the "
        "results",
    ),
    BehindProxy(
        "the proxy's configuration is wrong: a limit of size, a short timeout, another "
        "route, a page, HTTP/1",
        (
            "test_errors.test_nginxs_limit_of_a_requests_size_is_named",
            "test_errors.test_a_proxy_that_waits_too_short_names_its_timeout",
            "test_errors.test_what_is_no_grpc_is_told_as_such",
        ),
        9,
        "an error that says so and names the setting",
    ),
)

_HEAD = """\
# What faults do to a job

<!-- Written by `python -m tests.thorough.faults.table`. -->

Each row is a test of `tests/thorough/faults` with real processes: a client, a server,
and a TCP proxy between them if connections break or bytes change. The first number is
how many variants `make test-faults` tries. The second is how many of them, evenly
spread, run on every change. "The same bits" means: the bits of the same job without
the fault.

After each fault the server must be clean. Within seconds it admits a job that takes all
of its memory, so no reservation and no job is left. The number of open descriptors is
the same as before, and the log has no unexpected error.

| what happens | tried, of them on every change | what the user sees |
| --- | ---: | --- |
"""

_PROXIES = """
## Behind proxies

`make test-proxies` puts Envoy, nginx and HAProxy before two servers, as
`deploy/proxies` configures them ([more](proxies.md)).

| what happens | tried | what the user sees |
| --- | ---: | --- |
"""

_TAIL = """
## What is simulated

A limit on file size simulates a full disk: writes fail in the same place, with another
error text. A test backend simulates a device that is out of memory; `tests/gpu` tests
CuPy on a real device. The tests do not set the host's clock. gRPC and asyncio use the
monotonic clock, and a test checks that gradwire reads the wall clock only for the dates
of credentials.

A flipped bit that passes TCP's own checksum can block a plaintext connection. If the
bit makes an HTTP/2 stream number too large, gRPC ignores all later calls while its
pings still pass. Each call then ends with `DeadlineError` until the client is replaced.
TLS detects every flipped bit. If the bit is in a record's length, TLS first waits for
the missing bytes, and calls end with `DeadlineError` until the bytes arrive or the
pings fail. By gRPC's settings this takes at most 50 s (not tested here).

[failing.md](failing.md) describes retries and how to turn them off.
"""


def page() -> str:
    """The page that lists them."""
    rows = (
        f"| {fault.what} | {fault.every:,}, {fault.sampled:,} | {fault.seen} |\n"
        for fault in FAULTS.values()
    )
    behind = (f"| {row.what} | {row.tried} | {row.seen} |\n" for row in BEHIND_PROXIES)
    return _HEAD + "".join(rows) + _PROXIES + "".join(behind) + _TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
