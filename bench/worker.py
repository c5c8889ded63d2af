"""The process of one contender and one shape: ``python -m bench.worker``.

It makes the operands, starts the contender, checks one call's results, and
says so in a line of JSON. Then, for every line on its standard input, it
takes a turn and says what it saw. At the end of its input it tells the peak
memory of both sides and ends. A turn is one call, or as many up to
`MOST_CALLS` as begin within `TURN_S`: short calls need a few to get warm
after the others' turns.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench import contenders
from bench.contenders.interface import Contender
from bench.work import Array, Shape, operands, worst_error

TURN_S = 0.1
MOST_CALLS = 50
TOLERANCE = 1e-4


def main(name: str, shape: Shape) -> None:
    # Asked to end in the middle of a call, it still ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    given = operands(shape)
    contender = contenders.create(name)
    try:
        contender.start()
        error = worst_error(given, contender.gradients(*given))
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} is wrong at {shape}: relative error {error}")
        _say({"ready": True, "relative_error": error})
        for _ in sys.stdin:
            _say({"calls_s": [round(s, 7) for s in turn(contender, given)]})
        _say(
            {
                "client_peak_bytes": peak_bytes("self"),
                "server_peak_bytes": contender.server_pid
                and peak_bytes(contender.server_pid),
            }
        )
    finally:
        contender.close()


def turn(contender: Contender, given: tuple[Array, Array, Array]) -> list[float]:
    """Seconds of each call of one turn."""
    calls_s: list[float] = []
    until = time.perf_counter() + TURN_S
    while not calls_s or (time.perf_counter() < until and len(calls_s) < MOST_CALLS):
        began = time.perf_counter()
        results = contender.gradients(*given)
        calls_s.append(time.perf_counter() - began)
        # Giving memory back is not part of the call, and the next one must
        # not find it still held.
        del results
    return calls_s


def peak_bytes(process: int | str) -> int:
    """Highest resident memory of a process so far."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {process}")


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Shape.parse(sys.argv[2]))
