"""Products on a server as functions of JAX.

Importing it needs JAX: ``pip install 'gradwire[jax]'``.

    import gradwire
    import gradwire.jax

    with gradwire.connect("gpu-node:50051") as client:
        y = gradwire.jax.linear(x, w, b, client=client)

The functions can be used under `jax.jit`, `jax.grad`, `jax.vmap`, `jax.checkpoint` and
`jax.lax.scan`. docs/jax.md says what is computed by how many jobs, and how errors
arrive.
"""

from __future__ import annotations

try:
    import jax as _jax  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError("gradwire.jax needs JAX: pip install 'gradwire[jax]'") from error

from gradwire.jax._functions import linear, matmul

__all__ = ["linear", "matmul"]
