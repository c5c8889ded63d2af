"""Performance targets for gradwire, compared with a run.

``python -m bench.report.bars RUN.jsonl ...`` prints them. A bar (target) compares
figures of one run, shape and form; over(c) is the median of c minus local NumPy's
median. A bar stays open if the run lacks its contenders or shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bench.report import tables
from bench.report.record import Part, Run
from bench.work import FORMS, Shape

_1024, _2048, _4096 = (Shape(side, side, side) for side in (1024, 2048, 4096))
_TALL = Shape(16384, 1024, 1024)
_THIN = Shape(1_000_000, 64, 64)
GIGABIT = 1e9

Measure: TypeAlias = Callable[[Part], float | None]
"""A figure of a part; None if the part lacks what it is made of."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A target: a bound of a figure."""

    name: str
    shapes: tuple[Shape, ...]
    bound: float
    measure: Measure
    forms: tuple[str, ...] = FORMS
    at_least: bool = False
    """Whether it is a lower bound."""
    products: bool = True
    """Whether servers compute."""
    gbits: float | None = None
    """Rate of the link in Gbit/s; None: no limit."""
    round_trip_s: float = 0.0
    """Round-trip time of the link."""

    def part(self, run: Run, shape: Shape, form: str) -> Part | None:
        """The part of a run that the bar is about."""
        rate = None if self.gbits is None else self.gbits * GIGABIT
        return run.part(shape, form, rate, self.round_trip_s, products=self.products)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a bar in a run."""

    bar: str
    shape: Shape
    form: str
    seen: float | None
    """None if the run has no data for it."""

    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the figure is within its bound; None without data."""
        if self.seen is None:
            return None
        return self.seen >= self.bound if self.at_least else self.seen <= self.bound


def total(contender: str, other: str) -> Measure:
    """The ratio of two contenders' medians."""

    def ratio(part: Part) -> float | None:
        ours, theirs = part.figure(contender), part.figure(other)
        if ours is None or theirs is None:
            return None
        return ours.median_s / theirs.median_s

    return ratio


def over(contender: str, other: str) -> Measure:
    """The ratio of two contenders' times over the yardstick's."""

    def ratio(part: Part) -> float | None:
        ours, theirs = part.figure(contender), part.figure(other)
        if ours is None or theirs is None or part.figure("numpy") is None:
            return None
        if theirs.over_yardstick_s <= 0:
            return None
        return ours.over_yardstick_s / theirs.over_yardstick_s

    return ratio


def stages(contender: str) -> Measure:
    """Ratio of the total time to the longest of upload, compute and download.

    Upload and download are the bytes over the link's rate, without headers; compute is
    local NumPy's median of the same run.
    """

    def ratio(part: Part) -> float | None:
        ours, local = part.figure(contender), part.figure("numpy")
        if ours is None or local is None or part.link_bits_per_s is None:
            return None
        moving_s = 8 * part.shape.bytes_each_way / part.link_bits_per_s
        return ours.median_s / max(moving_s, local.median_s)

    return ratio


def wire(contender: str) -> Measure:
    """Ratio of a median to the time of one direction's bytes at the link's rate."""

    def ratio(part: Part) -> float | None:
        ours = part.figure(contender)
        if ours is None or part.link_bits_per_s is None:
            return None
        return ours.median_s / (8 * part.shape.bytes_each_way / part.link_bits_per_s)

    return ratio


def quotient(
    measured: Callable[[Part, str], float | None], ours: str, other: str
) -> Measure:
    """The ratio of a figure of two contenders."""

    def ratio(part: Part) -> float | None:
        mine, theirs = measured(part, ours), measured(part, other)
        return None if mine is None or not theirs else mine / theirs

    return ratio


def _client_peak(part: Part, contender: str) -> float | None:
    usage = part.usage(contender)
    return usage and usage.client_peak_bytes


def _server_peak(part: Part, contender: str) -> float | None:
    usage = part.usage(contender)
    return usage and usage.server_peak_bytes


_DIRECT, _GRPC = "gradwire-direct", "gradwire-grpc"
_DIRECT_TLS, _GRPC_TLS = f"{_DIRECT}-tls", f"{_GRPC}-tls"
_NEW, _SAME = ("fresh",), ("reused",)


def _times(
    ours: str, other: str, bound: float, *shapes: Shape, forms: tuple[str, ...] = FORMS
) -> Bar:
    return Bar(f"{ours} / {other}", shapes, bound, total(ours, other), forms)


def _transport(
    name: str, bound: float, measure: Measure, *, at_least: bool = False
) -> Bar:
    name = f"{name}, without products"
    return Bar(name, (_TALL,), bound, measure, _SAME, at_least, products=False)


BARS = (
    # Elements past gRPC.
    _times(_DIRECT, "numpy", 1.2, _2048, _TALL, forms=_NEW),
    _times(_DIRECT, "numpy", 1.5, _1024, forms=_NEW),
    _times(_DIRECT, "raw-tcp", 1.0, _2048, forms=_NEW),
    _times(_DIRECT, "raw-tcp", 0.95, _TALL, forms=_NEW),
    _times(_DIRECT, "arrow-flight", 0.87, _2048, forms=_NEW),
    _times(_DIRECT, _GRPC, 0.55, _THIN, forms=_NEW),
    *(
        Bar(
            f"{end}'s peak, {_DIRECT} / {_GRPC}",
            (_1024, _2048, _TALL, _THIN),
            1.05,
            quotient(peak, _DIRECT, _GRPC),
            _NEW,
        )
        for end, peak in (("client", _client_peak), ("server", _server_peak))
    ),
    _transport(
        f"GB/s each way, {_DIRECT}",
        1.5,
        lambda part: part.gb_per_s(_DIRECT),
        at_least=True,
    ),
    _transport(
        f"GB/s, {_DIRECT} / {_GRPC}",
        2.2,
        quotient(Part.gb_per_s, _DIRECT, _GRPC),
        at_least=True,
    ),
    _transport(f"CPU s/GB, {_DIRECT}", 0.6, lambda part: part.cpu_s_per_gb(_DIRECT)),
    _transport(
        f"switches/GB, {_DIRECT}", 1500, lambda part: part.switches_per_gb(_DIRECT)
    ),
    _transport(
        f"CPU s/GB, {_DIRECT_TLS} / {_GRPC_TLS}",
        0.65,
        quotient(Part.cpu_s_per_gb, _DIRECT_TLS, _GRPC_TLS),
    ),
    Bar(
        f"{_DIRECT} / the wire, 10 Gbit/s, without products",
        (_TALL,),
        1.3,
        wire(_DIRECT),
        _NEW,
        products=False,
        gbits=10,
    ),
    Bar(
        f"{_DIRECT} / {_GRPC}, 1 Gbit/s + 20 ms",
        (_TALL,),
        0.75,
        total(_DIRECT, _GRPC),
        _NEW,
        gbits=1,
        round_trip_s=0.02,
    ),
    # Elements in messages of the call.
    Bar(
        f"over({_GRPC}) / over(grpcio-unary)",
        (_2048, _TALL),
        0.12,
        over(_GRPC, "grpcio-unary"),
    ),
    _times(_GRPC, "arrow-flight", 1.0, _1024),
    _times(_GRPC, "raw-tcp", 1.25, _1024, _2048, _TALL),
    _times(_GRPC, "torch-rpc", 1.15, _1024, _2048, _TALL),
    # Elements in shared memory.
    _times("gradwire-shm", "numpy", 1.05, _2048, _4096, forms=_SAME),
    _times("gradwire-shm", "numpy", 1.25, _1024, forms=_SAME),
    _times("gradwire-shm", "raw-shm", 1.1, _2048, _4096, forms=_SAME),
)
LINK_BAR = f"{_GRPC} / max(upload, compute, download), 1 Gbit/s"
LINK_MOST = 1.15


def verdicts(run: Run) -> Iterator[Verdict]:
    """Every bar at each of its shapes and forms."""
    for bar in BARS:
        for shape in bar.shapes:
            for form in bar.forms:
                part = bar.part(run, shape, form)
                seen = None if part is None else bar.measure(part)
                yield Verdict(bar.name, shape, form, seen, bar.bound, bar.at_least)
    for part in run.parts:
        if part.link_bits_per_s == GIGABIT and not part.round_trip_s:
            seen = stages(_GRPC)(part)
            yield Verdict(LINK_BAR, part.shape, part.form, seen, LINK_MOST)


def table(found: Sequence[Verdict]) -> str:
    """The verdicts as a table."""
    words = {True: "holds", False: "FAILS", None: "open"}
    body = [
        (
            v.bar,
            v.shape.label,
            v.form,
            "" if v.seen is None else f"{v.seen:.3f}",
            f"{'at least' if v.at_least else 'at most'} {v.bound:.2f}",
            words[v.holds],
        )
        for v in found
    ]
    return tables.table(body, ("bar", "shape", "form", "seen", "bound", ""), texts=3)


def main(arguments: Sequence[str]) -> int:
    """Print the bars of all runs; return 1 if one does not hold."""
    runs = [Run.read(Path(argument)) for argument in arguments]
    parts = tuple(part for run in runs for part in run.parts)
    found = list(verdicts(Run(runs[0].about, parts)))
    print(table(found))
    return int(any(verdict.holds is False for verdict in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
