"""A job that takes its time: scripts/check-containers stops the server in it.

Prints `running` when the first results are here, and goes on for some seconds.
"""

import time
from collections.abc import Iterator

import numpy as np

import gradwire

ROWS = 8192
CHUNKS = 16
PAUSE_S = 0.3


def main() -> None:
    random = np.random.default_rng(0)
    x = random.integers(-3, 4, (ROWS, 128)).astype(np.float64)
    w = random.integers(-3, 4, (128, 128)).astype(np.float64)
    dy = random.integers(-3, 4, (ROWS, 128)).astype(np.float64)

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(CHUNKS):
            yield x, dy
            time.sleep(PAUSE_S)

    with gradwire.connect("server:50051") as client, client.stream(rows(), w) as blocks:
        received = 0
        for block in blocks:
            if received == 0:
                print("running", flush=True)
            received += len(block.y)
        # Small integers: every sum is exact, in whatever order.
        np.testing.assert_array_equal(blocks.dw, CHUNKS * (x.T @ dy))
    assert received == CHUNKS * ROWS, received


if __name__ == "__main__":
    main()
