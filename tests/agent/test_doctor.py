"""What `doctor` says about the mesh and the port of the links, from a real node."""

import random
from pathlib import Path

import pytest

from meshgpu.agent.home import Home
from meshgpu.agent.status import Status
from meshgpu.core.events import LogWritten, MeshEntered
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, KeyId
from meshgpu.model.trust import LogEntry
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import furnish

NOW = Now(1.0, 1_800_000_001.0, "boot")


class StillClock:
    def now(self) -> Now:
        return NOW


@pytest.mark.parametrize(("wanted", "ok"), [(40001, True), (0, True), (7443, None)])
async def test_doctor_doubts_the_links_where_their_port_was_taken(tmp_path: Path, wanted: int, ok: bool | None) -> None:
    office = furnish(random.Random(1), 2, is_plain=True)
    node = Node(office.setups[0].node, NOW, office.notaries[0], random.Random(1), NodeConfig("1"), ())
    status = Status(node, Home(tmp_path), StillClock(), "a", 40001, "", list, "python", wanted_port=wanted)
    (links,) = [check for check in await status.doctor() if check["name"] == "links"]
    assert (links["ok"], "port 7443 was taken" in links["found"]) == (ok, ok is None)


async def test_doctor_does_not_ask_for_ever_to_remove_who_is_out_already(tmp_path: Path) -> None:
    """A machine whose old keys somebody used at the same time is out, and its broken chain is nobody's trouble."""
    office = furnish(random.Random(1), 2, is_plain=True)
    first, second = (setup.node for setup in office.setups)
    node = Node(first, NOW, office.notaries[0], random.Random(1), NodeConfig("1"), ())
    node.step(NOW, MeshEntered(office.mesh, office.log))
    status = Status(node, Home(tmp_path), StillClock(), "a", 40001, "", list, "python")
    for name in ("next", "thief's"):
        public_key = office.ring.make(name)
        signers = (office.notaries[1], ToyNotary(office.ring, (public_key,)))
        rekey = make_rekey(office.mesh, second, (public_key, b"ca"), (), signers)
        heads = tuple(head for head in node.log.heads() if head.author != KeyId(second))
        entry = LogEntry(office.mesh, KeyId(second), 0, Digest(""), heads, rekey)
        node.step(NOW, LogWritten((office.notaries[1].sign(KeyId(second), entry),)))
    assert node.log.frozen == (KeyId(second),)
    assert node.log.person(KeyId(second)) == "rig1"
    (mesh,) = [check for check in await status.doctor() if check["name"] == "mesh"]
    assert (mesh["ok"], mesh["found"].endswith("1 machine")) == (True, True)
