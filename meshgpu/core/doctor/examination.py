"""Everything `doctor` looks at, in one list: a check is a function of facts, and none of them asks anybody."""

from collections.abc import Callable
from typing import Final

from meshgpu.core.doctor import machine, mesh, network
from meshgpu.model.doctor import AgentFacts, Facts, Finding, MachineFacts, State

OfMachine = Callable[[MachineFacts], Finding]
OfMesh = Callable[[AgentFacts, MachineFacts], Finding]

OF_MACHINE: Final[tuple[tuple[str, OfMachine], ...]] = (
    ("gpus", machine.gpus),
    ("containers", machine.containers),
    ("fence", machine.fence),
    ("python", machine.python),
    ("disk", machine.disk),
    ("socket", machine.socket),
)
"""What needs no agent."""

OF_MESH: Final[tuple[tuple[str, OfMesh], ...]] = (
    ("mesh", mesh.membership),
    ("names", mesh.names),
    ("versions", mesh.versions),
    ("addresses", network.addresses),
    ("link port", network.way_in),
    ("way out", network.way_out),
    ("links", network.links),
    ("discovery", network.discovery),
    ("clock", network.clock),
)
"""What the mesh knows."""

_WITHOUT_AGENT: Final[dict[str, OfMachine]] = {"discovery": network.mdns_port, "clock": network.kernel_clock}
"""What is left of a check of the mesh where no agent answers."""


def examine(facts: Facts) -> tuple[Finding, ...]:
    """All findings, in the order of the lists; one for each check, and what the agent's other parts say."""
    about, agent = facts.machine, facts.agent
    of_machine = [check(about) for _, check in OF_MACHINE]
    if agent is None:
        alone = [_alone(name, about) for name, _ in OF_MESH]
        return (*([facts.no_agent] if facts.no_agent else []), *alone, *of_machine)
    running = Finding("agent", State.OK, f"meshgpu {agent.version}, home {about.home}")
    of_mesh = [check(agent, about) for _, check in OF_MESH]
    return (running, *of_mesh, *agent.more, *of_machine)


def _alone(name: str, about: MachineFacts) -> Finding:
    check = _WITHOUT_AGENT.get(name)
    return check(about) if check else Finding(name, State.SKIPPED, "that needs the agent")
