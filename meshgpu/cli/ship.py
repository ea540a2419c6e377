"""Brings the working directory to the agent and the job into the mesh."""

from typing import Protocol

from meshgpu.cli.progress import Progress
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import JobRequest, JobView
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest
from meshgpu.model.tree import Manifest


class Chunks(Protocol):
    """A directory as it was captured."""

    @property
    def manifest(self) -> Manifest: ...

    def read(self, chunk: Digest) -> bytes: ...


def ship(client: AgentClient, tree: Chunks) -> str:
    """Give the agent what it does not have of `tree`; returns the tree's digest."""
    view = client.put_tree(tree.manifest.encode())
    sizes = tree.manifest.chunks()
    missing = [Digest(chunk) for chunk in view["missing"]]
    progress = Progress("reading the code,", sum(sizes.get(chunk, 0) for chunk in missing))
    try:
        for chunk in missing:
            data = tree.read(chunk)
            client.put_chunk(data)
            progress.add(len(data))
    finally:
        progress.close()
    return view["tree"]


def submit(client: AgentClient, request: JobRequest) -> JobView:
    """Submit and show how the tree travels; returns the job, queued."""
    progress: Progress | None = None
    try:
        for event in client.submit(request):
            if event["type"] == "job":
                return event["job"]
            progress = progress or Progress("shipping the code,", event["total_bytes"])
            progress.update(event["done_bytes"])
    finally:
        if progress is not None:
            progress.close()
    raise MeshgpuError("agent-gone", "the agent broke off before it took the job; it may have done so", "meshgpu ps")
