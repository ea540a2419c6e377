"""The control API's answer to `why`, from a real node through a real socket to the client."""

import asyncio
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshgpu.agent.control import Control, serve
from meshgpu.agent.jobs import Found
from meshgpu.client.agent import AgentClient
from meshgpu.client.home import SOCKET_NAME
from meshgpu.core.events import MachineRead, MeshEntered
from meshgpu.core.node import Node, NodeConfig
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import UserName, digest, job_id
from meshgpu.model.job import EnvironmentRequest, JobSpec, JobState, JobView, Register, SecretBox, SecretWrap
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.sim.office import Office, furnish

DEADLINE_S = 10.0
NOW = Now(1.0, 1_800_000_001.0, "boot")


@dataclass
class Rooms:
    """What the call needs of the agent's status and jobs: one user, one job that waits."""

    node: Node
    view: JobView
    clock_gap: None = None

    @property
    def clock(self) -> "Rooms":
        return self

    def now(self) -> Now:
        return NOW

    def account(self, uid: int) -> Any:
        return type("Account", (), {"key": "key"})()

    async def find(self, key: str, text: str) -> Found:
        if text != "train":
            raise MeshgpuError("unknown-job", f"cannot find a job {text} among yours")
        return Found(self.view, "train-abc")


def make_rooms(office: Office) -> Rooms:
    me, other = office.setups[:2]
    node = Node(me.node, NOW, office.notaries[0], random.Random(1), NodeConfig("1", fence="bubblewrap"), ())
    node.start(NOW)
    node.step(NOW, MeshEntered(office.mesh, office.log, ()))
    node.step(NOW, MachineRead(me.inventory, ()))
    spec = JobSpec(
        office.mesh,
        job_id(other.accounts[UserName("ada")], b"j" * 16),
        b"j" * 16,
        "train",
        UserName("ada"),
        other.node,
        ("python", "train.py"),
        False,
        (),
        EnvironmentRequest(),
        digest(b"tree"),
        1000,
        1,
        Resources(GpuRequest(2)),
        None,
        (me.node,),
        NOW.wall_s,
    )
    return Rooms(node, JobView(spec, Register(spec.job, JobState.QUEUED, submitted_wall_s=NOW.wall_s)))


async def ask(rooms: Rooms, home: Path, job: str) -> Any:
    """The answer, or the MeshgpuError."""
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        stub: Any = rooms
        unused: Any = None
        control = Control(
            stub, stub, unused, unused, unused, unused, unused, frozenset, unused, lambda: None, tasks, unused, unused
        )
        runner = await serve(control.application(), home / SOCKET_NAME)
        try:
            return await asyncio.to_thread(AgentClient(home).why, job)
        except MeshgpuError as error:
            return error
        finally:
            await runner.cleanup()


async def test_why_tells_of_every_machine_and_gpu(tmp_path: Path) -> None:
    office = furnish(random.Random(1), 3, is_plain=True)
    view = await ask(make_rooms(office), tmp_path, "train")
    assert view["job"]["display"] == "train-abc"
    assert view["job"]["held_by"] == ["rig0"]
    mine, *others = view["machines"]
    assert mine == {
        "name": "rig0",
        "takes": False,
        "rule": "lacks",
        "refusal": "has RTX 4090 24 GB; the job asks for 2",
        "remedy": "ask for less: -g, --cpus, --memory, --on",
        "gives": [],
        "gpus": [
            {
                "index": 0,
                "uuid": "GPU-rig0-0",
                "name": "NVIDIA GeForce RTX 4090",
                "memory_total_bytes": 24 * 2**30,
                "takes": True,
                "rule": None,
                "refusal": "",
                "remedy": "",
            }
        ],
    }
    assert [(other["name"], other["rule"], other["takes"]) for other in others] == [
        ("rig1", "down", False),
        ("rig2", "down", False),
    ]


async def test_why_names_machines_that_cannot_read_the_jobs_secrets(tmp_path: Path) -> None:
    rooms = make_rooms(furnish(random.Random(1), 2, is_plain=True))
    wraps = (SecretWrap(rooms.node.node, b"e" * 32, b"w" * 48),)
    spec = replace(rooms.view.spec, secrets=SecretBox(("TOKEN",), b"ciphertext", wraps))
    rooms.view = JobView(spec, rooms.view.register)
    view = await ask(rooms, tmp_path, "train")
    assert view["job"]["secrets"] == ["TOKEN"]
    sealed_to, other = view["machines"]
    assert sealed_to["rule"] == "lacks"
    assert (other["rule"], other["remedy"][:12]) == ("sealed", "run it anew:")
    assert "has no key to the job's secrets" in other["refusal"]


async def test_why_of_an_unknown_job_is_its_error(tmp_path: Path) -> None:
    rooms = make_rooms(furnish(random.Random(1), 2, is_plain=True))
    error = await ask(rooms, tmp_path, "nonsense")
    assert isinstance(error, MeshgpuError)
    assert (error.code, error.message) == ("unknown-job", "cannot find a job nonsense among yours")
