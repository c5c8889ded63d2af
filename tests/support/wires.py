"""A wire to a server, which may fall silent: a network namespace with a veth pair."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Literal

import pytest

Lost = Literal["to server", "to client"]
"""A direction in which every packet is lost."""

_NETWORK = ip_network("198.18.0.0/15")
"""For measurements of networks (RFC 2544): no host has these addresses."""

_NOBODY = "02:00:00:00:00:01"
"""An Ethernet address that no device has."""


class Wire:
    """A wire between this process and a server.

    Neither end is told when packets are lost: devices stay up, and nothing is answered.

    Attributes:
        client: This process's address.
        host: The server's address.
        prefix: A command that runs the server at the other end.
    """

    def __init__(self, name: str, device: str) -> None:
        # Other processes have wires of their own in this host's namespace.
        first = os.getpid() * 2 % _NETWORK.num_addresses
        self.client, self.host = str(_NETWORK[first]), str(_NETWORK[first + 1])
        self.prefix = ["ip", "netns", "exec", name]
        self._ends = {
            "to server": (["ip"], self.host, device),
            "to client": (["ip", "-n", name], self.client, device),
        }

    def lose(self, *lost: Lost) -> None:
        """Send all packets in these directions to nobody."""
        for each in lost:
            ip, to, device = self._ends[each]
            _do(*ip, "neigh", "replace", to, "lladdr", _NOBODY, "dev", device)

    def heal(self) -> None:
        """Lose no packets."""
        for ip, _, device in self._ends.values():
            _do(*ip, "neigh", "flush", "dev", device, "nud", "permanent")


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Make a wire; skip the test where this host does not allow it."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name, device = f"wire-{os.getpid()}", f"gw{os.getpid()}"
    made = Wire(name, device)
    with contextlib.ExitStack() as stack:
        try:
            _do("ip", "netns", "add", name)
            # This deletes the pair of devices, too.
            stack.callback(_do, "ip", "netns", "delete", name)
            pair = ("type", "veth", "peer", "name", device, "netns", name)
            _do("ip", "link", "add", device, *pair)
            for ip, here, there in (
                (["ip"], made.client, made.host),
                (["ip", "-n", name], made.host, made.client),
            ):
                _do(*ip, "address", "add", here, "peer", there, "dev", device)
                _do(*ip, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this host does not let wires be made: {error.stderr.strip()}")
        yield made


def _do(*arguments: str) -> None:
    subprocess.run(arguments, capture_output=True, text=True, check=True)
