"""Bulk streams: trees, logs and files, served to peers and to our own users by the same rules."""

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

from meshgpu.adapters.log_ledger import follow, read_records
from meshgpu.agent.files import open_beneath
from meshgpu.agent.home import Home
from meshgpu.agent.trees import serve_chunks
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.core.node import Node
from meshgpu.core.trust.roles import may_say
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.bulk import BulkRequest, ChunksWanted, FilesWanted, FileWanted, LogsWanted
from meshgpu.model.ids import Digest, JobId, NodeId
from meshgpu.model.job import Action
from meshgpu.model.logs import LogRecord, LogStream
from meshgpu.model.trust import Signed
from meshgpu.ports import ChunkStore, Clock
from meshgpu.wire.bulk import decode_bulk

_RECORD: Final = struct.Struct(">BdQI")
_STREAM_NUMBERS: Final = {LogStream.STDOUT: 1, LogStream.STDERR: 2}
_STREAMS: Final = {number: stream for stream, number in _STREAM_NUMBERS.items()}
MESSAGE_BYTES: Final = 256 * 1024
"""Payload gathered into one message: large enough for line rate, small enough to be live."""


class Streams:
    """Serves what this node's attempts printed and left, and the trees of jobs it holds or submits."""

    def __init__(self, node: Node, home: Home, chunks: ChunkStore, clock: Clock) -> None:
        self._node = node
        self._home = home
        self._chunks = chunks
        self._clock = clock

    async def serve(self, peer: NodeId, request: bytes) -> AsyncIterator[bytes]:
        """One bulk stream for an authenticated member. Raises MeshgpuError where it is not allowed or not there."""
        async for message in self.answer(peer, decode_bulk(request)):
            yield message

    def answer(self, peer: NodeId, request: BulkRequest) -> AsyncIterator[bytes]:
        member = self._node.log.members.get(peer)
        if member is None or not may_say(member, request):
            what = type(request).__name__
            raise TrustError("not-allowed", f"cannot serve {what} to a {member.role if member else 'stranger'}")
        match request:
            case ChunksWanted(job=job, chunks=chunks):
                return self._chunks_for(peer, job, chunks)
            case LogsWanted():
                return self._logs(self._attempt(peer, request.request, Action.LOGS), request)
            case FilesWanted():
                return self._files(self._attempt(peer, request.request, Action.FILES))
            case FileWanted(path=path):
                return self._file(self._attempt(peer, request.request, Action.FILES), path)

    def _attempt(self, peer: NodeId, signed: Signed, action: Action) -> Attempt:
        """The newest attempt of a job here, if the request's user may see it."""
        request = self._node.rules.verify_request(signed, self._clock.now(), peer)
        attempt = self._node.attempts.latest(request.job) if request.job else None
        may_see = attempt is not None and (attempt.spec.user == request.user or attempt.spec.shared)
        if request.action is not action or attempt is None or not may_see:
            raise TrustError("unknown-job", "cannot find that job among yours on this machine", "meshgpu ps -a")
        return attempt

    # -- trees --------------------------------------------------------------------------------------------------------

    async def _chunks_for(self, peer: NodeId, job: JobId, chunks: Sequence[Digest]) -> AsyncIterator[bytes]:
        tree = self._node.tree_for(job, peer)
        if tree is None:
            raise TrustError("not-allowed", f"cannot send files of job {job[:6]}: the asker neither holds nor runs it")
        if list(chunks) != [tree]:
            known = await asyncio.to_thread(lambda: self._chunks.manifest(tree).chunks())
            if any(chunk != tree and chunk not in known for chunk in chunks):
                raise TrustError("not-allowed", f"cannot send files: they are no part of job {job[:6]}")
        async for message in serve_chunks(self._chunks, chunks):
            yield message

    # -- logs ---------------------------------------------------------------------------------------------------------

    async def _logs(self, attempt: Attempt, request: LogsWanted) -> AsyncIterator[bytes]:
        ledger = self._directory(attempt) / "log"
        if not request.follow:
            position = request.position
            while records := await asyncio.to_thread(read_records, ledger, position, MESSAGE_BYTES):
                position = records[-1].position
                yield b"".join(_encode_record(record) for record in records)
            return
        async for record in follow(ledger, request.position, lambda: not attempt.occupies):
            yield _encode_record(record)

    # -- files --------------------------------------------------------------------------------------------------------

    def _directory(self, attempt: Attempt) -> Path:
        return self._home.attempt(attempt.spec.job, attempt.epoch)

    async def _files(self, attempt: Attempt) -> AsyncIterator[bytes]:
        path = self._directory(attempt) / "outputs.json"
        try:
            rows = await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            rows = b"[]"
        for start in range(0, len(rows), MESSAGE_BYTES):
            yield rows[start : start + MESSAGE_BYTES]

    async def _file(self, attempt: Attempt, path: str) -> AsyncIterator[bytes]:
        with await asyncio.to_thread(open_beneath, self._directory(attempt) / "work", path) as file:
            size = os.fstat(file.fileno()).st_size
            yield str(size).encode()
            sent = 0
            while sent < size:
                data = await asyncio.to_thread(file.read, min(2**20, size - sent))
                if not data:
                    raise MeshgpuError("unknown-file", f"cannot fetch {path}: it became shorter while it was read")
                sent += len(data)
                yield data


def _encode_record(record: LogRecord) -> bytes:
    head = _RECORD.pack(_STREAM_NUMBERS[record.stream], record.wall_s, record.position, len(record.data))
    return head + record.data


def decode_records(message: bytes) -> Iterator[LogRecord]:
    """The records of one message of a log stream. Raises MeshgpuError `bad-message`."""
    start = 0
    while start < len(message):
        try:
            number, wall_s, position, length = _RECORD.unpack_from(message, start)
            stream = _STREAMS[number]
        except (struct.error, KeyError) as error:
            raise MeshgpuError("bad-message", "cannot read a log: a record of it is garbled") from error
        start += _RECORD.size
        yield LogRecord(stream, wall_s, message[start : start + length], position)
        start += length


def decode_files(data: bytes) -> list[tuple[str, int]]:
    """[(path, bytes)] of what a job left."""
    try:
        return [(str(path), int(size)) for path, size in json.loads(data or b"[]")]
    except (ValueError, TypeError) as error:
        raise MeshgpuError("bad-message", "cannot read the list of files: it is garbled") from error
