"""Forged, mutated, truncated, replayed and misdirected frames against real nodes: `make fuzz`.

Three nodes with real keys run real jobs over the real wire format; every frame between them is kept. Then these frames
come again, in any order, from anybody, and broken in every way: nothing may start, stop, change or crash, and memory
must stay bounded. `python -m tests.fuzz --frames 100000 --seed 1` prints what was tried and what came of it.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.owner import OwnerPolicy
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import GpuId, JobId, KeyId, MeshId, NodeId, UserName, digest, key_id, node_id
from meshgpu.model.inventory import Gpu, GpuReading, Inventory
from meshgpu.model.job import Action, AttemptState, Draft, EnvironmentRequest, JobState, Result
from meshgpu.model.lending import Lending
from meshgpu.model.resources import GB, GpuRequest, Resources
from meshgpu.model.trust import AddNode, Genesis, LinkUser, Role, Signed
from meshgpu.wire.codec import decode_frame, encode_frame
from meshgpu.wire.notary import WireNotary

WALL_S: Final = 1_800_000_000.0
TREE: Final = digest(b"tree")
GROWTH_LIMIT_BYTES: Final = 100 * 10**6
STRANGER: Final = NodeId("a" * 52)
JOBS: Final = 4


@dataclass(frozen=True)
class Frame:
    sender: NodeId
    receiver: NodeId
    data: bytes


@dataclass
class Host:
    """A node of its own directory of keys. started: how often each attempt was told to start."""

    name: str
    directory: Path
    has_gpu: bool = False
    may_steward: bool = False
    node: Node = field(init=False)
    started: Counter[tuple[JobId, int]] = field(default_factory=Counter)
    ended: Counter[tuple[JobId, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.keys = KeyFiles(self.directory / self.name)
        self.notary = WireNotary(self.keys.sign, self.keys.verify)
        self.id = node_id(self.keys.node_key())
        config = NodeConfig(
            "1", fence="bubblewrap", may_steward=self.may_steward, policy=OwnerPolicy(lending=Lending.DEDICATED)
        )
        self.node = Node(self.id, Now(0.0, WALL_S, "boot"), self.notary, random.Random(self.name), config, ())

    @property
    def user(self) -> KeyId:
        return key_id(self.keys.user_key(1000))

    @property
    def inventory(self) -> Inventory:
        gpus = (Gpu(GpuId(f"GPU-{self.name}"), 0, "NVIDIA L4", 24 * 2**30),) if self.has_gpu else ()
        return Inventory(8, 32 * GB, gpus)


class Trio:
    """Who submits, who holds, who runs: all of ada's, each a machine of its own."""

    def __init__(self, directory: Path) -> None:
        self.hosts = [
            Host("desk", directory),
            Host("holder", directory, may_steward=True),
            Host("rig", directory, has_gpu=True),
        ]
        self.by_id = {host.id: host for host in self.hosts}
        self.frames: list[Frame] = []
        self.now_s = 0.0
        self.answers: list[fx.Answered] = []
        self.mesh = self._found()

    def now(self) -> Now:
        return Now(self.now_s, WALL_S + self.now_s, "boot")

    def _found(self) -> MeshId:
        first = self.hosts[0]
        mesh, genesis = found(first.notary, first.user, Genesis("lab", first.keys.user_key(1000), b"r" * 32, b"nonce"))
        log = MeshLog(first.notary)
        log.enter(mesh, (genesis,))
        ada = UserName("ada")
        bodies = [
            body
            for host in self.hosts
            for body in (
                AddNode(host.id, host.keys.node_key(), host.keys.device_ca(), host.name, Role.RIG, ada),
                LinkUser(ada, host.keys.user_key(1000), host.id, 1000),
            )
        ]
        entries: tuple[Signed, ...] = (genesis, *log.write(first.user, bodies))
        for host in self.hosts:
            self.tell(host, ev.MeshEntered(mesh, entries))
            self.tell(host, ev.MachineRead(host.inventory, tuple(GpuReading(g.uuid) for g in host.inventory.gpus)))
        for host in self.hosts:
            for other in self.hosts:
                if other is not host:
                    self.tell(host, ev.LinkOpened(other.id))
        return mesh

    def tell(self, host: Host, event: ev.Event) -> None:
        """Let it happen, and all that follows; what is sent is kept."""
        todo: deque[tuple[Host, ev.Event]] = deque([(host, event)])
        while todo:
            who, what = todo.popleft()
            for effect in who.node.step(self.now(), what):
                todo.extend(self._carried_out(who, effect))

    def _carried_out(self, host: Host, effect: fx.Effect) -> list[tuple[Host, ev.Event]]:
        match effect:
            case fx.Send(peer=peer, message=message):
                assert host.node.log.mesh is not None
                frame = Frame(host.id, peer, encode_frame(host.node.log.mesh, message))
                self.frames.append(frame)
                return [(self.by_id[peer], ev.MessageArrived(host.id, decode_frame(frame.data)[1]))]
            case fx.FetchTree(job=job):
                return [(host, ev.TreeArrived(job))]
            case fx.StartAttempt(plan=plan):
                host.started[plan.spec.job, plan.epoch] += 1
                return [(host, ev.AttemptBegan(plan.spec.job, plan.epoch, self.now().wall_s))]
            case fx.EndAttempt(job=job, epoch=epoch):
                host.ended[job, epoch] += 1
                result = Result(AttemptState.EXITED, 143)
                return [(host, ev.AttemptFinished(job, epoch, self.now().wall_s, result))]
            case fx.Answered():
                self.answers.append(effect)
        return []

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            self.now_s += 0.1
            for host in self.hosts:
                self.tell(host, ev.Ticked())

    def work(self) -> None:
        """Some jobs that end by themselves, one that is stopped, and a list."""
        desk, _, rig = self.hosts
        self.pass_time(2.0)
        for number in range(JOBS):
            draft = Draft(
                f"job{number}", ("true",), False, (), EnvironmentRequest(), TREE, 1, 1, "", Resources(GpuRequest(1))
            )
            self.tell(desk, ev.RunAsked(f"run{number}", desk.user, draft))
            self.pass_time(2.0)
            (view,) = next(a.views for a in self.answers if a.query == f"run{number}")
            if number == JOBS - 1:
                order = ev.ActionAsked("stop", desk.user, Action.STOP, view.spec.job, view.spec.stewards)
                self.tell(desk, order)
            else:
                done = Result(AttemptState.EXITED, 0)
                self.tell(rig, ev.AttemptFinished(view.spec.job, 1, self.now().wall_s, done))
            self.pass_time(2.0)
        self.tell(desk, ev.JobsAsked("list", desk.user))
        self.pass_time(1.0)

    def state(self) -> tuple[object, ...]:
        """All that nobody may change by old or broken frames."""
        views = [
            (host.name, job, view.register.state, view.register.epoch, view.register.result)
            for host in self.hosts
            for job, _ in sorted(self.hosts[2].started)
            if (view := host.node.stewardship.view(job)) is not None
        ]
        logs = [(host.node.log.members, host.node.log.users, host.node.log.heads()) for host in self.hosts]
        acts = [(dict(host.started), dict(host.ended)) for host in self.hosts]
        heard = [host.node.heard(other.id) for host in self.hosts for other in self.hosts]
        return views, logs, acts, heard


def broken(rng: random.Random, frames: list[list[Frame]]) -> tuple[str, Frame]:
    """A frame that was seen, as somebody else would send it again; frames: by what they say, so that all come up."""
    frame, other = rng.choice(rng.choice(frames)), rng.choice(rng.choice(frames))
    data = bytearray(frame.data)
    kind = rng.choice(("replayed", "flipped", "flipped", "cut", "grown", "spliced", "misdirected", "from a stranger"))
    match kind:
        case "flipped":
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[rng.randrange(len(data)) :]
        case "grown":
            at = rng.randrange(len(data) + 1)
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        case "spliced":
            at = rng.randrange(len(data))
            data[at:] = other.data[rng.randrange(len(other.data)) :]
        case "misdirected":
            return kind, Frame(other.sender, other.receiver, frame.data)
        case "from a stranger":
            return kind, Frame(STRANGER, frame.receiver, frame.data)
    return kind, Frame(frame.sender, frame.receiver, bytes(data))


def fuzz(count: int, seed: int, directory: Path) -> Counter[str]:
    """Returns what was tried, by kind, and how much of it could not even be read. Raises AssertionError."""
    rng = random.Random(seed)
    trio = Trio(directory)
    trio.work()
    views = (trio.hosts[1].node.stewardship.view(job) for job, _ in trio.hosts[2].started)
    states = Counter(view.register.state for view in views if view is not None)
    assert states == {JobState.SUCCEEDED: JOBS - 1, JobState.CANCELLED: 1}, states
    assert sum(trio.hosts[2].started.values()) == JOBS
    by_kind: dict[type, list[Frame]] = {}
    for seen in trio.frames:
        by_kind.setdefault(type(decode_frame(seen.data)[1]), []).append(seen)
    frames = list(by_kind.values())
    before = trio.state()
    tried: Counter[str] = Counter()
    peak_bytes = _peak_bytes()
    for number in range(count):
        kind, frame = broken(rng, frames)
        tried[kind] += 1
        trio.now_s += 0.01
        host = trio.by_id[frame.receiver]
        try:
            mesh, message = decode_frame(frame.data)
        except MeshgpuError:
            tried["(unreadable)"] += 1
            continue
        if mesh != trio.mesh:
            tried["(of another mesh)"] += 1
            continue
        for effect in host.node.step(trio.now(), ev.MessageArrived(frame.sender, message)):
            assert not isinstance(effect, fx.StartAttempt | fx.EndAttempt | fx.FetchTree), (number, kind, effect)
    assert trio.state() == before
    grown = _peak_bytes() - peak_bytes
    assert grown < GROWTH_LIMIT_BYTES, f"{grown:,} bytes more"
    tried["(kilobytes more)"] = grown // 1000
    return tried


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tried = fuzz(options.frames, options.seed, Path(directory))
    for kind, number in sorted(tried.items()):
        print(f"{number:>9,}  {kind}")
    print(f"{options.frames:>9,}  in all, 0 executed, 0 crashes, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
