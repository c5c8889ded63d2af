"""What a device may lose in rounding is what its server says of it, no name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._integrity.rounding_error import gamma
from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.async_device.gemm import SUMS_ROUNDED_TO_NEAREST
from gradwire_server.backends.numpy.backend import NumpyBackend
from tests.cli.conftest import serving_with

LENGTH = 1024


class InexactJob:
    """A job whose Y is off by a given amount in its first element."""

    def __init__(self, job: Any, off: float) -> None:
        self._job = job
        self._off = off

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def compute_block(self, block: Any) -> None:
        self._job.compute_block(block)
        block.y[0, 0] += self._off


class InexactBackend(NumpyBackend):
    """A device that rounds worse than to nearest, or a name that does not count."""

    name = "inexact"

    def __init__(self, off: float, **said: Any) -> None:
        super().__init__()
        self._off = off
        device = dataclasses.replace(self.devices[0], backend=self.name, **said)
        self.devices = (device,)

    def open_job(self, *arguments: Any, **options: Any) -> Any:
        return InexactJob(super().open_job(*arguments, **options), self._off)


NOTHING: dict[str, Any] = {"sums_rounded_to_nearest": (), "ignores_tf32": False}
AS_CUDA = {"sums_rounded_to_nearest": SUMS_ROUNDED_TO_NEAREST, "ignores_tf32": False}
TRUNCATED = 2 * gamma(LENGTH, Dtype.FLOAT32.unit_roundoff) * LENGTH
"""Off by twice what rounding to nearest explains, of sums of LENGTH ones."""


def verified(dtype: str, off: float, *, tf32: bool = False, **said: Any) -> None:
    """A product of ones whose first element is off."""
    kind = Dtype.named(dtype).numpy
    x, w = np.ones((2, LENGTH), kind), np.ones((LENGTH, 1), kind)
    backend = InexactBackend(off, **said)
    with serving_with(backend) as address, gradwire.connect(address) as client:
        client.gradients(
            *(x, w, None),
            results="y",
            result_dtype="float64" if dtype == "float64" else "float32",
            allow_tf32=tf32,
            verify=True,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_that_says_nothing_may_lose_what_tensor_cores_do(dtype: str) -> None:
    verified(dtype, TRUNCATED, **NOTHING)
    with pytest.raises(gradwire.VerificationError):
        verified(dtype, 2 * TRUNCATED, **NOTHING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_that_rounds_to_nearest_may_not(dtype: str) -> None:
    with pytest.raises(gradwire.VerificationError, match="inexact"):
        verified(dtype, TRUNCATED)
    verified(dtype, TRUNCATED / 4)


def test_a_gpu_may_with_16_bit_operands_alone() -> None:
    verified("float16", TRUNCATED, **AS_CUDA)
    with pytest.raises(gradwire.VerificationError):
        verified("float32", TRUNCATED, **AS_CUDA)


def test_tf32_may_cut_factors_where_the_job_allows_it_and_the_device_has_it() -> None:
    cut = LENGTH * 2.0**-10
    verified("float32", cut, tf32=True, **AS_CUDA)
    for refused in ({"tf32": False, **AS_CUDA}, {"tf32": True}):
        with pytest.raises(gradwire.VerificationError):
            verified("float32", cut, **refused)


def test_what_a_server_says_of_its_device_reaches_the_caller() -> None:
    for said, expected in (
        ({}, (("float16", "bfloat16", "float32", "float64"), True)),
        (AS_CUDA, (("float32", "float64"), False)),
        (NOTHING, ((), False)),
    ):
        with (
            serving_with(InexactBackend(0, **said)) as address,
            gradwire.connect(address) as client,
        ):
            (device,) = client.server_info().devices
        assert (device.sums_rounded_to_nearest, device.ignores_tf32) == expected
