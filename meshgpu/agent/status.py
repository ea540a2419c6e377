"""What the agent knows of itself and its surroundings, for the people at its socket."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from meshgpu import __version__
from meshgpu.agent.home import Home
from meshgpu.agent.views import Document
from meshgpu.core.node import Node
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.gossip import Sighting, mesh_tag
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.inventory import Inventory, gpu_summary, short_gpu_name
from meshgpu.model.trust import UserKey
from meshgpu.ports import Clock
from meshgpu.wire.codec import PROTOCOL

SIGHTINGS_KEPT = 512
"""Announcements remembered for `discover`."""


@dataclass(frozen=True, slots=True)
class JoinNote:
    """What became of the file by which this machine was to join."""

    ok: bool | None
    found: str
    hint: str | None = None


@dataclass(slots=True)
class Status:
    """Reads the node and what the adapters reported at start."""

    node: Node
    home: Home
    clock: Clock
    host_name: str
    link_port: int
    fence: str
    addresses: Callable[[], list[Address]]
    python: str
    inventory: Inventory = field(default_factory=lambda: Inventory(0, 0))
    sightings: dict[NodeId, Sighting] = field(default_factory=dict)
    discovery_fault: str = ""
    pairing_port: int = 0
    fence_reason: str = ""
    wanted_port: int = 0
    join_note: JoinNote | None = None
    started_wall_s: float = field(default_factory=time.time)

    def sighted(self, sighting: Sighting) -> None:
        """Remember an announcement; the oldest is forgotten when a flood comes."""
        self.sightings.pop(sighting.node, None)
        self.sightings[sighting.node] = sighting
        if len(self.sightings) > SIGHTINGS_KEPT:
            del self.sightings[next(iter(self.sightings))]

    def account(self, uid: int) -> UserKey:
        """The mesh's key for an OS account of this machine. Raises `not-in-mesh` or `not-allowed`."""
        log = self.node.log
        if log.mesh is None:
            raise MeshgpuError(
                "not-in-mesh", "cannot do this: this machine is in no mesh", "meshgpu init, or meshgpu join INVITE"
            )
        account = log.account(self.node.node, uid)
        if self.node.node in log.former:
            raise TrustError(
                "not-in-mesh",
                f"cannot do this: this machine is no member of the mesh {log.mesh_name} any more",
                "meshgpu leave, and then join again under new keys",
            )
        if account is None:
            raise TrustError("not-allowed", f"cannot do this: account {uid} of this machine is no user of the mesh")
        return account

    def agent(self, uid: int) -> Document:
        log = self.node.log
        account = log.account(self.node.node, uid)
        me = log.members.get(self.node.node)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "home": str(self.home.directory),
            "node": self.node.node,
            "name": me.name if me else self.host_name,
            "mesh": {"id": log.mesh, "name": log.mesh_name} if log.mesh else None,
            "user": account.user if account else None,
            "link_port": self.link_port,
            "wanted_port": self.wanted_port,
            "addresses": self.addresses(),
            "fence": self.fence,
            "lending": self.node.owner.policy.lending.value,
            "gpus": self.gpu_names(),
            "gpu_note": self.inventory.gpu_note,
            "started_at": self.started_wall_s,
        }

    def gpu_names(self) -> list[str]:
        return [short_gpu_name(gpu.name) for gpu in self.inventory.gpus]

    async def discover(self, seconds: float) -> list[Document]:
        """Machines that announce themselves, after listening for up to `seconds`; this one comes first."""
        await asyncio.sleep(seconds)
        sightings = sorted(self.sightings.values(), key=lambda sighting: sighting.node)
        return [self._sighting(sighting) for sighting in (self.own_sighting(), *sightings)]

    def own_sighting(self) -> Sighting:
        """What this machine announces of itself where everything may be shown."""
        log = self.node.log
        return Sighting(
            self.node.node,
            mesh_tag(log.mesh),
            log.mesh_name,
            PROTOCOL,
            tuple(self.addresses()),
            self.pairing_port,
            gpu_summary(self.inventory.gpus),
        )

    def _sighting(self, sighting: Sighting) -> Document:
        log = self.node.log
        member = log.members.get(sighting.node)
        is_ours = log.mesh is not None and sighting.mesh_tag == mesh_tag(log.mesh)
        is_self = sighting.node == self.node.node
        return {
            "node": sighting.node,
            "name": member.name if member else (self.host_name if is_self else None),
            "mesh_name": sighting.mesh_name or None,
            "mesh_tag": sighting.mesh_tag or None,
            "ours": is_ours,
            "self": is_self,
            "pairing": sighting.pairing_port > 0,
            "addresses": list(sighting.addresses),
            "gpus": sighting.gpus or None,
        }
