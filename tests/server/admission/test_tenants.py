"""What tenants may have at once, and whose turn it is."""

from __future__ import annotations

import contextlib

import pytest

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_server.admission.controller import Admission
from gradwire_server.admission.quota import CALL_BYTES
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_selector import DeviceSelector
from tests.server.admission.test_controller import Jobs


def make_jobs(memory_limit=256 * MIB, max_jobs=1, max_queue=1000, **of):
    """Jobs of tenants, of which some have limits."""

    def limits_of(tenant):
        return of.get(tenant, Limits())

    return Jobs(
        Admission(memory_limit, max_jobs, max_queue, DeviceSelector(), limits_of)
    )


async def refusal(jobs, name):
    with pytest.raises(JobError) as caught:
        await jobs.tasks[name]
    return caught.value


def fill(held, admission, tenant):
    """Opens calls until there is no place for one more; why there is not."""
    for _ in range(1000):
        try:
            held.enter_context(admission.call(tenant=tenant))
        except JobError as refused:
            return refused
    raise AssertionError("there is no end")


async def test_one_job_of_a_tenant_waits_for_one_of_each_other_and_no_more():
    jobs = make_jobs()
    for number in range(100):
        await jobs.start(f"many{number}", tenant="many")
    await jobs.start("one", tenant="one")
    await jobs.start("two", tenant="two")
    assert jobs.told["one"] == [2]  # the one that runs, and one that waits
    order = []
    while jobs.running:
        (runs,) = jobs.running
        order.append(runs)
        await jobs.end(runs)
    assert order[:4] == ["many0", "many1", "one", "two"]
    assert order[4:] == [f"many{number}" for number in range(2, 100)]
    assert jobs.admission.held_bytes == 0


async def test_each_is_told_how_many_come_before_it():
    jobs = make_jobs()
    names = [f"{tenant}{number}" for tenant in "abc" for number in range(4)]
    for name in names:
        await jobs.start(name, tenant=name[0])
    told = {name: jobs.told[name][-1] for name in names if name not in jobs.running}
    order = []
    while jobs.running:
        (runs,) = jobs.running
        order.append(runs)
        await jobs.end(runs)
    assert {name: order.index(name) for name in told} == told


async def test_a_tenant_has_so_many_jobs_and_lets_others_by_meanwhile():
    jobs = make_jobs(max_jobs=9, a=Limits(max_jobs=1))
    for name in ("a0", "a1", "b0", "b1"):
        await jobs.start(name, tenant=name[0])
    assert jobs.running == ["a0", "b0", "b1"]
    await jobs.end("a0")
    assert jobs.running == ["b0", "b1", "a1"]


async def test_a_tenant_has_so_much_memory_and_lets_others_by_meanwhile():
    jobs = make_jobs(max_jobs=9, a=Limits(memory_limit=20 * MIB))
    await jobs.start("a0", 12 * MIB, tenant="a")
    await jobs.start("a1", 12 * MIB, tenant="a")
    await jobs.start("b0", 40 * MIB, tenant="b")
    assert jobs.running == ["a0", "b0"]
    await jobs.start("vast", 19 * MIB, tenant="a")
    refused = await refusal(jobs, "vast")
    assert refused.reason is Reason.JOB_TOO_LARGE
    assert refused.metadata == {"limit": "tenant_memory_limit"}
    assert "your tenant has 20971520" in refused.message
    await jobs.end("a0")
    assert jobs.running == ["b0", "a1"]


@pytest.mark.parametrize(
    ("limits", "named", "says"),
    [
        (Limits(max_queue=1), "tenant_max_queue", "and 1 wait, of at most 1"),
        (Limits(max_jobs=1, max_queue=0), "tenant_max_jobs", "1 jobs of your tenant"),
    ],
)
async def test_who_finds_its_tenants_places_taken_is_told_which(limits, named, says):
    jobs = make_jobs(max_jobs=2, a=limits)
    names = ["b0", "a0", "a1"] if limits.max_jobs else ["b0", "a0", "a1", "a2"]
    for name in names:
        await jobs.start(name, tenant=name[0])
    refused = await refusal(jobs, names[-1])
    assert refused.reason is Reason.BUSY
    assert refused.retry_after_s == pytest.approx(1)
    assert refused.metadata == {"limit": named}
    assert says in refused.message
    assert named in refused.message


async def test_a_queue_full_of_one_tenants_jobs_has_a_place_for_anothers():
    jobs = make_jobs(max_queue=3)
    for name in ("a0", "a1", "a2", "a3"):
        await jobs.start(name, tenant="a")
    await jobs.start("b0", tenant="b")
    refused = await refusal(jobs, "a3")
    assert refused.reason is Reason.BUSY
    assert refused.metadata == {"limit": "max_queue"}
    await jobs.start("b1", tenant="b")  # b has as many as a in the end, but no more
    refused = await refusal(jobs, "b1")
    assert refused.metadata == {"limit": "max_queue"}
    for expected in ("a0", "a1", "b0", "a2"):
        assert jobs.running == [expected]
        await jobs.end(expected)
    assert jobs.admission.held_bytes == 0


def test_open_calls_of_one_tenant_leave_memory_to_others():
    jobs = make_jobs(memory_limit=64 * MIB)
    with contextlib.ExitStack() as held:
        refused = fill(held, jobs.admission, "a")
        assert refused.reason is Reason.BUSY
        assert refused.metadata == {"limit": "memory_limit"}
        assert "open calls of your tenant" in refused.message
        assert jobs.admission.held_bytes <= 32 * MIB
        with jobs.admission.call(tenant="b"), jobs.admission.call(tenant="b"):
            pass
    assert jobs.admission.held_bytes == 0


def test_a_tenants_own_limit_of_memory_counts_its_open_calls():
    jobs = make_jobs(a=Limits(memory_limit=3 * CALL_BYTES))
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(jobs.admission.call(tenant="a"))
        with pytest.raises(JobError) as caught, jobs.admission.call(tenant="a"):
            pass
        assert caught.value.metadata == {"limit": "tenant_memory_limit"}
        with jobs.admission.call(tenant="b"):
            pass


async def test_who_finds_the_memory_full_of_anothers_jobs_can_still_ask():
    jobs = make_jobs(memory_limit=256 * MIB, max_jobs=9)
    for number in range(5):
        await jobs.start(f"a{number}", 60 * MIB, tenant="a")
    assert jobs.running == ["a0", "a1", "a2", "a3"]
    with jobs.admission.call(tenant="b"):
        with pytest.raises(JobError) as caught, jobs.admission.call(tenant="b"):
            pass  # one call each is kept, not more
        assert caught.value.metadata == {"limit": "memory_limit"}
        await jobs.start("b0", 60 * MIB, tenant="b")
        assert jobs.admission.held_bytes <= 256 * MIB
        await jobs.end("a0")
        await jobs.end("a1")
        assert jobs.running == ["a2", "a3", "a4", "b0"]
    for name in list(jobs.running):
        await jobs.end(name)
    assert jobs.admission.held_bytes == 0


async def test_limits_that_change_hold_for_those_who_wait():
    of = {"a": Limits(max_jobs=1)}
    jobs = Jobs(Admission(256 * MIB, 9, 9, DeviceSelector(), lambda tenant: of[tenant]))
    for name, size_bytes in (("a0", MIB), ("a1", 50 * MIB), ("a2", 10 * MIB)):
        await jobs.start(name, size_bytes, tenant="a")
    of["a"] = Limits(max_jobs=1, memory_limit=40 * MIB)
    await jobs.end("a0")
    assert (await refusal(jobs, "a1")).reason is Reason.JOB_TOO_LARGE
    assert jobs.running == ["a2"]


def test_what_a_tenant_can_have_is_the_least_of_both():
    jobs = make_jobs(max_jobs=5, max_queue=9, a=Limits(7, 32 * MIB, 3))
    assert jobs.admission.limits("a") == Limits(5, 32 * MIB, 3)
    assert jobs.admission.limits("b") == Limits(5, 240 * MIB, 9)


def test_tenants_that_hold_nothing_are_forgotten():
    jobs = make_jobs()
    for number in range(1000):
        with jobs.admission.call(tenant=str(number)):
            pass
    assert not jobs.admission._ledger.tenants
