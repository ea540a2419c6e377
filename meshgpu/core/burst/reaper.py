"""Which instances of the mesh have no right to live, whoever rented them. Reads tags alone, so any burst peer can."""

from collections.abc import Callable, Collection, Iterable
from typing import Final

from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.cloud import LIVE_STATES, Instance, LaunchId
from meshgpu.model.ids import JobId, NodeId

LOST_OWNER_S: Final = 600.0
"""How long the burst peer that rented an instance may be away, as for an upgrade: then others watch the instance."""


class Reaper:
    """Remembers since when owners are away."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._away_since: dict[NodeId, float] = {}

    def doomed(
        self,
        now: Now,
        instances: Iterable[Instance],
        launches: Collection[LaunchId],
        is_burst_peer: Callable[[NodeId], bool],
        is_busy: Callable[[Instance], bool],
    ) -> list[tuple[Instance, str]]:
        """What is to end, and why. `launches`: those of this node. Called after each survey, at least once a minute."""
        living = sorted(
            (instance for instance in instances if instance.state in LIVE_STATES),
            key=lambda instance: (instance.launched_wall_s, instance.instance),
        )
        self._note_owners(now, living, is_burst_peer)
        first: dict[JobId, Instance] = {}
        verdicts: list[tuple[Instance, str]] = []
        for instance in living:
            older = first.setdefault(instance.need, instance)
            reason = ""
            if now.wall_s > instance.lease_ends_wall_s + WALL_CLOCK_SLACK_S:
                reason = "its lease is over"
            elif older is not instance:
                reason = f"{older.instance} was rented for the same job before"
            elif instance.owner == self._node and instance.launch not in launches:
                reason = "this node knows nothing of its launch"
            elif self._is_orphan(now, instance) and not is_busy(instance):
                reason = "the burst peer that rented it is away"
            if reason:
                verdicts.append((instance, reason))
        return verdicts

    def _note_owners(self, now: Now, living: list[Instance], is_burst_peer: Callable[[NodeId], bool]) -> None:
        away = {i.owner for i in living if i.owner != self._node and not is_burst_peer(i.owner)}
        self._away_since = {owner: self._away_since.get(owner, now.boot_s) for owner in sorted(away)}

    def _is_orphan(self, now: Now, instance: Instance) -> bool:
        since = self._away_since.get(instance.owner)
        return since is not None and now.boot_s >= since + LOST_OWNER_S
