"""Work that threads share."""

from __future__ import annotations

import threading

import pytest

from gradwire_server.backends.crew import Crew


@pytest.fixture(params=[1, 2, 4])
def crew(request):
    crew = Crew(request.param)
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
    crew = Crew(2)
    meeting = threading.Barrier(2, timeout=10)
    crew.run([meeting.wait, meeting.wait])
    crew.close()
