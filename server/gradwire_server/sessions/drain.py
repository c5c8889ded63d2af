"""What becomes of sessions when their server drains.

Jobs, puts and new sessions are refused. Everything else is served in the grace period,
so that clients can make the step that they have sent, and fetch or save what they want
to keep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.registry import Sessions
from gradwire_server.sessions.saved_states import SavedStates
from gradwire_server.sessions.session import Session

_log = logging.getLogger("gradwire_server")


async def save(
    sessions: Sessions,
    states: SavedStates,
    worker_of: Callable[[Session], TenantHandle],
) -> None:
    """Save the last step of the sessions whose clients have asked for saved steps.

    A step that is still made is saved, too.

    Args:
        sessions: The sessions.
        states: Where they are saved.
        worker_of: Returns the worker of a session's device.
    """
    async with asyncio.TaskGroup() as group:
        for session in sessions:
            if session.save_every:
                session.save_every = 1
                if session.is_unsaved:
                    group.create_task(_save(session, states, worker_of(session)))


async def _save(session: Session, states: SavedStates, worker: TenantHandle) -> None:
    try:
        with session.used():
            async with session.turns.alone():
                session.require_open()
                await states.save_if_due(session, worker)
    except JobError as error:
        # No call tells a client of it: its last steps are lost unless somebody acts.
        _log.error(
            "a session was not saved",
            extra={
                **session.log,
                "step": session.step,
                "error": str(error),
                **error.log,
            },
        )


async def wait_closed(sessions: Sessions) -> None:
    """Wait until sessions are closed whose clients may want to fetch what they have.

    Those with saved steps are not waited for: their clients restore them.
    """
    for session in sessions:
        if not session.save_every or session.is_unsaved:
            await session.freed.wait()
