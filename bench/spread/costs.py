"""What a spread job costs: processor time, bytes, and the client's memory."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.contenders.server_process import Used
from bench.driver import SETTLE_S, rotated
from bench.spread.rounds import Rounds
from bench.spread.servers import WARM_UP, Arrays, Say, Servers, connect
from bench.work import Shape, worst_error
from bench.worker import forget_peak, peak_bytes
from gradwire_protocol.dtypes import Dtype

ACCUMULATOR_BYTES = Dtype.FLOAT32.default_accumulator.itemsize
TOLERANCE = 1e-4


def cpu(given: dict[str, Any], say: Say) -> None:
    """Processor time of client and servers, in turns."""
    arrays = Arrays(Shape.parse(given["shape"]))
    computes = given["servers"] == "numpy"
    with ExitStack() as stack:
        servers = Servers(stack, given["servers"], 3)
        clients = {
            "plain": connect(stack, servers.addresses[0], given["transport"]),
            **{
                f"spread {count}": connect(
                    stack, servers.addresses[:count], given["transport"]
                )
                for count in (1, 2, 3)
            },
        }
        alone = None
        for name, client in clients.items():  # to warm up, and to check
            arrays.call(client, spread=name != "plain")
            if not computes:
                continue
            if name == "plain":
                results = arrays.out["y"], arrays.out["dx"], arrays.out["dw"]
                error = worst_error(arrays.operands, results)
                if not error < TOLERANCE:
                    raise RuntimeError(f"the results are wrong: {error}")
            elif alone is None:
                alone = arrays.copies()
            elif not arrays.same(alone):
                raise RuntimeError(f"{name} has other bits than one server")
        del alone
        for number in Rounds.of(given):
            for name in rotated(list(clients), number):
                time.sleep(SETTLE_S)
                before = Used.here(), servers.used()
                begun = time.perf_counter()
                receipt = arrays.call(clients[name], spread=name != "plain")
                seconds = time.perf_counter() - begun
                after = Used.here(), servers.used()
                say(
                    way=name,
                    round=number,
                    seconds=round(seconds, 4),
                    client_cpu_s=round(after[0].since(before[0]).cpu_s, 4),
                    server_cpu_s=round(after[1].since(before[1]).cpu_s, 4),
                    switches=after[0].since(before[0]).switches
                    + after[1].since(before[1]).switches,
                    bytes=2 * arrays.shape.bytes_each_way,
                    jobs=receipt.jobs,
                    segments=len(receipt.segments),
                    over=receipt.transport,
                )


def count_bytes(given: dict[str, Any], say: Say) -> None:
    """Bytes of operands and results, as the servers count them."""
    with ExitStack() as stack:
        servers = Servers(stack, "idle", max(given["counts"]))
        plain = connect(stack, servers.addresses[0], given["transport"])
        ways = {
            count: connect(stack, servers.addresses[:count], given["transport"])
            for count in given["counts"]
        }
        for text in given["shapes"]:
            shape = Shape.parse(text)
            # All rows are one: they need no memory.
            x, dy = (np.ones((1, each), np.float32) for each in (shape.n, shape.k))
            operands = (
                np.broadcast_to(x, (shape.m, shape.n)),
                np.ones((shape.n, shape.k), np.float32),
                np.broadcast_to(dy, (shape.m, shape.k)),
            )
            receipt = plain.gradients(*operands).receipt
            up, down = receipt.bytes_received, receipt.bytes_sent
            for count, client in ways.items():
                receipt = client.gradients(*operands, spread=True).receipt
                say(
                    shape=text,
                    servers=count,
                    up=receipt.bytes_received,
                    down=receipt.bytes_sent,
                    plain_up=up,
                    plain_down=down,
                    jobs=receipt.jobs,
                    segments=len(receipt.segments),
                    segment_rows=receipt.fingerprint.segment_rows,
                )


def memory(given: dict[str, Any], say: Say) -> None:
    """Peak of this process in a call, above what it held before."""
    shape, count = Shape.parse(given["shape"]), given["count"]
    arrays = Arrays(shape)
    with ExitStack() as stack:
        servers = Servers(stack, "idle", max(1, count))
        addresses = servers.addresses if count else servers.addresses[0]
        client = connect(stack, addresses, given["transport"])
        small = Arrays(WARM_UP)
        small.call(client, spread=bool(count))
        gc.collect()
        forget_peak("self")
        before = peak_bytes("self")
        receipt = arrays.call(client, spread=bool(count))
        say(
            servers=count,
            above=peak_bytes("self") - before,
            sum_bytes=shape.n * shape.k * ACCUMULATOR_BYTES,
            jobs=receipt.jobs,
            segments=len(receipt.segments),
        )
