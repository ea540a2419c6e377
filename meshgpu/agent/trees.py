"""Trees on their way: fetched chunk by chunk from whoever has them, laid out as an attempt's working directory."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from meshgpu.agent.home import Home
from meshgpu.errors import MeshgpuError
from meshgpu.model.bulk import ChunksWanted
from meshgpu.model.ids import Address, Digest, JobId, NodeId, digest
from meshgpu.model.job import AttemptPlan
from meshgpu.model.tree import MANIFEST_LIMIT_BYTES
from meshgpu.ports import ChunkStore, Transport
from meshgpu.wire.bulk import encode_bulk

logger = logging.getLogger(__name__)

CHUNKS_PER_REQUEST: Final = 256
"""Digests in one request: 16 kB, far below a frame."""

PROGRESS_BYTES: Final = 8 * 2**20
"""How much arrives between two words about it."""


class Trees:
    """Moves trees between machines and into working directories."""

    def __init__(
        self, home: Home, chunks: ChunkStore, transport: Transport, addresses: Callable[[NodeId], Sequence[Address]]
    ) -> None:
        self._home = home
        self._chunks = chunks
        self._transport = transport
        self._addresses = addresses
        self._fetching: dict[Digest, asyncio.Lock] = {}

    async def fetch(
        self, job: JobId, tree: Digest, sources: Sequence[NodeId], progress: Callable[[int, int], None]
    ) -> None:
        """Make every chunk of `tree` be here. Raises MeshgpuError with what the last source said."""
        lock = self._fetching.setdefault(tree, asyncio.Lock())
        try:
            async with lock:  # a second job with the same tree waits, and then finds everything here
                await self._fetch(job, tree, sources, progress)
        finally:
            if not lock.locked():
                self._fetching.pop(tree, None)

    async def _fetch(
        self, job: JobId, tree: Digest, sources: Sequence[NodeId], progress: Callable[[int, int], None]
    ) -> None:
        failure: MeshgpuError | None = None
        if not await asyncio.to_thread(self._chunks.missing, [tree]):
            missing, sizes = await asyncio.to_thread(self._missing, tree)
            if not missing:
                return
        for source in sources:
            try:
                await self._get(job, source, [tree], lambda _: None)
                missing, sizes = await asyncio.to_thread(self._missing, tree)
                total = sum(sizes[chunk] for chunk in missing)
                done = 0

                def count(received: int, total: int = total) -> None:
                    nonlocal done
                    if (done + received) // PROGRESS_BYTES > done // PROGRESS_BYTES:
                        progress(done + received, total)
                    done += received

                for start in range(0, len(missing), CHUNKS_PER_REQUEST):
                    await self._get(job, source, missing[start : start + CHUNKS_PER_REQUEST], count)
                return
            except MeshgpuError as error:
                logger.info("cannot fetch tree %s from %s: %s", tree[:12], source[:12], error.message)
                failure = error
        raise failure or MeshgpuError("missing-chunks", f"cannot get the files of job {job[:6]}: nobody has them")

    def _missing(self, tree: Digest) -> tuple[list[Digest], dict[Digest, int]]:
        sizes = self._chunks.manifest(tree).chunks()
        return self._chunks.missing(list(sizes)), sizes

    async def _get(self, job: JobId, source: NodeId, chunks: Sequence[Digest], count: Callable[[int], None]) -> None:
        """Fetch some chunks from one machine; each is checked before it is kept."""
        missing = await asyncio.to_thread(self._chunks.missing, list(chunks))
        if not missing:
            return
        request = encode_bulk(ChunksWanted(job, tuple(missing)))
        wanted = iter(missing)
        parts: list[bytes] = []
        held_bytes = 0
        async for message in self._transport.fetch(source, self._addresses(source), request):
            held_bytes = held_bytes + len(message) if parts else len(message)
            if held_bytes > MANIFEST_LIMIT_BYTES:
                raise MeshgpuError("missing-chunks", f"cannot use what {source[:12]} sends: a chunk has no end")
            parts.append(message[1:])
            count(len(message) - 1)
            if message[:1] == b"\x01":
                data, parts = b"".join(parts), []
                if digest(data) != next(wanted, None):
                    raise MeshgpuError("missing-chunks", f"cannot use what {source[:12]} sent: it was not asked for")
                await asyncio.to_thread(self._chunks.put, data)
        if next(wanted, None) is not None:
            raise MeshgpuError("missing-chunks", f"cannot get all files from {source[:12]}: the stream ended early")
        await asyncio.to_thread(self._chunks.sync)

    async def stage(self, plan: AttemptPlan, sources: Sequence[NodeId], progress: Callable[[str], None]) -> Path:
        """An attempt's working directory, filled. Raises MeshgpuError; then nothing of it is left."""
        spec = plan.spec

        def tell(done_bytes: int, total_bytes: int) -> None:
            progress(f"files: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")

        await self.fetch(spec.job, spec.tree, sources, tell)
        work = self._home.attempt(spec.job, plan.epoch) / "work"
        work.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # `parents` minds no mode
        work.parent.mkdir(mode=0o700, exist_ok=True)
        await asyncio.to_thread(self._chunks.materialise, spec.tree, work)
        work.chmod(0o755)  # its parents are private; the account that runs a fenced job must get in
        return work


async def serve_chunks(chunks: ChunkStore, wanted: Sequence[Digest]) -> AsyncIterator[bytes]:
    """Answer ChunksWanted: each chunk in parts of up to 1 MiB less the flag byte."""
    part_bytes = 2**20 - 1
    for chunk in wanted:
        data = await asyncio.to_thread(chunks.get, chunk)
        for start in range(0, max(len(data), 1), part_bytes):
            is_last = start + part_bytes >= len(data)
            yield (b"\x01" if is_last else b"\x00") + data[start : start + part_bytes]
