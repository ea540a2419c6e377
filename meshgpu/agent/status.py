"""What the agent knows of itself and its surroundings, for the people at its socket."""

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from meshgpu import __version__
from meshgpu.agent.home import Home
from meshgpu.agent.views import Document
from meshgpu.core.node import Node
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.gossip import MemberState, Sighting, mesh_tag
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.inventory import Inventory, gpu_summary, short_gpu_name
from meshgpu.model.trust import UserKey
from meshgpu.ports import Clock
from meshgpu.wire.codec import PROTOCOL

LOW_DISK_BYTES = 10 * 10**9
"""Below this a job's files may not fit any more: `doctor` says so."""

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

    # -- doctor -------------------------------------------------------------------------------------------------------

    async def doctor(self) -> list[Document]:
        """Everything that this agent can check about itself."""
        return [
            _check("agent", True, f"meshgpu {__version__}, home {self.home.directory}"),
            self._mesh_check(),
            *self._join_file_check(),
            self._links_check(),
            *self._clones_check(),
            self._audit_check(),
            self._discovery_check(),
            self._gpu_check(),
            self._fence_check(),
            _check("python for jobs", True, self.python),
            await asyncio.to_thread(self._disk_check),
        ]

    def _mesh_check(self) -> Document:
        log = self.node.log
        if log.mesh is None:
            return _check("mesh", None, "in no mesh yet", "meshgpu init, or meshgpu join INVITE")
        if self.node.node in log.former:
            return _check("mesh", False, f"no member of {log.mesh_name} any more", "meshgpu leave")
        if frozen := [key for key in log.frozen if NodeId(key) not in log.former]:  # else it is out, and that is that
            who = ", ".join(log.person(key) for key in frozen)
            found = f"{who} signed two different entries of the log with one number: frozen there"
            return _check("mesh", False, found, "meshgpu admin remove, by another admin, or meshgpu recover")
        if log.refused:
            return _check("mesh", False, f"an entry of the mesh log was refused: {log.refused[-1]}")
        return _check("mesh", True, f"{log.mesh_name} ({mesh_tag(log.mesh)}), {_count(len(log.members), 'machine')}")

    def _join_file_check(self) -> list[Document]:
        note = self.join_note
        return [] if note is None else [_check("join file", note.ok, note.found, note.hint)]

    def _links_check(self) -> Document:
        machines = [view for view in self.node.machines(self.clock.now()) if not view.is_self]
        away = [view.member.name for view in machines if view.state is MemberState.DOWN]
        where = f"port {self.link_port} at {', '.join(self.addresses()) or 'no address'}"
        if not away:
            total = _count(len(machines), "other machine")
            found = f"{where}; {len(machines)} of {total} {'answers' if len(machines) == 1 else 'answer'}"
            if self.wanted_port in (0, self.link_port):
                return _check("links", True, found)
            hint = f"ss -ltnp 'sport = :{self.wanted_port}'; then meshgpu down && meshgpu up"
            return _check("links", None, f"{found}; port {self.wanted_port} was taken", hint)
        hint = f"is it on, and may it reach port {self.link_port} here?"
        return _check("links", False, f"{where}; no answer from {', '.join(away)}", hint)

    def _clones_check(self) -> list[Document]:
        cloned = [view.member.name for view in self.node.machines(self.clock.now()) if view.is_cloned]
        found = "two agents run with the keys of "
        hint = "was a disk or a home directory copied? On the copy: meshgpu down, then delete its keys and join anew"
        return [_check("keys", False, f"{found}{', '.join(cloned)}: no work is given to it", hint)] if cloned else []

    def _audit_check(self) -> Document:
        node = self.node
        for fault in node.audits.faults:
            name = node.log.name_of(fault.node)
            return _check(
                "audit", False, f"{name}: {fault.reason}", f"ask its owner, and on {name}: meshgpu audit --verify"
            )
        own, others = _count(node.attempts.audit.count, "entry", "entries"), _count(node.audits.watched, "machine")
        return _check("audit", True, f"{own} here, ends of {others} watched")

    def _discovery_check(self) -> Document:
        if self.discovery_fault:
            return _check("discovery", False, self.discovery_fault, 'list machines as seeds = ["host"] in config.toml')
        count = len(self.sightings)
        return _check("discovery", True if count else None, f"mDNS works here; {_count(count, 'other machine')} seen")

    def _gpu_check(self) -> Document:
        inventory = self.inventory
        if inventory.gpus:
            versions = f"driver {inventory.driver_version or '?'}, CUDA {inventory.cuda_version or '?'}"
            return _check("gpus", True, f"{gpu_summary(inventory.gpus)}, {versions}")
        return _check("gpus", None, inventory.gpu_note or "no GPU")

    def _fence_check(self) -> Document:
        if self.fence:
            weaker = f" ({self.fence_reason})" if self.fence_reason else ""
            return _check("fence", True, f"{self.fence} shuts in other users' jobs{weaker}")
        found = self.fence_reason or "nothing works here"
        return _check("fence", False, f"other users' jobs are refused: {found}", "apt install bubblewrap")

    def _disk_check(self) -> Document:
        usage = shutil.disk_usage(self.home.directory)
        found = f"{usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free below {self.home.directory}"
        return _check(
            "disk", usage.free >= LOW_DISK_BYTES, found, None if usage.free >= LOW_DISK_BYTES else "free some"
        )


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def _check(name: str, ok: bool | None, found: str, hint: str | None = None) -> Document:  # noqa: FBT001  # a verdict
    return {"name": name, "ok": ok, "found": found, "hint": hint}
