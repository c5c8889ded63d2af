"""A slow link between two namespaces: ``python -m bench.links.delay_line``.

This process connects two TUN devices. A packet from one device waits for its turn at
the link's rate, then for the delay, and goes to the other device. (Linux's netem does
the same in the kernel, but many kernels of virtual machines lack it.) Packets keep
TCP's segmentation offload: one read moves up to 64 KiB, so a tenth of a core carries
1 Gbit/s each way.

The process prints ``ready`` when both devices exist, and runs until it is stopped. The
devices can then be moved into their namespaces; they vanish with the process.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

# From linux/if_tun.h.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 1, 2

_OFFLOAD_HEADER_BYTES = 10
"""Size of struct virtio_net_hdr before every packet."""

_SEGMENT_HEADER_BYTES = 66
"""Size of the Ethernet, IP and TCP headers (with usual options) of a segment."""

_MAX_PACKET_BYTES = 70_000

_QUEUE_BYTES = 8 << 20
"""Most bytes waiting in one direction; further packets are dropped."""


class Direction:
    """One direction of the link.

    Args:
        source: Device that packets come from.
        target: Device that packets go to.
        bytes_per_s: Rate of the link.
        delay_s: Delay of each packet after its last byte was sent.
    """

    def __init__(
        self, source: int, target: int, bytes_per_s: float, delay_s: float
    ) -> None:
        self._source, self._target = source, target
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued_bytes = 0
        self._free_at = 0.0

    def take(self) -> None:
        """Read the waiting packets from the source."""
        while True:
            try:
                packet = os.read(self._source, _MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            size = len(packet) - _OFFLOAD_HEADER_BYTES
            if self._queued_bytes + size > _QUEUE_BYTES:
                continue
            # Bytes 4 and 5 of the header: payload of a segment, in a packet of several.
            (segment,) = struct.unpack_from("<H", packet, 4)
            segments = -(-size // segment) if segment else 1
            sent_s = (size + segments * _SEGMENT_HEADER_BYTES) / self._bytes_per_s
            self._free_at = max(self._free_at, time.monotonic()) + sent_s
            self._queue.append((self._free_at + self._delay_s, packet))
            self._queued_bytes += size

    def give(self, now: float) -> float | None:
        """Write the arrived packets; return the arrival time of the next one."""
        while self._queue and self._queue[0][0] <= now:
            _, packet = self._queue.popleft()
            self._queued_bytes -= len(packet) - _OFFLOAD_HEADER_BYTES
            # If the device is down or its queue full, the packet is lost, as on a wire.
            with contextlib.suppress(OSError):
                os.write(self._target, packet)
        return self._queue[0][0] if self._queue else None


def open_tun(name: str) -> int:
    """Make a TUN device of this name; closing the descriptor removes it."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return device


def run(one: str, other: str, bits_per_s: float, delay_s: float) -> None:
    """Carry packets between two devices of these names, forever."""
    devices = open_tun(one), open_tun(other)
    forth = Direction(*devices, bits_per_s / 8, delay_s)
    back = Direction(*reversed(devices), bits_per_s / 8, delay_s)
    by_source = dict(zip(devices, (forth, back), strict=True))
    print("ready", flush=True)
    with select.epoll() as poll:
        for device in devices:
            poll.register(device, select.EPOLLIN)
        while True:
            now = time.monotonic()
            due = [each.give(now) for each in (forth, back)]
            waits = [max(0.0, at - time.monotonic()) for at in due if at is not None]
            for device, _ in poll.poll(min(waits, default=None)):
                by_source[device].take()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.links.delay_line")
    parser.add_argument("devices", nargs=2)
    parser.add_argument("--bits-per-s", type=float, required=True)
    parser.add_argument("--delay-s", type=float, required=True, help="one way")
    options = parser.parse_args()
    try:
        run(*options.devices, options.bits_per_s, options.delay_s)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
