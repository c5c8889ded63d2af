"""The client's end of one part: ``python -m bench.spread.worker JSON``.

Its argument names the part and says what to measure. Everything that it measures is a
line of JSON on its standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from bench.spread import costs, times
from bench.spread.servers import Say

PARTS: dict[str, Callable[[dict[str, Any], Say], None]] = {
    "cpu": costs.cpu,
    "bytes": costs.count_bytes,
    "memory": costs.memory,
    "devices": times.devices,
    "failing": times.failing,
    "stream": times.stream,
}


def main(given: dict[str, Any]) -> None:
    # Terminated in the middle of a call, the worker still ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def say(**fields: Any) -> None:
        load = round(os.getloadavg()[0], 1)
        print(json.dumps({**fields, "load": load}), flush=True)

    PARTS[given["part"]](given, say)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
