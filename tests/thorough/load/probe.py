"""Asks for a server's health every 10 ms, in a process of its own.

    python -m tests.thorough.load.probe ADDRESS

prints a line when it has begun; when its standard input is closed it prints
as JSON the latencies of all checks in seconds. A check that fails or that says
anything but SERVING counts as an hour.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

INTERVAL_S = 0.01
NEVER_S = 3600.0


def main(address: str) -> None:
    closed = threading.Event()

    def wait_for_close() -> None:
        sys.stdin.read()
        closed.set()

    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest()
        check(request, timeout=10)
        print("begun", flush=True)
        threading.Thread(target=wait_for_close, daemon=True).start()
        latencies: list[float] = []
        while not closed.wait(INTERVAL_S):
            started = time.perf_counter()
            try:
                answer = check(request, timeout=10)
                serving = answer.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                serving = False
            seconds = time.perf_counter() - started
            latencies.append(seconds if serving else NEVER_S)
    print(json.dumps(latencies), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
