"""The jobs that compute products, as callbacks of JAX."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from gradwire._api.errors import ClientStateError
from gradwire._api.types import Array
from gradwire._client._sync.client import Client

Results: TypeAlias = tuple[str, ...]
Operands: TypeAlias = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Route:
    """Who computes products, and how."""

    # Compiled functions outlive the code that made them, and would keep the client's
    # connection.
    client: weakref.ref[Client]
    options: tuple[tuple[str, Any], ...]


# Callbacks with equal fields are equal, so JAX compiles a product only once.
@dataclass(frozen=True)
class Job:
    """The callback of a job. It must start nothing in JAX.

    All threads of JAX may be in callbacks. Its arguments are read-only views of XLA's
    memory.
    """

    route: Route
    results: Results
    operands: tuple[str, ...]

    def __call__(self, *arrays: Any) -> tuple[Array, ...]:
        client = self.route.client()
        if client is None:
            raise ClientStateError(
                "the client of this product no longer exists: keep a reference to it"
            )
        given: dict[str, Any] = dict.fromkeys(("x", "w", "dy"))
        for name, array in zip(self.operands, arrays, strict=True):
            given[name] = _copied(client, np.asarray(array))
        if given["w"] is None and given["x"].ndim > 2:
            # It is not needed, but says that dW is not to be summed.
            shape = (
                *given["x"].shape[:-2],
                given["x"].shape[-1],
                given["dy"].shape[-1],
            )
            given["w"] = np.broadcast_to(np.zeros((), given["x"].dtype), shape)
        options: Any = dict(self.route.options)
        done = client.gradients(**given, results=self.results, **options)
        return tuple(getattr(done, name) for name in self.results)


def _copied(client: Client, view: Array) -> Array:
    """Return a copy, in memory shared with the server if there is any.

    A job that fails may end while gRPC's thread still reads from an operand, and XLA
    frees its memory when the callback returns.
    """
    copy = client.empty(view.shape, view.dtype)
    copy[...] = view
    return copy


def shapes_of(results: Results, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes and dtypes of results, by those of the operands."""
    first = next(iter(operands.values()))
    sizes: dict[str, int] = {}
    for name, letters in (("x", "mn"), ("w", "nk"), ("dy", "mk")):
        if name in operands:
            sizes.update(zip(letters, operands[name].shape[-2:], strict=True))
    letters_of = {"y": "mk", "dx": "mn", "dw": "nk"}
    return tuple(
        jax.ShapeDtypeStruct(
            (*first.shape[:-2], *(sizes[letter] for letter in letters_of[result])),
            first.dtype,
        )
        for result in results
    )
