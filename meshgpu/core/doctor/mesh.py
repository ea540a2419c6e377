"""Membership, names and versions."""

from typing import Final

from meshgpu.core.doctor.words import count, listed
from meshgpu.model.doctor import AgentFacts, Finding, MachineFacts, Membership, State

_RELEASES_APART: Final = 1
"""Neighbouring minor versions understand each other; before 1.0 the wire may change with each further one."""

UPGRADE: Final = "uv tool upgrade meshgpu && meshgpu down && meshgpu up"


def membership(agent: AgentFacts, _: MachineFacts) -> Finding:
    """In a mesh, and still a member of it; nobody frozen, nothing refused."""
    match agent.membership:
        case Membership.NONE:
            return Finding("mesh", State.WARN, "in no mesh yet", "meshgpu init, or meshgpu join")
        case Membership.FORMER:
            return Finding("mesh", State.FAIL, f"no member of {agent.mesh_name} any more", "meshgpu leave")
        case Membership.ENDED:
            found = f"no member of {agent.mesh_name} any more: this rented machine's lease has expired"
            return Finding("mesh", State.FAIL, found, "on an office machine: meshgpu burst status")
        case Membership.MEMBER:
            pass
    if agent.frozen:
        found = f"{', '.join(agent.frozen)} signed two different entries of the log with one number: frozen there"
        return Finding("mesh", State.FAIL, found, "meshgpu admin remove, by another admin, or meshgpu recover")
    if agent.refused:
        found = f"an entry of the mesh log was refused: {agent.refused}"
        return Finding("mesh", State.FAIL, found, "meshgpu admin ls")
    found = f"{agent.mesh_name} ({agent.mesh_tag}), {count(agent.members, 'machine')}"
    return Finding("mesh", State.OK, found)


def names(agent: AgentFacts, _: MachineFacts) -> Finding:
    """Two machines that were given one name: the later one shows with a suffix."""
    if not agent.clashes:
        return Finding("names", State.OK, "every machine has a name of its own")
    found = f"two machines were given one name: the later shows as {listed(agent.clashes)}"
    return Finding("names", State.WARN, found, "on that machine: meshgpu leave, then meshgpu join --name OTHER")


def versions(agent: AgentFacts, _: MachineFacts) -> Finding:
    """Machines more than one minor version apart may not understand each other; whoever is behind is named."""
    own = _release(agent.version)
    seen = [(other.name, _release(other.version)) for other in agent.others]
    known = [(name, release) for name, release in seen if release is not None]
    if own is None or not known:
        return Finding("versions", State.OK, f"meshgpu {agent.version}")
    newest = max(release for _, release in known)
    if newest > own:
        ahead = [other for other in agent.others if _release(other.version) == newest]
        is_near = _distance(own, newest) <= _RELEASES_APART
        found = f"{agent.version} is {'one behind' if is_near else 'too old here'}: {ahead[0].version} runs on "
        found += listed(other.name for other in ahead)
        return Finding("versions", State.WARN if is_near else State.FAIL, found, UPGRADE)
    old = [name for name, release in known if _distance(release, own) > _RELEASES_APART]
    if old:
        found = f"too old for {agent.version} here: {listed(old)}"
        return Finding("versions", State.FAIL, found, f"on {old[0]}: {UPGRADE}")
    behind = [name for name, release in known if release < own]
    found = f"meshgpu {agent.version}" + (f"; {listed(behind)} one behind" if behind else ", everywhere the same")
    return Finding("versions", State.OK, found)


def _release(version: str) -> tuple[int, int] | None:
    """(major, minor); None for what is no version."""
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return int(parts[0]), int(parts[1])


def _distance(older: tuple[int, int], newer: tuple[int, int]) -> int:
    """Minor versions between two releases; another major version is far away."""
    return newer[1] - older[1] if newer[0] == older[0] else 2 * _RELEASES_APART
