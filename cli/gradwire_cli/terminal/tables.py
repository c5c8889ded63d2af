"""Tables that commands print for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from gradwire_cli.terminal.printable import printable

_WIDTH_OF_A_FILE = 1000
"""Long paths and names leave the other columns unfolded, so that grep finds them."""


def console(file: TextIO | None = None) -> Console:
    """A console that is wide enough for tables in files and pipes.

    Markup is off, because addresses and tenant names may have brackets.

    Args:
        file: Output file; by default standard output.
    """
    file = file or sys.stdout
    unknown = not file.isatty() and "COLUMNS" not in os.environ
    return _Console(
        file=file,
        highlight=False,
        markup=False,
        width=_WIDTH_OF_A_FILE if unknown else None,
    )


class _Console(Console):
    """Writes no control character but its own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is written, with the texts made safe."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))


def properties(pairs: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values, without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    return table
