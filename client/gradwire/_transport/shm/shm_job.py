"""Where the matrices of a job in shared memory lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradwire._api.errors import CallError
from gradwire._api.types import Array
from gradwire._arrays.operand import Operand
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArrayOutputs
from gradwire._transport.shm.segments import Allocation, Pool, Segment
from gradwire._transport.shm.shm_exchange import ShmExchange
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.matrices import Matrix


class ShmJob:
    """Places for a job's matrices in a client's regions.

    Operands and results that lie there are used where they are; for the
    others room is needed, out of which results without an array of the
    caller's are handed back.

        shared = ShmJob(plan, operands, outputs, pool)
        shared.place(rooms of shared.sizes)
        shared.copy_in()
        ... run shared.exchange() ...
        shared.copy_out()

    Attributes:
        sizes: Bytes of the room that is needed, by matrix.
        at_risk: Whether the server may still write to arrays that the caller
            gave as `out`, so that no other attempt may.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        pool: Pool,
    ) -> None:
        self.at_risk = False
        self._plan = plan
        self._operands = operands
        self._outputs = outputs
        self._pool = pool
        self._places: dict[Matrix, tuple[Segment, int]] = {}
        self._room: dict[Matrix, Array] = {}
        # What travels in another dtype cannot be used where it lies.
        self._widened = {
            matrix
            for matrix in plan.results
            if plan.array_dtype(matrix) is not plan.result_dtype(matrix)
        }
        present = {
            matrix: value.array
            for matrix, value in operands.items()
            if value.rounding is None
        }
        present |= {
            matrix: array
            for matrix, array in outputs.present().items()
            if matrix not in self._widened
        }
        for matrix, array in present.items():
            place = pool.find(array)
            if place is not None:
                self._places[matrix] = place
        self._missing = [
            matrix
            for matrix in (*plan.operands, *plan.results)
            if matrix not in self._places
        ]
        self.sizes = [plan.size_bytes(matrix, plan.m or 0) for matrix in self._missing]

    def place(self, rooms: Sequence[Allocation]) -> None:
        """Use these for what does not lie in a region yet."""
        for matrix, room in zip(self._missing, rooms, strict=True):
            self._places[matrix] = (room.region, room.offset)
            self._room[matrix] = room.array

    @property
    def copies(self) -> bool:
        """Whether elements have to be copied, before or after."""
        given = self._outputs.present()
        return any(
            matrix in self._operands or matrix in given or matrix in self._widened
            for matrix in self._room
        )

    def copy_in(self) -> None:
        """Copy the operands that lie elsewhere.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        for matrix, operand in self._operands.items():
            if matrix in self._room:
                operand.copy_to(self._room[matrix])

    def exchange(self) -> ShmExchange:
        """The conversation."""
        return ShmExchange(self._plan, self._places)

    def copy_out(self) -> None:
        """Have the results where the caller gets them."""
        plan, given = self._plan, self._outputs.present()
        for matrix in plan.results:
            if matrix not in self._room:
                continue
            room = self._room[matrix].view(plan.result_dtype(matrix).numpy)
            if matrix in given:
                np.copyto(given[matrix], room.reshape(given[matrix].shape))
            elif matrix in self._widened:
                self._outputs.hand_back(
                    matrix, room.astype(plan.array_dtype(matrix).numpy)
                )
            else:
                self._outputs.hand_back(matrix, room)

    def worth_another_try(self, error: BaseException) -> bool:
        """What a failed job means for its regions; whether they were the cause.

        Only the server's own word says that it has let go of them. Without
        that, with a deadline for example, it may write results for as long as
        a row block takes, so their regions are not used again.
        """
        reason = error.reason if isinstance(error, CallError) else None
        if reason is Reason.REGION_UNKNOWN:
            self._pool.invalidate({region for region, _ in self._places.values()})
            return True
        if reason is None:
            results = self._plan.results
            self._pool.invalidate({self._places[matrix][0] for matrix in results})
            self.at_risk = any(matrix not in self._room for matrix in results)
        return False
