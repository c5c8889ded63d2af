"""Short tables of a run: medians in ms, a column per shape.

``python -m bench.report.summary RUN.jsonl`` prints the tables for both forms, for the
notes. With ``--page PAGE.md`` it writes one between the marks of that page, for readers
who do not know the bench.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.report import tables
from bench.report.record import Part, Run
from bench.work import FORMS, Shape

LABELS = {
    "numpy": "NumPy alone, no transport",
    "gradwire-shm": "gradwire, shared memory",
    "gradwire-direct": "gradwire, direct connections",
    "gradwire-grpc": "gradwire, gRPC alone",
    "gradwire-direct-tls": "gradwire, direct connections, TLS",
    "gradwire-grpc-tls": "gradwire, gRPC alone, TLS",
    "torch-rpc": "`torch.distributed.rpc`",
    "arrow-flight": "Arrow Flight",
    "raw-tcp": "a TCP socket",
    "grpcio-stream": "plain streaming gRPC",
    "grpcio-unary": "plain unary gRPC",
}
"""The contenders of the page, in order, in its words."""

ABOUT_TRANSPORTS = """\
In the last two columns nothing is computed: the rate of {shape} in
both directions at once, and processor seconds of client and server for 10⁹ bytes."""

PAGE_SHAPES = tuple(
    Shape.parse(text) for text in ("1024", "2048", "4096", "16384x1024x1024")
)

_MARKED = re.compile(r"(?<=<!-- medians -->\n).*?(?=<!-- /medians -->)", re.DOTALL)


def table(run: Run, form: str) -> str:
    """One row per contender with the median of each shape."""
    parts = [p for p in run.parts if p.form == form and _is_whole_job(p)]
    names = [figure.contender for part in parts for figure in part.figures]
    return _table(run, parts, {name: name for name in names}, f"ms, {form} results")


def page_text(run: Run) -> str:
    """The table of the page: fresh results, a few shapes, contenders in words."""
    parts = [
        part for shape in PAGE_SHAPES if (part := run.part(shape, "fresh")) is not None
    ]
    text = _table(run, parts, LABELS, "")
    if alone := transports(run):
        text += f"\n\n{ABOUT_TRANSPORTS.format(shape=alone.shape.label)}"
    return text


def write_page(run: Run, page: Path) -> None:
    """Write the table between the marks of the page.

    Raises:
        ValueError: The page has no marks.
    """
    text, count = _MARKED.subn(lambda _: f"\n{page_text(run)}\n\n", page.read_text())
    if count != 1:
        raise ValueError(f"{page} has no place for the medians")
    page.write_text(text)


def _table(
    run: Run, parts: Sequence[Part], labels: Mapping[str, str], corner: str
) -> str:
    head = [corner, *(part.shape.label for part in parts)]
    alone = transports(run)
    if alone is not None:
        head += ["GB/s each way", "CPU s/GB"]
    body = []
    for name, label in labels.items():
        figures = [part.figure(name) for part in parts]
        cells = ["" if f is None else tables.milliseconds(f.median_s) for f in figures]
        if alone is not None:
            rates = alone.gb_per_s(name), alone.cpu_s_per_gb(name)
            cells += ["" if rate is None else f"{rate:.2f}" for rate in rates]
        if any(cells):
            body.append((label, *cells))
    return tables.table(body, head, texts=1)


def transports(run: Run) -> Part | None:
    """The part without products and without a link, if the run has one."""
    found = (p for p in run.parts if not p.products and p.link_bits_per_s is None)
    return next(found, None)


def _is_whole_job(part: Part) -> bool:
    return part.products and part.link_bits_per_s is None


def main(arguments: Sequence[str]) -> int:
    """Print the tables of a run, or write one into a page."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.summary")
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    run = Run.read(options.run)
    if options.page:
        write_page(run, options.page)
        return 0
    print(tables.heading(run.about))
    for form in FORMS:
        if any(part.form == form and _is_whole_job(part) for part in run.parts):
            print(f"\n{table(run, form)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
