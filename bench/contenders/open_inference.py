"""A running server with the Open Inference Protocol (Triton, MLServer, ...).

The server is given by its address. Its model has FP32 inputs X, W and DY and FP32
outputs Y, DX and DW. Each call is one unary ModelInfer with raw contents, without a
limit on message size; all other options are defaults. As a script, this module is a
small server with this model.
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np

from bench.contenders.grpc_server import UNLIMITED, serve
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.messages import message_classes
from bench.work import Array, copied, products

DEFAULT_MODEL = "gradients"
_SERVICE, _METHOD = "inference.GRPCInferenceService", "ModelInfer"
# The needed fields of the protocol. The protocol nests these messages; the wire
# format is the same.
_TENSOR = {
    "name": ("string", 1),
    "datatype": ("string", 2),
    "shape": ("repeated int64", 3),
}
_Tensor, _Wanted, _Request, _Reply = message_classes(
    "inference",
    {
        "Tensor": _TENSOR,
        "Wanted": {"name": ("string", 1)},
        "ModelInferRequest": {
            "model_name": ("string", 1),
            "inputs": ("repeated Tensor", 5),
            "outputs": ("repeated Wanted", 6),
            "raw_input_contents": ("repeated bytes", 7),
        },
        "ModelInferResponse": {
            "model_name": ("string", 1),
            "outputs": ("repeated Tensor", 5),
            "raw_output_contents": ("repeated bytes", 6),
        },
    },
)


def _arrays(tensors: Any, contents: Any) -> dict[str, Array]:
    return {
        tensor.name: np.frombuffer(data, np.float32).reshape(tensor.shape)
        for tensor, data in zip(tensors, contents, strict=True)
    }


def _tensor(name: str, array: Array) -> Any:
    return _Tensor(name=name, datatype="FP32", shape=array.shape)


class OpenInference(ArrayContender):
    """One client, one connection, one call after the other.

    Args:
        where: ``HOST:PORT`` or ``HOST:PORT/MODEL``.
    """

    def __init__(self, where: str) -> None:
        self._address, _, model = where.partition("/")
        self._model = model or DEFAULT_MODEL
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        self._channel = grpc.insecure_channel(self._address, options=UNLIMITED)
        self._call = self._channel.unary_unary(
            f"/{_SERVICE}/{_METHOD}",
            request_serializer=_Request.SerializeToString,
            response_deserializer=_Reply.FromString,
        )

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        given = {"X": x, "W": w, "DY": dy}
        reply = self._call(
            _Request(
                model_name=self._model,
                inputs=[_tensor(name, array) for name, array in given.items()],
                outputs=[_Wanted(name=name) for name in ("Y", "DX", "DW")],
                raw_input_contents=[array.tobytes() for array in given.values()],
            )
        )
        found = _arrays(reply.outputs, reply.raw_output_contents)
        results = (found["Y"], found["DX"], found["DW"])
        return results if out is None else copied(results, out)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


create = OpenInference


def _compute(request: Any, _: grpc.ServicerContext) -> Any:
    given = _arrays(request.inputs, request.raw_input_contents)
    results = products(given["X"], given["W"], given["DY"])
    named = dict(zip(("Y", "DX", "DW"), results, strict=True))
    return _Reply(
        model_name=request.model_name,
        outputs=[_tensor(name, array) for name, array in named.items()],
        raw_output_contents=[array.tobytes() for array in named.values()],
    )


def _serve() -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        _compute,
        request_deserializer=_Request.FromString,
        response_serializer=_Reply.SerializeToString,
    )
    serve(_SERVICE, _METHOD, handler, UNLIMITED)


if __name__ == "__main__":
    _serve()
