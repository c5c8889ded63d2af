"""Figures of training from the lines that workers print."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from bench.report import tables
from bench.report.bound import Bound

Lines: TypeAlias = Sequence[dict[str, Any]]

HEAD = (
    "contender",
    "MB up",
    "MB down",
    "MB a step",
    "of them elements",
    "on the link",
    "median ms",
    "min ms",
    "x numpy",
    "steps",
    "stolen %",
)
MOST_MB = {
    ("a", "session"): 275.0,
    ("a", "session-bfloat16"): 137.6,
    ("b", "session"): 36.1,
}
"""Most MB of a step, by size and contender."""
MOST_OF_ONE_CORE = 0.5
"""Most time of a step of size b at a server that computes nothing, over local NumPy's
on one core."""
MOST_OF_LINK = 1.15
CALL_S = 0.002
"""Most time of a step: `MOST_OF_LINK` times the larger direction of each of its calls,
and this for each. So for the calls of each layer, too."""
LEAST_BLOCKS = 4
MOST_STOLEN = 0.02
"""Most share of the processors' time that the host gives to other machines during an
undisturbed step. Client, link and server share the processors, and their time is then
missing in the middle of calls."""
LEAST_UNDISTURBED = 5
"""Least undisturbed steps for the bars of a link to count them only."""


def table(lines: Lines) -> str:
    """The bytes and times of one size over one link."""
    counted = {line["contender"]: line for line in lines if line["kind"] == "bytes"}
    steps = _steps(lines)
    base = {line["round"]: line["seconds"] for line in steps.get("numpy", ())}
    body = []
    for name, taken in steps.items():
        seconds = [line["seconds"] for line in taken]
        ratios = [
            line["seconds"] / base[line["round"]]
            for line in taken
            if line["round"] in base
        ]
        on_link = statistics.median(
            line["interface_up"] + line["interface_down"] for line in taken
        )
        of = counted.get(name)
        moved: tuple[str, ...] = ("",) * 4
        if of is not None:
            up, down = of["up"], of["down"]
            elements = of["payload_up"] + of["payload_down"]
            moved = tuple(_mb(each) for each in (up, down, up + down, elements))
        body.append(
            (
                name,
                *moved,
                _mb(on_link) if taken[0]["calls"] and on_link else "",
                tables.milliseconds(statistics.median(seconds)),
                tables.milliseconds(min(seconds)),
                f"{statistics.median(ratios):.2f}" if ratios else "",
                str(len(taken)),
                f"{100 * statistics.median(_stolen(line) for line in taken):.1f}",
            )
        )
    return tables.table(body, HEAD, texts=1)


def bounds(lines: Lines) -> Iterator[Bound]:
    """The bars that these lines say something about."""
    size, gbits = lines[0]["size"], lines[0]["gbits"]
    for line in lines:
        most = MOST_MB.get((size, line.get("contender", "")))
        if line["kind"] == "bytes" and most is not None:
            seen = (line["up"] + line["down"]) / 1e6
            yield Bound(f"{size}: MB of {line['contender']}", seen, most)
    steps = _steps(lines)
    if not gbits:
        return
    if size == "b" and "numpy-1" in steps:
        one_core = {line["round"]: line["seconds"] for line in steps["numpy-1"]}
        for name in steps:
            if "idle" in name:
                ratio = statistics.median(
                    line["seconds"] / one_core[line["round"]] for line in steps[name]
                )
                yield Bound(f"b: {name} / numpy-1", ratio, MOST_OF_ONE_CORE)
    if size == "a":
        for name in steps:
            if name.startswith("session") and name.endswith("auto"):
                yield from _overlap(name, steps[name], gbits)


def _overlap(name: str, steps: Lines, gbits: float) -> Iterator[Bound]:
    """How well the directions of calls overlap, in all and by the layer's shape.

    All steps are counted, and then those that were undisturbed, if they are not all.
    """
    quiet = [step for step in steps if _stolen(step) <= MOST_STOLEN]
    yield from _overlap_of(f"a: {name}", steps, gbits)
    if LEAST_UNDISTURBED <= len(quiet) < len(steps):
        of = f"a: {name}, {len(quiet)} undisturbed of {len(steps)} steps"
        yield from _overlap_of(of, quiet, gbits)


def _overlap_of(of: str, steps: Lines, gbits: float) -> Iterator[Bound]:
    of_steps = []
    for step in steps:
        link_s = sum(max(c["up"], c["down"]) for c in step["calls"]) / (gbits * 125e6)
        of_steps.append((step["seconds"] - len(step["calls"]) * CALL_S) / link_s)
    ratio = statistics.median(of_steps)
    yield Bound(f"{of}: (step - 2 ms a call) / link", ratio, MOST_OF_LINK)
    calls: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for step in steps:
        for call in step["calls"]:
            calls[call["shape"], call["method"]].append(call)
    for shape in dict.fromkeys(shape for shape, _ in calls):
        both = [calls[shape, method] for method in ("forward", "backward")]
        seconds = sum(statistics.median(c["seconds"] for c in each) for each in both)
        link_s = sum(max(c[0]["up"], c[0]["down"]) for c in both) / (gbits * 125e6)
        ratio = (seconds - len(both) * CALL_S) / link_s
        what = f"{of}, {shape}: (time - 2 ms a call) / link"
        yield Bound(what, ratio, MOST_OF_LINK)
        blocks = min(call["blocks"] for each in both for call in each)
        yield Bound(f"{of}, {shape}: blocks", blocks, LEAST_BLOCKS, at_least=True)


def _steps(lines: Lines) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "ready":
            found.setdefault(line["contender"], [])
        if line["kind"] == "step":
            found.setdefault(line["contender"], []).append(line)
    return {name: taken for name, taken in found.items() if taken}


def _stolen(step: dict[str, Any]) -> float:
    stolen: float = step.get("stolen", 0.0)  # older files do not say
    return stolen


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.2f}"
