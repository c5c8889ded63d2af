"""Gradwire servers in separate processes, for the duration of a block.

The examples use it to run without any setup. A real program connects to an
existing server.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalServer:
    """A server in a process of its own."""

    address: str
    """HOST:PORT."""

    pid: int
    """Id of its process."""


@contextlib.contextmanager
def local_servers(
    count: int, *flags: str, log_level: str = "warning"
) -> Iterator[list[LocalServer]]:
    """Run ``gradwire serve`` on free ports.

    Args:
        count: Number of servers.
        flags: More flags of ``gradwire serve``.
        log_level: What they log, to standard error.

    Yields:
        The servers.

    Raises:
        RuntimeError: A server did not start; standard error has the reason.
    """
    gradwire = str(Path(sys.executable).with_name("gradwire"))
    command = [gradwire, "serve", "--listen", "127.0.0.1:0", "--log-level", log_level]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
            )
            for _ in range(count)
        ]
        try:
            yield [LocalServer(_address_of(each), each.pid) for each in processes]
        finally:
            for each in processes:
                each.terminate()


def _address_of(process: subprocess.Popen[str]) -> str:
    """Wait until a server listens."""
    # Example: gradwire 0.1.0 serves on 127.0.0.1:40123 (numpy: why)
    ready = process.stdout.readline() if process.stdout else ""
    if " serves on " not in ready:
        raise RuntimeError(f"no server: it ended with {process.wait()}")
    return ready.split(" serves on ")[1].split()[0]


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """Run ``gradwire serve`` on a free port.

    Yields:
        The server's address, HOST:PORT.

    Raises:
        RuntimeError: The server did not start; standard error has the reason.
    """
    with local_servers(1) as (server,):
        yield server.address


def given_or_local_server() -> contextlib.AbstractContextManager[str]:
    """The address from the command line, or a local server."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        help="HOST:PORT of a server; without it, one is started for the example",
    )
    address = parser.parse_args().address
    return local_server() if address is None else contextlib.nullcontext(address)
