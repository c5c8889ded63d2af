"""Y, dX and dW of a product from a server, compared with NumPy.

.venv/bin/python examples/quickstart.py [ADDRESS]
"""

import numpy as np
from local_server import given_or_local_server

import gradwire

rng = np.random.default_rng()
x, w, dy = (rng.random(shape) for shape in ((5000, 300), (300, 200), (5000, 200)))

with given_or_local_server() as address, gradwire.connect(address) as client:
    y, dx, dw = client.gradients(x, w, dy)

print("Y  = X W   is correct:", np.allclose(y, x @ w))
print("dX = dY Wᵀ is correct:", np.allclose(dx, dy @ w.T))
print("dW = Xᵀ dY is correct:", np.allclose(dw, x.T @ dy))
