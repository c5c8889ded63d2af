"""Performance targets for gradwire, compared with a run.

``python -m bench.report.bars RUN.jsonl ...`` prints them. A bar (target) compares
medians of one run, shape and form; over(c) is the median of c minus local NumPy's
median. A bar stays open if the run lacks its contenders or shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import tables
from bench.report.record import Part, Run
from bench.work import FORMS, Shape

_1024, _2048, _4096 = (Shape(side, side, side) for side in (1024, 2048, 4096))
_TALL = Shape(16384, 1024, 1024)
GIGABIT = 1e9


@dataclass(frozen=True, slots=True)
class Bar:
    """A target: an upper bound on a ratio."""

    name: str
    shapes: tuple[Shape, ...]
    most: float
    ratio: Callable[[Part], float | None]
    forms: tuple[str, ...] = FORMS


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a bar in a run."""

    bar: str
    shape: Shape
    form: str
    ratio: float | None
    """None if the run has no data for it."""

    most: float

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within its bound; None without data."""
        return None if self.ratio is None else self.ratio <= self.most


def total(contender: str, other: str) -> Callable[[Part], float | None]:
    """The ratio of two contenders' medians."""

    def ratio(part: Part) -> float | None:
        ours, theirs = part.figure(contender), part.figure(other)
        if ours is None or theirs is None:
            return None
        return ours.median_s / theirs.median_s

    return ratio


def over(contender: str, other: str) -> Callable[[Part], float | None]:
    """The ratio of two contenders' times over the yardstick's."""

    def ratio(part: Part) -> float | None:
        ours, theirs = part.figure(contender), part.figure(other)
        if ours is None or theirs is None or part.figure("numpy") is None:
            return None
        if theirs.over_yardstick_s <= 0:
            return None
        return ours.over_yardstick_s / theirs.over_yardstick_s

    return ratio


def stages(contender: str) -> Callable[[Part], float | None]:
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


BARS = (
    Bar(
        "over(gradwire-tcp) / over(grpcio-unary)",
        (_2048, _TALL),
        0.12,
        over("gradwire-tcp", "grpcio-unary"),
    ),
    Bar(
        "gradwire-tcp / arrow-flight",
        (_2048, _TALL),
        0.85,
        total("gradwire-tcp", "arrow-flight"),
    ),
    Bar(
        "gradwire-tcp / arrow-flight",
        (_1024,),
        1.0,
        total("gradwire-tcp", "arrow-flight"),
    ),
    Bar(
        "gradwire-tcp / raw-tcp",
        (_1024, _2048, _TALL),
        1.25,
        total("gradwire-tcp", "raw-tcp"),
    ),
    Bar(
        "gradwire-tcp / torch-rpc",
        (_1024, _2048, _TALL),
        1.15,
        total("gradwire-tcp", "torch-rpc"),
    ),
    Bar(
        "gradwire-shm / numpy",
        (_2048, _4096),
        1.05,
        total("gradwire-shm", "numpy"),
        ("reused",),
    ),
    Bar(
        "gradwire-shm / numpy",
        (_1024,),
        1.25,
        total("gradwire-shm", "numpy"),
        ("reused",),
    ),
    Bar(
        "gradwire-shm / raw-shm",
        (_2048, _4096),
        1.1,
        total("gradwire-shm", "raw-shm"),
        ("reused",),
    ),
)
LINK_BAR = "gradwire-tcp / max(upload, compute, download), 1 Gbit/s"
LINK_MOST = 1.15


def verdicts(run: Run) -> Iterator[Verdict]:
    """Every bar at each of its shapes and forms."""
    for bar in BARS:
        for shape in bar.shapes:
            for form in bar.forms:
                part = run.part(shape, form)
                ratio = None if part is None else bar.ratio(part)
                yield Verdict(bar.name, shape, form, ratio, bar.most)
    for part in run.parts:
        if part.link_bits_per_s == GIGABIT and not part.round_trip_s:
            ratio = stages("gradwire-tcp")(part)
            yield Verdict(LINK_BAR, part.shape, part.form, ratio, LINK_MOST)


def table(found: Sequence[Verdict]) -> str:
    """The verdicts as a table."""
    words = {True: "holds", False: "FAILS", None: "open"}
    body = [
        (
            v.bar,
            v.shape.label,
            v.form,
            "" if v.ratio is None else f"{v.ratio:.3f}",
            f"{v.most:.2f}",
            words[v.holds],
        )
        for v in found
    ]
    return tables.table(body, ("bar", "shape", "form", "seen", "at most", ""), texts=3)


def main(arguments: Sequence[str]) -> int:
    """Print the bars of all runs; return 1 if one does not hold."""
    runs = [Run.read(Path(argument)) for argument in arguments]
    parts = tuple(part for run in runs for part in run.parts)
    found = list(verdicts(Run(runs[0].about, parts)))
    print(table(found))
    return int(any(verdict.holds is False for verdict in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
