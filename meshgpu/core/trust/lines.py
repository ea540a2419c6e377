"""The machines of the office through all their keys: the id that each was admitted under, and those that came after."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from meshgpu.core.trust.chains import Chains, Written
from meshgpu.model.ids import NodeId, node_id
from meshgpu.model.trust import OFFICE_ROLES, AddNode, Member, Rekey


@dataclass(slots=True)
class Line:
    """One machine. ids: in the order in which it took them. steps: what it said each time it took another.

    removals: whose removal takes it out. is_lost: it gave up its last keys, and nobody can go on in its place.
    """

    ids: list[NodeId]
    steps: list[Rekey] = field(default_factory=list)
    removals: frozenset[NodeId] = frozenset()
    is_lost: bool = False

    @property
    def first(self) -> NodeId:
        return self.ids[0]

    @property
    def current(self) -> NodeId:
        return self.ids[-1]

    def changes(self) -> Iterator[tuple[NodeId, Rekey, NodeId]]:
        """(id of before, what was said, the next id), in order."""
        return zip(self.ids, self.steps, self.ids[1:], strict=False)

    def members(self, admitted: Member) -> list[Member]:
        """The machine under each of its ids; `admitted` is the first, with the role it has now."""
        members = [admitted]
        for _, said, heir in self.changes():
            members.append(replace(admitted, node=heir, public_key=said.public_key, device_ca=said.device_ca))
        return members


def lines(chains: Chains) -> list[Line]:
    """All machines that admins ever let into the office, in the order in which they came.

    The key of somebody who was admitted, or that several would go on as, is nobody's next; and who gave up his keys
    without knowing that he is a member has nothing to hand on. All the same his old keys are gone for ever.
    """
    admitted: dict[NodeId, Written] = {}
    for written in chains.counting:
        if isinstance(body := written.entry.body, AddNode) and is_admission(body):
            admitted.setdefault(body.node, written)
    rekeyed = chains.rekeyed()
    found: list[Line] = []
    for node, admission in admitted.items():
        line = Line([node])
        while (said := rekeyed.get(line.current)) is not None and chains.follows(said, admission):
            assert isinstance(said.entry.body, Rekey)
            heir = node_id(said.entry.body.public_key)
            if heir in admitted or chains.lineage.is_disputed(heir):
                break
            line.ids.append(heir)
            line.steps.append(said.entry.body)
        line.is_lost = line.current in rekeyed
        line.removals = chains.lineage.ancestry(line.current)
        found.append(line)
    return found


def is_admission(body: AddNode) -> bool:
    """Whether it may admit a machine of the office."""
    return body.role in OFFICE_ROLES and body.node == node_id(body.public_key)
