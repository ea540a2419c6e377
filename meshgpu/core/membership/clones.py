"""Two agents with one node key, as after a disk was copied: who they are, and since when it was seen.

Every start of an agent draws an instance id, which its Links carry. A restart brings a new one, and the old one does
not come back, but for a Link that was on its way when its agent ended; where it comes back again, both live.
"""

import math
from typing import Final

from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId

INSTANCES_KEPT: Final = 64
"""Of one member: as many starts, within which a copy that lives is sure to have opened a Link again."""

RETURNS: Final = 3
"""Of instances after another: a Link that an agent opened just before its end makes at most two, its own and then that
of the agent which it took the Link from."""

CLONE_S: Final = 600.0
"""For how long a member is refused work after it was last seen to run twice. Two that live take each other's Links away
every few seconds."""


class Clones:
    """What the Links of each member show."""

    def __init__(self) -> None:
        self._instances: dict[NodeId, list[str]] = {}
        self._returns: dict[NodeId, tuple[int, float]] = {}
        self._seen_at: dict[NodeId, float] = {}

    def link_opened(self, now: Now, peer: NodeId, instance: str) -> bool:
        """Returns whether this shows that the member runs twice, and that was not known before."""
        known = self._instances.get(peer, [])
        self._instances[peer] = [*(one for one in known if one != instance), instance][-INSTANCES_KEPT:]
        if instance not in known[:-1]:
            return False
        count, last_at = self._returns.get(peer, (0, -math.inf))
        count = count + 1 if now.boot_s < last_at + CLONE_S else 1
        self._returns[peer] = count, now.boot_s
        if count < RETURNS:
            return False
        was_known = peer in self._seen_at
        self._seen_at[peer] = now.boot_s
        return not was_known

    def is_cloned(self, peer: NodeId) -> bool:
        return peer in self._seen_at

    def forget(self, peer: NodeId) -> None:
        """It is no member any more."""
        self._instances.pop(peer, None)
        self._returns.pop(peer, None)
        self._seen_at.pop(peer, None)

    def step(self, now: Now) -> None:
        """Forgive those that have not run twice for CLONE_S."""
        for peer in [peer for peer, at in self._seen_at.items() if now.boot_s >= at + CLONE_S]:
            del self._seen_at[peer]
