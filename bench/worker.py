"""The process of one contender, form and shape: ``python -m bench.worker``.

The process makes the operands, starts the contender, checks the results of one call,
and prints a line of JSON. It takes one turn for every line on standard input, and
prints its measurements. At the end of its input it prints the resource usage of client
and server, and ends. A turn is one call, or as many calls as start within `TURN_S`, up
to `MOST_CALLS`: short calls need some calls to warm up after the others' turns.

Where servers compute nothing (`bench.work.COMPUTES`), only the results' shapes are
checked.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import contenders
from bench.contenders.interface import Arrays, Contender
from bench.contenders.server_process import Used
from bench.work import COMPUTES, FORMS, Shape, empty_results, operands, worst_error

TURN_S = 0.1
MOST_CALLS = 50
TOLERANCE = 1e-4


def main(name: str, form: str, shape: Shape) -> None:
    # Terminated in the middle of a call, the worker still ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    contender = contenders.create(name)
    try:
        contender.start()
        call, error = _made_ready(contender, form, shape)
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} is wrong at {shape}: relative error {error}")
        _say({"ready": True, "relative_error": error})
        # Do not count the memory of startup and check.
        for process in _processes(contender):
            forget_peak(process)
        before = _used(contender)
        calls = 0
        for _ in sys.stdin:
            calls_s = turn(call)
            calls += len(calls_s)
            _say({"calls_s": [round(s, 7) for s in calls_s]})
        after = _used(contender)
        client = after[0].since(before[0])
        server = after[1] and after[1].since(before[1] or after[1])
        pid = contender.server_pid
        _say(
            {
                "calls": calls,
                "client_cpu_s": client.cpu_s,
                "server_cpu_s": server.cpu_s if server else 0.0,
                "client_peak_bytes": peak_bytes("self"),
                "server_peak_bytes": pid and peak_bytes(pid),
                "client_switches": client.switches,
                "server_switches": server and server.switches,
            }
        )
    finally:
        contender.close()


def _made_ready(
    contender: Contender, form: str, shape: Shape
) -> tuple[Callable[[], Arrays], float]:
    """Prepare the call and run it once; return the call and its error.

    Operands not needed by the call are released.
    """
    given = operands(shape)
    call = contender.call(given, reused=form == "reused")
    results = call()
    contender.check_way(shape)
    if not COMPUTES:
        wanted = [array.shape for array in empty_results(*given)]
        wrong = [array.shape for array in results] != wanted
        return call, float("inf") if wrong else 0.0
    return call, worst_error(given, results)


def turn(call: Callable[[], Arrays]) -> list[float]:
    """Seconds of each call of one turn."""
    calls_s: list[float] = []
    until = time.perf_counter() + TURN_S
    while not calls_s or (time.perf_counter() < until and len(calls_s) < MOST_CALLS):
        began = time.perf_counter()
        results = call()
        calls_s.append(time.perf_counter() - began)
        # Freeing results is not part of the call, and must happen before the next.
        del results
    return calls_s


def peak_bytes(process: int | str) -> int:
    """Highest resident memory of a process so far."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {process}")


def forget_peak(process: int | str) -> None:
    """Reset `peak_bytes` to the current resident memory."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def cpu_s(process: int) -> float:
    """Processor time of a process and all its threads so far, in seconds."""
    # The command name is in parentheses and may contain any character.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def _processes(contender: Contender) -> list[int | str]:
    server = contender.server_pid
    return ["self"] if server is None else ["self", server]


def _used(contender: Contender) -> tuple[Used, Used | None]:
    """What client and server have used so far; None: the bench started no server."""
    server = contender.server
    return Used.here(), None if server is None else server.used()


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    if sys.argv[2] not in FORMS:
        sys.exit(f"{sys.argv[2]} is none of {', '.join(FORMS)}")
    main(sys.argv[1], sys.argv[2], Shape.parse(sys.argv[3]))
