"""New keys for a machine that stays: what is signed for them, and which nodes go on as which.

A Rekey is believed only with the word of every key in it, so nobody is put in another's place against its will. The
lineage knows each Rekey of a node that told one story, whether it counts or not: a removal reaches all who may come
after its target.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from meshgpu.errors import TrustError
from meshgpu.model.ids import KeyId, MeshId, NodeId, key_id
from meshgpu.model.trust import NewKey, NewKeys, Notary, Rekey, Signed

ACCOUNTS_LIMIT: Final = 16
"""OS accounts of one machine whose keys change at once: each brings two signatures to check, and a liar sends many."""

REKEYS_LIMIT: Final = 64
"""Of one machine, for ever: one a quarter for 16 years. Each is an author whom all later digests name."""


def make_rekey(
    mesh: MeshId,
    node: NodeId,
    identity: tuple[bytes, bytes],
    users: Iterable[NewKey],
    signers: tuple[Notary, Notary],
) -> Rekey:
    """What `node` writes to go on as another.

    identity: its next device key and device CA. signers: what holds the keys of before, and those of after.
    Raises TrustError `no-such-key` where a key is with neither.
    """
    users = tuple(users)
    public_key, device_ca = identity
    claim = NewKeys(mesh, node, public_key, users)
    before, after = signers
    proofs: list[Signed] = [after.sign(key_id(public_key), claim)]
    for user in users:
        proofs += [before.sign(key_id(user.before), claim), after.sign(key_id(user.after), claim)]
    return Rekey(public_key, device_ca, users, tuple(proofs))


def check_rekey(notary: Notary, mesh: MeshId, author: KeyId, rekey: Rekey) -> None:
    """Raises TrustError unless every key that changes place agreed to exactly this."""
    who = f"cannot take in new keys of {author[:12]}"
    if len(rekey.users) > ACCOUNTS_LIMIT:
        raise TrustError("not-allowed", f"{who}: of {len(rekey.users)} accounts, expected at most {ACCOUNTS_LIMIT}")
    keys = [rekey.public_key, *(key for user in rekey.users for key in (user.before, user.after))]
    if len({*keys}) != len(keys) or key_id(rekey.public_key) == author:
        raise TrustError("not-allowed", f"{who}: a key stands in more than one place")
    if len(rekey.proofs) != len(keys):
        raise TrustError("not-allowed", f"{who}: {len(rekey.proofs)} keys agreed, expected {len(keys)}")
    claim = NewKeys(mesh, NodeId(author), rekey.public_key, rekey.users)
    for key, proof in zip(keys, rekey.proofs, strict=True):
        if notary.read(proof, key, NewKeys) != claim:
            raise TrustError("not-allowed", f"{who}: the key {key_id(key)[:12]} agreed to something else")


class Lineage:
    """Who goes on as whom, as everybody comes to know it: walked from the keys that admins let in.

    Steps are those of nodes that told one story. Of those that come after a *forked* one each of us may have heard
    another; so they are not known here, and all that would hang on them is left out. Everybody who holds the same forks
    and the same admissions walks the same way, whatever else he was told, and forks are told to all.
    """

    def __init__(self, admitted: Iterable[NodeId], heirs: Mapping[NodeId, NodeId]) -> None:
        """heirs: {node that is not forked: the one that it goes on as}."""
        self._steps = dict.fromkeys(admitted, 0)
        self._before: dict[NodeId, set[NodeId]] = {}
        waiting = deque(self._steps)
        while waiting:
            before = waiting.popleft()
            heir = heirs.get(before)
            if heir is None:
                continue
            self._before.setdefault(heir, set()).add(before)
            if heir not in self._steps:
                self._steps[heir] = self._steps[before] + 1
                waiting.append(heir)

    def knows(self, node: NodeId) -> bool:
        """Whether `node` was let in, or comes after one that was, and no fork lies between."""
        return node in self._steps

    def is_full(self, node: NodeId) -> bool:
        """Whether the machine of `node` has changed its keys too often for us to remember one more time.

        By the shortest way that leads here. It can only become shorter, so who refuses first takes in later.
        """
        return self._steps.get(node, 0) >= REKEYS_LIMIT

    def is_disputed(self, node: NodeId) -> bool:
        """Whether several nodes go on as this one."""
        return len(self._before.get(node, ())) > 1

    def ancestry(self, node: NodeId) -> frozenset[NodeId]:
        """`node`, and all that it may have been before."""
        if node not in self._before:
            return frozenset((node,))  # nearly always
        seen = {node}
        waiting = [node]
        while waiting:
            for before in self._before.get(waiting.pop(), ()):
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)
        return frozenset(seen)
