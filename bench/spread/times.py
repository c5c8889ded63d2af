"""How long a spread job takes at servers whose devices are slow, and if one fails."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import gradwire
from bench.driver import SETTLE_S, rotated
from bench.spread.rounds import Rounds
from bench.spread.servers import WARM_UP, Arrays, Say, Servers, connect
from bench.work import Array, Shape, worst_error

VICTIM = 1
LOOK_AGAIN_S = 0.5
"""How long after a stopped server continues the results are looked at again, in
addition to the time that it needs for an answer."""


def devices(given: dict[str, Any], say: Say) -> None:
    """Seconds of a job whose row blocks keep their device busy, in turns."""
    arrays = Arrays(Shape.parse(given["shape"]))
    kind = f"idle:{given['block_ms']:g}"
    with ExitStack() as stack:
        servers = Servers(stack, kind, 3)
        one = Servers(stack, f"{kind}x3", 1)
        clients = {
            "plain": connect(stack, servers.addresses[0], given["transport"]),
            **{
                f"spread {count}": connect(
                    stack, servers.addresses[:count], given["transport"]
                )
                for count in (1, 2, 3)
            },
            "3 devices": connect(stack, one.addresses[0], given["transport"]),
        }
        for number in Rounds.of(given):
            for name in rotated(list(clients), number):
                time.sleep(SETTLE_S)
                begun = time.perf_counter()
                receipt = arrays.call(clients[name], spread=name != "plain")
                say(
                    way=name,
                    round=number,
                    seconds=round(time.perf_counter() - begun, 4),
                    computing_s=round(receipt.computing_s, 4),
                    jobs=receipt.jobs,
                    segments=len(receipt.segments),
                )


def failing(given: dict[str, Any], say: Say) -> None:
    """Seconds of a job at three servers, undisturbed and if one fails."""
    arrays = Arrays(Shape.parse(given["shape"]))
    small = Arrays(WARM_UP)
    with ExitStack() as stack:
        servers = Servers(stack, f"numpy:{given['block_ms']:g}", 3)

        def connected(of_way: ExitStack) -> gradwire.Client:
            # A client remembers which servers have failed: each way has its own.
            client = connect(of_way, servers.addresses, given["transport"])
            small.call(client, spread=True)
            return client

        for number in Rounds.of(given):
            with ExitStack() as of_way:
                client = connected(of_way)
                time.sleep(SETTLE_S)
                begun = time.perf_counter()
                receipt = arrays.call(client, spread=True)
                seconds = time.perf_counter() - begun
            expected = arrays.copies()
            results = expected["y"], expected["dx"], expected["dw"]
            error = worst_error(arrays.operands, results)
            if not error < given["tolerance"]:
                raise RuntimeError(f"the results are wrong: {error}")
            of = {
                "round": number,
                "undisturbed_s": round(seconds, 4),
                "segment_s": round(receipt.computing_s / len(receipt.segments), 5),
                "segments": len(receipt.segments),
                "jobs": receipt.jobs,
            }
            for way in given["ways"]:
                with ExitStack() as of_way:
                    client = connected(of_way)
                    say(**of, **_disturbed(way, servers, client, arrays, expected))
                if way == "killed":
                    servers.replace(VICTIM)


IN_THE_MIDDLE = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def _disturbed(
    way: str,
    servers: Servers,
    client: gradwire.Client,
    arrays: Arrays,
    expected: dict[str, Array],
) -> dict[str, Any]:
    """Take a server away, compute, and let a stopped server continue."""
    in_the_middle = IN_THE_MIDDLE.get(way)
    at_s: list[float] = []
    begun = 0.0

    def progress(told: gradwire.Progress) -> None:
        rows = sum((told.rows_by_server or {}).values())
        if not at_s and in_the_middle and 2 * rows >= (told.m or 0):
            servers.signal(VICTIM, in_the_middle)
            at_s.append(time.perf_counter() - begun)

    arrays.forget()
    time.sleep(SETTLE_S)
    if in_the_middle is None:
        servers.signal(VICTIM, signal.SIGSTOP)
        at_s.append(0.0)
    begun = time.perf_counter()
    try:
        receipt = arrays.call(client, spread=True, on_progress=progress)
        seconds = time.perf_counter() - begun
        same = arrays.same(expected)
        arrays.forget()
    finally:
        if way != "killed":
            servers.signal(VICTIM, signal.SIGCONT)
    if way != "killed":
        client.server_info(address=servers.addresses[VICTIM])
        time.sleep(LOOK_AGAIN_S)
    by_victim = servers.addresses[VICTIM]
    return {
        "way": way,
        "seconds": round(seconds, 4),
        "at_s": round(at_s[0], 4),
        "same": same,
        "written_later": arrays.written(),
        "attempts": sum(each.attempts for each in receipt.segments),
        "by_victim": sum(each.server_address == by_victim for each in receipt.segments),
    }


def stream(given: dict[str, Any], say: Say) -> None:
    """Seconds until the first block of a stream, and until the last, in turns."""
    shape = Shape.parse(given["shape"])
    x, w, dy = Arrays(shape).operands
    rows = given["item_rows"]

    def items() -> Iterator[tuple[Array, Array]]:
        for at in range(0, shape.m, rows):
            yield x[at : at + rows], dy[at : at + rows]

    with ExitStack() as stack:
        servers = Servers(stack, given["servers"], 3)
        clients = {
            "plain": connect(stack, servers.addresses[0], given["transport"]),
            **{
                f"spread {count}": connect(
                    stack, servers.addresses[:count], given["transport"]
                )
                for count in (1, 3)
            },
        }

        def seconds(name: str) -> tuple[float, float, int]:
            begun = time.perf_counter()
            first_s, count = 0.0, 0
            options = {} if name == "plain" else {"spread": True}
            with clients[name].stream(items(), w, **options) as blocks:
                for _ in blocks:
                    first_s = first_s or time.perf_counter() - begun
                    count += 1
            return first_s, time.perf_counter() - begun, count

        try:
            for name in clients:  # to warm up
                seconds(name)
        except (TypeError, gradwire.InputError) as error:
            say(skipped=f"streams cannot be spread yet: {error}")
            return
        for number in Rounds.of(given):
            for name in rotated(list(clients), number):
                time.sleep(SETTLE_S)
                each = [seconds(name) for _ in range(given["calls"])]
                first_s, all_s = (
                    statistics.median(one[position] for one in each)
                    for position in (0, 1)
                )
                say(
                    way=name,
                    round=number,
                    first_s=round(first_s, 5),
                    seconds=round(all_s, 5),
                    blocks=each[0][2],
                )
