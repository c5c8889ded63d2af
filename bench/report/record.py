"""A run as lines of JSON: written during the run, read for reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

from bench.driver import Turn, Usage
from bench.report.statistics import Figure
from bench.work import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """All contenders at one shape in one form, behind one link."""

    shape: Shape
    form: str
    figures: tuple[Figure, ...]
    usages: tuple[Usage, ...]
    link_bits_per_s: float | None = None
    """Rate of the link between client and server; None: no limit."""
    round_trip_s: float = 0.0
    """Round-trip time of the link."""

    def figure(self, contender: str) -> Figure | None:
        """The figure of a contender; None if it did not take part."""
        return next((f for f in self.figures if f.contender == contender), None)


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one run of the bench."""

    about: dict[str, Any]
    """The machine, the libraries, the time."""

    parts: tuple[Part, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `Writer`."""
        about: dict[str, Any] = {}
        found: dict[tuple[Any, ...], tuple[list[Figure], list[Usage]]] = {}
        for line in path.read_text().splitlines():
            item = json.loads(line)
            kind = item.pop("kind")
            if kind == "run":
                about = item
            elif kind in {"figure", "usage"}:
                of = tuple(
                    item.get(key)
                    for key in ("shape", "form", "link_bits_per_s", "round_trip_s")
                )
                figures, usages = found.setdefault(of, ([], []))
                if kind == "figure":
                    figures.append(_of(Figure, item))
                else:
                    usages.append(_of(Usage, item))
        parts = (
            Part(
                Shape.parse(shape), form, tuple(seen), tuple(usages), link, trip or 0.0
            )
            for (shape, form, link, trip), (seen, usages) in found.items()
        )
        return cls(about, tuple(parts))

    def part(
        self, shape: Shape, form: str, link_bits_per_s: float | None = None
    ) -> Part | None:
        """The part with this shape, form and link, if present."""
        wanted = (shape, form, link_bits_per_s)
        return next(
            (p for p in self.parts if (p.shape, p.form, p.link_bits_per_s) == wanted),
            None,
        )


def _of(kind: type[Any], item: dict[str, Any]) -> Any:
    # Runs of earlier states lack the fields that were added since.
    known = [field.name for field in fields(kind) if field.name in item]
    return kind(**{name: item[name] for name in known})


class Writer:
    """Writes the lines of a run, each as soon as it is known."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines

    def about(self, fields: dict[str, Any]) -> None:
        """Write the first line."""
        self._write("run", fields)

    def part(self, part: Part, turns: Sequence[Turn]) -> None:
        """Write a part with all of its calls."""
        of: dict[str, Any] = {"shape": str(part.shape), "form": part.form}
        if part.link_bits_per_s is not None:
            of["link_bits_per_s"] = part.link_bits_per_s
            of["round_trip_s"] = part.round_trip_s
        lines: tuple[tuple[str, Iterable[Any]], ...] = (
            ("turn", turns),
            ("usage", part.usages),
            ("figure", part.figures),
        )
        for kind, items in lines:
            for item in items:
                self._write(kind, of | asdict(item))

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        self._lines.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._lines.flush()
