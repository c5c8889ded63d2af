"""A server of the bench says what it has used, with threads that have ended."""

import sys

import pytest

from bench.contenders import gradwire_server
from bench.contenders.server_process import ServerProcess, Used

_ENDED_THREAD = """
import threading, time
from bench.contenders.server_process import say_ready, wait_until_stopped

def wait_often():
    for _ in range(300):
        time.sleep(0.0001)

thread = threading.Thread(target=wait_often)
thread.start()
thread.join()
say_ready("here")
print("what a library says")
wait_until_stopped()
"""


def test_a_thread_that_has_ended_counts():
    server = ServerProcess.start([sys.executable, "-c", _ENDED_THREAD])
    try:
        assert server.used().switches >= 300
    finally:
        server.stop()


def test_a_server_that_has_ended_is_named_so():
    server = ServerProcess.start([sys.executable, "-c", "print('ready at x')"])
    try:
        with pytest.raises(RuntimeError, match="exit status 0"):
            server.used()
    finally:
        server.stop()


def test_gradwire_says_it_too():
    server = gradwire_server.start("numpy")
    try:
        before = server.used()
        after = server.used()
        assert before.cpu_s > 0.05  # it has started
        assert after.since(before).switches >= 0
    finally:
        server.stop()


def test_the_difference_of_two_moments():
    assert Used(3.0, 7).since(Used(1.0, 2)) == Used(2.0, 5)
