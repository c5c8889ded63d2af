"""Checks that a server computes correctly.

Each check compares the server's results with finite differences, with local
float64 products, with exact values, or with results of the same job sent in another
way. This package does not print.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from gradwire import CallError, ProtocolError, UnavailableError
from gradwire_cli.checks import arithmetic, shapes
from gradwire_cli.checks.clients import Clients
from gradwire_cli.checks.result import Check, CheckResult
from gradwire_cli.checks.spread import spread_jobs
from gradwire_cli.checks.ways import WAYS
from gradwire_protocol.dtypes import Dtype

_SUMMED_IN_FLOAT32 = tuple(dtype for dtype in Dtype if dtype.sums_in is Dtype.FLOAT32)

CHECKS: dict[str, tuple[Check, tuple[Dtype, ...]]] = {
    "finite differences": (arithmetic.finite_differences, (Dtype.FLOAT64,)),
    "products": (arithmetic.products, tuple(Dtype)),
    "rounding": (arithmetic.rounding, tuple(Dtype)),
    "subnormals": (arithmetic.subnormals, tuple(Dtype)),
    "NaN and Inf": (arithmetic.not_finite, tuple(Dtype)),
    "overflow to Inf": (arithmetic.overflow, tuple(Dtype)),
    "zero sizes": (arithmetic.zero_sizes, tuple(Dtype)),
    "shapes": (shapes.small_shapes, tuple(Dtype)),
    "wide": (shapes.wide, tuple(Dtype)),
    "long rows": (shapes.long_rows, tuple(Dtype)),
    "row blocks": (shapes.row_blocks, tuple(Dtype)),
    "wide blocks": (shapes.wide_blocks, (Dtype.FLOAT32, Dtype.FLOAT64)),
    "float64 sum": (arithmetic.wide_accumulator, _SUMMED_IN_FLOAT32),
    **{name: (check, tuple(Dtype)) for name, check in WAYS.items()},
    "spread": (spread_jobs, tuple(Dtype)),
}
"""Every check and its dtypes."""


def run_checks(
    clients: Clients,
    offered: Collection[Dtype],
    seed: int,
    names: Collection[str] = tuple(CHECKS),
) -> Iterator[CheckResult]:
    """Run checks and yield their results.

    A job that the server fails or refuses, or that breaks the contract, is a
    result, too.

    Args:
        clients: Clients of the server to check.
        offered: Dtypes that the server computes with.
        seed: Seed of the random operands.
        names: Which of `CHECKS` to run.

    Raises:
        GradwireError: The server is unreachable or about to stop.
    """
    for name, (check, dtypes) in CHECKS.items():
        if name not in names:
            continue
        for dtype in dtypes:
            if dtype not in offered:
                continue
            rng = np.random.default_rng([seed, dtype])
            try:
                yield from check(clients, dtype, rng)
            except UnavailableError:
                raise
            except (CallError, ProtocolError) as error:
                yield CheckResult(
                    name, dtype.label, None, "all", math.inf, 0, str(error)
                )
