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
    products: bool = True
    """Whether servers computed; if not, calls took as long as transports."""

    def figure(self, contender: str) -> Figure | None:
        """The figure of a contender; None if it did not take part."""
        return next((f for f in self.figures if f.contender == contender), None)

    def usage(self, contender: str) -> Usage | None:
        """What a contender has used; None if it did not take part."""
        return next((u for u in self.usages if u.contender == contender), None)

    def gb_per_s(self, contender: str) -> float | None:
        """10⁹ bytes a second each way, at the median of a call."""
        figure = self.figure(contender)
        return figure and self.shape.bytes_each_way / figure.median_s / 1e9

    def cpu_s_per_gb(self, contender: str) -> float | None:
        """Processor time of both ends for 10⁹ bytes of operands and results."""
        usage = self.usage(contender)
        if usage is None:
            return None
        return (usage.client_cpu_s + usage.server_cpu_s) / self._moved_gb(usage)

    def switches_per_gb(self, contender: str) -> float | None:
        """Context switches of both ends for 10⁹ bytes of operands and results."""
        usage = self.usage(contender)
        if usage is None or usage.client_switches is None:
            return None
        both = usage.client_switches + (usage.server_switches or 0)
        return both / self._moved_gb(usage)

    def _moved_gb(self, usage: Usage) -> float:
        return 2 * self.shape.bytes_each_way * usage.calls / 1e9


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
                    for key in (
                        "shape",
                        "form",
                        "link_bits_per_s",
                        "round_trip_s",
                        "products",
                    )
                )
                figures, usages = found.setdefault(of, ([], []))
                if kind == "figure":
                    figures.append(_of(Figure, item))
                else:
                    usages.append(_of(Usage, item))
        parts = (
            Part(
                Shape.parse(shape),
                form,
                tuple(seen),
                tuple(usages),
                link,
                trip or 0.0,
                products is not False,
            )
            for (shape, form, link, trip, products), (seen, usages) in found.items()
        )
        return cls(about, tuple(parts))

    def part(
        self,
        shape: Shape,
        form: str,
        link_bits_per_s: float | None = None,
        round_trip_s: float = 0.0,
        *,
        products: bool = True,
    ) -> Part | None:
        """The part of this kind, if present."""
        wanted = (shape, form, link_bits_per_s, round_trip_s, products)
        return next((part for part in self.parts if _kind(part) == wanted), None)


def _kind(part: Part) -> tuple[Shape, str, float | None, float, bool]:
    return (
        part.shape,
        part.form,
        part.link_bits_per_s,
        part.round_trip_s,
        part.products,
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
        if not part.products:
            of["products"] = False
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
