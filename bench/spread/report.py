"""Figures of spread jobs from the lines that workers print."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from bench.report import tables
from bench.report.bound import Bound
from bench.work import Shape

Line: TypeAlias = Mapping[str, Any]
Lines: TypeAlias = Sequence[Line]

MOST_CPU = 1.15
"""Most processor time of a spread job, over the same job at one server."""
MOST_BYTES = 1.05
MOST_BYTES_SHAPE = "1024x1024"
LEAST_SPEEDUP = 2.3
MOST_LATE = {"killed": 2.0, "stopped": 4.0, "stopped before": 4.0}
"""Most segments' time that a job with a failing server takes longer than the servers
that are left need."""
OTHER_BYTES = 2 << 20
"""What a client may need for threads and connections, beside arrays and sums."""
MOST_FIRST = 1.3
"""Most time until the first block of a spread stream, over one server's."""
SERVERS = 3


def sums_bytes(servers: int, sum_bytes: int) -> int:
    """Most bytes of sums that a client holds.

    Args:
        servers: Number of servers with one device.
        sum_bytes: Bytes of the sum of dW in the accumulator's dtype.
    """
    return (2 * servers + 1) * sum_bytes


def left_s(undisturbed_s: float, at_s: float, servers: int = SERVERS) -> float:
    """Seconds of a job, one of whose servers computes nothing from a moment on.

    Args:
        undisturbed_s: Seconds of the job with all servers.
        at_s: When the server fails, in seconds from the job's beginning.
        servers: Number of servers.
    """
    rest_s = max(0.0, undisturbed_s - at_s)
    return undisturbed_s - rest_s + rest_s * servers / (servers - 1)


def late(line: Line) -> float:
    """How many segments' time a job took longer than the servers left need."""
    expected_s = left_s(line["undisturbed_s"], line["at_s"])
    return float((line["seconds"] - expected_s) / line["segment_s"])


def cpu_table(lines: Lines) -> str:
    body = []
    for way, taken in _ways(lines).items():
        per_gb = [_cpu_s_per_gb(each) for each in taken]
        gb = taken[0]["bytes"] / 1e9
        body.append(
            (
                way,
                taken[0]["over"],
                str(taken[0]["jobs"]),
                f"{statistics.median(per_gb):.2f}",
                f"{min(per_gb):.2f}",
                f"{_median(taken, 'client_cpu_s') / gb:.2f}",
                f"{_median(taken, 'server_cpu_s') / gb:.2f}",
                f"{statistics.median(_ratios(lines, way, _cpu_s_per_gb)):.3f}",
                f"{_median(taken, 'switches') / gb:.0f}",
                tables.milliseconds(_median(taken, "seconds")),
                str(len(taken)),
            )
        )
    head = ("way", "over", "jobs", "CPU s/GB", "min", "client", "servers", "x plain")
    return tables.table(body, (*head, "switches/GB", "median ms", "rounds"), texts=2)


def cpu_bounds(lines: Lines) -> Iterator[Bound]:
    of = f"{lines[0]['shape']} at {lines[0]['servers']}"
    for way in _ways(lines):
        if way != "plain":
            ratio = statistics.median(_ratios(lines, way, _cpu_s_per_gb))
            yield Bound(f"5: CPU, {of}: {way} / plain", ratio, MOST_CPU)


def bytes_table(lines: Lines) -> str:
    body = [
        (
            line["shape"],
            str(line["servers"]),
            str(line["segments"]),
            str(line["jobs"]),
            str(line["segment_rows"]),
            f"{line['up'] / 1e6:.1f}",
            f"{line['down'] / 1e6:.1f}",
            f"{line['up'] / line['plain_up']:.4f}",
            f"{line['down'] / line['plain_down']:.4f}",
            f"{byte_ratio(line):.4f}",
            f"{many_segments(line):.4f}" if line["segments"] > 1 else "",
        )
        for line in lines
    ]
    head = ("shape", "servers", "segments", "jobs", "rows of one", "MB up", "MB down")
    ratios = ("up x plain", "down x plain", "both x plain", "with many segments")
    return tables.table(body, (*head, *ratios), texts=1)


def byte_ratio(line: Line) -> float:
    """Bytes both ways, over those of the same job at one server."""
    plain = line["plain_up"] + line["plain_down"]
    return float((line["up"] + line["down"]) / plain)


def many_segments(line: Line) -> float:
    """The ratio of `byte_ratio` for a job of very many such segments.

    The plain job's W and dW then count for nothing.
    """
    shape = Shape.parse(line["shape"])
    rows = 2 * (shape.bytes_each_way - 4 * shape.n * shape.k)
    of_a_segment = (line["up"] + line["down"] - rows) / line["segments"]
    return 1 + float(of_a_segment / (rows * line["segment_rows"] / shape.m))


def bytes_bounds(lines: Lines) -> Iterator[Bound]:
    for line in lines:
        if line["shape"].endswith(f"x{MOST_BYTES_SHAPE}"):
            name = f"9: bytes, {line['shape']}, {line['servers']} servers"
            yield Bound(f"{name}: spread / plain", byte_ratio(line), MOST_BYTES)


def devices_table(lines: Lines) -> str:
    body = [
        (
            way,
            str(taken[0]["jobs"]),
            tables.milliseconds(_median(taken, "seconds")),
            tables.milliseconds(min(each["seconds"] for each in taken)),
            tables.milliseconds(_median(taken, "computing_s")),
            f"{1 / statistics.median(_ratios(lines, way, _seconds)):.2f}",
            str(len(taken)),
        )
        for way, taken in _ways(lines).items()
    ]
    head = ("way", "jobs", "median ms", "min ms", "devices busy ms", "times as fast")
    return tables.table(body, (*head, "rounds"), texts=1)


def devices_bounds(lines: Lines) -> Iterator[Bound]:
    for way in ("spread 3", "3 devices"):
        if way in _ways(lines):
            speedup = 1 / statistics.median(_ratios(lines, way, _seconds))
            name = f"6: devices: plain / {way}"
            yield Bound(name, speedup, LEAST_SPEEDUP, at_least=True)


def failing_table(lines: Lines) -> str:
    body = []
    for way, taken in _ways(lines).items():
        over = [
            (each["seconds"] - each["undisturbed_s"]) / each["segment_s"]
            for each in taken
        ]
        body.append(
            (
                way,
                tables.milliseconds(_median(taken, "undisturbed_s")),
                tables.milliseconds(_median(taken, "segment_s")),
                tables.milliseconds(_median(taken, "at_s")),
                tables.milliseconds(_median(taken, "seconds")),
                f"{statistics.median(over):.1f}",
                f"{statistics.median(map(late, taken)):.1f}",
                f"{max(map(late, taken)):.1f}",
                "all" if all(each["same"] for each in taken) else "NO",
                "YES" if any(each["written_later"] for each in taken) else "none",
                str(len(taken)),
            )
        )
    head = ("server", "undisturbed ms", "a segment ms", "at ms", "median ms")
    segments = ("segments over undisturbed", "over two servers", "most")
    checks = ("right", "written later", "rounds")
    return tables.table(body, (*head, *segments, *checks), texts=1)


def failing_bounds(lines: Lines) -> Iterator[Bound]:
    for way, taken in _ways(lines).items():
        bar = 2 if way == "killed" else 3
        median = statistics.median(map(late, taken))
        name = f"{bar}: {way}: segments' time over two servers"
        yield Bound(name, median, MOST_LATE[way])
        wrong = sum(not each["same"] or each["written_later"] for each in taken)
        yield Bound(f"{bar}: {way}: wrong, or written later", wrong, 0)


def memory_table(lines: Lines) -> str:
    body = [
        (
            f"spread {line['servers']}" if line["servers"] else "plain",
            str(line["segments"] or ""),
            _mib(line["above"]),
            _mib(sums_bytes(line["servers"], line["sum_bytes"]))
            if line["servers"]
            else "",
        )
        for line in lines
    ]
    head = ("way", "segments", "MiB above arrays", "(2N + 1) n k")
    return tables.table(body, head, texts=1)


def memory_bounds(lines: Lines) -> Iterator[Bound]:
    for line in lines:
        if line["servers"]:
            most = sums_bytes(line["servers"], line["sum_bytes"]) + OTHER_BYTES
            name = f"8: memory: spread {line['servers']} / ((2N + 1) n k + 2 MiB)"
            yield Bound(name, line["above"] / most, 1)


def stream_table(lines: Lines) -> str:
    if "skipped" in lines[0]:
        return str(lines[0]["skipped"])
    body = [
        (
            way,
            str(taken[0]["blocks"]),
            tables.milliseconds(_median(taken, "first_s")),
            tables.milliseconds(min(each["first_s"] for each in taken)),
            f"{statistics.median(_ratios(lines, way, _first_s)):.2f}",
            tables.milliseconds(_median(taken, "seconds")),
            str(len(taken)),
        )
        for way, taken in _ways(lines).items()
    ]
    head = ("way", "blocks", "first block ms", "min ms", "x plain", "all ms", "rounds")
    return tables.table(body, head, texts=1)


def stream_bounds(lines: Lines) -> Iterator[Bound]:
    for way in _ways(lines):
        if way.startswith("spread"):
            ratio = statistics.median(_ratios(lines, way, _first_s))
            name = f"7: first block at {lines[0]['servers']}: {way} / plain"
            yield Bound(name, ratio, MOST_FIRST)


TABLES: Mapping[str, Callable[[Lines], str]] = {
    "cpu": cpu_table,
    "bytes": bytes_table,
    "devices": devices_table,
    "failing": failing_table,
    "memory": memory_table,
    "stream": stream_table,
}
BOUNDS: Mapping[str, Callable[[Lines], Iterable[Bound]]] = {
    "cpu": cpu_bounds,
    "bytes": bytes_bounds,
    "devices": devices_bounds,
    "failing": failing_bounds,
    "memory": memory_bounds,
    "stream": stream_bounds,
}


def loads(lines: Lines) -> str:
    """The machine's load during a part."""
    seen = [line["load"] for line in lines]
    return f"{min(seen):.0f} to {max(seen):.0f}"


def _ways(lines: Lines) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "way" in line:
            found.setdefault(line["way"], []).append(line)
    return found


def _ratios(lines: Lines, way: str, figure: Callable[[Line], float]) -> list[float]:
    """The ratios of a way's figure to the plain job's of the same round."""
    ways = _ways(lines)
    base = {line["round"]: figure(line) for line in ways["plain"]}
    return [
        figure(line) / base[line["round"]]
        for line in ways[way]
        if line["round"] in base
    ]


def _cpu_s_per_gb(line: Line) -> float:
    cpu_s = line["client_cpu_s"] + line["server_cpu_s"]
    return float(cpu_s / (line["bytes"] / 1e9))


def _seconds(line: Line) -> float:
    return float(line["seconds"])


def _first_s(line: Line) -> float:
    return float(line["first_s"])


def _median(lines: Iterable[Line], name: str) -> float:
    return statistics.median(line[name] for line in lines)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f}"
