"""The names of labels, which Prometheus restricts."""

from __future__ import annotations

import re

import pytest

from gradwire_server.observability.prometheus import label_name


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        ("numpy", "numpy"),
        ("cuda-driver", "cuda_driver"),
        ("__A.b c", "a_b_c"),
        ("7zip", "library_7zip"),
        ("python", "library_python"),
        ("-", "library_"),
    ],
)
def test_any_library_has_a_label(library: str, expected: str) -> None:
    assert label_name(library) == expected
    assert re.fullmatch("[a-z][a-z0-9_]*", expected)
