"""A gradwire server in a process of its own, for as long as a block lasts.

The examples use it so that they can be tried with nothing set up; a program
of yours would connect to a server that is already there.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """Run ``gradwire serve`` on a free port.

    Yields:
        The server's address, HOST:PORT.

    Raises:
        RuntimeError: It did not start; it has said why on standard error.
    """
    gradwire = str(Path(sys.executable).with_name("gradwire"))
    command = [gradwire, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            # Such as: gradwire 0.1.0 serves on 127.0.0.1:40123 (numpy: why)
            ready = process.stdout.readline() if process.stdout else ""
            if " serves on " not in ready:
                raise RuntimeError(f"no server: it ended with {process.wait()}")
            yield ready.split(" serves on ")[1].split()[0]
        finally:
            process.terminate()


def given_or_local_server() -> contextlib.AbstractContextManager[str]:
    """The address that the command line names, or a server of our own."""
    if len(sys.argv) > 1:
        return contextlib.nullcontext(sys.argv[1])
    return local_server()
