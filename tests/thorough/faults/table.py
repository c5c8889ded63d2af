"""Every fault of the suite, how often it is tried, and what becomes of it.

    python -m tests.thorough.faults.table

writes `docs/faults.md`, which lists them. A test holds the page to this table, and
the tests of the suite hold the table's counts to what they try.
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
    """In how many ways it is tried by `make test-faults`."""
    sampled: int
    """How many of those, evenly spread, are tried on every change."""
    seen: str
    """What the user sees."""

    def cases(self, every: Sequence[T], extent: str) -> list[T]:
        """Those to be tried of all that there are.

        Raises:
            AssertionError: There are not as many as the table says.
        """
        assert len(every) == self.every, (self.what, len(every))
        if extent == "every":
            return list(every)
        step = (len(every) - 1) / max(self.sampled - 1, 1)
        return [every[round(step * i)] for i in range(self.sampled)]


FAULTS = {
    "cut-message": Fault(
        "the connection breaks behind a message: every one of a job of all results, "
        "of one of Y alone and of one of dW alone, in either direction, of a `Client` "
        "and of an `AsyncClient`",
        160,
        100,
        "the results, with the same bits; `receipt.retried` says `UNAVAILABLE`",
    ),
    "cut-told": Fault(
        "the same with `retries=False`",
        80,
        20,
        "`ConnectionLostError`; the client's jobs are right again as soon as gRPC has "
        "found out and connected anew",
    ),
    "cut-byte": Fault(
        "the connection breaks after a byte: every third of the first 4,000 of a job's "
        "requests and 4,200 of its responses, headers and frames included",
        2733,
        60,
        "the results, with the same bits",
    ),
    "cut-stream": Fault(
        "the connection breaks behind a message of a stream whose rows come from a "
        "generator: every one, in either direction, of both clients",
        86,
        43,
        "every row block once and in order, and dW, with the same bits: the stream "
        "goes on where it was",
    ),
    "flip": Fault(
        "a bit of a byte is flipped, with `checksum=True`: of every fifth of those "
        "bytes, so in elements, in messages' fields and in HTTP/2's frames",
        1640,
        20,
        "the results, with the same bits; or an error of the SDK's (only elements have "
        "a checksum, and what is wrong with a message or a frame is not tried again). "
        "Never a wrong result",
    ),
    "flip-tls": Fault(
        "a bit of a byte is flipped, over TLS and without checksums: of every 97th of "
        "those bytes",
        86,
        12,
        "the results, with the same bits; or `DeadlineError`, where it was one of a "
        "record's length. Never a wrong result",
    ),
    "flip-elements": Fault(
        "a bit of a message's elements is flipped, with `checksum=True`: of every "
        "message that has some",
        34,
        34,
        "the results, with the same bits; `receipt.retried` says `CHECKSUM_MISMATCH`",
    ),
    "server-killed": Fault(
        "the server is killed (SIGKILL), and another one is behind the address: at "
        "every message of a job but its header and its last",
        36,
        4,
        "the results, with the same bits, from the other one",
    ),
    "server-killed-waiting": Fault(
        "the same while the job waits in the queue",
        1,
        1,
        "the results, with the same bits, from the other one",
    ),
    "server-drained": Fault(
        "the server is asked to stop (SIGTERM) with no time left (`grace`), and "
        "another one is behind the address: at the same messages",
        36,
        3,
        "the results, with the same bits, begun on the one and ended on the other; "
        "`receipt.retried` says `DRAINING`, unless all had been sent",
    ),
    "client-killed": Fault(
        "the client is killed (SIGKILL): at the same messages",
        36,
        3,
        "nothing; the server's log says `CANCELLED`, or `OK` where all was sent",
    ),
    "client-stopped": Fault(
        "the client stands still (SIGSTOP) for longer than `idle-timeout`: at the same "
        "messages",
        36,
        2,
        "`ClientIdleError` when it goes on; or, where all was sent before, the results",
    ),
    "server-stopped": Fault(
        "the server stands still (SIGSTOP) for longer than the call's `timeout_s`: at "
        "the same messages",
        36,
        2,
        "`DeadlineError`, in time; the next job, once the server goes on, is right",
    ),
    "server-resumed": Fault(
        "the server stands still for longer than its own `idle-timeout`, and goes on: "
        "at the same messages",
        36,
        3,
        "the results, with the same bits: the server does not take its clients for "
        "idle because it was not there",
    ),
    "disk-full": Fault(
        "files cannot grow any more while `gradwire compute` writes: before the first "
        "byte of a result, and at every row of the largest one",
        43,
        2,
        "one sentence (`... npy cannot be written: File too large`), status 1, and no "
        "results, not even half ones",
    ),
    "device-memory": Fault(
        "the device is out of memory: at every step of the three jobs (opening, W, "
        "each row block, dW)",
        22,
        22,
        "`DeviceOutOfMemoryError`; the next job is right",
    ),
    "clock-jumps": Fault(
        "the server's wall clock is an hour off whenever it is asked, forth and back: "
        "the three jobs, an idle client, and a deadline",
        3,
        3,
        "the results, with the same bits; idle times and deadlines pass when they "
        "should",
    ),
}

_HEAD = """\
# What faults do to a job

<!-- Written by `python -m tests.thorough.faults.table`. -->

Each row is a test of `tests/thorough/faults` with real processes: a client, a
server, and where connections break or bytes change a TCP proxy between them.
`make test-faults` tries every way that is counted; on every change as many are
tried as the second number says, evenly spread. "The same bits" are those of the
same job when nothing happens to it.

Behind each row the server has to be clean: within seconds a job is admitted at once
that takes all of its memory, so nothing is reserved any more and nothing runs; as
many descriptors are open as before; and its log has no error that nobody foresaw.

| what happens | tried, of them on every change | what the user sees |
| --- | ---: | --- |
"""

_TAIL = """
A disk that is full is played by a limit on the size of files, which fails writes in
the same place with another word. A device that is out of memory is a backend that
says so; what CuPy does on a real one is tested in `tests/gpu`. No clock of the host
is set: gRPC and asyncio go by the monotonic one, and a test reads all of gradwire's
sources for others.

A flipped bit that TCP's own checksum lets through can leave a plaintext connection
deaf: gRPC ignores calls after one whose number in HTTP/2 came out too large, and its
pings still pass, so that each call ends with `DeadlineError` until the client is made
anew. TLS notices every flipped bit. Where it is one of a record's length, TLS waits
first for what is missing, and calls end with `DeadlineError` until that has come or
the pings fail, which takes 50 s at most by gRPC's settings (nobody has waited for it
here).

What happens on retries, and how to turn them off: [failing.md](failing.md).
"""


def page() -> str:
    """The page that lists them."""
    rows = (
        f"| {fault.what} | {fault.every:,}, {fault.sampled:,} | {fault.seen} |\n"
        for fault in FAULTS.values()
    )
    return _HEAD + "".join(rows) + _TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
