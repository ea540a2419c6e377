"""What makes a request fresh where clocks differ, and which requests to stop were obeyed already."""

import random
from collections.abc import Iterable
from typing import Final

from meshgpu.core.effects import Effect, Persist
from meshgpu.errors import TrustError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.records import ObeyedRecord

CHALLENGE_BYTES: Final = 32
CHALLENGE_S: Final = 120.0
"""Seconds of the boot clock for which a challenge is good: a round trip takes far less, a slow person none."""
OPEN_LIMIT: Final = 64
"""Open challenges of one peer, of which the oldest goes: some thousands in the largest mesh."""

OBEYED_S: Final = 2 * WALL_CLOCK_SLACK_S
"""A request may be dated 120 s ahead and is fresh for 120 s after that: for so long it could be repeated."""
OBEYED_LIMIT: Final = 1024
"""Requests to stop of one key within that time: more than a loop over all of a user's jobs makes."""
NONCE_CHARACTERS: Final = 64
"""Of a request's nonce at most: it becomes a key on the disk."""


class Challenges:
    """Random bytes that this node gave out, each to one peer, good once. In memory: a restart makes all void."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._open: dict[NodeId, dict[bytes, float]] = {}

    def issue(self, now: Now, peer: NodeId) -> bytes:
        """A new challenge for `peer`."""
        mine = {nonce: until for nonce, until in self._open.get(peer, {}).items() if now.boot_s < until}
        while len(mine) >= OPEN_LIMIT:
            del mine[next(iter(mine))]
        nonce = self._rng.randbytes(CHALLENGE_BYTES)
        mine[nonce] = now.boot_s + CHALLENGE_S
        self._open[peer] = mine
        return nonce

    def redeem(self, now: Now, peer: NodeId, nonce: bytes) -> bool:
        """Whether `nonce` is an open challenge of `peer`; it is none any more."""
        until = self._open.get(peer, {}).pop(nonce, None)
        return until is not None and now.boot_s < until


class Obeyed:
    """The requests to stop that this node obeyed of late, by key and nonce; durable through the effects returned."""

    def __init__(self) -> None:
        self._until: dict[KeyId, dict[str, float]] = {}

    def restore(self, records: Iterable[ObeyedRecord]) -> None:
        for record in records:
            self._until.setdefault(record.key, {})[record.nonce] = record.until_wall_s

    def has(self, key: KeyId, nonce: str) -> bool:
        return nonce in self._until.get(key, {})

    def check_room(self, now: Now, key: KeyId, nonce: str) -> None:
        """Raises TrustError where one more cannot be kept, so that it must not be obeyed."""
        if not 0 < len(nonce) <= NONCE_CHARACTERS:
            raise TrustError("bad-request", f"cannot obey a request: its nonce has {len(nonce)} characters")
        if sum(now.wall_s < until for until in self._until.get(key, {}).values()) >= OBEYED_LIMIT:
            raise TrustError(
                "busy", f"cannot stop a job: {OBEYED_LIMIT} were stopped within {OBEYED_S:.0f} s", "try again soon"
            )

    def note(self, now: Now, key: KeyId, nonce: str) -> list[Effect]:
        """Keep that it was obeyed, and forget what would be stale by now."""
        until_wall_s = now.wall_s + OBEYED_S
        effects = self.forget_old(now)
        self._until.setdefault(key, {})[nonce] = until_wall_s
        return [*effects, Persist("obeyed", f"{key}/{nonce}", ObeyedRecord(key, nonce, until_wall_s))]

    def forget_old(self, now: Now) -> list[Effect]:
        old = [
            (key, nonce) for key, kept in self._until.items() for nonce, until in kept.items() if now.wall_s >= until
        ]
        for key, nonce in old:
            del self._until[key][nonce]
        return [Persist("obeyed", f"{key}/{nonce}", None) for key, nonce in old]
