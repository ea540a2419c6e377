"""What `doctor` goes by, gathered from outside and from the node, and what it finds."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Interface

from meshgpu.model.ids import Address, NodeId
from meshgpu.model.inventory import Inventory
from meshgpu.model.messages import KnockAnswer, KnockResult


class State(StrEnum):
    """How a finding stands. skipped: it was not tried, or what it is about is not here."""

    SKIPPED = "skipped"
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`. remedy: a command that mends it, or leads there; None where nothing is to mend."""

    name: str
    state: State
    found: str
    remedy: str | None = None


class InterfaceKind(StrEnum):
    """What an interface leads to. containers: a bridge without a network card, or half of a container's cable."""

    OFFICE = "office"
    LOOPBACK = "loopback"
    TUNNEL = "tunnel"
    CONTAINERS = "containers"


@dataclass(frozen=True, slots=True)
class Interface:
    """One IPv4 address of this machine."""

    name: str
    address: IPv4Interface
    kind: InterfaceKind = InterfaceKind.OFFICE


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The container engine. version: empty where none answers; then `fault` says why, `remedy` what mends it.

    Without a remedy there simply is none.
    """

    version: str = ""
    gives_gpus: bool = False
    fault: str = "no container engine here: jobs with --image are refused"
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """The control socket. is_own: whether it belongs to the account that asks."""

    path: str
    mode: int
    is_own: bool


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What can be seen of a machine without an agent.

    restricts_userns: whether AppArmor keeps programs from making user namespaces. is_fence_wanted: False where
    config.toml says `none`. is_clock_kept: whether the kernel's clock follows a time server; None if it does not tell.
    firewall: what rules are kept by: `ufw`, `firewalld`, empty for neither. mdns_fault: why UDP port 5353 cannot be
    opened; mdns_holder: the program that has it, where that can be seen. faults: of GPUs, one text each.
    """

    home: str
    python: str
    inventory: Inventory
    interfaces: tuple[Interface, ...] = ()
    disk_free_bytes: int = 0
    disk_total_bytes: int = 0
    keep_free_bytes: int = 0
    fence: str = ""
    fence_reason: str = ""
    is_fence_wanted: bool = True
    has_bubblewrap: bool = True
    restricts_userns: bool = False
    engine: EngineFacts = EngineFacts()
    is_clock_kept: bool | None = None
    firewall: str = ""
    mdns_fault: str = ""
    mdns_holder: str = ""
    gpu_faults: tuple[str, ...] = ()
    socket: SocketFacts | None = None


@dataclass(frozen=True, slots=True)
class OtherMachine:
    """Another member of the office as this machine sees it.

    doors: what knocking at its addresses came to. is_neighbour: whether it answered ARP on this very network
    within the last minutes; it may be off by now.
    """

    node: NodeId
    name: str
    version: str
    addresses: tuple[Address, ...]
    is_linked: bool
    doors: tuple[KnockResult, ...] = ()
    is_neighbour: bool = False


@dataclass(frozen=True, slots=True)
class Help:
    """What a peer said that was asked to knock here. is_heard: whether its announcement by mDNS arrived here.

    clock_gap_s: by how much its clock is ahead of this machine's.
    """

    node: NodeId
    name: str
    answer: KnockAnswer
    is_heard: bool
    clock_gap_s: float


class Membership(StrEnum):
    """former: it was revoked, has left, or goes on elsewhere under new keys. ended: its lease is over."""

    NONE = "none"
    MEMBER = "member"
    FORMER = "former"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What only a running agent knows. members: how many machines the mesh has, this one included.

    frozen: who signed two entries of the log with one number. refused: why an entry of it was. clashes: machines that
    show with a suffix because another has their name. addresses: what this machine announces of itself.
    sightings: machines seen by mDNS since the start. help: of those that were asked to knock here and answered in time.
    more: what other parts of the agent have to say.
    """

    version: str
    node: NodeId
    mesh_name: str = ""
    mesh_tag: str = ""
    membership: Membership = Membership.NONE
    members: int = 0
    frozen: tuple[str, ...] = ()
    refused: str = ""
    clashes: tuple[str, ...] = ()
    link_port: int = 0
    wanted_port: int = 0
    addresses: tuple[Address, ...] = ()
    announces: bool = True
    sightings: int = 0
    others: tuple[OtherMachine, ...] = ()
    help: tuple[Help, ...] = ()
    more: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. agent: None where none answers, and then `no_agent` is what was found instead."""

    machine: MachineFacts
    agent: AgentFacts | None = None
    no_agent: Finding | None = None
