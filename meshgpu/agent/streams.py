"""Bulk streams: trees, logs and files, served to peers and to our own users by the same rules."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from meshgpu.adapters.log_ledger import LedgerReader, follow, ledger_files
from meshgpu.adapters.log_search import Begin, find_begin
from meshgpu.agent.files import open_beneath
from meshgpu.agent.home import Home
from meshgpu.agent.trees import serve_chunks
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.core.node import Node
from meshgpu.core.trust.roles import may_say
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.bulk import (
    AttemptsWanted,
    BulkRequest,
    ChunksWanted,
    FilesWanted,
    FileWanted,
    LogsWanted,
    TailWanted,
)
from meshgpu.model.ids import Digest, JobId, NodeId
from meshgpu.model.job import Action, JobRequest, JobSpec
from meshgpu.model.logs import LogGap
from meshgpu.model.trust import Signed
from meshgpu.ports import ChunkStore, Clock
from meshgpu.wire.bulk import decode_bulk
from meshgpu.wire.logs import encode_piece

MESSAGE_BYTES: Final = 256 * 1024
"""Of a list of files gathered into one message."""


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
            case LogsWanted(epoch=epoch):
                return self._logs(self._attempt(peer, request.request, Action.LOGS, epoch), request)
            case AttemptsWanted():
                return self._epochs(self._attempt(peer, request.request, Action.LOGS).spec.job)
            case TailWanted():
                return self._tail(peer, request.request)
            case FilesWanted():
                return self._files(self._attempt(peer, request.request, Action.FILES))
            case FileWanted(path=path):
                return self._file(self._attempt(peer, request.request, Action.FILES), path)

    def _attempt(self, peer: NodeId, signed: Signed, action: Action, epoch: int = 0) -> Attempt:
        """An attempt of a job here, the newest for epoch 0, if the request's user may see it."""
        request = self._request(peer, signed, action)
        attempts, attempt = self._node.attempts, None
        if request.job:
            attempt = attempts.find(request.job, epoch) if epoch else attempts.latest(request.job)
        if attempt is None or not _may_see(request, attempt.spec):
            raise _unknown()
        return attempt

    def _request(self, peer: NodeId, signed: Signed, action: Action) -> JobRequest:
        request = self._node.rules.verify_request(signed, self._clock.now(), peer)
        if request.action is not action:
            raise _unknown()
        return request

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
        ledger = self._ledger(attempt.spec.job, attempt.epoch)
        begin = Begin(request.position, request.selection.stream)
        if request.position == 0:
            begin = await asyncio.to_thread(find_begin, ledger, request.selection)
            if begin.position and not begin.cuts:  # who is cut off before the first line must not begin later then
                yield encode_piece(LogGap(0, begin.position))
        ended = (lambda: not attempt.occupies) if request.follow else (lambda: True)
        async for pieces in follow(LedgerReader(ledger, begin.position), ended):
            if message := b"".join(encode_piece(kept) for piece in pieces if (kept := begin.keep(piece)) is not None):
                yield message

    async def _tail(self, peer: NodeId, signed: Signed) -> AsyncIterator[bytes]:
        request = self._request(peer, signed, Action.LOGS)
        stewardship = self._node.stewardship
        view = stewardship.view(request.job) if request.job else None
        if view is None or not _may_see(request, view.spec):
            raise _unknown()
        if (tail := stewardship.tail(view.spec.job)) is not None:
            yield tail.data

    async def _epochs(self, job: JobId) -> AsyncIterator[bytes]:
        def with_log() -> list[int]:
            return [epoch for epoch in self._node.attempts.epochs(job) if ledger_files(self._ledger(job, epoch))]

        yield json.dumps(await asyncio.to_thread(with_log)).encode()

    def _ledger(self, job: JobId, epoch: int) -> Path:
        return self._home.attempt(job, epoch) / "log"

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


def _may_see(request: JobRequest, spec: JobSpec) -> bool:
    return spec.user == request.user or spec.shared


def _unknown() -> TrustError:
    return TrustError("unknown-job", "cannot find that job among yours on this machine", "meshgpu ps -a")


def decode_epochs(data: bytes) -> list[int]:
    """Attempts that have a log."""
    try:
        return [int(epoch) for epoch in json.loads(data)]
    except (ValueError, TypeError) as error:
        raise MeshgpuError("bad-message", "cannot read the list of attempts: it is garbled") from error


def decode_files(data: bytes) -> list[tuple[str, int]]:
    """[(path, bytes)] of what a job left."""
    try:
        return [(str(path), int(size)) for path, size in json.loads(data or b"[]")]
    except (ValueError, TypeError) as error:
        raise MeshgpuError("bad-message", "cannot read the list of files: it is garbled") from error
