"""Copies between host and device: one way alone, and both at once.

If copies take longest, they limit a device worker. Rows go up while results come down,
and the bus is slower in each direction then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.gpu.parts import Answer, Options, median
from gradwire_server.backends.async_device.device import Stream

SIZE = 64 << 20
_TIMES = 16
_ROUNDS = 5


def slowdown(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slowdown of each direction while the other is in use."""
    rates = {row["copies"]: row for row in rows}
    both = rates["both at once"]
    return {
        "up GB/s": rates["up alone"]["up GB/s"] / both["up GB/s"],
        "down GB/s": rates["down alone"]["down GB/s"] / both["down GB/s"],
    }


def measure(options: Options) -> Answer:
    """Measure GB/s of each direction, with the backend's own streams."""
    if options.backend != "cupy":
        return Answer("copies", skipped="there is no device beside the processor")
    from gradwire_server.backends.cuda.backend import CupyBackend  # noqa: PLC0415
    from gradwire_server.backends.cuda.host import CupyDevice, allocate  # noqa: PLC0415
    from gradwire_server.backends.cuda.memory_pool import Pool  # noqa: PLC0415

    backend = CupyBackend((0,))
    pool: Pool[Any] = Pool(allocate, max_free_bytes=0)
    device = CupyDevice(0, pool)
    memories = [device.allocate(SIZE) for _ in range(2)]
    arrays = [backend.empty(SIZE) for _ in range(2)]

    def rate(*, up: bool, down: bool) -> dict[str, float]:
        events = device.events()
        device.record(Stream.H2D, events.upload_begun)
        device.record(Stream.D2H, events.download_begun)
        for _ in range(_TIMES):
            if up:
                device.upload(arrays[0], memories[0].address)
            if down:
                device.download(memories[1].address, arrays[1])
        device.record(Stream.H2D, events.uploaded)
        device.record(Stream.D2H, events.done)
        device.synchronize_all()
        took = {
            "up GB/s": device.elapsed_s(events.upload_begun, events.uploaded),
            "down GB/s": device.elapsed_s(events.download_begun, events.done),
        }
        moved = {"up GB/s": up, "down GB/s": down}
        device.release_events(events)
        return {
            name: SIZE * _TIMES / seconds / 1e9 if moved[name] else 0.0
            for name, seconds in took.items()
        }

    ways = {"up alone": (True, False), "down alone": (False, True)}
    ways["both at once"] = (True, True)
    rows = []
    for name, (up, down) in ways.items():
        rate(up=up, down=down)
        seen = [rate(up=up, down=down) for _ in range(_ROUNDS)]
        rows.append(
            {"copies": name, "MiB each": SIZE >> 20}
            | {key: median([each[key] for each in seen]) for key in seen[0]}
        )
    backend.close()
    return Answer("copies", rows)
