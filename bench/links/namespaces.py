"""A link with a rate and a delay, between two network namespaces.

A pair of virtual Ethernet devices joins them, with a token bucket at both ends; links
with a delay use `bench.links.delay_line`. Needs root, iproute2, and a kernel with veth
and tbf, or tun.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

_CLIENT, _SERVER = "10.77.0.1", "10.77.0.2"
_DEVICE = "bench0"
"""At most 15 characters, with a process id after it."""


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
    # They exist outside of the namespaces for a moment.
    names = [f"{_DEVICE}-{os.getpid()}{end}" for end in ("c", "s")]
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
