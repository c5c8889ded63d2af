"""What the model is fed with: devices, hosts and costs, as they were measured."""

from __future__ import annotations

from dataclasses import dataclass

from bench.scale.workload import Workload
from gradwire_protocol.limits import MIB


@dataclass(frozen=True)
class Device:
    """What a server computes with."""

    name: str
    ops_per_s: float = float("inf")
    copy_bytes_per_s: float = float("inf")
    """Each way to and from the device while both happen; they overlap the products."""
    block_s: float = 0.0
    """Seconds of a block whatever its size: of a device that sleeps."""
    row_block_bytes: int = 32 * MIB
    slots: int = 6
    """Row blocks of a job that the server holds."""
    cores: int = 0
    """If the products run on the server's cores, their number: sending and receiving
    then takes from them."""

    def seconds(self, work: Workload, rows: int) -> float:
        """How long the products of so many rows take."""
        copied = rows * work.row_bytes / self.copy_bytes_per_s
        return max(work.ops(rows) / self.ops_per_s, copied, self.block_s)


CPU = Device("2 cores", ops_per_s=200e9, row_block_bytes=16 * MIB, slots=3, cores=2)
"""16384x1024x1024 in 514 ms, NumPy in float32 (NOTES.md, "Seen")."""

H200 = Device("H200", ops_per_s=51.8e12, copy_bytes_per_s=45e9)
"""Products in float32, and copies both ways at once (NOTES.md, "Seen on a GPU")."""

DEVICES = {"cpu": CPU, "h200": H200}


@dataclass(frozen=True)
class Host:
    """The client or a server, without its card. Seconds are processor seconds."""

    cores: int = 16
    send_s_per_gb: float = 0.3
    """For 10⁹ bytes on direct connections, at this end."""
    receive_s_per_gb: float = 0.3
    lock_s_per_gb: float = 0.06
    """Of these, those outside the kernel: at most so long is the interpreter locked."""
    job_s: float = 4e-3
    """For a job, whatever its size."""
    job_lock_s: float = 2.6e-3
    """Of these, those outside the kernel."""


CLIENT = Host()
SERVER = Host(send_s_per_gb=0.45, receive_s_per_gb=0.45, job_s=3e-3)


@dataclass(frozen=True)
class Costs:
    """What belongs to neither end alone."""

    round_trip_s: float = 1e-4
    job_s: float = 2e-3
    """From a job's call to its first byte, processors and one round trip apart."""
    add_bytes_per_s: float = 10e9
    """Bytes of sums that one thread adds to a sum in a second."""
    sums_queue: bool = True
    """Whether a job's sum waits for row blocks of others that are queued for the device
    when its own last block ends. It does: a server asks for the sum once it has seen
    the block end."""
    window_bytes: int = 4 * MIB
    """On the way on one connection: sockets' buffers."""


COSTS = Costs()
