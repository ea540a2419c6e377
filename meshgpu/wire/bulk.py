"""Bulk requests as bytes: the name of the request's type, a zero byte, its protobuf encoding."""

from typing import get_args

from meshgpu.errors import MeshgpuError
from meshgpu.model.bulk import BulkRequest
from meshgpu.wire.codec import decode, encode

_KINDS = {kind.__name__.encode(): kind for kind in get_args(BulkRequest)}


def encode_bulk(request: BulkRequest) -> bytes:
    return type(request).__name__.encode() + b"\0" + encode(request)


def decode_bulk(data: bytes) -> BulkRequest:
    """Raises MeshgpuError `bad-message`."""
    name, _, payload = data.partition(b"\0")
    kind = _KINDS.get(name)
    if kind is None:
        raise MeshgpuError("bad-message", "cannot serve a stream: the request is of no known kind")
    request: BulkRequest = decode(kind, payload)
    return request
