"""Short table of a run for the README: medians in ms, one column per shape.

``python -m bench.report.summary RUN.jsonl`` prints the table for both forms.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import tables
from bench.report.record import Run
from bench.work import FORMS


def table(run: Run, form: str) -> str:
    """One row per contender with the median of each shape."""
    parts = [p for p in run.parts if p.form == form and p.link_bits_per_s is None]
    names = {figure.contender: None for part in parts for figure in part.figures}
    body = []
    for name in names:
        figures = [part.figure(name) for part in parts]
        cells = ("" if f is None else tables.milliseconds(f.median_s) for f in figures)
        body.append((name, *cells))
    head = (f"ms, {form} results", *(part.shape.label for part in parts))
    return tables.table(body, head, texts=1)


def main(arguments: Sequence[str]) -> int:
    """Print the tables of a run."""
    run = Run.read(Path(arguments[0]))
    print(tables.heading(run.about))
    for form in FORMS:
        if any(part.form == form for part in run.parts):
            print(f"\n{table(run, form)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
