"""What the methods of a session return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from gradwire._api.types import Device


class Forward(NamedTuple):
    """The results of a session's `forward`: a tuple (y, context)."""

    y: Any
    """Y, shape (..., k)."""
    context: Any
    """What `backward` needs: X, which stays in the session, and W. None if X was not
    kept."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session of a server, for people."""

    id: str
    """Name for `close_session`."""
    label: str
    """The label that its client has given."""
    device: int
    """Number of its device."""
    step: int
    """Steps so far."""
    tensors: int
    """Number of tensors."""
    keep_bytes: int
    """Bytes reserved for tensors."""
    used_bytes: int
    """Bytes used by tensors."""
    lease_s: float
    """Seconds without a call after which the session expires."""
    idle_s: float
    """Seconds since the last call ended; 0 during a call."""
    age_s: float
    """Seconds since the session was opened."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A session's state that a server has saved."""

    name: str
    """Name for `restore` and `delete_saved_state`."""
    step: int | None
    """Steps of the session. None: the file is damaged, or of another version, and
    cannot be restored."""
    size_bytes: int
    """Size of its file."""
    age_s: float
    """Seconds since it was saved."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a step."""

    step: int
    """Number of the step, from 1."""
    total_norm: float
    """Norm of all gradients together, before clipping."""
    skipped: bool
    """Whether no weight changed, because a gradient had NaN or Inf."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a session."""

    number: int
    name: str
    """Its name in files; empty: it has none."""
    role: str
    """"weight", "gradient" or "activation"."""
    shape: tuple[int, ...]
    dtype: str
    compute_dtype: str | None
    """Element type of the copy for jobs; None: there is no copy."""
    size_bytes: int
    """Bytes of the tensor, its copy and its states."""
    states: tuple[str, ...]
    """Names of its optimizer states, as in PyTorch: "exp_avg", ..."""
    updates: int
    """Updates by steps that were not skipped."""
    parts: tuple[int, ...]
    """For a gradient: numbers of the contributions since the last step."""
    frozen: bool = False
    """Whether it never changes: it was put with `frozen`."""
    sharers: int = 0
    """For a frozen tensor: tensors of the tenant's sessions that use its memory, with
    this one. 0: it is never shared."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session's state."""

    label: str
    server_instance: str
    device: Device
    lease_s: float
    """Seconds without a call after which the session expires."""
    step: int
    """Steps so far."""
    keep_bytes: int
    """Bytes reserved for tensors."""
    used_bytes: int
    """Bytes used by tensors."""
    tensors: tuple[TensorInfo, ...]
