"""Work that threads share."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from gradwire_server.backends.numpy.worker_threads import WorkerThreads


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    threads = WorkerThreads(request.param)
    yield threads
    threads.close()


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_every_piece_is_done_once(threads, count):
    done = []
    threads.run([lambda i=i: done.append(i) for i in range(count)])
    assert sorted(done) == list(range(count))


def test_what_a_piece_raises_reaches_the_caller_and_the_threads_goes_on(threads):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        threads.run([fail] * 5)
    done = []
    threads.run([lambda: done.append(1)])
    assert done == [1]


def test_pieces_run_side_by_side():
    threads = WorkerThreads(2)
    meeting = threading.Barrier(2, timeout=10)
    threads.run([meeting.wait, meeting.wait])
    threads.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness")
def test_those_who_work_are_nicer_than_the_process():
    threads, met = WorkerThreads(2, niceness=3), threading.Barrier(2, timeout=10)
    before, seen = os.getpriority(os.PRIO_PROCESS, 0), set()

    def piece():
        met.wait()  # so that each thread has one
        seen.add(os.getpriority(os.PRIO_PROCESS, 0))

    def worker():
        threads.enter()
        threads.run([piece, piece])

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    threads.close()
    assert seen == {min(before + 3, 19)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
