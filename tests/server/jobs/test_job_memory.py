"""The ring of slots that a stream fills."""

from __future__ import annotations

import asyncio
import random

import pytest

from gradwire_server.backends.base import empty_aligned
from gradwire_server.backends.row_blocks import plan_row_blocks
from gradwire_server.jobs.stream.job_memory import JobMemory
from gradwire_server.jobs.stream.slots import Slots
from tests.server.specs import make_spec

BLOCKS = 40


@pytest.mark.parametrize("begun", [1, 3])
@pytest.mark.parametrize("seed", range(5))
async def test_operands_that_do_not_keep_step_never_lock_it(begun, seed):
    """The client sends X as far ahead of dY as it may, and stalls whenever it likes."""
    chance = random.Random(seed)
    spec = make_spec(m=None)
    plan = plan_row_blocks(spec, 1, begun)
    slots = Slots(plan.slots)
    ahead = plan.window_rows // plan.block_rows
    complete = [asyncio.Event() for _ in range(BLOCKS)]
    held, most = set(), 0

    async def stall():
        for _ in range(chance.choice((0, 0, 1, 50))):
            await asyncio.sleep(0)

    async def place(block):
        nonlocal most
        await slots.wait_for(block)
        held.add(block)
        most = max(most, len(held))
        await stall()

    async def send():
        for block in range(BLOCKS + ahead):
            if block < BLOCKS:  # X
                await place(block)
            if block >= ahead:  # dY
                await place(block - ahead)
                complete[block - ahead].set()

    async def leave():
        for block in range(BLOCKS):
            await complete[block].wait()
            await stall()
            held.discard(block)
            slots.release(block)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(send())
        group.create_task(leave())
    assert slots.released == BLOCKS
    assert most <= plan.slots == begun + 2


def test_the_slots_of_a_ring_share_no_byte():
    spec = make_spec(m=None)
    plan = plan_row_blocks(spec, 4096, 1)
    memory = JobMemory(spec, plan, empty_aligned(plan.region_bytes))
    arrays = [memory.w().view("u1").reshape(-1)]
    for block in range(plan.slots):
        rows = memory.rows(block, plan.block_rows)
        arrays += [each.view("u1") for each in (rows.x, rows.dy, rows.y, rows.dx)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays))
