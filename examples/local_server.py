"""A gradwire server in a separate process, for the duration of a block.

The examples use it to run without any setup. A real program connects to an
existing server.
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
        RuntimeError: The server did not start; standard error has the reason.
    """
    gradwire = str(Path(sys.executable).with_name("gradwire"))
    command = [gradwire, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            # Example: gradwire 0.1.0 serves on 127.0.0.1:40123 (numpy: why)
            ready = process.stdout.readline() if process.stdout else ""
            if " serves on " not in ready:
                raise RuntimeError(f"no server: it ended with {process.wait()}")
            yield ready.split(" serves on ")[1].split()[0]
        finally:
            process.terminate()


def given_or_local_server() -> contextlib.AbstractContextManager[str]:
    """The address from the command line, or a local server."""
    if len(sys.argv) > 1:
        return contextlib.nullcontext(sys.argv[1])
    return local_server()
