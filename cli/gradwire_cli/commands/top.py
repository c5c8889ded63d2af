"""``gradwire top``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeAlias

from cyclopts import App, Parameter
from rich.console import Group
from rich.live import Live

from gradwire_cli.errors import CommandError
from gradwire_cli.load.metrics_page import (
    DEFAULT_URL,
    MetricsPage,
    read_metrics,
    url_of,
)
from gradwire_cli.load.screen import failure_line, server_table
from gradwire_cli.load.server_load import ServerLoad, load_between
from gradwire_cli.options import FLAG, Seconds
from gradwire_cli.terminal.tables import console

app = App(
    name="top",
    help="""
    Watch what servers do: jobs, queue, devices, bytes, memory, sessions, tenants.

    Reads their metrics, so they need gradwire serve --metrics-listen.
    """,
)

Loads: TypeAlias = dict[str, ServerLoad | CommandError]
"""The load of each server, or why there is none, by URL."""


@app.default
def top(
    *urls: Annotated[str, Parameter(negative=())],
    interval: Seconds = 2.0,
    once: Annotated[bool, FLAG] = False,
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
    timeout: Seconds = 5.0,
) -> None:
    """Watch what servers do, until Ctrl-C.

    Rates are those of the last interval.

    Args:
        urls: Where the metrics are: HOST:PORT, a PORT of 127.0.0.1, or a URL.
            By default http://127.0.0.1:9464/metrics.
        interval: Time between two readings.
        once: Print the load of one interval, and end. So does a standard output that
            is no terminal.
        as_json: Print the load of one interval, a JSON object for each server. Sizes
            are in bytes, times in seconds.
        timeout: Time limit for an answer.
    """
    # Each once, in the order given.
    servers = list(dict.fromkeys(url_of(each) for each in urls or (DEFAULT_URL,)))
    with _Readers(servers, timeout) as readers:
        readers.read()
        if as_json or once or not sys.stdout.isatty():
            time.sleep(interval)
            _print(readers.read(), as_json=as_json)
            return
        try:
            _watch(readers, interval)
        except KeyboardInterrupt:
            return


def _print(loads: Loads, *, as_json: bool) -> None:
    failed = [load for load in loads.values() if isinstance(load, CommandError)]
    for load in loads.values():
        if isinstance(load, CommandError):
            continue
        if as_json:
            json.dump(dataclasses.asdict(load), sys.stdout)
            sys.stdout.write("\n")
        else:
            console().print(server_table(load))
    if failed:
        raise CommandError("; ".join(str(error) for error in failed))


def _watch(readers: _Readers, interval_s: float) -> None:
    with Live(console=console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            tables = [
                failure_line(url, load)
                if isinstance(load, CommandError)
                else server_table(load)
                for url, load in readers.read().items()
            ]
            live.update(Group(*tables), refresh=True)


class _Readers:
    """Reads the metrics of several servers at once.

    The first reading fails if no server answers.
    """

    def __init__(self, urls: list[str], timeout_s: float) -> None:
        self._urls = urls
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max_workers=len(urls))
        self._before: dict[str, MetricsPage] = {}

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self) -> Loads:
        """Return what each server did since the reading before."""
        pages = dict(
            zip(self._urls, self._pool.map(self._page, self._urls), strict=True)
        )
        loads: Loads = {}
        for url, page in pages.items():
            before = self._before.get(url)
            if isinstance(page, CommandError):
                loads[url] = page
                continue
            loads[url] = load_between(url, before or page, page)
            self._before[url] = page
        if not self._before:
            raise CommandError("; ".join(str(error) for error in pages.values()))
        return loads

    def _page(self, url: str) -> MetricsPage | CommandError:
        try:
            return read_metrics(url, self._timeout_s)
        except CommandError as error:
            return error
