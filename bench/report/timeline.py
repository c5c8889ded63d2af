"""Timeline of a job: when each row block was received, computed and sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Event: TypeAlias = tuple[float, str, int | None]
"""Seconds, stage, and row block (None: W or dW) of a busy moment."""

STAGES = ("receiving", "computing", "sending")
_SHADES = (("#7fb3d5", "#1f618d"), ("#f8c471", "#b9770e"), ("#7dcea0", "#1e8449"))


class Span(NamedTuple):
    """A time span in seconds."""

    begin: float
    end: float

    def meets(self, other: Span) -> bool:
        """Whether the spans overlap."""
        return max(self.begin, other.begin) < min(self.end, other.end)

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """The stages of one job."""

    blocks: dict[str, list[Span]]
    """Spans of the row blocks in order, for every stage."""

    w: Span | None
    """When W was received."""

    dw: Span | None
    """When dW was sent."""

    @classmethod
    def of(cls, events: Iterable[Event]) -> Timeline:
        """Build a timeline from an observer's events; seconds count from the first.

        Raises:
            ValueError: A row block lacks a stage.
        """
        seen: dict[tuple[str, int | None], list[float]] = {}
        for at, stage, block in events:
            seen.setdefault((stage, block), []).append(at)
        start = min((times[0] for times in seen.values()), default=0.0)
        spans = {
            key: Span(min(times) - start, max(times) - start)
            for key, times in seen.items()
        }
        count = len({block for _, block in spans if block is not None})
        try:
            blocks = {s: [spans[s, b] for b in range(count)] for s in STAGES}
        except KeyError as missing:
            raise ValueError(f"nothing was seen of {missing}") from None
        return cls(blocks, spans.get(("receiving", None)), spans.get(("sending", None)))

    @property
    def count(self) -> int:
        """Number of row blocks."""
        return len(self.blocks["computing"])

    @property
    def seconds(self) -> float:
        """Seconds from the first byte of an operand to the last of a result."""
        ends = [span.end for spans in self.blocks.values() for span in spans]
        return max([*ends, *(span.end for span in (self.w, self.dw) if span)])

    def mean_s(self, stage: str) -> float:
        """Mean length of a stage of one row block."""
        spans = self.blocks[stage]
        return sum(span.seconds for span in spans) / max(1, len(spans))

    def overlapped(self) -> tuple[int, int]:
        """The number of overlapped row blocks, and of blocks that could overlap.

        Block b is overlapped if its products overlap both the receipt of b + 1 and
        the sending of b - 1. The first and the last block have only one neighbour
        and do not count.
        """
        receiving, computing, sending = (self.blocks[stage] for stage in STAGES)
        inner = range(1, self.count - 1)
        met = sum(
            computing[b].meets(receiving[b + 1]) and computing[b].meets(sending[b - 1])
            for b in inner
        )
        return met, len(inner)

    def chrome_trace(self) -> dict[str, Any]:
        """Trace for chrome://tracing and Perfetto: microseconds, one track a stage."""
        tracks: list[tuple[str, Sequence[tuple[str, Span]]]] = [
            (stage, [(f"block {b}", span) for b, span in enumerate(self.blocks[stage])])
            for stage in STAGES
        ]
        for name, track, span in (("W", 0, self.w), ("dW", 2, self.dw)):
            if span is not None:
                tracks[track] = (tracks[track][0], [*tracks[track][1], (name, span)])
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "server"}}
        ]
        for number, (stage, spans) in enumerate(tracks, 1):
            events.append(
                {
                    "name": "thread_name",
                    "ph": "M",
                    "pid": 1,
                    "tid": number,
                    "args": {"name": f"{number} {stage}"},
                }
            )
            events += [
                {
                    "name": name,
                    "cat": stage,
                    "ph": "X",
                    "ts": round(span.begin * 1e6, 1),
                    "dur": round(span.seconds * 1e6, 1),
                    "pid": 1,
                    "tid": number,
                }
                for name, span in sorted(spans, key=lambda item: item[1])
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def draw(self, path: Path, title: str) -> None:
        """Draw one row per stage, with alternating light and dark row blocks."""
        # Imported here: only this method needs it.
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=(11, 2.8), layout="constrained")
        axes = figure.subplots()
        for row, (stage, colours) in enumerate(zip(STAGES, _SHADES, strict=True)):
            bars = [(span.begin, span.seconds) for span in self.blocks[stage]]
            shade = [colours[block % 2] for block in range(self.count)]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=shade)
        for row, span in ((0, self.w), (2, self.dw)):
            if span is not None:
                axes.broken_barh(
                    [(span.begin, span.seconds)], (row - 0.4, 0.8), facecolors="#95a5a6"
                )
        axes.set_yticks(range(len(STAGES)), STAGES)
        axes.invert_yaxis()
        axes.set_xlim(0, self.seconds)
        axes.set_xlabel("seconds (grey: W arrives, dW leaves)")
        axes.set_title(title, fontsize=10)
        figure.savefig(path, dpi=120)
