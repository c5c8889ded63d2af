"""Parsers that read what others wrote: any bytes are read, or refused in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from cyclopts import CycloptsError

from gradwire_cli.app import app
from gradwire_cli.errors import CommandError
from gradwire_cli.files.npy import open_npy
from gradwire_cli.serve_settings import ServeSettings
from gradwire_protocol import error_details as codec
from gradwire_protocol import framing
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason

Check = Callable[[bytes], None]


def _outcome(decode: Callable[[bytes], Any], message: bytes) -> Any:
    """What a parser makes of a message, in a form that compares."""
    try:
        decoded = decode(message)
    except framing.FramingError as error:
        return str(error)
    if isinstance(decoded, framing.Chunk):
        payload = decoded.payload
        data = None if payload is None else bytes(payload)
        return decoded.matrix, decoded.index, data, decoded.crc32c
    # As written: a NaN is not equal to itself.
    return type(decoded), decoded.SerializeToString(deterministic=True)


@contextlib.contextmanager
def framing_both_ways() -> Iterator[Check]:
    """Messages framed by hand mean what the generated classes say, always."""

    def check(data: bytes) -> None:
        for fast, slow in (
            (framing.decode_request, framing.decode_request_slow),
            (framing.decode_response, framing.decode_response_slow),
        ):
            assert _outcome(fast, data) == _outcome(slow, data)

    yield check


@contextlib.contextmanager
def error_details() -> Iterator[Check]:
    """The trailer of an error, which a proxy may have made or damaged."""

    def check(data: bytes) -> None:
        details = codec.decode(data)
        assert details.reason is None or details.reason in Reason
        assert details.retry_after_s is None or details.retry_after_s < 1e13

    yield check


@contextlib.contextmanager
def npy_files() -> Iterator[Check]:
    """Files that are called .npy, whoever wrote them."""
    with TemporaryDirectory(prefix="gradwire-fuzz-") as directory:
        path = Path(directory) / "x.npy"

        def check(data: bytes) -> None:
            path.write_bytes(data)
            for raw in (None, Dtype.BFLOAT16):
                try:
                    matrix = open_npy(path, raw_as=raw)
                except CommandError as refused:
                    assert str(path) in str(refused)  # noqa: PT017
                    continue
                with contextlib.closing(matrix):
                    assert matrix.size_bytes <= len(data)
                    rows = matrix.rows(0, min(matrix.shape[0], 3))
                    assert rows.shape == (min(matrix.shape[0], 3), matrix.shape[1])

        yield check


@contextlib.contextmanager
def settings_files() -> Iterator[Check]:
    """TOML files of settings."""
    strangers = [name for name in os.environ if name.startswith("GRADWIRE_")]
    with (
        TemporaryDirectory(prefix="gradwire-fuzz-") as directory,
        mock.patch.dict(os.environ),
    ):
        for name in strangers:
            del os.environ[name]
        path = Path(directory) / "gradwire.toml"

        def check(data: bytes) -> None:
            path.write_bytes(data)
            try:
                _, bound, _ = app.parse_args(
                    ["serve", "--config", str(path)],
                    exit_on_error=False,
                    print_error=False,
                )
            except (CycloptsError, CommandError) as refused:
                assert str(refused)  # noqa: PT017
                return
            bound.apply_defaults()
            assert isinstance(bound.arguments["settings"], ServeSettings)

        yield check
