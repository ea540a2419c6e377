"""What happened in a world, as text: whole for a fingerprint, or the story of its jobs for people to review."""

import hashlib
from typing import Protocol

from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.audit import AUDIT
from meshgpu.model import messages as msg
from meshgpu.model.ids import NodeId
from meshgpu.model.records import AttemptRecord, JobRecord
from meshgpu.model.trust import Signed
from meshgpu.sim.machine import Machine


class Transcript(Protocol):
    def stepped(self, time_s: float, machine: Machine, event: ev.Event | None, effects: list[fx.Effect]) -> None: ...


class Fingerprint:
    """A hash of every event and effect of every node: two worlds with one fingerprint went the same way."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def stepped(self, time_s: float, machine: Machine, event: ev.Event | None, effects: list[fx.Effect]) -> None:
        self._hash.update(f"{time_s!r} {machine.setup.name} {event!r} {effects!r}\n".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Story:
    """Lines about jobs alone: who heard what, and what it did about it. What is only said again is left out."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[NodeId, str] = {}
        self._jobs: dict[str, str] = {}
        self._repeated: dict[NodeId, list[str]] = {}

    def note(self, time_s: float, text: str) -> None:
        self.lines.append(f"{time_s:8.3f} -- {text}")

    def stepped(self, time_s: float, machine: Machine, event: ev.Event | None, effects: list[fx.Effect]) -> None:
        self._names[machine.node] = machine.setup.name
        heard = self._event(event)
        done = [line for effect in effects if (line := self._effect(effect))]
        if isinstance(event, ev.Ticked):
            is_news = bool(done) and done != self._repeated.get(machine.node)
            self._repeated[machine.node] = done or self._repeated.get(machine.node, [])
            heard = heard if is_news else ""
        if heard:
            self.lines.append(f"{time_s:8.3f} {machine.setup.name}: {heard}")
            self.lines.extend(f"{'':9}  {line}" for line in done)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    # -- wording ------------------------------------------------------------------------------------------------------

    def _event(self, event: ev.Event | None) -> str:
        match event:
            case None:
                return "starts"
            case ev.Ticked():
                return "time passes"
            case ev.MessageArrived(peer=peer, message=message):
                said = self._message(message)
                return f"{self._name(peer)} says {said}" if said else ""
            case ev.RunAsked(draft=draft):
                where = f" on {draft.machine}" if draft.machine else ""
                return f"asked to run {draft.name}{where}"
            case ev.ActionAsked(action=action, job=job):
                return f"asked to {action} {self._job(job)}"
            case ev.TreeArrived(job=job) | ev.TreeFailed(job=job):
                return f"{type(event).__name__} {self._job(job)}"
            case ev.AttemptBegan() | ev.AttemptFinished():
                result = (
                    f" {event.result.outcome} {event.result.exit_code}" if isinstance(event, ev.AttemptFinished) else ""
                )
                return f"{type(event).__name__} {self._job(event.job)}/{event.epoch}{result}"
            case ev.LinkClosed(peer=peer, reason=reason):
                return f"Link to {self._name(peer)} is closed: {reason}"
            case _:
                return ""

    def _effect(self, effect: fx.Effect) -> str:
        match effect:
            case fx.Persist(record=JobRecord(register=register)):
                where = f" on {self._name(register.node)}" if register.node else ""
                reason = f" ({register.reason})" if register.reason else ""
                return f"keeps job {self._job(register.job)}/{register.epoch} {register.state}{where}{reason}"
            case fx.Persist(record=AttemptRecord() as record):
                return f"keeps attempt {self._job(record.job)}/{record.epoch} {record.state}"
            case fx.Persist(kind=kind) if kind == AUDIT:
                return "keeps an entry of its audit"
            case fx.Send(peer=peer, message=message):
                said = self._message(message)
                return f"→ {self._name(peer)}: {said}" if said else ""
            case fx.FetchTree(job=job):
                return f"fetches the tree of {self._job(job)}"
            case fx.StartAttempt(plan=plan) | fx.AdoptAttempt(plan=plan):
                return f"{type(effect).__name__} {self._job(plan.spec.job)}/{plan.epoch}"
            case fx.EndAttempt(job=job, epoch=epoch, mode=mode):
                return f"EndAttempt {self._job(job)}/{epoch} {mode}"
            case fx.Answered():
                jobs = ", ".join(f"{self._job(v.spec.job)} {v.register.state}" for v in effect.views)
                return f"answers {effect.query}: {effect.code or jobs or 'nothing'}"
            case fx.Reject(reason=reason):
                return f"rejects: {reason}"
            case _:
                return ""

    def _message(self, message: msg.Message) -> str:
        match message:
            case msg.GossipDigest() | msg.GossipDelta() | msg.LogDelta() | msg.JobUpdate() | msg.Answer() | msg.Ask():
                return "" if isinstance(message, msg.GossipDigest | msg.GossipDelta | msg.LogDelta) else _kind(message)
            case msg.ProbeFor() | msg.ProbeAnswer():
                return ""
            case msg.OfferAnswer():
                said = "yes" if message.hold else f"no: {message.refusal}"
                return f"OfferAnswer {self._job(message.job)}/{message.epoch} {said}"
            case msg.CommitAnswer():
                said = "accepted" if message.accepted else f"declined: {message.reason}"
                return f"CommitAnswer {self._job(message.job)}/{message.epoch} {said}"
            case msg.AttemptReport():
                said = str(message.result.outcome) if message.result else str(message.phase or "not begun")
                return f"AttemptReport {self._job(message.job)}/{message.epoch} {said}"
            case msg.AttemptOutput():
                return f"AttemptOutput {self._job(message.job)}/{message.epoch} to {message.chunk.end}"
            case msg.SubmitAnswer():
                said = "held" if message.held else message.reason or "receiving"
                return f"SubmitAnswer {self._job(message.job)} {said}"
            case msg.KnockWanted() | msg.KnockAnswer():
                return _kind(message)
            case msg.Prepare(ballot=ballot):
                return f"Prepare {self._job(message.job)} turn {ballot.round}"
            case msg.Promise(ballot=ballot, promised=promised):
                said = "granted" if promised == ballot else f"refused for turn {promised.round}"
                return f"Promise {self._job(message.job)} turn {ballot.round} {said}"
            case msg.Accept(standing=standing):
                register = standing.register
                stamp = f"{register.stamp.ballot.round}.{register.stamp.step}"
                return f"Accept {self._job(message.job)} {stamp} {register.state}/{register.epoch}"
            case msg.Accepted(stamp=stamp):
                return f"Accepted {self._job(message.job)} {stamp.ballot.round}.{stamp.step}"
            case msg.Submit() | msg.Release():
                return f"{_kind(message)} {self._job(message.job)}"
            case _:
                return f"{_kind(message)} {self._job(message.job)}/{message.epoch}"

    def _name(self, node: NodeId) -> str:
        return self._names.get(node, node[:6])

    def _job(self, job: str) -> str:
        return self._jobs.setdefault(job, f"job{len(self._jobs) + 1}")


def _kind(message: msg.Message | Signed) -> str:
    return type(message).__name__
