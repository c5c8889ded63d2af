"""torch.distributed.rpc: TensorPipe over TCP, one `rpc_sync` a call.

Tensors travel out of band. The products use NumPy, as in every contender, so that the
bench does not compare BLAS libraries. As a script, this module is the server.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch.distributed import rpc

from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.server_process import ServerProcess, say_ready
from bench.work import Array, products

# Both of torch's libraries listen on this interface.
_INTERFACE = os.environ.get("BENCH_INTERFACE", "lo")


def _join(name: str, rank: int, meeting_point: str) -> None:
    os.environ |= dict.fromkeys(("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), _INTERFACE)
    # Warnings about the choice of backends and, at the end, about the peer's exit.
    warnings.filterwarnings("ignore", module="torch.distributed")
    rpc.init_rpc(
        name,
        rank=rank,
        world_size=2,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{meeting_point}",
            rpc_timeout=0,
            # Use TCP, not shared memory, although both are on one host.
            _transports=["uv"],
            _channels=["basic"],
        ),
    )


def compute(
    x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Y, dX and dW; called in the server."""
    results = products(x.numpy(), w.numpy(), dy.numpy())
    return tuple(torch.from_numpy(result) for result in results)


class TorchRpc(ArrayContender):
    """One client, one connection, one call after the other."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="torch-rpc-bench-")
        self._joined = False

    def start(self) -> None:
        meeting_point = str(Path(self._folder.name, "store"))
        self.server = ServerProcess.of_module(__name__, meeting_point)
        _join("client", 1, meeting_point)
        self._joined = True

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        given = tuple(torch.from_numpy(operand) for operand in (x, w, dy))
        results = rpc.rpc_sync("server", compute, args=given)
        if out is None:
            y, dx, dw = (result.numpy() for result in results)
            return y, dx, dw
        for ours, result in zip(out, results, strict=True):
            torch.from_numpy(ours).copy_(result)
        return out

    def close(self) -> None:
        if self._joined:
            self._joined = False
            rpc.shutdown(graceful=False)
        if self.server is not None:
            self.server.stop()
        self._folder.cleanup()


create = TorchRpc

if __name__ == "__main__":
    # `_join` returns when the client has joined, and the client waits for this line.
    say_ready(sys.argv[1])
    _join("server", 0, sys.argv[1])
    threading.Event().wait()
