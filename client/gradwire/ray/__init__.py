"""gradwire servers in a Ray cluster: a client of all of them, and jobs beside the data.

Importing it needs Ray: ``pip install "gradwire[ray]"``. ``gradwire ray up`` starts the
servers, one on each node.

    import gradwire.ray

    with gradwire.ray.connect() as client:
        y, dx, dw = client.gradients(x, w, dy)

    y_ref, dx_ref, dw_ref = gradwire.ray.gradients(x_ref, w_ref, dy_ref)

docs/ray.md says when that is worth it.
"""

from __future__ import annotations

try:
    # Not `import ray` alone: a folder of that name would do for it.
    from ray import ObjectRef as _ObjectRef  # noqa: F401 - to say what is missing
except ImportError as error:
    raise ImportError('gradwire.ray needs Ray: pip install "gradwire[ray]"') from error

from gradwire.ray._connect import connect
from gradwire.ray._gradients import GradientRefs, gradients

__all__ = ["GradientRefs", "connect", "gradients"]
