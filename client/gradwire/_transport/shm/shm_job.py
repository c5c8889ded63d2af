"""The memory layout of a job in shared memory."""

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
    """Places a job's matrices in shared memory.

    Operands and results already in shared memory are used in place. For the others,
    memory is allocated. Results without an array of the caller are returned from it.

        shared = ShmJob(plan, operands, outputs, pool)
        shared.place(allocations of shared.sizes)
        shared.copy_in()
        ... run shared.exchange() ...
        shared.copy_out()

    Attributes:
        sizes: Bytes to allocate for each matrix not in shared memory.
        at_risk: Whether the server may still write to the caller's `out` arrays, so
            that a retry must not.
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
        # Matrices sent in another dtype cannot be used in place.
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
        """Use allocations for the matrices not in shared memory."""
        for matrix, room in zip(self._missing, rooms, strict=True):
            self._places[matrix] = (room.region, room.offset)
            self._room[matrix] = room.array

    @property
    def copies(self) -> bool:
        """Whether elements must be copied, before or after the job."""
        given = self._outputs.present()
        return any(
            matrix in self._operands or matrix in given or matrix in self._widened
            for matrix in self._room
        )

    def copy_in(self) -> None:
        """Copy the operands not in shared memory.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        for matrix, operand in self._operands.items():
            if matrix in self._room:
                operand.copy_to(self._room[matrix])

    def exchange(self) -> ShmExchange:
        """Create the job's exchange."""
        return ShmExchange(self._plan, self._places)

    def copy_out(self) -> None:
        """Copy the results to the caller's arrays, if they are elsewhere."""
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
        """Record a failed job, and return whether its regions were the cause.

        Only an answer of the server confirms that it no longer uses the regions.
        Otherwise, for example after a deadline, it may still write results for the
        duration of a row block. The regions are then not reused.
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
