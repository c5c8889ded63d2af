"""A job that is large enough for direct connections: scripts/check-containers runs it.

Prints the transport of its elements.
"""

import sys

import numpy as np

import gradwire


def main() -> None:
    x = np.ones((16384, 256), np.float32)
    w = np.ones((256, 128), np.float32)
    with gradwire.connect(sys.argv[1]) as client:
        results = client.gradients(x, w, x[:, :128])
    assert (results.y == 256).all()
    assert (results.dw == 16384).all()
    print(results.receipt.transport)


if __name__ == "__main__":
    main()
