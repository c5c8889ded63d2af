"""Memory of results that is used again."""

from __future__ import annotations

import gc
import threading

import numpy as np

from gradwire._arrays.buffer_pool import ResultPool
from gradwire_protocol.limits import MIB

F4 = np.dtype(np.float32)


def address(array) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_array_is_gone() -> None:
    pool = ResultPool()
    array = pool.empty((512, 1024), F4)
    assert (array.shape, array.dtype) == ((512, 1024), F4)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    where = address(array)
    del array
    assert pool.free_bytes == 2 * MIB
    assert address(pool.empty((1024, 256), np.dtype(np.float64))) == where


def test_memory_stays_while_any_view_of_it_lives() -> None:
    pool = ResultPool()
    array = pool.empty((512, 1024), F4)
    row = array.T[3:4]
    del array
    assert pool.free_bytes == 0
    other = pool.empty((512, 1024), F4)
    other[:] = 1
    row[:] = 2
    assert (other == 1).all()
    del row
    assert pool.free_bytes == 2 * MIB


def test_what_lay_free_for_longest_is_given_back_first() -> None:
    pool = ResultPool(max_free_bytes=5 * MIB)
    first, second, third = (pool.empty((size, 1024), F4) for size in (512, 768, 256))
    kept = address(second)
    del first
    del second
    del third
    assert pool.free_bytes == 4 * MIB
    assert address(pool.empty((768, 1024), F4)) == kept


def test_many_arrays_that_die_together_do_not_stay() -> None:
    pool = ResultPool(max_free_bytes=3 * MIB)
    arrays = [pool.empty((1024, 256), F4) for _ in range(20)]
    del arrays
    assert pool.free_bytes <= 3 * MIB


def test_a_closed_or_forgotten_pool_keeps_nothing() -> None:
    pool = ResultPool()
    free, used = pool.empty((512, 1024), F4), pool.empty((512, 1024), F4)
    del free
    pool.close()
    assert pool.free_bytes == 0
    del used
    assert pool.free_bytes == 0
    orphan = ResultPool().empty((512, 1024), F4)
    gc.collect()
    orphan[:] = 1
    del orphan


def test_small_arrays_are_plain_ones() -> None:
    pool = ResultPool()
    small = pool.empty((10, 10), F4)
    assert small.flags.owndata
    empty = pool.empty((0, 10), F4)
    assert empty.shape == (0, 10)
    del small, empty
    assert pool.free_bytes == 0


def test_threads_never_share_memory() -> None:
    pool = ResultPool()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            array = pool.empty((256, 1024), F4)
            array[::64] = number
            if not (array[::64] == number).all():
                wrong.append(number)
            del array

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
