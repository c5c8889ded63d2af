"""Which row blocks travel on which of a job's connections.

Row block b travels on connection b mod N, both ways. So each connection
carries a share of the rows: whole blocks, in order, with a fixed number of
others' blocks between them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of one connection. With one connection it is all of them."""

    connection: int
    """Which connection, from 0."""

    connections: int
    """How many there are."""

    block_rows: int
    """Rows of a block, at least 1."""

    def block(self, number: int) -> int:
        """The job's block that is the share's `number`-th, both from 0."""
        return number * self.connections + self.connection

    def rows(self, m: int) -> int:
        """How many of a job's m rows belong to the share."""
        full, rest = divmod(m, self.block_rows)
        own = max(0, -(-(full - self.connection) // self.connections))
        last = rest if full % self.connections == self.connection else 0
        return own * self.block_rows + last

    def index(self, count: int, row_length: int) -> int:
        """Where a matrix goes on after `count` of the share's elements.

        Args:
            count: Elements of the share, in its order.
            row_length: Elements of a row.

        Returns:
            The index of the next element within the whole matrix.
        """
        block_elements = self.block_rows * row_length
        if not block_elements:
            return 0
        number, within = divmod(count, block_elements)
        return self.block(number) * block_elements + within

    def room(self, count: int, row_length: int) -> int | None:
        """Elements until the block ends in which the next one lies.

        None where blocks follow each other without a gap.
        """
        if self.connections == 1:
            return None
        block_elements = self.block_rows * row_length
        return block_elements - count % block_elements if block_elements else 0
