"""Gathers what `doctor` goes by: from the node, from peers that knock here, from the machine; `core/doctor` judges."""

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshgpu import __version__
from meshgpu.adapters import surroundings
from meshgpu.adapters.chunk_files import KEEP_FREE_BYTES, KEEP_FREE_SHARE
from meshgpu.adapters.docker_executor import examine_engine
from meshgpu.adapters.fences import find_fence
from meshgpu.adapters.nvml_gpus import NvmlGpus
from meshgpu.agent.home import Home
from meshgpu.agent.knocking import HEARD_S, knock_at_all
from meshgpu.agent.runtime import Runtime
from meshgpu.agent.status import Status
from meshgpu.agent.views import Document
from meshgpu.config import Config, load_config
from meshgpu.core.doctor import firewall
from meshgpu.core.doctor.examination import examine
from meshgpu.core.doctor.words import count
from meshgpu.core.events import KnocksAsked
from meshgpu.core.node import MachineView, Node
from meshgpu.errors import MeshgpuError
from meshgpu.model.doctor import AgentFacts, Facts, Finding, Help, MachineFacts, Membership, OtherMachine, State
from meshgpu.model.gossip import MemberState, mesh_tag
from meshgpu.model.ids import NodeId
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.trust import OFFICE_ROLES
from meshgpu.ports import Discovery, Transport

LINKED_TRIED: Final = 3
"""Linked machines at whose doors this one knocks: as many as are asked to knock here."""

AWAY_TRIED: Final = 16
"""Machines that do not answer, and are looked for: more would only make the line longer."""

DOORS_TRIED: Final = 4
"""Of one machine."""

GRACE_S: Final = 0.3
"""Access points hold multicast back until the next beacon that sends it: every third, at 0.1 s each."""


@dataclass(slots=True)
class Doctor:
    """Examines one agent and its machine. discovery: None where there is none."""

    status: Status
    config: Config
    runtime: Runtime
    transport: Transport
    discovery: Callable[[], Discovery | None]

    async def findings(self) -> list[Document]:
        """All findings as JSON; takes a second, up to seven where doors stay silent."""
        agent, machine = await asyncio.gather(self._agent(), asyncio.to_thread(self._machine))
        return [document(finding) for finding in examine(Facts(machine, agent))]

    # -- the mesh -----------------------------------------------------------------------------------------------------

    async def _agent(self) -> AgentFacts:
        status, node = self.status, self.status.node
        views = [view for view in node.machines(status.clock.now()) if is_of_office(view)]
        others, helped = await asyncio.gather(self._others(views), self._helped())
        log = node.log
        return AgentFacts(
            __version__,
            node.node,
            log.mesh_name,
            mesh_tag(log.mesh),
            membership(node),
            len(log.members),
            tuple(log.person(key) for key in log.frozen if NodeId(key) not in log.former),  # those are out anyway
            log.refused[-1] if log.refused else "",
            clashes(node),
            status.link_port,
            status.wanted_port,
            tuple(status.addresses()),
            self.config.advertise != "off",
            len(status.sightings),
            others,
            helped,
            tuple(self._more()),
        )

    async def _others(self, views: Sequence[MachineView]) -> tuple[OtherMachine, ...]:
        """The other machines; some linked ones and all others are knocked at."""
        linked = [view for view in views if view.state is MemberState.ALIVE]
        away = [view for view in views if view.state is not MemberState.ALIVE]
        tried = {view.member.node for view in (*linked[:LINKED_TRIED], *away[:AWAY_TRIED])}
        return tuple(await asyncio.gather(*(self._other(view, view.member.node in tried) for view in views)))

    async def _other(self, view: MachineView, is_tried: bool) -> OtherMachine:  # noqa: FBT001  # one of a gather
        member, record = view.member, view.record
        addresses = self.status.node.addresses(member.node) or (record.addresses if record else ())
        doors = await knock_at_all(self.transport, addresses[:DOORS_TRIED]) if is_tried else ()
        near = await asyncio.to_thread(surroundings.neighbours) if doors else frozenset()
        return OtherMachine(
            member.node,
            member.name,
            record.agent_version if record else "",
            tuple(record.addresses if record and record.addresses else addresses),
            view.state is MemberState.ALIVE,
            doors,
            any(door.address.rpartition(":")[0] in near for door in doors),
        )

    async def _helped(self) -> tuple[Help, ...]:
        """Have peers knock here. Both sides let their announcement be heard meanwhile."""
        discovery, clock = self.discovery(), self.status.clock
        since_s = clock.now().boot_s - HEARD_S
        if discovery is not None:
            discovery.remind()
        answered = (await self.runtime.ask(KnocksAsked)).knocks
        heard = frozenset[NodeId]()
        if discovery is not None:
            await asyncio.sleep(GRACE_S)  # an announcement may be held back longer than the answer that followed it
            window_s = clock.now().boot_s - since_s
            heard = frozenset(peer for peer, _, _ in answered if discovery.heard(peer, window_s))
        name = self.status.node.log.name_of
        helped = [Help(peer, name(peer), answer, peer in heard, gap_s) for peer, answer, gap_s in answered]
        return tuple(sorted(helped, key=lambda help_: help_.name))

    def _more(self) -> Iterable[Finding]:
        """What other parts of the agent noticed."""
        if (note := self.status.join_note) is not None:
            state = {True: State.OK, False: State.FAIL, None: State.WARN}[note.ok]
            yield Finding("join file", state, note.found, note.hint)
        node = self.status.node
        cloned = [view.member.name for view in node.machines(self.status.clock.now()) if view.is_cloned]
        if cloned:
            found = f"two agents run with the keys of {', '.join(cloned)}: no work is given to it"
            remedy = "was a disk or a home directory copied? On the copy: meshgpu down, delete its keys, and join anew"
            yield Finding("keys", State.FAIL, found, remedy)
        for fault in node.audits.faults:
            name = node.log.name_of(fault.node)
            remedy = f"ask its owner, and on {name}: meshgpu audit --verify"
            yield Finding("audit", State.FAIL, f"{name}: {fault.reason}", remedy)
            return
        own, others = count(node.attempts.audit.count, "entry", "entries"), count(node.audits.watched, "machine")
        yield Finding("audit", State.OK, f"{own} here, ends of {others} watched")

    # -- the machine --------------------------------------------------------------------------------------------------

    def _machine(self) -> MachineFacts:
        status = self.status
        _, capacity = status.node.heard(status.node.node)
        readings = capacity.readings if capacity else ()
        return machine_facts(
            status.home,
            self.config,
            status.inventory,
            readings,
            (status.fence, status.fence_reason),
            status.discovery_fault,
        )


def membership(node: Node) -> Membership:
    log = node.log
    if log.mesh is None:
        return Membership.NONE
    if node.node in log.ended:
        return Membership.ENDED
    return Membership.FORMER if node.node in log.former else Membership.MEMBER


def clashes(node: Node) -> tuple[str, ...]:
    """Machines that show with the beginning of their id, because another one has their name."""
    members = node.log.members.values()
    names = {member.name for member in members}
    return tuple(
        member.name
        for member in members
        if member.name.endswith(f"-{member.node[:4]}") and member.name[: -len("-abcd")] in names
    )


def is_of_office(view: MachineView) -> bool:
    return not view.is_self and view.member.role in OFFICE_ROLES


def machine_facts(
    home: Home,
    config: Config,
    inventory: Inventory,
    readings: Iterable[GpuReading],
    fence: tuple[str, str],
    mdns_fault: str,
) -> MachineFacts:
    """What the machine itself shows. fence: name, and why it is nothing stronger. Blocks."""
    free, total = surroundings.disk_room(home.directory)
    kept = int(config.keep_free_gb * 1e9) if config.keep_free_gb is not None else int(total * KEEP_FREE_SHARE)
    faults = (reading.fault for reading in readings if reading.fault)
    return MachineFacts(
        str(home.directory),
        getattr(sys, "_base_executable", sys.executable),
        inventory,
        surroundings.read_networks(),
        free,
        total,
        kept if config.keep_free_gb is not None else max(kept, KEEP_FREE_BYTES),
        *fence,
        config.fence != "none",
        surroundings.has_program("bwrap"),
        surroundings.restricts_userns(),
        examine_engine(),
        surroundings.is_clock_kept(),
        surroundings.firewall_here(),
        mdns_fault,
        surroundings.udp_holder() if mdns_fault else "",
        tuple(dict.fromkeys(faults)),
        surroundings.socket_facts(home.socket),
    )


def document(finding: Finding) -> Document:
    """A finding as JSON; ok: whether it is well, None for what is only worth a look or was not tried."""
    ok = {State.OK: True, State.FAIL: False}.get(finding.state)
    return {
        "name": finding.name,
        "state": finding.state.value,
        "ok": ok,
        "found": finding.found,
        "hint": finding.remedy,
    }


# -- where no agent answers ------------------------------------------------------------------------------------------


def examine_alone(directory: Path, found: str, remedy: str | None) -> list[Document]:
    """What can be said of this machine without its agent. found: what became of the try to reach it."""
    home, fault = Home(directory), Finding("agent", State.FAIL, found, remedy)
    try:
        config = load_config(home.config)
    except (MeshgpuError, OSError) as error:
        bad = error.message if isinstance(error, MeshgpuError) else str(error)
        fault = Finding("agent", State.FAIL, f"it cannot start: {bad}", f"nano {home.config}")
        config = Config()
    inventory, readings = asyncio.run(_read_gpus())
    trial = find_fence() if config.fence == "auto" else None
    fence = (trial.name, trial.reason) if trial else ("", "config.toml says so")
    machine = machine_facts(home, config, inventory, readings, fence, surroundings.mdns_fault())
    return [document(finding) for finding in examine(Facts(machine, no_agent=fault))]


async def _read_gpus() -> tuple[Inventory, tuple[GpuReading, ...]]:
    """One sample of the driver."""
    samples: list[tuple[Inventory, tuple[GpuReading, ...]]] = []
    probe = NvmlGpus()
    await probe.start(lambda inventory, readings: samples.append((inventory, readings)))
    await probe.stop()
    return samples[0]


def firewall_document(link_port: int, pairing_port: int) -> Document:
    """What a firewall has to let through, for `--for-firewall`."""
    return {
        "rules": [
            {
                "port": rule.port,
                "protocol": rule.protocol,
                "direction": rule.direction,
                "peer": rule.peer,
                "purpose": rule.purpose,
            }
            for rule in firewall.rules(link_port, pairing_port)
        ],
        "ufw": list(firewall.ufw_lines(link_port, pairing_port)),
        "firewalld": list(firewall.firewalld_lines(link_port, pairing_port)),
    }


def ports_of(directory: Path) -> tuple[int, int]:
    """The ports that config.toml asks for: of Links, and of pairing."""
    config = load_config(Home(directory).config)
    return config.link_port, config.pairing_port
