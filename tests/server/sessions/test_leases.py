"""A session expires when its lease has passed without a call, and no later."""

from __future__ import annotations

import asyncio

from gradwire.v1 import session_service_pb2 as pb2
from gradwire_server import Server, Settings

LEASE_S = 600.0


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be put forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s

    async def pass_s(self, seconds: float) -> None:
        """Let time pass, and what is due then happen."""
        self.ahead_s += seconds
        for _ in range(5):
            await asyncio.sleep(0)


def test_a_lease_ends_on_time_after_the_last_call() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        server = Server(Settings(listen=("127.0.0.1:0",), backend="numpy"))
        await server.start()
        try:
            assert server._service is not None
            sessions = server._service.sessions
            request = pb2.OpenSessionRequest(keep_bytes=100, lease_seconds=LEASE_S)
            for last_call_s in (0.0, 10.0, 0.5 * LEASE_S, LEASE_S - 10):
                session = await sessions.open(request, "")
                await loop.pass_s(last_call_s)
                with sessions.used(session.token, ""):
                    pass
                await loop.pass_s(LEASE_S - last_call_s)  # it is looked at
                await loop.pass_s(last_call_s - 5)
                assert len(sessions) == (last_call_s > 0)
                await loop.pass_s(6)
                assert len(sessions) == 0
            session = await sessions.open(request, "")
            with sessions.used(session.token, ""):  # an open call keeps it alive
                for _ in range(5):
                    await loop.pass_s(0.7 * LEASE_S)
            await loop.pass_s(LEASE_S - 5)
            assert len(sessions) == 1
            await loop.pass_s(6)
            assert len(sessions) == 0
        finally:
            await server.drain()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(run())
