"""The bench over links of 1 and 10 Gbit/s: ``python -m bench.links``.

Client and server run in separate network namespaces. A pair of virtual Ethernet
devices joins them, with a token bucket at both ends; links with a delay use
`bench.links.delay_line`. Needs root, iproute2, and a kernel with veth and tbf, or tun.

The shapes balance computation on two cores with each direction of the link. A
transport with overlap then takes as long as its longest stage; a transport without
overlap takes as long as all three.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import command, machine
from bench.driver import run_shape
from bench.report import bars, tables
from bench.report.record import Part, Run, Writer
from bench.report.statistics import figures
from bench.work import FORMS, Shape

SHAPES = {1: Shape(32768, 2048, 2048), 10: Shape(262144, 256, 256)}
"""Shapes by the link's Gbit/s."""

CONTENDERS = (
    "numpy",
    "gradwire-grpc",
    "gradwire-direct",
    "grpcio-stream",
    "arrow-flight",
    "torch-rpc",
    "raw-tcp",
)
_CLIENT, _SERVER = "10.77.0.1", "10.77.0.2"
_DEVICE = "bench0"


class LinkError(Exception):
    """A link cannot be made; the text says why."""


@contextlib.contextmanager
def link(bits_per_s: float, round_trip_s: float = 0.0) -> Iterator[list[str]]:
    """Make a link; yield the prefix for a client's command at one end of it.

    Servers started by the client as contenders run at the other end.

    Args:
        bits_per_s: Rate of the link, each way.
        round_trip_s: Round-trip time of the link.

    Raises:
        LinkError: The link cannot be made on this host.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LinkError(f"there is no {tool}: install iproute2")
    client, server = (f"bench-{end}-{os.getpid()}" for end in ("client", "server"))
    with contextlib.ExitStack() as stack:
        for name in (client, server):
            _do("ip", "netns", "add", name)
            # This deletes the devices inside, too.
            stack.callback(_do, "ip", "netns", "delete", name)
            _do("ip", "-n", name, "link", "set", "lo", "up")
        if round_trip_s:
            line = _delay_line(client, server, bits_per_s, round_trip_s / 2)
            stack.enter_context(line)
        else:
            pair = ("netns", client, "type", "veth", "peer", "name", _DEVICE)
            _do("ip", "link", "add", _DEVICE, *pair, "netns", server)
        ends = ((client, _CLIENT, _SERVER), (server, _SERVER, _CLIENT))
        for name, here, there in ends:
            where = ("address", "add", here, "peer", there, "dev", _DEVICE)
            _do("ip", "-n", name, *where)
            _do("ip", "-n", name, "link", "set", _DEVICE, "up")
            if not round_trip_s:
                limit = _limit(bits_per_s)
                _do("tc", "-n", name, "qdisc", "add", "dev", _DEVICE, *limit)
        yield [
            *("ip", "netns", "exec", client, "env"),
            f"BENCH_SERVER_HOST={_SERVER}",
            f"BENCH_SERVER_COMMAND=ip netns exec {server}",
            f"BENCH_INTERFACE={_DEVICE}",
        ]


@contextlib.contextmanager
def _delay_line(
    client: str, server: str, bits_per_s: float, delay_s: float
) -> Iterator[None]:
    names = [f"{_DEVICE}-{end}" for end in ("c", "s")]
    command = [sys.executable, "-m", "bench.links.delay_line", *names]
    command += ["--bits-per-s", f"{bits_per_s:.0f}", "--delay-s", f"{delay_s}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise LinkError("no TUN devices can be made here; see above")
            for device, namespace in zip(names, (client, server), strict=True):
                into = ("netns", namespace, "name", _DEVICE)
                _do("ip", "link", "set", device, *into)
            yield
        finally:
            process.kill()


def _limit(bits_per_s: float) -> list[str]:
    # A millisecond of tokens, but more than the 64 KiB that TCP hands over.
    burst = max(int(bits_per_s / 8 / 1000), 256 << 10)
    bucket = ["rate", f"{bits_per_s:.0f}bit", "burst", str(burst), "latency", "50ms"]
    return ["root", "tbf", *bucket]


def _do(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise LinkError(f"{' '.join(arguments)}: {said}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    when = datetime.now(UTC)
    path: Path = options.out or command.OUT / f"{when:%Y-%m-%dT%H%M%SZ}-links.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = command.installed(options.contenders)
    threads = os.cpu_count() or 1
    body: list[tuple[str, ...]] = []
    with path.open("w") as lines:
        writer = Writer(lines)
        about = machine.describe(threads)
        writer.about({"when": when.isoformat(timespec="seconds"), **about})
        print(tables.heading(about), end="\n\n", flush=True)
        for gbits in options.gbits:
            shape = options.shape or SHAPES[gbits]
            round_trip_s = options.round_trip_ms / 1000
            print(f"{shape} at {gbits} Gbit/s ...", file=sys.stderr, flush=True)
            try:
                with link(gbits * 1e9, round_trip_s) as before:
                    turns, usages = run_shape(
                        names,
                        shape,
                        form=options.form,
                        threads=threads,
                        rounds=options.rounds,
                        seconds=options.seconds,
                        before=before,
                    )
            except (LinkError, RuntimeError) as error:
                print(error, file=sys.stderr)
                return 1
            seen = tuple(figures(turns, names[0]))
            part = Part(
                shape, options.form, seen, tuple(usages), gbits * 1e9, round_trip_s
            )
            writer.part(part, turns)
            name = f"{gbits} Gbit/s"
            if round_trip_s:
                name += f", {options.round_trip_ms:g} ms"
            body += [(name, *row) for row in tables.rows(part)]
    print(tables.table(body, ("link", *tables.HEAD), texts=3))
    found = [v for v in bars.verdicts(Run.read(path)) if v.holds is not None]
    if found:
        print(f"\n{bars.table(found)}")
    print(f"\nEvery call is in {path}.", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.links",
        description="The bench over limited links, between network namespaces.",
    )
    parser.add_argument(
        "--gbits",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(SHAPES),
        help="Gbit/s each way, by commas (1,10)",
    )
    parser.add_argument(
        "--round-trip-ms", type=float, default=0, help="round-trip time of the link (0)"
    )
    parser.add_argument("--shape", type=Shape.parse, help="instead of the balanced one")
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        default=list(CONTENDERS),
        help=f"by commas, numpy first ({','.join(CONTENDERS)})",
    )
    parser.add_argument("--form", choices=FORMS, default="fresh")
    parser.add_argument(
        "--seconds", type=float, default=90, help="for each link, about (90)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="at most (10)")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    return parser
