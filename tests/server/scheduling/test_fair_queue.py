"""Turns of tenants whose pieces take long, and of those whose do not."""

from __future__ import annotations

from collections import Counter

from gradwire_server.scheduling.fair_queue import MAX_LEAD_S, FairQueue


class DeviceWorker:
    """Works for tenants that always want more, by a clock of its own."""

    def __init__(self) -> None:
        self.turns: FairQueue[str] = FairQueue()
        self.pieces_s: dict[str, float] = {}

    def wants(self, tenant: str, piece_s: float) -> None:
        """A tenant comes whose pieces take so long."""
        self.pieces_s[tenant] = piece_s
        self.turns.put(tenant, "job", tenant)

    def next(self) -> str:
        """Whose the next piece is; it is done, and the tenant wants another."""
        tenant = self.turns.take()
        self.turns.charge(tenant, self.pieces_s[tenant])
        self.turns.put(tenant, "job", tenant)
        return tenant


def test_tenants_get_as_much_of_a_device_however_long_their_pieces_take() -> None:
    worker = DeviceWorker()
    for tenant, piece_s in (("wide", 1.0), ("usual", 0.05), ("small", 0.01)):
        worker.wants(tenant, piece_s)
    pieces = Counter(worker.next() for _ in range(2000))
    usage_s = {tenant: pieces[tenant] * worker.pieces_s[tenant] for tenant in pieces}
    assert max(usage_s.values()) - min(usage_s.values()) <= 1.0 + MAX_LEAD_S


def test_short_pieces_are_done_in_turn() -> None:
    worker = DeviceWorker()
    for tenant in ("one", "two", "three"):
        worker.wants(tenant, MAX_LEAD_S / 50)
    assert [worker.next() for _ in range(30)] == ["one", "two", "three"] * 10


def test_what_a_tenant_did_not_want_is_not_made_up_for() -> None:
    worker = DeviceWorker()
    worker.wants("first", 0.5)
    for _ in range(100):
        worker.next()
    worker.wants("second", 0.5)
    assert [worker.next() for _ in range(4)].count("first") >= 1
    pieces = Counter(worker.next() for _ in range(100))
    assert abs(pieces["first"] - pieces["second"]) <= 1


def test_tenants_that_came_once_are_forgotten() -> None:
    worker = DeviceWorker()
    worker.wants("always", 0.01)
    for number in range(1000):
        name = f"once{number}"
        worker.turns.put(name, "job", name)
        worker.pieces_s[name] = 0.01
        for _ in range(2):
            tenant = worker.turns.take()
            worker.turns.charge(tenant, 0.01)
        worker.turns.put("always", "job", "always")
    assert len(worker.turns._usage_s) < 300
