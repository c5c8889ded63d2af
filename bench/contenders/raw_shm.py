"""Shared memory and nothing above it: the floor of all transports.

Client and server map one unnamed file. Over a socket pair, a message of 24 bytes
announces operands, and a message of one byte announces results. As a script, this
module is the server.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from bench.contenders.interface import Arrays, Contender
from bench.contenders.server_process import ServerProcess, say_ready
from bench.work import copied, empty_results, products

_SIZES = struct.Struct("<3q")
_ALIGNMENT = 64
_Sizes: TypeAlias = tuple[int, int, int]


def _mapped(file: int, sizes: _Sizes) -> tuple[Arrays, Arrays]:
    """Map operands and results in the file, and enlarge the file as needed."""
    m, n, k = sizes
    shapes = ((m, n), (n, k), (m, k), (m, k), (m, n), (n, k))
    offsets = [0]
    for rows, columns in shapes:
        taken = 4 * rows * columns
        offsets.append(offsets[-1] + taken + -taken % _ALIGNMENT)
    if os.fstat(file).st_size < offsets[-1]:
        os.ftruncate(file, offsets[-1])
    memory = mmap.mmap(file, offsets[-1])
    x, w, dy, y, dx, dw = (
        np.ndarray(shape, np.float32, memory, offset)
        for shape, offset in zip(shapes, offsets, strict=False)
    )
    return (x, w, dy), (y, dx, dw)


class RawShm(Contender):
    """One client, one file, one call after the other."""

    def __init__(self) -> None:
        self._turns: socket.socket | None = None
        self._file = -1

    def start(self) -> None:
        self._file = os.memfd_create("bench")
        self._turns, theirs = socket.socketpair()
        with theirs:
            keep = (self._file, theirs.fileno())
            self.server = ServerProcess.of_module(
                __name__, *(str(descriptor) for descriptor in keep), keep=keep
            )

    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        x, w, _ = given
        sizes = (*x.shape, w.shape[1])
        operands, results = _mapped(self._file, sizes)
        copied(given, into=operands)

        def in_place() -> Arrays:
            assert self._turns is not None
            self._turns.sendall(_SIZES.pack(*sizes))
            if not self._turns.recv(1):
                raise EOFError("the server is gone")
            return results

        def in_and_out() -> Arrays:
            copied(given, into=operands)
            return copied(in_place(), into=empty_results(*given))

        return in_place if reused else in_and_out

    def close(self) -> None:
        if self._turns is not None:
            self._turns.close()
        if self.server is not None:
            self.server.stop()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


create = RawShm


def _serve(file: int, turns: socket.socket) -> None:
    say_ready("memory")
    sizes: _Sizes | None = None
    while message := turns.recv(_SIZES.size, socket.MSG_WAITALL):
        asked: _Sizes = _SIZES.unpack(message)
        if asked != sizes:
            sizes = asked
            operands, results = _mapped(file, sizes)
        products(*operands, results)
        turns.sendall(b"r")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
