"""Settings refuse what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradwire_server import Settings

PAIR = {"tls_cert": Path("c"), "tls_key": Path("k")}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"listen": ()}, "listen is empty"),
        ({"backend": "tpu"}, "backend is 'tpu': expected one of auto, cupy, numpy"),
        ({"memory_limit": 1}, "memory_limit is 1: expected at least 16777216"),
        ({"max_jobs": 0}, "max_jobs is 0: expected at least 1"),
        ({"max_queue": -1}, "max_queue is -1: expected at least 0"),
        ({"row_block_bytes": 0}, "row_block_bytes is 0: expected at least 1"),
        ({"idle_timeout": 0.0}, "idle_timeout is 0.0: expected at least 0.01"),
        ({"tls_cert": Path("c")}, "tls_cert is set without tls_key"),
        ({"tls_key": Path("k")}, "tls_key is set without tls_cert"),
        ({"tls_client_ca": Path("a")}, "tls_client_ca is set without tls_cert"),
        ({"insecure": True} | PAIR, "insecure is set beside tls_cert"),
        ({"data_advertise": "h"}, "data_advertise is 'h': expected HOST:PORT or :PORT"),
        ({"data_advertise": "h:0"}, "data_advertise is 'h:0': expected HOST:PORT"),
        (
            {"data_advertise": ":9", "data_listen": "off"},
            "data_advertise is set beside data_listen off",
        ),
        (
            {"data_listen": "6161", "listen": ("unix:/s",)},
            "data_listen is '6161', and listen has no TCP address",
        ),
        ({"grace": float("nan")}, "grace is nan: expected at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(given, text):
    with pytest.raises(ValueError, match="^" + text.replace("(", r"\(")):
        Settings(**given)
