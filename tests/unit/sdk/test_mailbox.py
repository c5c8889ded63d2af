"""Messages between threads."""

from __future__ import annotations

import threading

from gradwire._mailbox import Mailbox


def test_items_come_in_the_order_in_which_they_were_put() -> None:
    box: Mailbox[int] = Mailbox(lambda: 3)
    assert all(box.put(item) for item in range(3))
    assert [box.get() for _ in range(3)] == [0, 1, 2]


def test_a_full_box_is_waited_for() -> None:
    box: Mailbox[int] = Mailbox(lambda: 1)
    box.put(0)
    putting = threading.Thread(target=box.put, args=(1,))
    putting.start()
    assert [box.get(10), box.get(10)] == [0, 1]
    putting.join()


def test_a_closed_box_is_emptied_and_takes_no_more() -> None:
    box: Mailbox[int] = Mailbox(lambda: 2)
    box.put(0)
    box.close()
    assert not box.put(1)
    assert [box.get(), box.get()] == [0, None]


def test_closing_wakes_those_who_wait() -> None:
    full: Mailbox[int] = Mailbox(lambda: 1)
    full.put(0)
    put: list[bool] = []
    waiting = threading.Thread(target=lambda: put.append(full.put(1)))
    waiting.start()
    full.close()
    waiting.join()
    assert put == [False]


def test_an_empty_box_is_waited_for_no_longer_than_said() -> None:
    assert Mailbox[int](lambda: 1).get(0.01) is None
