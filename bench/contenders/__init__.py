"""Ways to compute the three gradients, behind one interface.

A new contender is a module with a `Contender` in it and a line in `_MODULES`.
Its module is imported in its own worker process only, so that what one needs
(and what one does to the process) is nothing to the others.
"""

from __future__ import annotations

import importlib

from bench.contenders.interface import Contender

_MODULES = {
    "numpy": "local_numpy",
    "gradwire-tcp": "gradwire_tcp",
    "grpcio-unary": "grpcio_unary",
}

NAMES = tuple(_MODULES)
"""Every contender, in the order of the table. The first is the yardstick."""


def create(name: str) -> Contender:
    """The contender of that name, not started.

    Raises:
        KeyError: There is none.
    """
    module = importlib.import_module(f"bench.contenders.{_MODULES[name]}")
    contender: Contender = module.create()
    return contender
