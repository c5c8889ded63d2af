"""How long a job's memory lives in the client."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_operands_and_results_go_with_their_last_reference(
    transport: str, small_blocks: ServerProcess
) -> None:
    """A reference cycle would keep them until the garbage collector runs.

    It counts objects, not their bytes, and so may be gigabytes late.
    """
    with gradwire.connect(small_blocks.address, transport=transport) as client:
        x = X.copy()
        out = np.empty_like(x)
        seen = [weakref.ref(x), weakref.ref(out)]
        client.gradients(x, W, DY, out={"dx": out})
        del x, out
        assert [each() for each in seen] == [None, None]
        x = X.copy()
        seen = [weakref.ref(x)]
        with client.stream([(x, DY)], W) as stream:
            seen += [weakref.ref(block.dx) for block in stream]
        del x, stream
        assert not any(each() is not None for each in seen)
