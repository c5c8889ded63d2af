"""Work that threads share."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from gradwire_server.backends.numpy.worker_threads import WorkerThreads


@pytest.fixture(params=[1, 2, 4])
def crew(request):
    crew = WorkerThreads(request.param)
    yield crew
    crew.close()


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_every_piece_is_done_once(crew, count):
    done = []
    crew.run([lambda i=i: done.append(i) for i in range(count)])
    assert sorted(done) == list(range(count))


def test_what_a_piece_raises_reaches_the_caller_and_the_crew_goes_on(crew):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        crew.run([fail] * 5)
    done = []
    crew.run([lambda: done.append(1)])
    assert done == [1]


def test_pieces_run_side_by_side():
    crew = WorkerThreads(2)
    meeting = threading.Barrier(2, timeout=10)
    crew.run([meeting.wait, meeting.wait])
    crew.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness")
def test_those_who_work_are_nicer_than_the_process():
    crew, met = WorkerThreads(2, niceness=3), threading.Barrier(2, timeout=10)
    before, seen = os.getpriority(os.PRIO_PROCESS, 0), set()

    def piece():
        met.wait()  # so that each thread has one
        seen.add(os.getpriority(os.PRIO_PROCESS, 0))

    def lane():
        crew.enter()
        crew.run([piece, piece])

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join()
    crew.close()
    assert seen == {min(before + 3, 19)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
