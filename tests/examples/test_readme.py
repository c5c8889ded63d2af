"""What the README shows can be typed in."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_python_runs(server_address, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape) for shape in ((50, 4), (4, 3), (50, 3)))
    given = {
        "x": x,
        "w": w,
        "dy": dy,
        "x_parts": np.array_split(x, 3),
        "dy_parts": np.array_split(dy, 3),
    }
    exec(code.replace("gpu-node:50051", server_address), given)
    np.testing.assert_allclose(given["y"], x @ w)
    np.testing.assert_allclose(given["dx"], dy @ w.T)
    np.testing.assert_allclose(given["stream"].dw, x.T @ dy)
    assert "0 (50, 3) (50, 4)" in capsys.readouterr().out
