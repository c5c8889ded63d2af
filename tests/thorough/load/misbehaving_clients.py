"""Clients that a server would rather not have, each kind in a process of its own.

    python -m tests.thorough.load.misbehaving_clients KIND ADDRESS COUNT

prints a line when its calls stand, and goes on until it is killed. A call
that ends before that ends the process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import grpc

from tests.support.raw import SERVICE, Request, chunk, make_job

KIB = 1 << 10
MIB = 1 << 20
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each
    # What is not read stays on the server's side: else gRPC would take
    # megabytes in at once for a client that looks at a kibibyte a second.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 * KIB),
]


def open_call(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    return channel.stream_stream(f"/{SERVICE}/ComputeStream")()


async def be_idle(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Opens a stream and says nothing."""
    call = open_call(channel)
    await call.wait_for_connection()
    stands()
    await call.read()


async def be_connected(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Connects, and makes no call."""
    await channel.channel_ready()
    stands()
    await asyncio.Event().wait()


async def push(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Sends W and rows without waiting to be accepted, as fast as they are taken."""
    call = open_call(channel)
    header = make_job(m=None, n=1024, k=1024, results=("y",))
    await call.write(Request(job=header).SerializeToString())
    stands()
    data = bytes(MIB)
    for matrix, elements in (("w", 1024 * 1024), ("x", 1 << 40)):
        for index in range(0, elements, MIB // 4):
            await call.write(chunk(matrix, index, data).SerializeToString())


async def read_slowly(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Wants megabytes and reads a kibibyte of them a second."""
    call = open_call(channel)
    k = 16 * KIB
    header = make_job(m=64, n=1, k=k, results=("y",), max_chunk_bytes=KIB)
    await call.write(Request(job=header).SerializeToString())
    await call.write(chunk("w", 0, bytes(4 * k)).SerializeToString())
    await call.write(chunk("x", 0, bytes(4 * 64)).SerializeToString())
    await call.read()
    stands()
    message = None
    while message is not grpc.aio.EOF:
        message = await call.read()
        await asyncio.sleep(1)


async def write_slowly(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Sends an element of W a second."""
    call = open_call(channel)
    header = make_job(m=64, n=1024, k=1024, results=("y",))
    await call.write(Request(job=header).SerializeToString())
    await call.read()
    stands()
    for index in range(1024 * 1024):
        await call.write(chunk("w", index, bytes(4)).SerializeToString())
        await asyncio.sleep(1)


async def write_without_reading(
    channel: grpc.aio.Channel, stands: Callable[[], None]
) -> None:
    """Writes a whole job before it reads anything."""
    call = open_call(channel)
    k = 64 * KIB
    header = make_job(m=None, n=1, k=k, results=("y",))
    await call.write(Request(job=header).SerializeToString())
    await call.write(chunk("w", 0, bytes(4 * k)).SerializeToString())
    stands()
    for row in range(1 << 20):
        await call.write(chunk("x", row, bytes(4)).SerializeToString())


async def stop_half_way(channel: grpc.aio.Channel, stands: Callable[[], None]) -> None:
    """Sends half a job, and then nothing."""
    call = open_call(channel)
    header = make_job(m=64, n=1024, k=1024, job_id="half")
    await call.write(Request(job=header).SerializeToString())
    for index in range(0, 1024 * 1024, MIB // 4):
        await call.write(chunk("w", index, bytes(MIB)).SerializeToString())
    await call.read()
    stands()
    await call.read()


KINDS: dict[str, Callable[..., Awaitable[None]]] = {
    each.__name__: each
    for each in (
        *(be_idle, be_connected, push, read_slowly, write_slowly),
        *(write_without_reading, stop_half_way),
    )
}


async def main(kind: str, address: str, count: int) -> None:
    standing = 0
    all_stand = asyncio.Event()

    def stands() -> None:
        nonlocal standing
        standing += 1
        if standing == count:
            all_stand.set()

    async def one() -> None:
        async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
            try:
                await KINDS[kind](channel, stands)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                if not all_stand.is_set():
                    raise

    async with asyncio.TaskGroup() as members:
        for _ in range(count):
            members.create_task(one())
        await all_stand.wait()
        print("all stand", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
