"""Pieces of a log as bytes, one after the other, as `LogsWanted` says."""

import struct
from collections.abc import Iterator
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.logs import LogGap, LogPiece, LogRecord, LogStream

_HEAD: Final = struct.Struct(">BdQI")
_MISSING: Final = struct.Struct(">Q")
_GAP: Final = 0
_STREAM_NUMBERS: Final = {LogStream.STDOUT: 1, LogStream.STDERR: 2}
_STREAMS: Final = {number: stream for stream, number in _STREAM_NUMBERS.items()}


def encode_piece(piece: LogPiece) -> bytes:
    if isinstance(piece, LogGap):
        return _HEAD.pack(_GAP, 0.0, piece.position, _MISSING.size) + _MISSING.pack(piece.size_bytes)
    head = _HEAD.pack(_STREAM_NUMBERS[piece.stream], piece.wall_s, piece.position, len(piece.data))
    return head + piece.data


def decode_pieces(message: bytes) -> Iterator[LogPiece]:
    """The pieces in one message. Raises MeshgpuError `bad-message`."""
    start = 0
    while start < len(message):
        try:
            number, wall_s, position, length = _HEAD.unpack_from(message, start)
            start += _HEAD.size
            data = message[start : start + length]
            if number == _GAP:
                (missing_bytes,) = _MISSING.unpack(data)
                yield LogGap(missing_bytes, position)
            else:
                yield LogRecord(_STREAMS[number], wall_s, data, position)
        except (struct.error, KeyError) as error:
            raise MeshgpuError("bad-message", "cannot read a log: a record of it is garbled") from error
        start += length
