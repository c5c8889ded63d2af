"""Metrics as Prometheus reads them, by a parser of the tests' own."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


class Samples:
    """The samples of one scrape.

    Args:
        text: Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.all: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            found = _SAMPLE.fullmatch(line)
            assert found is not None, line
            labels = dict(_LABEL.findall(found[2] or ""))
            self.all.setdefault(found[1], []).append((labels, float(found[3])))

    def sum(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 without any."""
        return sum(
            value
            for found, value in self.all.get(f"gradwire_{name}", [])
            if labels.items() <= found.items()
        )

    def by(self, name: str, *labels: str) -> Mapping[tuple[str, ...], float]:
        """A metric's samples that are not 0, by the values of labels."""
        samples: dict[tuple[str, ...], float] = {}
        for found, value in self.all.get(f"gradwire_{name}", []):
            key = tuple(found[label] for label in labels)
            samples[key] = samples.get(key, 0.0) + value
        return {key: value for key, value in samples.items() if value}


def scrape(url: str) -> Samples:
    """Get a server's metrics."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        return Samples(answer.read().decode())
