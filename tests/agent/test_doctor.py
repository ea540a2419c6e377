"""What `doctor` says about the port of the links, from a real node."""

import random
from pathlib import Path

import pytest

from meshgpu.agent.home import Home
from meshgpu.agent.status import Status
from meshgpu.core.node import Node, NodeConfig
from meshgpu.model.clock import Now
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
