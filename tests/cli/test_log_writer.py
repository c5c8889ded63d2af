"""A log that nobody reads never stops the server."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import gradwire as sdk
from gradwire_cli.terminal.log_writer import LogWriter
from tests.cli.conftest import started


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def logger_to(writer: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test", logging.DEBUG)  # noqa: LOG001 - no global state
    logger.addHandler(writer)
    return logger


def test_entries_are_written_in_order_and_all_of_them(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = LogWriter(writing)
    logger = logger_to(writer)
    for number in range(100):
        logger.info("entry %d of ↦", number)
    writer.close()
    lines = os.read(reading, 1 << 16).decode().splitlines()
    assert lines == [f"entry {number} of ↦" for number in range(100)]


def test_entries_beyond_the_bound_are_dropped_and_counted(
    pipe: tuple[int, int],
) -> None:
    reading, writing = pipe
    writer = LogWriter(writing, max_entries=10)
    writer.setFormatter(_WithDropped())
    logger = logger_to(writer)
    for _ in range(1000):  # 1 MB, and a pipe takes 64 KiB
        logger.info("x" * 1000)
    closing = threading.Thread(target=writer.close)
    closing.start()
    written = dropped = 0
    with open(reading, closefd=False) as file:
        while written + dropped < 1000:
            text, *number = file.readline().split(" ")
            if text == "x" * 1000:
                written += 1
            else:
                dropped += int(number[-1])
    closing.join(10)
    assert not closing.is_alive()
    assert written + dropped == 1000
    assert dropped > 100


class _WithDropped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.getMessage()} {getattr(record, 'dropped', '')}"


def test_a_server_whose_standard_error_nobody_reads_serves_and_ends() -> None:
    reading, writing = os.pipe()
    try:
        with started("serve", "--listen=127.0.0.1:0", stderr=writing) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split(" on ")[1].split(" ")[0]
            with sdk.connect(address, timeout_s=30) as client:
                for _ in range(250):  # 100 kB of log
                    client.forward(np.ones((2, 3)), np.ones((3, 1)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        os.set_blocking(reading, False)
        entries = os.read(reading, 1 << 20).decode().split("\n")
        assert json.loads(entries[0])["level"] == "info"
        assert 100 < len(entries) < 250
    finally:
        os.close(reading)
        os.close(writing)
