"""Joining by a string that lies in a file: which file is believed, which refusal is final, when to try again.

Whoever can write such a file decides whose jobs run on the machine, and whoever can read it can join in its place.
"""

from typing import Final

from meshgpu.model.ids import NodeId, as_name

OVER: Final = frozenset({"bad-invite", "wrong-mesh"})
"""Codes after which the same string will never work: it is garbled, used up or over, or another mesh answered."""

FIRST_PAUSE_S: Final = 5.0
LONGEST_PAUSE_S: Final = 300.0
"""An invite lives for days at most, and its maker's machine may be off for the night."""

NODE_CHARACTERS: Final = 4
"""Of the node id, as machines of one name are told apart in the mesh, too."""


def fault_of(mode: int, owner: int, own_uid: int) -> str:
    """Why a file with these permission bits and this owner's uid is not believed; empty where it is."""
    if owner not in (0, own_uid):
        return f"it belongs to the account {owner}, expected root or the one that runs the agent"
    if mode & ~0o600:
        return f"its mode is {mode:04o}, expected 0600: others might read the secret in it"
    return ""


def is_over(code: str) -> bool:
    """Whether the error with which joining failed leaves nothing to hope for."""
    return code in OVER


def pause_s(tries: int, luck: float) -> float:
    """Seconds to wait after so many tries that nobody answered. luck: 0 to 1, so that machines do not come at once."""
    return float(min(FIRST_PAUSE_S * 2.0 ** min(tries - 1, 16), LONGEST_PAUSE_S) * (0.5 + luck / 2))


def names_for(host_name: str, node: NodeId) -> tuple[str, str]:
    """What the machine is to be called, and what if the mesh has one of that name: images often share a host name."""
    return host_name, as_name(f"{host_name[: 39 - NODE_CHARACTERS]}-{node[:NODE_CHARACTERS]}", "machine")
