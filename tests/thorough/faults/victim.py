"""A client in a process of its own, to be stopped or killed at a stage of its job.

    python -m tests.thorough.faults.victim ADDRESS EVENT

computes all results of the suite's job as `victim-EVENT`. At the EVENT-th report of
progress it prints "reached" and waits for a line on its standard input; 0 stands
for no event. Then it prints how the job ended, as JSON: the name of an error, or
null; how many events there were; and the bits of the results, in hex.
"""

from __future__ import annotations

import json
import sys
import threading

import gradwire
from tests.thorough.faults.conftest import connected
from tests.thorough.faults.jobs import bits, compute


def main(address: str, stop_at: int) -> None:
    events = 0
    lock = threading.Lock()

    def on_progress(_: gradwire.Progress) -> None:
        nonlocal events
        with lock:
            events += 1
            here = events == stop_at
        if here:
            print("reached", flush=True)
            sys.stdin.readline()

    with connected(address, retries=False) as client:
        error, found = None, ()
        try:
            result = compute(
                client,
                "all results",
                on_progress=on_progress,
                request_id=f"victim-{stop_at}",
            )
            found = bits(result, "all results")
        except gradwire.GradwireError as failed:
            error = type(failed).__name__
    ended = {"error": error, "events": events, "bits": [each.hex() for each in found]}
    print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
