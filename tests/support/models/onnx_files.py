"""Small ONNX models, written field by field: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto."""

import struct
from collections.abc import Iterable
from pathlib import Path

FLOAT = 1
INT, BYTES = 0, 2  # protobuf's wire types


def write_dark_finder(path: Path, *, side: int = 320) -> Path:
    """Write a model with U2-Net's interface that finds what is darker than middle grey: sigmoid(conv 1x1)."""
    graph = [
        _sub(1, _node("Conv", ["picture", "weight", "bias"], "sum"), _node("Sigmoid", ["sum"], "mask")),
        _sub(5, _tensor("weight", (1, 3, 1, 1), [-20.0] * 3), _tensor("bias", (1,), [0.0])),
        _sub(11, _value("picture", (1, 3, side, side))),
        _sub(12, _value("mask", (1, 1, side, side))),
        _field(2, b"dark"),
    ]
    opset = _field(2, 13)
    path.write_bytes(_field(1, 8) + _sub(7, b"".join(graph)) + _sub(8, opset))
    return path


def _node(kind: str, inputs: Iterable[str], output: str) -> bytes:
    return _sub(1, *(one.encode() for one in inputs)) + _field(2, output.encode()) + _field(4, kind.encode())


def _tensor(name: str, shape: tuple[int, ...], values: list[float]) -> bytes:
    dims = b"".join(_field(1, dim) for dim in shape)
    return dims + _field(2, FLOAT) + _field(8, name.encode()) + _field(9, struct.pack(f"<{len(values)}f", *values))


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = _sub(1, *(_field(1, dim) for dim in shape))
    tensor = _field(1, FLOAT) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _sub(number: int, *messages: bytes) -> bytes:
    return b"".join(_field(number, message) for message in messages)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | INT) + _varint(value)
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
