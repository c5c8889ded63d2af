"""Tables that commands print for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table

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
    return Console(
        file=file,
        highlight=False,
        markup=False,
        width=_WIDTH_OF_A_FILE if unknown else None,
    )


def properties(pairs: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values, without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    return table
