"""What a byte passes on its way: cores, cards, links, and the threads beside them.

A station serves first come, first served, and a message is small beside a row block. A
connection has few messages on the way, so that many connections take turns message by
message, as TCP's do: this comes to sharing the station evenly, and needs one event for
a message where fluid rates would change for all connections with every block.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence

import simpy

Done = Callable[[], None]

FEW = 6
"""So many messages of a connection keep every station on its way busy."""


class Station:
    """Serves requests in the order in which they come, `width` at a time."""

    def __init__(self, env: simpy.Environment, width: int = 1) -> None:
        self._env = env
        self._free_at = [0.0] * width
        self.busy_s: Counter[str] = Counter()
        """Seconds of service, by kind."""

    def book(self, seconds: float, kind: str = "") -> float:
        """Take the next free time; return in how many seconds it ends."""
        now = self._env.now
        start = max(now, self._free_at[0])
        heapq.heapreplace(self._free_at, start + seconds)
        self.busy_s[kind] += seconds
        return float(start + seconds - now)

    def use(self, seconds: float, kind: str = "", delay_s: float = 0.0) -> simpy.Event:
        """Occur when the request has been served, and `delay_s` later."""
        return self._env.timeout(self.book(seconds, kind) + delay_s)

    def share(self, seconds: float) -> float:
        """The part of so many seconds in which it was busy."""
        return self.busy_s.total() / (len(self._free_at) * seconds)


class Card:
    """A network card with its link: both directions at the same time, at one rate."""

    def __init__(self, env: simpy.Environment, gbits: float) -> None:
        self.s_per_byte = 8e-9 / gbits
        self.up = _Direction(env, self)
        self.down = _Direction(env, self)
        self.busy_s = 0.0
        """Seconds in which at least one direction was busy."""
        self.busy_until = 0.0


class _Direction(Station):
    def __init__(self, env: simpy.Environment, card: Card) -> None:
        super().__init__(env)
        self._card = card

    def book(self, seconds: float, kind: str = "") -> float:
        ends_in = super().book(seconds, kind)
        card, now = self._card, self._env.now
        # Without a gap: it serves from now on, or what was booked before until then.
        end = now + ends_in
        card.busy_s += max(end - max(card.busy_until, now), 0.0)
        card.busy_until = max(card.busy_until, end)
        return ends_in


class Process:
    """A Python process: cores, and an interpreter whose lock one thread has at a time.

    Args:
        send_s, receive_s: Processor seconds for a byte.
        lock_s: Of these, what the interpreter's lock is held for.
    """

    def __init__(
        self,
        env: simpy.Environment,
        cores: Station,
        send_s: float,
        receive_s: float,
        lock_s: float,
    ) -> None:
        self._env = env
        self.cores = cores
        self.lock = Station(env)
        self.send_s, self.receive_s, self._lock_s = send_s, receive_s, lock_s

    def handle(self, size: float, s_per_byte: float, kind: str = "") -> simpy.Event:
        """Occur when a thread has sent or received so many bytes."""
        on_core_s = self.cores.book(size * s_per_byte, kind)
        locked_s = self.lock.book(size * min(self._lock_s, s_per_byte), kind)
        return self._env.timeout(max(on_core_s, locked_s))

    def compute(self, seconds: float, locked_s: float) -> simpy.Event:
        """Occur when the process has used so many seconds, some of them locked."""
        on_core_s = self.cores.book(seconds)
        return self._env.timeout(max(on_core_s, self.lock.book(locked_s)))


class Thread:
    """Works through messages one by one, on whichever core is free."""

    def __init__(self, process: Process, s_per_byte: float) -> None:
        self._process, self._s_per_byte = process, s_per_byte
        self._waiting: deque[tuple[int, str, Done]] = deque()
        self._idle = True

    def put(self, size: int, kind: str, done: Done) -> None:
        self._waiting.append((size, kind, done))
        if self._idle:
            self._next()

    def _next(self) -> None:
        if not self._waiting:
            self._idle = True
            return
        self._idle = False
        size, kind, done = self._waiting.popleft()

        def finished(_: simpy.Event) -> None:
            done()
            self._next()

        _then(self._process.handle(size, self._s_per_byte, kind), finished)


class Connection:
    """One direction of a job: a thread at each end, and few messages on the way.

    Args:
        sender, receiver: The two ends.
        path: Stations on the way, each with its seconds for a byte.
        latency_s: From the last station to the receiver.
        window_bytes: At most so much is on the way, or `FEW` messages.
    """

    def __init__(
        self,
        sender: Process,
        path: Sequence[tuple[Station, float]],
        receiver: Process,
        latency_s: float,
        window_bytes: float,
    ) -> None:
        self._sender = Thread(sender, sender.send_s)
        self._receiver = Thread(receiver, receiver.receive_s)
        self._path = path
        self._latency_s = latency_s
        self._window = window_bytes
        self._on_the_way = self._messages = 0
        self._queue: deque[tuple[int, str, Done]] = deque()

    def send(
        self, size: int, message: int, kind: str, done: Done | None = None
    ) -> None:
        """Send `size` bytes in messages; `done` when the last one was received."""
        while size > message:
            self._queue.append((message, kind, _nothing))
            size -= message
        self._queue.append((size, kind, done or _nothing))
        self._pump()

    def _pump(self) -> None:
        while self._queue and (
            self._messages < FEW or self._on_the_way + self._queue[0][0] <= self._window
        ):
            size, kind, done = self._queue.popleft()
            self._messages += 1
            self._on_the_way += size
            self._start(size, kind, done)

    def _start(self, size: int, kind: str, done: Done) -> None:
        def received() -> None:
            self._messages -= 1
            self._on_the_way -= size
            done()
            self._pump()

        def arrived(_: simpy.Event) -> None:
            self._receiver.put(size, kind, received)

        def travel(hop: int) -> None:
            station, s_per_byte = self._path[hop]
            last = hop == len(self._path) - 1
            event = station.use(
                size * s_per_byte, kind, self._latency_s if last else 0.0
            )
            _then(event, arrived if last else lambda _: travel(hop + 1))

        self._sender.put(size, kind, lambda: travel(0))


def _nothing() -> None:
    """Do nothing."""


def _then(event: simpy.Event, do: Callable[[simpy.Event], None]) -> None:
    assert event.callbacks is not None
    event.callbacks.append(do)
