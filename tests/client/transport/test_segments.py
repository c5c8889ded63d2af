"""Arrays in a region: where they lie, and when their memory is free again."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

import gradwire
from gradwire._transport.shm.segments import Pool, Segment, proof_of
from gradwire.v1.gradient_service_pb2 import OpenRegionResponse, RegionChallenge

SIZE = 1 << 20
COOKIE = bytes(range(32))


@pytest.fixture
def fd() -> Iterator[int]:
    opened = os.memfd_create("gradwire-region")
    os.ftruncate(opened, SIZE)
    os.pwrite(opened, COOKIE, 0)
    yield opened
    os.close(opened)


def answer(fd: int, **fields: object) -> OpenRegionResponse:
    usual = {"token": "t", "pid": os.getpid(), "fd": fd, "cookie": COOKIE}
    return OpenRegionResponse(**({"size_bytes": SIZE} | usual | fields))


@pytest.fixture
def closed() -> list[str]:
    return []


@pytest.fixture
def pool(fd: int, closed: list[str]) -> Pool:
    made = Pool()
    made.add(Segment(answer(fd), lambda: closed.append("t")), [])
    return made


@pytest.mark.parametrize(
    "fields", [{"cookie": bytes(32)}, {"size_bytes": SIZE // 2}, {"pid": 1 << 22}]
)
def test_another_file_is_never_taken_for_the_region(fd: int, fields: dict) -> None:
    with pytest.raises(gradwire.ConnectError, match="cannot be opened here"):
        Segment(answer(fd, **fields), lambda: None)


def test_a_path_to_no_region_is_not_even_opened(tmp_path: object) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(gradwire.ConnectError):
            Segment(answer(writing), lambda: None)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def proof_fd() -> Iterator[int]:
    opened = os.memfd_create("gradwire-proof")
    os.pwrite(opened, COOKIE + b"the proof", 0)
    yield opened
    os.close(opened)


def challenge(fd: int, **fields: object) -> RegionChallenge:
    usual = {"pid": os.getpid(), "fd": fd, "cookie": COOKIE}
    return RegionChallenge(**(usual | fields))


def test_the_proof_is_what_follows_the_cookie(proof_fd: int) -> None:
    assert proof_of(challenge(proof_fd)) == b"the proof"


@pytest.mark.parametrize("fields", [{"cookie": bytes(32)}, {"pid": 1 << 22}])
def test_a_proof_of_another_server_is_not_given_away(
    proof_fd: int, fd: int, fields: dict
) -> None:
    for wrong in (challenge(proof_fd, **fields), challenge(fd)):
        with pytest.raises(gradwire.ConnectError, match="cannot be opened here"):
            proof_of(wrong)


def test_memory_is_free_again_when_the_last_view_has_died(pool: Pool) -> None:
    (room,) = pool.allocate([SIZE]) or []
    view = room.array.view(np.float32).reshape(512, 512)[5:, 3:].T
    del room
    gc.collect()
    assert pool.allocate([256]) is None
    memory = memoryview(view)
    del view
    assert pool.allocate([256]) is None
    del memory
    gc.collect()
    assert pool.allocate([SIZE]) is not None


def test_rooms_never_overlap_and_all_memory_comes_back(pool: Pool) -> None:
    dice = random.Random(0)
    rooms = []
    for _ in range(2000):
        if rooms and dice.random() < 0.5:
            rooms.pop(dice.randrange(len(rooms)))
        taken = pool.allocate(
            [dice.randrange(1, 20_000) for _ in range(dice.randrange(4))]
        )
        rooms += taken or []
        spans = sorted((r.offset, r.offset + r.array.nbytes) for r in rooms)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert not spans or spans[-1][1] <= SIZE
        assert all(r.offset % 64 == 0 for r in rooms)
    rooms.clear()
    taken = None
    gc.collect()
    assert pool.allocate([SIZE]) is not None


def test_all_rooms_or_none(pool: Pool) -> None:
    assert pool.allocate([SIZE // 2, SIZE // 2, 1]) is None
    assert pool.allocate([SIZE // 2, SIZE // 2]) is not None


def test_an_array_is_found_where_a_job_can_use_it(pool: Pool) -> None:
    (room,) = pool.allocate([64 * 64]) or []
    matrix = room.array.view(np.float32).reshape(64, 16)
    for usable in (matrix, matrix[3:], matrix[1:2], matrix.reshape(4, 16, 16)[1]):
        region, offset = pool.find(usable) or (None, -1)
        assert region is room.region
        address = usable.ctypes.data - matrix.ctypes.data
        assert offset == room.offset + address
    unusable = [
        matrix.T,
        matrix[:, 1:],
        matrix[::2],
        matrix.reshape(-1)[1:][None],
        matrix.view(">f4"),
        matrix[:0],
        matrix.copy(),
    ]
    assert [pool.find(array) for array in unusable] == [None] * len(unusable)


def test_nothing_is_found_in_a_region_that_has_ended(
    pool: Pool, closed: list[str]
) -> None:
    (room,) = pool.allocate([4096]) or []
    room.region.on_end()()
    assert pool.find(room.array) is None
    assert pool.allocate([1]) is None
    room.array[:] = 7
    assert (room.array == 7).all()


def test_what_is_retired_is_closed_and_its_arrays_stay_valid(
    pool: Pool, closed: list[str]
) -> None:
    (room,) = pool.allocate([4096]) or []
    pool.invalidate([room.region])
    assert closed == ["t"]
    room.array[:] = 7
    assert pool.allocate([1]) is None


@pytest.mark.parametrize(
    ("sizes_mib", "given_back"),
    [
        ((200, 200, 200), ["1", "2"]),
        ((16, 384), ["0"]),  # a loop of jobs of 384 MiB needs the second again
        ((384, 16), ["1"]),
        ((16, 200), []),
    ],
)
def test_much_unused_memory_is_given_back_but_never_the_largest_region(
    closed: list[str], sizes_mib: tuple[int, ...], given_back: list[str]
) -> None:
    pool, fds = Pool(), []
    try:
        for number, size_mib in enumerate(sizes_mib):
            size = size_mib << 20  # never touched, so it takes no memory
            fds.append(os.memfd_create("gradwire-region"))
            os.ftruncate(fds[-1], size)
            os.pwrite(fds[-1], COOKIE, 0)
            region = Segment(
                answer(fds[-1], size_bytes=size, token=str(number)),
                lambda number=number: closed.append(str(number)),
            )
            rooms = pool.add(region, [mmap.PAGESIZE])
        del rooms
        gc.collect()
        pool.allocate([1])
        assert closed == given_back
    finally:
        for opened in fds:
            os.close(opened)
