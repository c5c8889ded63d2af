"""The pool that keeps memory for the next job."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest

from gradwire_protocol.limits import MIB
from gradwire_server.backends.cuda.memory_pool import GRAIN_BYTES, Pool, rounded_up
from gradwire_server.backends.cuda.pinned import empty_pinned


class Memory:
    """What a system gives: an address, until the last reference is gone."""

    def __init__(self, system, size_bytes):
        if system.taken_bytes + size_bytes > system.size_bytes:
            raise MemoryError("the system has no more")
        self._system = system
        self._size_bytes = size_bytes
        self._array = np.empty(size_bytes, np.uint8)
        self.ptr = self._array.ctypes.data
        system.taken_bytes += size_bytes
        system.calls += 1

    def __del__(self):
        if hasattr(self, "ptr"):
            self._system.taken_bytes -= self._size_bytes


class System:
    def __init__(self, size_bytes=64 * MIB):
        self.size_bytes = size_bytes
        self.taken_bytes = 0
        self.calls = 0

    def allocate(self, size_bytes):
        return Memory(self, size_bytes)


def make_pool(system, **options):
    return Pool(system.allocate, **{"max_free_bytes": 16 * MIB} | options)


def test_memory_that_is_given_back_serves_the_next_of_its_size():
    system = System()
    pool = make_pool(system)
    first = pool.take(MIB)
    address = first.memory.ptr
    first.free()
    first.free()
    second, third = pool.take(MIB - 5), pool.take(MIB)
    assert second.memory.ptr == address
    assert third.memory.ptr != address
    assert system.calls == 2
    assert pool.taken_bytes == system.taken_bytes == 2 * MIB


def test_no_piece_is_larger_than_was_asked_for_by_more_than_the_spare():
    system = System()
    exact, loose = make_pool(system), make_pool(system, spare=1.25)
    for pool in (exact, loose):
        pool.take(MIB).free()
        assert pool.take(MIB // 2).size_bytes == MIB // 2
    assert exact.take(MIB * 15 // 16).size_bytes == MIB * 15 // 16
    assert loose.take(MIB * 15 // 16).size_bytes == MIB


def test_no_more_is_kept_than_the_bound():
    system = System()
    pool = make_pool(system, max_free_bytes=3 * MIB)
    pieces = [pool.take(MIB) for _ in range(10)]
    for piece in pieces:
        piece.free()
    del pieces, piece
    pool.take(2 * MIB).free()
    pool.take(GRAIN_BYTES).free()
    assert system.taken_bytes <= 3 * MIB + GRAIN_BYTES
    pool.clear()
    assert pool.taken_bytes == system.taken_bytes == 0


def test_many_small_pieces_are_not_kept():
    system = System()
    pool = make_pool(system)
    for piece in [pool.take(1) for _ in range(500)]:
        piece.free()
    del piece
    pool.take(MIB).free()
    assert system.taken_bytes < 100 * GRAIN_BYTES + MIB


def test_what_is_kept_makes_room_within_the_limit():
    system = System()
    pool = make_pool(system, limit_bytes=4 * MIB)
    kept, used = pool.take(2 * MIB), pool.take(MIB)
    kept.free()
    del kept
    pool.take(3 * MIB)
    with pytest.raises(MemoryError, match="in use"):
        pool.take(2 * MIB)
    used.free()
    assert pool.taken_bytes <= 4 * MIB


def test_what_is_kept_makes_room_where_the_system_has_no_more():
    system = System(4 * MIB)
    pool = make_pool(system)
    pool.take(3 * MIB).free()
    large = pool.take(4 * MIB)
    with pytest.raises(MemoryError, match="the system"):
        pool.take(MIB)
    assert pool.taken_bytes == system.taken_bytes == 4 * MIB
    large.free()
    assert pool.take(4 * MIB).size_bytes == 4 * MIB


def test_an_array_has_its_memory_until_the_last_view_of_it_is_gone():
    system = System()
    pool = make_pool(system)
    array = empty_pinned(pool, 1000)
    assert array.shape == (1000,)
    assert array.flags.writeable
    array[:] = 7
    view = array[4:].view(np.float32)
    address = array.ctypes.data
    del array
    gc.collect()
    assert empty_pinned(pool, 1000).ctypes.data != address
    assert view.view(np.uint8).max() == 7
    del view
    addresses = {empty_pinned(pool, 1000).ctypes.data for _ in range(3)}
    assert address in addresses
    assert empty_pinned(pool, 0).size == 0
    assert system.calls == 2


def test_threads_share_a_pool():
    system = System()
    pool = make_pool(system, spare=1.25, limit_bytes=64 * MIB)

    def work(seed):
        random = Random(seed)
        held = []
        for _ in range(300):
            size = random.randrange(1, MIB)
            held.append(empty_pinned(pool, size))
            held[-1][:] = seed
            if len(held) > 3:
                oldest = held.pop(0)
                assert (oldest == oldest[0]).all()
                del oldest

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()
    pool.clear()
    assert pool.taken_bytes == 0


def test_sizes_are_rounded_up_a_little():
    assert rounded_up(0) == 0
    assert rounded_up(1) == GRAIN_BYTES
    assert rounded_up(GRAIN_BYTES) == GRAIN_BYTES
    assert rounded_up(100 * MIB + 1) == 100 * MIB + GRAIN_BYTES
