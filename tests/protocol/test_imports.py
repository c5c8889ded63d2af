"""The ground stands alone: importing it loads neither SDK nor server."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from gradwire_protocol.byte_order import require_little_endian


@functools.cache
def loaded(code: str) -> set[str]:
    """The packages that a fresh Python has loaded after some code."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


EVERYTHING = """
import importlib, pkgutil, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not any(part in module.name for part in ("__main__", "cupy", ".cuda.")):
        importlib.import_module(module.name)
"""


def test_the_protocol_loads_neither_sdk_nor_server() -> None:
    code = EVERYTHING.format(package="gradwire_protocol")
    assert not loaded(code) & {"gradwire", "gradwire_server", "gradwire_cli"}


def test_the_server_loads_no_module_of_the_sdk() -> None:
    code = EVERYTHING.format(package="gradwire_server")
    assert not loaded(code) & {"gradwire", "gradwire_cli"}


def test_the_sdk_loads_no_module_of_the_server() -> None:
    assert not loaded("import gradwire") & {"gradwire_server", "gradwire_cli"}


def test_importing_the_sdk_loads_no_other_array_library() -> None:
    assert not loaded("import gradwire") & {"torch", "jax", "cupy"}


def test_a_big_endian_host_is_refused() -> None:
    with pytest.raises(ImportError, match="this one is big-endian"):
        require_little_endian("big")


def test_this_host_is_fine() -> None:
    require_little_endian(sys.byteorder)


@pytest.mark.parametrize("package", ["gradwire", "gradwire_server"])
@pytest.mark.parametrize(
    ("before", "printed"), [(None, "None True\n"), ("0", "0 False\n")]
)
def test_grpc_has_fork_support_and_the_environment_stays_as_it_was(
    package: str, before: str | None, printed: str
) -> None:
    code = (
        f"import os\nimport {package}\n"
        "from grpc._cython import cygrpc\n"
        "print(os.environ.get('GRPC_ENABLE_FORK_SUPPORT'),"
        " cygrpc._GRPC_ENABLE_FORK_SUPPORT)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    if before is not None:
        environment["GRPC_ENABLE_FORK_SUPPORT"] = before
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout == printed


def test_the_command_line_loads_the_server_only_to_serve() -> None:
    code = (
        "import sys\nimport gradwire_cli.app\n"
        "assert 'gradwire_server.server' not in sys.modules\n"
        "from gradwire_server import Server, start_in_thread\n"
        "print(Server.__name__, start_in_thread.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Server start_in_thread\n"


OTHER_STATUS = """
from google.protobuf import descriptor_pb2, descriptor_pool

file = descriptor_pb2.FileDescriptorProto(
    name="google/rpc/status.proto", package="google.rpc", syntax="proto3"
)
file.message_type.add(name="Status").field.add(
    name="other", number=9, type="TYPE_STRING", label="LABEL_OPTIONAL"
)
descriptor_pool.Default().Add(file)
import gradwire
import gradwire_server
print("imported")
"""


def test_another_packages_copy_of_google_rpc_does_no_harm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_STATUS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "imported\n"
