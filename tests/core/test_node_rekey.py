"""A node that takes new keys: when it may, what it says and keeps, and what others make of it."""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.audit import AuditFault
from meshgpu.core.jobs.attempts import Attempts, AttemptTiming
from meshgpu.core.jobs.placement import Rule
from meshgpu.core.node import Node, NodeConfig, take_up
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.rekeying import make_rekey
from meshgpu.errors import TrustError
from meshgpu.model import messages as msg
from meshgpu.model.audit import AuditHead
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Caps, Market, Rung
from meshgpu.model.gossip import Demand, Need
from meshgpu.model.ids import Address, Digest, JobId, KeyId, NodeId, UserName, digest, key_id, node_id
from meshgpu.model.job import Action, AttemptState, Draft, EnvironmentRequest, JobRequest, JobState, Result
from meshgpu.model.records import AttemptRecord, Record
from meshgpu.model.resources import GB, NO_GPU, GpuRequest, Resources
from meshgpu.model.trust import Head, LogEntry, NewKey, Rekey, RemoveNode, Role, SetRole, Signed
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import Office, furnish

WALL_S = 1_800_000_000.0
ADA = UserName("ada")
TREE = digest(b"tree")
DONE = Result(AttemptState.EXITED, 0)
DAY_S = 86400.0


@dataclass
class Machine:
    node: Node
    notary: ToyNotary
    disk: dict[tuple[str, str], Record] = field(default_factory=dict)
    done: list[fx.Effect] = field(default_factory=list)


class Room:
    """Nodes that are all linked and hear each other at once. What else they order is kept in `done`."""

    def __init__(self, size: int) -> None:
        self.office: Office = furnish(random.Random(1), size, is_plain=True)
        self.at = 0.0
        self.lost: tuple[type[msg.Message], ...] = ()
        """Messages that nobody hears."""
        self.machines: dict[NodeId, Machine] = {}
        for setup, notary in zip(self.office.setups, self.office.notaries, strict=True):
            config = NodeConfig("1", fence=setup.fence, may_steward=setup.may_steward)
            self.machines[setup.node] = Machine(
                Node(setup.node, self.now(), notary, random.Random(1), config, ()), notary
            )
            self.tell(setup.node, ev.MeshEntered(self.office.mesh, self.office.log))
            self.tell(setup.node, ev.MachineRead(setup.inventory, ()))
            self.tell(setup.node, ev.AddressesChanged((setup.address,)))
        for one in self.machines:
            for other in self.machines:
                if one != other:
                    self.tell(one, ev.LinkOpened(other))
        self.pass_time(1.0)

    @property
    def nodes(self) -> list[NodeId]:
        return [setup.node for setup in self.office.setups]

    def now(self) -> Now:
        return Now(self.at, WALL_S + self.at, "boot")

    def tell(self, node: NodeId, event: ev.Event) -> list[fx.Effect]:
        """One event and all that follows from it everywhere. Returns what `node` ordered in that one step."""
        effects = self._step(node, event)
        waiting = deque((node, effect) for effect in effects)
        while waiting:
            sender, effect = waiting.popleft()
            if isinstance(effect, fx.Send) and effect.peer in self.machines:
                for more in self._step(effect.peer, ev.MessageArrived(sender, effect.message)):
                    waiting.append((effect.peer, more))
        return effects

    def _step(self, node: NodeId, event: ev.Event) -> list[fx.Effect]:
        machine = self.machines[node]
        if isinstance(event, ev.MessageArrived) and isinstance(event.message, self.lost):
            return []
        effects = machine.node.step(self.now(), event)
        for effect in effects:
            if isinstance(effect, fx.Persist) and effect.record is not None:
                machine.disk[effect.kind, effect.key] = effect.record
        machine.done.extend(effects)
        return effects

    def pass_time(self, seconds: float) -> None:
        self.at += seconds
        for node in self.machines:
            self.tell(node, ev.Ticked())

    def rekey(self, node: NodeId, name: str = "next") -> tuple[fx.Answered, list[fx.Effect], NodeId, ToyNotary]:
        """(answer, all effects of that step, id of the new keys, who signs with them)."""
        ring, machine = self.office.ring, self.machines[node]
        public_key = ring.make(f"{name} of {node}")
        accounts = [user for user in machine.node.log.users.values() if user.node == node]
        users = [NewKey(user.public_key, ring.make(f"{name} of {user.key}")) for user in accounts]
        notary = ToyNotary(ring, (public_key, *(user.after for user in users)))
        rekey = make_rekey(self.office.mesh, node, (public_key, b"next ca"), users, (machine.notary, notary))
        return *self.ask(node, rekey), node_id(public_key), notary

    def ask(self, node: NodeId, rekey: Rekey) -> tuple[fx.Answered, list[fx.Effect]]:
        effects = self.tell(node, ev.RekeyAsked("q", rekey))
        (answer,) = [effect for effect in effects if isinstance(effect, fx.Answered)]
        return answer, effects

    def begin_anew(self, before: NodeId, heir: NodeId, notary: ToyNotary) -> None:
        """The agent of a machine that took new keys starts again with what is on disk, and all others link to it."""
        old, setup = self.machines.pop(before), self.office.setups[self.nodes.index(before)]
        node = Node(heir, self.now(), notary, random.Random(1), NodeConfig("1", setup.fence), old.disk.values())
        self.machines[heir] = Machine(node, notary, old.disk)
        node.start(self.now())
        self.tell(heir, ev.MachineRead(setup.inventory, ()))
        for other in self.machines:
            if other != heir:
                self.tell(other, ev.LinkClosed(before, "no longer trusted"))
                self.tell(other, ev.LinkOpened(heir))
                self.tell(heir, ev.LinkOpened(other))
        self.pass_time(1.0)

    def held_by(self, holder: NodeId) -> JobId:
        """The one job that it holds."""
        (job,) = self.machines[holder].node.stewardship._jobs
        return job

    def begin(self, holder: NodeId) -> tuple[NodeId, JobId, int]:
        """Let the one job that `holder` holds begin. Returns the machine where it runs, the job, and its epoch."""
        job = self.held_by(holder)
        self.tell(holder, ev.TreeArrived(job))
        for _ in range(5):
            self.pass_time(0.5)
        (runs,) = [
            (node, effect)
            for node, machine in self.machines.items()
            for effect in machine.done
            if isinstance(effect, fx.StartAttempt)
        ]
        self.tell(runs[0], ev.AttemptBegan(job, runs[1].plan.epoch, WALL_S))
        return runs[0], job, runs[1].plan.epoch

    def revoke(self, node: NodeId) -> None:
        """The admin, on the first machine, takes another one out; its jobs go on."""
        first = self.nodes[0]
        log, admin = self.machines[first].node.log, self.office.setups[0].accounts[ADA]
        body = log.revocation(node, stops_jobs=False)
        self.tell(first, ev.LogWritten(log.write(admin, (body,))))

    def finish(self, holder: NodeId) -> JobId:
        """Let the one job that `holder` holds run to its end."""
        runs, job, epoch = self.begin(holder)
        self.tell(runs, ev.AttemptFinished(job, epoch, WALL_S, DONE))
        return job

    def run(self, submitter: NodeId, machine: str, gpus: int = 1) -> list[fx.Effect]:
        key = self.office.setups[self.nodes.index(submitter)].accounts[ADA]
        resources = Resources(GpuRequest(gpus) if gpus else NO_GPU)
        draft = Draft("train", ("true",), False, (), EnvironmentRequest(), TREE, 1, 1, machine, resources)
        return self.tell(submitter, ev.RunAsked("run", key, draft))


def entries_of(effects: Iterable[fx.Effect]) -> int:
    return sum(isinstance(effect, fx.Persist) and effect.kind == "log" for effect in effects)


def test_audit_of_before_is_held_against_the_new_keys() -> None:
    room = Room(2)
    first, second = room.nodes
    audits = room.machines[first].node.audits
    audits.heard(second, AuditHead(5, Digest("a" * 64)))
    _, _, heir, _ = room.rekey(second)
    fault = audits.heard(heir, AuditHead(0, Digest("b" * 64)))
    assert fault == AuditFault(heir, "its audit went back from entry 5 to 0")


def test_idle_node_hands_over_and_everybody_hears() -> None:
    room = Room(3)
    first, second, third = room.nodes
    answer, effects, heir, _ = room.rekey(second)
    assert answer.code == ""
    assert entries_of(effects) == 1
    assert effects[-1] == answer, "it is answered when all is on disk"
    for node in (first, third):
        log = room.machines[node].node.log
        assert log.members[heir].name == "rig1"
        assert second not in log.members
        trusted = [e.members for e in room.machines[node].done if isinstance(e, fx.TrustMembers)][-1]
        assert {member.node for member in trusted} == {first, heir, third}
        assert fx.NoteNewKeys("rig1", second, heir) in room.machines[node].done


def test_admin_writes_both_and_all_of_it_in_one_transaction() -> None:
    room = Room(3)
    first = room.nodes[0]
    answer, effects, heir, _ = room.rekey(first)
    assert answer.code == ""
    assert entries_of(effects) == 3
    log = room.machines[room.nodes[1]].node.log
    assert [user.node for user in log.admins()] == [heir]


def test_where_it_was_it_is_dialled_at_once_and_after_a_restart() -> None:
    room = Room(2)
    first, second = room.nodes
    address = room.office.setups[1].address
    _, _, heir, _ = room.rekey(second)
    machine = room.machines[first]
    assert machine.node.addresses(heir) == (address,)
    room.tell(first, ev.LinkClosed(second, "no longer trusted"))
    room.pass_time(6.0)
    assert fx.Dial(heir, address) in machine.done
    again = Node(first, room.now(), machine.notary, random.Random(1), NodeConfig("1"), machine.disk.values())
    again.start(room.now())
    assert again.addresses(heir) == (address,)


def test_what_it_kept_makes_it_the_new_node() -> None:
    room = Room(2)
    first, second = room.nodes
    _, _, heir, notary = room.rekey(second)
    disk = room.machines[second].disk
    log = MeshLog(notary)
    take_up(log, disk.values())
    assert log.current(second) == heir == log.current(heir)
    again = Node(heir, room.now(), notary, random.Random(1), NodeConfig("1"), disk.values())
    again.start(room.now())
    assert again.log.members[heir].name == "rig1"
    assert again.addresses(first) == (room.office.setups[0].address,)
    again.step(room.now(), ev.AddressesChanged((Address("new:7443"),)))


def test_machine_without_a_log_goes_on_as_itself() -> None:
    log = MeshLog(ToyNotary(furnish(random.Random(1), 1).ring, ()))
    assert take_up(log, ()) == 0
    assert log.current(NodeId("me")) == "me"


def test_request_signed_with_an_old_key_is_refused_from_both_ids() -> None:
    room = Room(2)
    first, second = room.nodes
    old = room.office.setups[1].accounts[ADA]
    request = JobRequest(room.office.mesh, ADA, Action.LIST, first, room.now().wall_s, "nonce", None)
    signed = room.machines[second].notary.sign(old, request)
    rules = room.machines[first].node.rules
    assert rules.verify_request(signed, room.now(), second) == request
    _, _, heir, notary = room.rekey(second)
    for peer in (second, heir):
        with pytest.raises(TrustError, match="no member any more"):
            rules.verify_request(signed, room.now(), peer)
    new = room.machines[first].node.log.account(heir, 1000)
    assert new is not None
    assert rules.verify_request(notary.sign(new.key, request), room.now(), heir) == request


def test_what_the_old_node_says_is_rejected() -> None:
    room = Room(2)
    first, second = room.nodes
    room.rekey(second)
    heard = room.machines[first].done
    del heard[:]
    room.machines[second].node._gossip._push_at = room.at
    room.tell(second, ev.Ticked())
    assert fx.Reject(second, "a node outside the mesh sent a message") in heard


# -- when it may not -------------------------------------------------------------------------------------------------


def refused(room: Room, node: NodeId) -> str:
    """Why `node` may not take new keys; nothing has changed by it."""
    machine = room.machines[node]
    before = machine.node.log.all_entries()
    answer, effects, _, _ = room.rekey(node, "refused")
    assert answer.code in ("busy", "not-allowed", "not-in-mesh", "frozen")
    assert answer.hint
    assert entries_of(effects) == 0
    assert machine.node.log.all_entries() == before
    return answer.reason


def test_node_that_holds_a_job_waits_until_it_has_ended() -> None:
    room = Room(2)
    first, second = room.nodes
    room.run(first, "")  # the last machine holds what has no place
    held = room.held_by(second)
    assert "holds 1 unfinished job" in refused(room, second)
    assert "a job is being submitted here" in refused(room, first)
    room.tell(second, ev.TreeFailed(held, "no-answer", "gone"))
    assert room.rekey(second)[0].code == ""


def test_node_that_runs_a_job_waits_until_its_end_is_known() -> None:
    room = Room(3)
    first, second, third = room.nodes
    room.run(first, "rig1")
    held = room.held_by(third)
    room.tell(third, ev.TreeArrived(held))
    for _ in range(5):
        room.pass_time(0.5)
    (start,) = [e for e in room.machines[second].done if isinstance(e, fx.StartAttempt)]
    assert "jobs run here (train)" in refused(room, second)
    room.tell(second, ev.AttemptBegan(held, start.plan.epoch, WALL_S))
    assert "jobs run here (train)" in refused(room, second)
    del room.machines[third]  # who holds it hears nothing now
    room.tell(second, ev.AttemptFinished(held, start.plan.epoch, WALL_S, Result(AttemptState.EXITED, 0)))
    assert "has yet to reach who holds them" in refused(room, second)


SETTINGS = BurstSettings(
    "eu-central-1", Caps(5.0, 20.0, 50.0, 10.0, 3, False, 3600.0), ("g6.xlarge",), 60.0, 300.0, 900.0, "", "", "true"
)
RUNG = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * GB, 0.40)


def preparing() -> tuple[Room, fx.PrepareLaunch]:
    """The first machine may rent, and is about to, for a job that waits."""
    room = Room(2)
    first = room.nodes[0]
    node, setup = room.machines[first].node, room.office.setups[0]
    room.tell(first, ev.LogWritten(node.log.write(setup.accounts[ADA], (SetRole(first, Role.BURST),))))
    room.tell(first, ev.BurstConfigured(SETTINGS))
    node._gossip.say(room.now(), Demand((Need(JobId("a" * 26), Resources(GpuRequest(1)), WALL_S - 300.0),)))
    (prepare,) = [e for e in room.tell(first, ev.CloudSurveyed((RUNG,))) if isinstance(e, fx.PrepareLaunch)]
    return room, prepare


def test_node_that_is_about_to_rent_waits() -> None:
    room, _ = preparing()
    assert "rents instances, or is about to" in refused(room, room.nodes[0])


def test_node_that_rents_waits_until_nothing_is_left_and_may_rent_as_before() -> None:
    room, prepare = preparing()
    first, second = room.nodes
    room.tell(first, ev.LaunchPrepared(prepare.launch, b"user data", b"bootstrap"))
    room.tell(first, ev.BurstConfigured(None))
    assert "rents instances, or is about to" in refused(room, first)
    room.tell(first, ev.LaunchEnded(prepare.launch, None, "bad-request", "no such type"))
    answer, _, heir, _ = room.rekey(first)
    assert answer.code == ""
    assert room.machines[second].node.log.members[heir].role is Role.BURST


def test_rented_machine_and_one_that_left_cannot() -> None:
    room = Room(2)
    second = room.nodes[1]
    node = room.machines[second].node
    member = node.log.members[second]
    node.log.members[second] = replace(member, role=Role.CLOUD)
    answer, *_ = room.rekey(second)
    assert "this machine is rented" in answer.reason
    node.log.members[second] = member
    room.tell(second, ev.LogWritten(node.log.write(KeyId(second), (RemoveNode(second),))))
    assert "no member of a mesh" in refused(room, second)


def test_frozen_admin_changes_nothing_not_even_half() -> None:
    room = Room(2)
    first = room.nodes[0]
    machine, setup = room.machines[first], room.office.setups[0]
    run = [entry for entry in machine.node.log.all_entries() if entry.key == setup.accounts[ADA]]
    admin = setup.accounts[ADA]
    body = SetRole(first, Role.VIEWER)
    fork = LogEntry(room.office.mesh, admin, len(run) - 1, machine.notary.digest(run[-2]), (), body)
    before = machine.node.log.users[admin]
    room.tell(first, ev.LogWritten((machine.notary.sign(admin, fork),)))
    machine.node.log.users[admin] = before  # as if he still were one, which he was when his chain broke
    assert "two different entries" in refused(room, first)


def test_keys_that_did_not_agree_change_nothing() -> None:
    room = Room(2)
    second = room.nodes[1]
    ring, machine = room.office.ring, room.machines[second]
    public_key = ring.make("next")
    others: Signed = ring.forge(key_id(public_key), "x")
    answer, effects = room.ask(second, Rekey(public_key, b"ca", (), (others,)))
    assert answer.code == "not-allowed"
    assert entries_of(effects) == 0
    assert second in machine.node.log.members


# -- what named the old id -------------------------------------------------------------------------------------------


def test_jobs_that_ended_are_still_found_where_they_were_held() -> None:
    room = Room(2)
    first, second = room.nodes
    room.run(first, "")
    held = room.finish(second)
    key = room.office.setups[0].accounts[ADA]
    _, _, heir, notary = room.rekey(second)
    old = room.machines.pop(second)
    again = Node(heir, room.now(), notary, random.Random(1), NodeConfig("1"), old.disk.values())
    again.start(room.now())
    room.machines[heir] = Machine(again, notary)
    room.tell(first, ev.LinkClosed(second, "no longer trusted"))
    room.tell(first, ev.LinkOpened(heir))
    room.tell(heir, ev.LinkOpened(first))
    for event in (
        ev.JobsAsked("list", key),
        ev.ActionAsked("stop", key, Action.STOP, held, (second,)),
    ):
        room.tell(first, event)
        room.pass_time(1.0)
        (answer,) = [e for e in room.machines[first].done if isinstance(e, fx.Answered) and e.query == event.query]
        assert answer.code == "", answer
        assert [view.spec.job for view in answer.views] == [held]


def test_job_that_waits_for_the_machine_by_its_old_id_is_offered_to_it() -> None:
    room = Room(3)
    first, second, third = room.nodes
    room.run(first, "rig1", gpus=1)
    held = room.held_by(third)
    spec = room.machines[third].node.stewardship._jobs[held].spec
    assert spec.machine == second
    _, _, heir, notary = room.rekey(second)
    elsewhere = [v.name for v in room.machines[third].node.why(spec) if v.rule is Rule.ELSEWHERE]
    assert elsewhere == ["rig0", "rig2"]
    old = room.machines.pop(second)
    again = Node(heir, room.now(), notary, random.Random(1), NodeConfig("1", fence="bubblewrap"), old.disk.values())
    again.start(room.now())
    again.step(room.now(), ev.MachineRead(room.office.setups[1].inventory, ()))
    room.machines[heir] = Machine(again, notary)
    for other in (first, third):
        room.tell(other, ev.LinkClosed(second, "no longer trusted"))
        room.tell(other, ev.LinkOpened(heir))
        room.tell(heir, ev.LinkOpened(other))
    room.pass_time(1.0)
    room.tell(third, ev.TreeArrived(held))
    for _ in range(8):
        room.pass_time(1.0)
    assert [e for e in room.machines[heir].done if isinstance(e, fx.StartAttempt)]


def test_member_that_names_what_does_not_exist_stops_no_rekey() -> None:
    room = Room(3)
    first, second, third = room.nodes
    nothing = Head(KeyId(first), 77, Digest("f" * 64))
    entry = LogEntry(room.office.mesh, KeyId(third), 0, Digest(""), (nothing,), RemoveNode(third))
    hostile = room.machines[third].notary.sign(KeyId(third), entry)
    room.tell(second, ev.LogWritten((hostile,)))
    answer, _, heir, _ = room.rekey(second)
    assert answer.code == ""
    assert heir in room.machines[first].node.log.members


# -- attempts whose holder has gone, or goes on under new keys --------------------------------------------------------


def running(machine: str = "rig1") -> tuple[Room, JobId, int]:
    """The third machine holds a job that runs on the second. (room, job, epoch)"""
    room = Room(3)
    room.run(room.nodes[0], machine)
    runs, job, epoch = room.begin(room.nodes[2])
    assert runs == room.nodes[1]
    return room, job, epoch


def attempt_state(room: Room, node: NodeId, job: JobId) -> AttemptState:
    attempt = room.machines[node].node.attempts.latest(job)
    assert attempt is not None
    return attempt.state


def test_result_that_nobody_is_left_to_hear_keeps_no_machine_busy() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.lost = (msg.ReportAck,)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    room.lost = ()
    node = room.machines[second].node
    assert not node.attempts.is_idle, "whoever holds the job may yet say that it heard"
    room.revoke(third)
    assert node.attempts.is_idle
    deadline = node.attempts.deadline()
    assert deadline is None or deadline > room.at + 60.0, "nobody is told any more, so nothing is due"
    assert room.rekey(second)[0].code == ""


def test_job_of_a_holder_that_was_revoked_runs_to_its_end_and_keeps_no_machine_busy_after_it() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.revoke(third)
    assert attempt_state(room, second, job) is AttemptState.RUNNING
    assert not [e for e in room.machines[second].done if isinstance(e, fx.EndAttempt)]
    assert "jobs run here (train)" in refused(room, second)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    assert attempt_state(room, second, job) is AttemptState.EXITED, "it was not heard, and nobody says that it was"
    assert room.rekey(second)[0].code == ""


def test_result_that_its_holder_may_not_hear_any_more_keeps_no_machine_busy_until_it_may() -> None:
    room, job, epoch = running()
    first, second, third = room.nodes
    log, admin = room.machines[first].node.log, room.office.setups[0].accounts[ADA]
    room.tell(first, ev.LogWritten(log.write(admin, (SetRole(third, Role.VIEWER),))))
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    room.pass_time(2.0)
    assert room.machines[second].node.attempts.is_idle
    room.tell(first, ev.LogWritten(log.write(admin, (SetRole(third, Role.RIG),))))
    room.pass_time(2.0)
    assert attempt_state(room, second, job) is AttemptState.DELIVERED


def test_hold_of_a_holder_that_was_revoked_is_let_go_at_once() -> None:
    room = Room(3)
    first, second, third = room.nodes
    room.run(first, "rig1")
    held = room.held_by(third)
    room.lost = (msg.OfferAnswer,)
    room.tell(third, ev.TreeArrived(held))
    assert "jobs run here (train)" in refused(room, second)
    room.revoke(third)
    assert room.machines[second].node.attempts.allocations() == ()
    assert room.rekey(second)[0].code == ""


def test_result_reaches_a_holder_that_took_new_keys_before_it_said_that_it_heard() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.lost = (msg.ReportAck,)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    room.lost = ()
    answer, _, heir, notary = room.rekey(third)
    assert answer.code == ""
    node = room.machines[second].node
    assert not node.attempts.is_idle, "the machine that holds the job is still there"
    room.begin_anew(third, heir, notary)
    room.pass_time(2.0)
    assert attempt_state(room, second, job) is AttemptState.DELIVERED
    assert room.rekey(second)[0].code == ""


def test_holder_under_new_keys_is_told_at_once_when_it_is_linked() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.lost = (msg.ReportAck,)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    _, _, heir, _ = room.rekey(third)
    told = room.tell(second, ev.LinkOpened(heir))
    (report,) = [e for e in told if isinstance(e, fx.Send) and isinstance(e.message, msg.AttemptReport)]
    assert report.peer == heir


def test_keys_that_a_holder_gave_up_acknowledge_nothing() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.lost = (msg.ReportAck,)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    room.lost = ()
    room.rekey(third)
    node = room.machines[second].node
    assert node.attempts.acknowledged(third, msg.ReportAck(job, epoch)) == []
    assert attempt_state(room, second, job) is AttemptState.EXITED


def test_attempt_that_was_accepted_too_late_is_fenced_by_a_holder_under_new_keys() -> None:
    room = Room(3)
    first, second, third = room.nodes
    room.run(first, "rig1")
    job = room.held_by(third)
    room.lost = (msg.CommitAnswer, msg.AttemptReport, msg.Cancel)
    room.tell(third, ev.TreeArrived(job))
    room.pass_time(0.1)
    assert attempt_state(room, second, job) is AttemptState.ACCEPTED
    room.pass_time(20.0)  # nobody answered: the job waits again
    key = room.office.setups[0].accounts[ADA]
    room.tell(first, ev.ActionAsked("stop", key, Action.STOP, job, (third,)))
    answer, _, heir, notary = room.rekey(third)
    assert answer.code == "", answer
    room.lost = ()
    room.begin_anew(third, heir, notary)
    room.pass_time(2.0)
    assert attempt_state(room, second, job) is AttemptState.DELIVERED


def test_stop_reaches_a_machine_that_took_new_keys_after_the_commit_to_it_was_lost() -> None:
    room = Room(3)
    first, second, third = room.nodes
    room.run(first, "rig1")
    job = room.held_by(third)
    room.lost = (msg.Commit,)
    room.tell(third, ev.TreeArrived(job))
    key = room.office.setups[0].accounts[ADA]
    room.lost = (msg.Commit, msg.Cancel)
    room.tell(first, ev.ActionAsked("stop", key, Action.STOP, job, (third,)))
    steward = room.machines[third].node.stewardship
    view = steward.view(job)
    assert view is not None
    assert (view.register.state, view.register.node) == (JobState.CANCELLING, second)
    room.pass_time(4.0)  # the hold runs out
    answer, _, heir, notary = room.rekey(second)
    assert answer.code == "", answer
    room.lost = ()
    room.begin_anew(second, heir, notary)
    room.pass_time(3.0)
    view = steward.view(job)
    assert view is not None
    assert view.register.state is JobState.CANCELLED


def test_rented_machine_that_the_log_knows_nothing_of_any_more_starts_and_tells_what_ran() -> None:
    """Whoever rented it was revoked, and with it all that it had said of its instances."""
    room, job, epoch = running()
    second = room.nodes[1]
    node = room.machines[second].node
    del node.log.members[second]
    assert node.log.known(second) is None
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    assert node.attempts.latest(job) is not None
    again = Attempts(
        second,
        node.log,
        node.rules,
        room.machines[second].notary,
        random.Random(1),
        node.owner,
        AttemptTiming(),
    )
    records = [record for record in room.machines[second].disk.values() if isinstance(record, AttemptRecord)]
    (running_record,) = [replace(record, state=AttemptState.RUNNING, result=None) for record in records]
    (adopt,) = again.restore(room.now(), [running_record])
    assert isinstance(adopt, fx.AdoptAttempt)


def test_result_that_nobody_hears_is_forgotten_when_it_has_been_kept_long_enough() -> None:
    room, job, epoch = running()
    _, second, third = room.nodes
    room.revoke(third)
    room.tell(second, ev.AttemptFinished(job, epoch, WALL_S, DONE))
    room.pass_time(29 * DAY_S)
    assert room.machines[second].node.attempts.latest(job) is not None
    room.pass_time(2 * DAY_S)
    assert room.machines[second].node.attempts.latest(job) is None
    assert fx.DiscardAttempt(job, epoch) in room.machines[second].done


def test_watch_goes_on_where_the_holder_took_new_keys() -> None:
    room = Room(3)
    first, _, third = room.nodes
    room.run(first, "rig1")
    job = room.finish(third)
    key = room.office.setups[0].accounts[ADA]
    room.tell(first, ev.WatchStarted(key, job, (third,)))
    _, _, heir, notary = room.rekey(third)
    room.begin_anew(third, heir, notary)
    del room.machines[first].done[:]
    room.tell(first, ev.LinkClosed(heir, "reset"))
    room.tell(first, ev.LinkOpened(heir))
    (told,) = [e.register for e in room.machines[first].done if isinstance(e, fx.TellWatchers)]
    assert (told.job, told.state) == (job, JobState.SUCCEEDED)


def test_job_is_confirmed_where_its_holder_took_new_keys_before_its_answer_was_heard() -> None:
    room = Room(3)
    first, _, third = room.nodes
    room.lost = (msg.SubmitAnswer,)
    room.run(first, "rig1")
    room.finish(third)
    answer, _, heir, notary = room.rekey(third)
    assert answer.code == ""
    room.lost = ()
    room.begin_anew(third, heir, notary)
    (answer,) = [e for e in room.machines[first].done if isinstance(e, fx.Answered) and e.query == "run"]
    assert answer.code == ""
    assert [view.spec.stewards for view in answer.views] == [(third,)]
