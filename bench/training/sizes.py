"""The linear layers of a GPT, and the bytes that a step of them moves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """A GPT of which only the linear layers count.

    Each of its blocks has the layers of attention, d to 3d and d to d, and those of
    the network behind it, d to 4d and back. The head follows.
    """

    name: str
    d: int
    blocks: int
    head: int
    """Columns of the head."""
    rows: int
    """Tokens of a step."""

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """The shape (n, k) of each W, forward in order."""
        d = self.d
        block = ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
        return block * self.blocks + ((d, self.head),)

    @property
    def weights(self) -> int:
        """Elements of all W."""
        return sum(n * k for n, k in self.layers)

    @property
    def operations(self) -> int:
        """Multiplications and additions of all products of a step."""
        return 6 * self.rows * self.weights

    def bytes_without_session(self, itemsize: int = 4) -> int:
        """Elements' bytes of a step with one call each for forward and backward.

        X and W go up and Y comes down; then X, W and dY go up, dX and dW come down.
        """
        rows = sum(3 * n + 2 * k for n, k in self.layers) * self.rows
        return itemsize * (rows + 3 * self.weights)

    def bytes_with_session(self, itemsize: int = 4) -> int:
        """Elements' bytes of a step with X, W and dW kept: X, Y, dY and dX move."""
        return itemsize * sum(2 * (n + k) for n, k in self.layers) * self.rows


SIZES = {
    size.name: size
    for size in (
        Size("a", d=512, blocks=4, head=256, rows=1024),
        Size("b", d=2048, blocks=1, head=256, rows=128),
        # For tests.
        Size("tiny", d=64, blocks=1, head=32, rows=256),
    )
}
