"""The model: one client, servers, and the segments of a job between them.

Simulated are the client's card, cores, and the one thread that adds sums; each server's
link, cores and device; jobs with their windows. `Plan` says who moves W and adds sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from bench.scale.figures import Host
from bench.scale.setting import Setting
from bench.scale.stations import Card, Connection, Process, Station
from bench.scale.workload import Workload
from gradwire_protocol.limits import MIB

MESSAGES = 4_000
"""About so many messages each way are simulated; a message has at least a MiB."""
_SLICES = 64
"""A sum passes from server to server in at most so many slices."""

_MOSTLY = 0.6

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Outcome:
    """What the model says of a job."""

    seconds: float
    gb_per_s: float
    """Operands and results of the job on one server over the time."""
    busy: dict[str, float]
    """Of what bounds it, the busiest first: the part of the time in which it works."""

    @property
    def bound(self) -> str:
        """What bounds the job; "waiting" if nothing is busy for most of the time."""
        first = next(iter(self.busy))
        return first if self.busy[first] > _MOSTLY else "waiting"


def simulate(work: Workload, setting: Setting) -> Outcome:
    """Run the job in the model."""
    model = _Model(work, setting)
    seconds = model.run()
    return Outcome(seconds, work.gigabytes / seconds, model.busy(seconds))


class _Server:
    """A server: link, process, device."""

    def __init__(
        self, env: simpy.Environment, setting: Setting, cores: Station
    ) -> None:
        self.card = Card(env, setting.server_gbits)
        self.device = Station(env)
        self.adder = Station(env)
        own = cores if setting.one_host else Station(env, setting.server.cores)
        self.process = _process(env, own, setting.server)
        self.has_w = env.event()


def _process(env: simpy.Environment, cores: Station, host: Host) -> Process:
    each = (host.send_s_per_gb, host.receive_s_per_gb, host.lock_s_per_gb)
    return Process(env, cores, *(s / 1e9 for s in each))


class _Model:
    def __init__(self, work: Workload, setting: Setting) -> None:
        self._work, self._setting = work, setting
        self._plan, self._costs = setting.plan, setting.costs
        self._env = env = simpy.Environment()
        cores = Station(env, setting.client.cores)
        self._process = _process(env, cores, setting.client)
        self._card = Card(env, setting.client_gbits)
        self._adder = Station(env)
        self._servers = [_Server(env, setting, cores) for _ in range(setting.servers)]
        moved = work.rows_bytes + work.segments * max(work.w_bytes, work.sum_bytes)
        self._message = max(MIB, moved // MESSAGES)
        self._uploads = simpy.Resource(env, setting.plan.uploads or 1)
        self._next = 0
        self._ahead = setting.plan.held(work, setting.servers)
        # Of sums that servers hold, the client waits for none.
        self._added = 0 if setting.plan.sums == "client" else work.segments
        self._room = env.event()
        self._summed = [env.event() for _ in range(work.segments)]
        self._owner: dict[int, _Server] = {}
        self._in_progress: list[Counter[str]] = []
        """Segments that jobs have begun and not completed."""

    def run(self) -> float:
        """Run the job; return its seconds."""
        env = self._env
        if self._plan.w == "tree":
            self._pass_on_w()
        runs: list[range] = []
        if self._plan.segments_a_job is not None:
            runs = self._plan.runs_of(self._work, len(self._servers))[::-1]
        # The first segments go to different servers.
        workers = [
            env.process(self._worker(server, runs))
            for _ in range(self._plan.jobs)
            for server in self._servers
        ]
        done = env.all_of([*workers, env.process(self._reduce())])
        env.run(done)
        return float(env.now)

    # Jobs.

    def _worker(self, server: _Server, runs: list[range]) -> Events:
        if self._plan.segments_a_job is None:
            yield self._env.process(self._job(server, None))
            return
        while runs:
            if runs[-1].start - self._added >= self._ahead:
                yield self._room
                continue
            yield self._env.process(self._job(server, runs.pop()))

    def _take(self, in_progress: Counter[str]) -> Events:
        """Return the next segment; None if there are no more."""
        servers = len(self._servers)
        while (left := self._work.segments - self._next) > 0:
            idle = sum(not each["segments"] for each in self._in_progress)
            idle += servers - len(self._in_progress)
            ahead = self._plan.may_be_ahead(self._work, left, servers, idle)
            held = self._next - self._added
            if in_progress["segments"] < ahead and held < self._ahead:
                self._next += 1
                return self._next - 1
            yield self._room
        return None

    def _job(self, server: _Server, run: range | None) -> Events:
        """Compute the segments of a run; None: take segments one by one."""
        env, work, costs, plan = self._env, self._work, self._costs, self._plan
        for process, host in (
            (self._process, self._setting.client),
            (server.process, self._setting.server),
        ):
            yield process.compute(host.job_s, host.job_lock_s)
        yield env.timeout(costs.job_s + costs.round_trip_s)
        up, down = self._connections(server)
        sends = self._uploads.request() if plan.uploads else None
        if sends:
            yield sends
        if plan.w == "tree":
            yield server.has_w
        elif plan.w == "job" or not server.has_w.triggered:
            if plan.w == "server":
                server.has_w.succeed()
            up.send(work.w_bytes, self._message, "W")
        slots = simpy.Container(env, init=self._setting.device.slots)
        ended, arrived = [], env.event()
        in_progress: Counter[str] = Counter()
        self._in_progress.append(in_progress)
        segments = iter(run or ())
        while True:
            if run is None:
                segment = yield from self._take(in_progress)
            else:
                segment = next(segments, None)
            if segment is None:
                break
            self._owner[segment] = server
            in_progress["segments"] += 1
            blocks = work.blocks_of(segment)
            for index, rows in enumerate(blocks):
                yield slots.get(1)
                arrived = env.event()
                of_last = segment if index == len(blocks) - 1 else None
                block = self._block(
                    server, up, down, rows, of_last, slots, arrived, in_progress
                )
                ended.append(env.process(block))
        if sends:
            yield arrived
            self._uploads.release(sends)
        yield env.all_of(ended)
        yield env.timeout(costs.round_trip_s / 2)

    def _block(
        self,
        server: _Server,
        up: Connection,
        down: Connection,
        rows: int,
        segment: int | None,
        slots: simpy.Container,
        arrived: simpy.Event,
        in_progress: Counter[str],
    ) -> Events:
        work, device = self._work, self._setting.device
        size = rows * work.row_bytes if self._plan.rows == "client" else 0
        # Empty without rows: it still comes after W.
        up.send(size, self._message, "rows", arrived.succeed)
        yield arrived
        seconds = device.seconds(work, rows)
        if device.cores:
            host = self._setting.server
            s_per_gb = host.send_s_per_gb + host.receive_s_per_gb
            seconds += size / 1e9 * s_per_gb / device.cores
        yield server.device.use(seconds)
        asked = segment is not None and self._costs.sums_queue
        ready = server.device.use(0.0) if asked else None
        returned = self._env.event()
        down.send(size, self._message, "rows", returned.succeed)
        if segment is not None:
            summed = self._summed[segment]
            if ready is not None:
                yield ready
            if self._plan.sums == "client":
                down.send(work.sum_bytes, self._message, "sums", summed.succeed)
                yield returned & summed
            else:
                summed.succeed()
                yield returned
            in_progress["segments"] -= 1
            self._tell()
        else:
            yield returned
        yield slots.put(1)

    def _connections(self, server: _Server) -> tuple[Connection, Connection]:
        """A job's connections to the server, and back."""
        window, latency_s = self._costs.window_bytes, self._costs.round_trip_s / 2
        card, link = self._card, server.card
        up = [(card.up, card.s_per_byte), (link.down, link.s_per_byte)]
        down = [(link.up, link.s_per_byte), (card.down, card.s_per_byte)]
        return (
            Connection(self._process, up, server.process, latency_s, window),
            Connection(server.process, down, self._process, latency_s, window),
        )

    # W.

    def _pass_on_w(self) -> None:
        """Send W to the first server, and from each server to two others."""
        size = self._work.w_bytes
        message = max(MIB, size // _SLICES)
        servers = self._servers

        def receive(index: int) -> Any:
            missing = [-(-size // message)]
            children = [
                self._between(servers[index], servers[child], receive(child))
                for child in (2 * index + 1, 2 * index + 2)
                if child < len(servers)
            ]

            def received(part: int) -> None:
                for child in children:
                    child(part)
                missing[0] -= 1
                if not missing[0]:
                    servers[index].has_w.succeed()

            return received

        first, _ = self._connections(servers[0])
        forward = receive(0)
        while size > 0:
            part = min(message, size)
            first.send(part, part, "W", lambda part=part: forward(part))
            size -= part

    def _between(self, source: _Server, target: _Server, done: Any) -> Any:
        out, into = source.card, target.card
        link = Connection(
            source.process,
            [(out.up, out.s_per_byte), (into.down, into.s_per_byte)],
            target.process,
            self._costs.round_trip_s / 2,
            self._costs.window_bytes,
        )
        return lambda part: link.send(part, part, "W", lambda: done(part))

    # Sums.

    def _reduce(self) -> Events:
        if self._plan.sums == "client":
            seconds = self._work.sum_bytes / self._costs.add_bytes_per_s
            for summed in self._summed:
                yield summed
                yield self._process.cores.use(seconds, "sums")
                self._adder.busy_s["sums"] += seconds
                self._add()
            return
        slices = max(1, min(_SLICES, self._work.sum_bytes // MIB))
        size = self._work.sum_bytes / slices
        pass_on = self._chain if self._plan.sums == "chain" else self._tree
        yield self._env.all_of(
            [self._env.process(pass_on(size)) for _ in range(slices)]
        )

    def _add(self) -> None:
        self._added += 1
        self._tell()

    def _tell(self) -> None:
        """Have all look again whether they may begin a segment."""
        room, self._room = self._room, self._env.event()
        room.succeed()

    def _chain(self, size: float) -> Events:
        for segment, summed in enumerate(self._summed):
            yield summed
            if segment:
                yield from self._hand_over(segment - 1, segment, size)
        yield from self._to_client(self._owner[self._work.segments - 1], size)

    def _tree(self, size: float) -> Events:
        yield self._env.process(self._node(0, self._work.segments, size))
        yield from self._to_client(self._owner[0], size)

    def _node(self, first: int, end: int, size: float) -> Events:
        """Bring a slice of the sums of these segments to the server of the first."""
        if end - first == 1:
            yield self._summed[first]
            return
        # The same shape for any number of servers, and of further segments.
        middle = first + (1 << ((end - first - 1).bit_length() - 1))
        yield self._env.all_of(
            [
                self._env.process(self._node(first, middle, size)),
                self._env.process(self._node(middle, end, size)),
            ]
        )
        yield from self._hand_over(middle, first, size)

    def _hand_over(self, source: int, target: int, size: float) -> Events:
        """Move a slice between the servers of two segments, and add it there."""
        a, b = self._owner[source], self._owner[target]
        if a is not b:
            yield a.process.handle(size, a.process.send_s, "sums")
            yield a.card.up.use(size * a.card.s_per_byte, "sums")
            delay_s = self._costs.round_trip_s / 2
            yield b.card.down.use(size * b.card.s_per_byte, "sums", delay_s)
            yield b.process.handle(size, b.process.receive_s, "sums")
        yield b.adder.use(size / self._costs.add_bytes_per_s, "sums")

    def _to_client(self, server: _Server, size: float) -> Events:
        yield server.process.handle(size, server.process.send_s, "sums")
        yield server.card.up.use(size * server.card.s_per_byte, "sums")
        delay_s = self._costs.round_trip_s / 2
        yield self._card.down.use(size * self._card.s_per_byte, "sums", delay_s)
        yield self._process.handle(size, self._process.receive_s, "sums")

    # What bounds it.

    def busy(self, seconds: float) -> dict[str, float]:
        """How busy each part was, the busiest first."""
        found: Counter[str] = Counter()
        up, down = self._card.up.busy_s, self._card.down.busy_s
        parts = {
            "client card": max(up["rows"], down["rows"]),
            "W": up["W"],
            "sums": down["sums"],
        }
        # Busy in one direction at a time is busy, too.
        found[max(parts, key=lambda part: parts[part])] = self._card.busy_s / seconds
        for station, otherwise in (
            (self._process.cores, "client CPU"),
            (self._process.lock, "client Python"),
        ):
            spent = station.busy_s
            name = next(
                (part for part in ("W", "sums") if spent[part] > spent.total() / 2),
                otherwise,
            )
            found[name] = max(found[name], station.share(seconds))
        found["sums"] = max(
            found["sums"],
            self._adder.share(seconds),
            *(server.adder.share(seconds) for server in self._servers),
        )
        for server in self._servers:
            found["devices"] = max(found["devices"], server.device.share(seconds))
            link = max(way.share(seconds) for way in (server.card.up, server.card.down))
            found["server links"] = max(found["server links"], link)
        few = self._work.segments < 2 * len(self._servers) > 2
        order = dict(found.most_common())
        top = next(iter(order))
        if few and top in {"devices", "server links"}:
            order = {"segments": order[top], **order}
        return order
