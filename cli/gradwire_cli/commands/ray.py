"""``gradwire ray``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.table import Table

from gradwire_cli.commands import serve
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.options import FLAG, Seconds, to_count
from gradwire_cli.serve_settings import ServeSettings
from gradwire_cli.terminal.logs import LogSettings
from gradwire_cli.terminal.tables import console
from gradwire_protocol.ray_pool import PoolStatus

if TYPE_CHECKING:
    from gradwire_ray.settings import PoolSettings

app = App(
    name="ray",
    help="""
    Run a pool of servers in a Ray cluster: one on each node.

    Ray keeps the servers running, and clients find them with gradwire.ray.connect().
    Needs the extra gradwire[ray]; nodes need gradwire[server,ray].
    """,
)

Cluster = Annotated[str, Parameter(metavar="ADDRESS", env_var="RAY_ADDRESS")]
_COUNT = Parameter(converter=to_count)


@app.command
def up(
    *serve_flags: Annotated[str, Parameter(negative=(), show=False)],
    address: Cluster = "auto",
    nodes: Annotated[int | None, _COUNT] = None,
    max_nodes: Annotated[int | None, _COUNT] = None,
    port: Annotated[int, _COUNT] = 50051,
    timeout: Seconds = 120.0,
) -> ExitStatus:
    """Start the pool, or change the number of servers of the running one.

    Flags after -- are those of gradwire serve, for every server: gradwire ray up
    --nodes 4 -- --insecure --max-jobs 8. Its variables here count, too. Files are
    those of the nodes.

    Args:
        serve_flags: Flags of gradwire serve.
        address: Address of the cluster's GCS, HOST:PORT; auto: the one of this host.
        nodes: Servers, each on a node of its own. Default: one on every node that has
            CPUs or GPUs for Ray.
        max_nodes: Most servers. While jobs wait, Ray's autoscaler is asked for more
            nodes than --nodes.
        port: Port of every server; 0 takes a free one.
        timeout: Time limit for the servers to start.
    """
    settings = _settings(serve_flags, nodes, max_nodes, port)
    with _joined(address) as control:
        told = _Told()
        status = control.up(settings, timeout, told)
        told(status)
        for host, text in status.failures:
            sys.stderr.write(f"{host}: {text}\n")
        serving = control.serving(status)
    if serving < max(status.wanted, 1):
        raise CommandError(
            f"{serving} of {status.wanted} servers serve after {timeout:g} s; the pool"
            " goes on trying: gradwire ray status"
        )
    return ExitStatus.OK


@app.command(name="status")
def status_(
    *,
    address: Cluster = "auto",
    as_json: Annotated[bool, FLAG, Parameter(name="--json")] = False,
) -> None:
    """Show the pool's servers, and what failed.

    Args:
        address: Address of the cluster's GCS, HOST:PORT; auto: the one of this host.
        as_json: Print one JSON object instead of a table.
    """
    with _joined(address) as control:
        status: PoolStatus = control.status()
    if as_json:
        json.dump(dataclasses.asdict(status), sys.stdout)
        sys.stdout.write("\n")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "state", "address", "running", "queued", "backend"):
        table.add_column(title)
    for each in status.servers:
        table.add_row(
            each.host,
            each.state,
            each.address,
            str(each.running_jobs),
            str(each.queued_jobs),
            each.backend,
        )
    console().print(table)
    what = "stops" if status.stopping else f"wants {status.wanted} servers"
    sys.stdout.write(f"the pool {what}\n")
    for host, text in status.failures:
        sys.stdout.write(f"{host}: {text}\n")


@app.command
def down(*, address: Cluster = "auto") -> None:
    """Stop all servers of the pool, and the pool.

    Running jobs have the servers' --grace to finish.

    Args:
        address: Address of the cluster's GCS, HOST:PORT; auto: the one of this host.
    """
    with _joined(address) as control:
        stopped = control.down()
    sys.stdout.write(f"stopped {stopped} server{'' if stopped == 1 else 's'}\n")


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Take part in a Ray cluster.

    Yields:
        The module that controls its pool.
    """
    try:
        # Imported here: Ray comes with an extra of its own.
        from gradwire_ray import control  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            "gradwire ray needs Ray; install it with:"
            " pip install 'gradwire[server,ray]'"
        ) from error
    try:
        with control.joined(address):
            yield control
    except control.PoolError as error:
        raise CommandError(str(error)) from error


def _settings(
    serve_flags: tuple[str, ...], nodes: int | None, max_nodes: int | None, port: int
) -> PoolSettings:
    from gradwire_ray.settings import PoolSettings  # noqa: PLC0415 - needs the server

    try:
        _, bound, _ = serve.app.parse_args(
            serve_flags, exit_on_error=False, print_error=False
        )
    except CycloptsError as error:
        error.command_chain = ("serve",)  # whose --help has these flags
        raise
    server: ServeSettings = bound.arguments.get("settings", ServeSettings())
    log: LogSettings = bound.arguments.get("log", LogSettings())
    if server.listen != ServeSettings.listen:
        raise CommandError(
            "--listen is not for a pool: its servers listen on --port of their nodes",
            ExitStatus.USAGE,
        )
    try:
        return PoolSettings(nodes, max_nodes, port, server, log.configure)
    except ValueError as error:
        raise CommandError(f"--{error}".replace("_", "-"), ExitStatus.USAGE) from None


class _Told:
    """Says of each server, once, that it serves."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, status: PoolStatus) -> None:
        for each in status.servers:
            if each.address and each.server_instance not in self._told:
                self._told.add(each.server_instance)
                sys.stdout.write(f"{each.address} serves ({each.backend})\n")
                sys.stdout.flush()
