"""The client's end: ``python -m bench.training.worker JSON``.

Its argument says what to measure. It starts its servers, checks one step of each
contender against NumPy, counts the bytes of a step, and then makes steps in turns.
Everything that it measures is a line of JSON on its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gradwire
from bench.contenders import gradwire_server
from bench.contenders.server_process import ServerProcess
from bench.driver import SETTLE_S, rotated
from bench.links.relay import Link
from bench.machine import ProcessorTime
from bench.training.sizes import SIZES, Size
from bench.training.trainers import Calls, Data, Local, LocalWeights, Session, Trainer

LOCAL = ("numpy", "numpy-1")
"""NumPy with all cores, and with one."""

CONTENDERS = (
    *LOCAL,
    "calls",
    "calls-auto",
    "session",
    "session-auto",
    "session-bfloat16",
    "session-bfloat16-auto",
    "session-idle",
    "session-idle-auto",
    "session-idle-products-auto",
)
"""What each name says: `calls` sends W and X, `session` keeps them; `auto`: with
block_rows="auto"; `idle`: at a server that computes nothing."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Worker:
    """Contenders of one size, and their servers and clients."""

    def __init__(self, size: Size, stack: contextlib.ExitStack) -> None:
        self._size = size
        self._stack = stack
        self._servers: dict[str, ServerProcess] = {}
        self._data = Data(size)
        self._weights: dict[str, LocalWeights] = {}

    def trainer(
        self, name: str, *, link: bool = False
    ) -> tuple[Trainer, gradwire.Client | None, Link | None]:
        """The contender of a name, with its client, and a relay that counts bytes."""
        if name in LOCAL:
            threads = 1 if name == "numpy-1" else None
            return Local(self._data, self._local("numpy"), threads), None, None
        address = self._server(_kind(name)).address
        relay = self._stack.enter_context(Link(address)) if link else None
        client = self._stack.enter_context(
            gradwire.connect(
                relay.address if relay else address,
                block_rows="auto" if name.endswith("auto") else None,
                transport="grpc",
            )
        )
        if name.startswith("calls"):
            return Calls(self._data, self._local("calls"), client), client, relay
        wire_dtype = "bfloat16" if "bfloat16" in name else None
        return Session(self._data, client, wire_dtype), client, relay

    def check(self, name: str, trainer: Trainer) -> dict[str, float]:
        """Make the first step, and compare everything with NumPy's."""
        layers = range(len(self._data.w))
        before = LocalWeights([trainer.weight(layer) for layer in layers])
        reference = Local(self._data, before)
        reference.results, trainer.results = {}, {}
        trainer.step()
        reference.step()
        errors: dict[str, float] = {"y": 0.0, "dx": 0.0}
        for layer, (y, dx) in trainer.results.items():
            expected = reference.results[layer]
            errors["y"] = max(errors["y"], _error(y, expected[0]))
            errors["dx"] = max(errors["dx"], _error(dx, expected[1]))
        # Local weights may have the states of another contender's steps.
        if name.startswith("session"):
            errors["w"] = max(
                _error(trainer.weight(layer), reference.weight(layer))
                for layer in layers
            )
        trainer.results = None
        most = TOLERANCE["bfloat16" if "bfloat16" in name else "float32"]
        if not max(errors.values()) < most:
            raise RuntimeError(f"{name} is wrong: relative errors {errors}")
        return errors

    def _local(self, name: str) -> LocalWeights:
        if name not in self._weights:
            self._weights[name] = LocalWeights(self._data.w)
        return self._weights[name]

    def _server(self, kind: gradwire_server.Kind) -> ServerProcess:
        if kind not in self._servers:
            self._servers[kind] = gradwire_server.start(kind)
            self._stack.callback(self._servers[kind].stop)
        return self._servers[kind]


def _kind(name: str) -> gradwire_server.Kind:
    kinds: tuple[gradwire_server.Kind, ...] = ("idle-products", "idle")
    for kind in kinds:
        if kind in name:
            return kind
    return "numpy"


def _error(result: Any, expected: Any) -> float:
    difference = np.linalg.norm(np.asarray(result, np.float32) - expected)
    return float(difference / np.linalg.norm(expected))


def main(given: dict[str, Any]) -> None:
    # Terminated in the middle of a step, the worker still ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    size, names = SIZES[given["size"]], given["contenders"]
    with contextlib.ExitStack() as stack:
        worker = Worker(size, stack)
        if given["count"]:
            for name in names:
                if name not in LOCAL:
                    _count(worker, name)
        trainers: dict[str, Trainer] = {}
        calls: dict[str, list[dict[str, Any]]] = {}
        for name in names:
            trainer, client, _ = worker.trainer(name)
            stack.callback(trainer.close)
            errors: dict[str, float] = {}
            # Over a link, getting all weights would take longer than all steps.
            if "idle" in name or not given["check"]:
                trainer.step()
            else:
                errors = worker.check(name, trainer)
            _say("ready", contender=name, errors=errors)
            trainers[name] = trainer
            if client is not None:
                calls[name] = []
                trainer.on_call = _observer(size, client, calls[name])
        until = time.monotonic() + given["seconds"]
        for number in range(given["rounds"]):
            if number >= given["least_rounds"] and time.monotonic() > until:
                break
            for name in rotated(names, number):
                time.sleep(SETTLE_S)
                before = interface_bytes()
                for each in calls.values():
                    each.clear()
                processors = ProcessorTime()
                _clock.began = began = time.perf_counter()
                trainers[name].step()
                seconds = time.perf_counter() - began
                stolen = processors.stolen()
                after = interface_bytes()
                _say(
                    "step",
                    contender=name,
                    round=number,
                    seconds=round(seconds, 6),
                    stolen=round(stolen, 4),
                    interface_up=after[0] - before[0],
                    interface_down=after[1] - before[1],
                    calls=calls.get(name, []),
                )


def _count(worker: Worker, name: str) -> None:
    """Count the bytes of a step on its connection, below gRPC and above TCP."""
    trainer, client, relay = worker.trainer(name, link=True)
    assert client is not None
    assert relay is not None
    payload = [0, 0]

    def called(_: str, __: int) -> None:
        receipt = client.last_receipt
        assert receipt is not None
        payload[0] += receipt.bytes_received
        payload[1] += receipt.bytes_sent

    try:
        trainer.step()  # the first one makes connections and states
        trainer.on_call = called
        before = relay.up_bytes, relay.down_bytes
        trainer.step()
        after = relay.up_bytes, relay.down_bytes
    finally:
        trainer.close()
    _say(
        "bytes",
        contender=name,
        up=after[0] - before[0],
        down=after[1] - before[1],
        payload_up=payload[0],
        payload_down=payload[1],
    )


class _Clock:
    """When the call that runs now began."""

    began = 0.0


_clock = _Clock()


def _observer(
    size: Size, client: gradwire.Client, into: list[dict[str, Any]]
) -> Callable[[str, int], None]:
    """Note every call: its seconds, bytes and blocks."""

    def called(method: str, layer: int) -> None:
        now = time.perf_counter()
        receipt = client.last_receipt
        assert receipt is not None
        n, k = size.layers[layer]
        into.append(
            {
                "method": method,
                "shape": f"{receipt.m}x{n}x{k}",
                "seconds": round(now - _clock.began, 6),
                "up": receipt.bytes_received,
                "down": receipt.bytes_sent,
                "blocks": receipt.blocks,
            }
        )
        _clock.began = time.perf_counter()

    return called


def interface_bytes() -> tuple[int, int]:
    """Bytes sent and received on the link's interface; 0 without a link."""
    name = os.environ.get("BENCH_INTERFACE")
    if name is None:
        return 0, 0
    folder = Path("/sys/class/net", name, "statistics")
    sent, received = (folder / f"{way}_bytes" for way in ("tx", "rx"))
    return int(sent.read_text()), int(received.read_text())


def _say(kind: str, **fields: Any) -> None:
    print(json.dumps({"kind": kind, **fields}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
