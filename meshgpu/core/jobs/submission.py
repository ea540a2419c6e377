"""The submitter's side: resolve what was asked for, sign it, and give it to the machine that will hold it."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import Answered, Effect, QueryProgressed, Send
from meshgpu.core.jobs.placement import Candidate, Guest, explain, nearest_name, never_fits, rank
from meshgpu.core.statemachine import earliest
from meshgpu.core.sweep import check_space
from meshgpu.core.trust.freshness import CHALLENGE_BYTES
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import MAX_STEWARDS
from meshgpu.core.trust.sealing import SEALING_KEY_BYTES, Seal, binding, check_draft, no_seal
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.clock import ClockGap, Now
from meshgpu.model.constraints import parse_constraint
from meshgpu.model.ids import RANDOM_ID_BYTES, Digest, JobId, KeyId, NodeId, base32, digest, job_id
from meshgpu.model.job import Action, CloudUse, Draft, JobRequest, JobSpec, JobState, JobView, Register
from meshgpu.model.messages import Challenge, Submit, SubmitAnswer
from meshgpu.model.resources import NO_GPU, GpuRequest, Resources
from meshgpu.model.trust import STEWARD_ROLES, Member, Notary, Role, Signed, UserKey

ONE_WHOLE_GPU: Final = GpuRequest(count=1)


@dataclass(frozen=True, slots=True)
class SubmissionTiming:
    """resend_s: how often the spec is sent again. patience_s: how long without a word before the user is told."""

    resend_s: float = 2.0
    patience_s: float = 10.0


@dataclass(slots=True)
class _Submission:
    """fresh: what makes the job fresh for the steward `challenger`, which asked for `challenge` to be in it.

    refusal: of another steward than the first.
    """

    query: str
    spec: JobSpec
    signed: Signed
    resend_at: float
    give_up_at: float
    clock: ClockGap | None = None
    tries: int = 0
    fresh: Signed | None = None
    challenger: NodeId | None = None
    challenge: bytes = b""
    refusal: SubmitAnswer | None = None


class Submissions:
    """Jobs on their way from this node to their steward. `candidates(guest, machine)` is the mesh as known here."""

    def __init__(
        self,
        node: NodeId,
        log: MeshLog,
        notary: Notary,
        rng: random.Random,
        candidates: Callable[[Guest, NodeId | None], list[Candidate]],
        timing: SubmissionTiming,
        seal: Seal = no_seal,
    ) -> None:
        self._node = node
        self._log = log
        self._notary = notary
        self._rng = rng
        self._candidates = candidates
        self._timing = timing
        self._seal = seal
        self._open: dict[JobId, _Submission] = {}

    def tree_for(self, job: JobId, peer: NodeId) -> Digest | None:
        """The tree of a job that is being submitted here, if `peer` was chosen to hold it."""
        found = self._open.get(job)
        return found.spec.tree if found is not None and peer in found.spec.stewards else None

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for the answer of a steward."""
        return bool(self._open)

    def asked(self, now: Now, query: str, key: KeyId, draft: Draft) -> list[Effect]:
        try:
            spec = self._resolve(now, query, self._user(key), draft)
            signed = self._notary.sign(key, spec)
        except MeshgpuError as error:
            return [Answered(query, code=error.code, reason=error.message, hint=error.hint)]
        self._open[spec.job] = _Submission(
            query, spec, signed, now.boot_s + self._timing.resend_s, now.boot_s + self._timing.patience_s
        )
        return [Send(spec.stewards[0], Submit(spec.job, signed))]

    def answered(self, now: Now, steward: NodeId, answer: SubmitAnswer) -> list[Effect]:
        found = self._open.get(answer.job)
        if found is None or not self._holds(steward, found.spec):
            return []
        if (challenge := answer.challenge) is not None and challenge.refused != found.challenge:
            return []  # it refuses what was sent before the steward was answered
        if challenge is not None and not found.challenge and len(challenge.nonce) == CHALLENGE_BYTES:
            return self._sign_again(now, steward, found, challenge)
        if answer.code and steward != self._log.current(found.spec.stewards[0]):
            found.refusal = answer  # the first, which speaks before it, may hold the job all the same
            return []
        if answer.code:
            del self._open[answer.job]
            return [Answered(found.query, code=answer.code, reason=answer.reason, clock=found.clock)]
        if not answer.held:
            found.give_up_at = now.boot_s + self._timing.patience_s
            return [QueryProgressed(found.query, answer.done_bytes, answer.total_bytes)] if answer.total_bytes else []
        del self._open[answer.job]
        register = Register(answer.job, JobState.QUEUED, submitted_wall_s=now.wall_s)
        return [Answered(found.query, (JobView(found.spec, register),), clock=found.clock)]

    def _sign_again(self, now: Now, steward: NodeId, found: _Submission, challenge: Challenge) -> list[Effect]:
        """The steward's clock and ours differ: what it asked for makes the same job fresh. Once for each job."""
        spec, found.clock = found.spec, ClockGap(steward, challenge.wall_s - now.wall_s)
        nonce = base32(self._rng.randbytes(RANDOM_ID_BYTES))
        request = JobRequest(spec.mesh, spec.user, Action.SUBMIT, steward, now.wall_s, nonce, spec.job, challenge.nonce)
        try:
            found.fresh = self._notary.sign(found.signed.key, request)
        except MeshgpuError as error:
            del self._open[spec.job]
            return [Answered(found.query, code=error.code, reason=error.message, hint=error.hint)]
        found.challenge, found.challenger = challenge.nonce, steward
        found.resend_at = now.boot_s + self._timing.resend_s
        return [Send(steward, Submit(spec.job, found.signed, found.fresh))]

    def steward_linked(self, now: Now, steward: NodeId) -> None:
        for found in self._open.values():
            if self._holds(steward, found.spec):
                found.resend_at = now.boot_s

    def step(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for job, found in list(self._open.items()):
            if now.boot_s >= found.give_up_at:
                del self._open[job]
                if (refusal := found.refusal) is not None:
                    effects.append(Answered(found.query, code=refusal.code, reason=refusal.reason, clock=found.clock))
                    continue
                name = " or ".join(map(self._log.name_of, found.spec.stewards))
                waited = f"{self._timing.patience_s:.0f} s"
                reason = f"cannot submit: {name} did not confirm within {waited} that the job is held"
                effects.append(Answered(found.query, code="no-answer", reason=reason, hint="meshgpu machines"))
            elif now.boot_s >= found.resend_at:
                found.resend_at = now.boot_s + self._timing.resend_s
                found.tries += 1  # whoever speaks for the job by now
                steward = found.spec.stewards[found.tries % len(found.spec.stewards)]
                fresh = found.fresh if steward == found.challenger else None
                effects.append(Send(self._log.current(steward), Submit(job, found.signed, fresh)))
        return effects

    def deadline(self) -> float | None:
        return earliest(*(min(found.resend_at, found.give_up_at) for found in self._open.values()))

    def _holds(self, node: NodeId, spec: JobSpec) -> bool:
        """Whether `node` is to hold the job, under the keys it has now."""
        return node in map(self._log.current, spec.stewards)

    # -- resolving ----------------------------------------------------------------------------------------------------

    def _user(self, key: KeyId) -> UserKey:
        user = self._log.users.get(key)
        if user is None:
            raise TrustError("not-allowed", "cannot submit: this account is no user of the mesh", "meshgpu version")
        return user

    def _resolve(self, now: Now, query: str, user: UserKey, draft: Draft) -> JobSpec:
        assert self._log.mesh is not None
        if self._log.members[user.node].role is Role.VIEWER:
            raise TrustError(
                "not-allowed",
                "cannot run: this machine is a viewer, from which nothing is submitted",
                "ask an admin to run: meshgpu role MACHINE submitter",
            )
        check_draft(draft)
        if draft.sweep is not None:
            check_space(draft.sweep, draft.command)
        machine = self._machine(draft.machine) if draft.machine else None
        guest = Guest(user.user, draft.image, self._cloud_use(draft))
        candidates = self._candidates(guest, machine.node if machine else None)
        resources = draft.resources or self._default_resources(draft, candidates)
        if resources.gpus.count == 0 and parse_constraint(resources.on).is_about_gpus:
            raise MeshgpuError(
                "bad-request", f"cannot run where {resources.on}: that is about GPUs, and the job asks for none", "-g 1"
            )
        self._check_possible(resources, machine, candidates, guest, has_secrets=bool(draft.secrets))
        nonce = self._rng.randbytes(RANDOM_ID_BYTES)
        job = job_id(user.key, nonce)
        secrets = None
        if draft.secrets:
            bound_to = binding(self._log.mesh, job, user.key, draft.secrets)
            secrets = self._seal(query, bound_to, draft.secrets, _recipients(candidates, machine))
        return JobSpec(
            self._log.mesh,
            job,
            nonce,
            draft.name,
            user.user,
            self._node,
            draft.command,
            draft.shell,
            draft.env,
            draft.environment,
            draft.tree,
            draft.tree_bytes,
            draft.tree_files,
            resources,
            machine.node if machine else None,
            self._stewards(job, guest, resources, machine),
            now.wall_s,
            draft.image,
            guest.cloud,
            draft.retries,
            draft.sweep,
            draft.objective,
            secrets,
            draft.shared,
            draft.priority,
            draft.preemptible,
            draft.timeout_s,
            _start_within_s(now, draft),
        )

    def _machine(self, name: str) -> Member:
        member = self._log.member_named(name)
        if member is not None:
            return member
        names = [member.name for member in self._log.members.values()]
        near = nearest_name(name, names)
        hint = f"did you mean -m {near}?" if near else f"the machines are: {', '.join(sorted(names))}"
        raise MeshgpuError("unknown-machine", f"cannot run on {name}: no machine of the mesh has that name", hint)

    def _default_resources(self, draft: Draft, candidates: list[Candidate]) -> Resources:
        """Without -g: one whole GPU if the machine (without -m: any machine) has one, else none."""
        has_gpu = any(candidate.record and candidate.record.inventory.gpus for candidate in candidates)
        return Resources(ONE_WHOLE_GPU if has_gpu else NO_GPU, draft.cpus, draft.memory_bytes, draft.on)

    def _cloud_use(self, draft: Draft) -> CloudUse:
        """Where nothing is said, what the mesh allows."""
        if draft.cloud in (None, CloudUse.NEVER):
            return CloudUse.OK if draft.cloud is None and self._log.may_leave else CloudUse.NEVER
        if not self._log.may_leave:
            raise MeshgpuError(
                "not-allowed",
                f"cannot run with --cloud {draft.cloud}: this mesh lets no job leave the office",
                "meshgpu burst setup",
            )
        return draft.cloud

    def _check_possible(
        self,
        resources: Resources,
        machine: Member | None,
        candidates: list[Candidate],
        guest: Guest,
        *,
        has_secrets: bool,
    ) -> None:
        """A request that no machine can ever satisfy is refused now, not queued for ever."""
        known = [candidate for candidate in candidates if candidate.record is not None]
        if machine is not None:
            refusal = next((c.refusal for c in known if c.node == machine.node and c.is_closed), "")
            lacks = next((never_fits(resources, c.host) for c in known if c.host), "")
            if refusal or lacks:
                raise MeshgpuError(
                    "impossible", f"cannot run on {machine.name}: it {refusal or lacks}", "meshgpu machines"
                )
            return
        may_rent = guest.cloud is not CloudUse.NEVER and not has_secrets  # which only machines that exist can read
        if may_rent and any(m.role is Role.BURST for m in self._log.members.values()):
            return  # what no machine here has may be rented
        open_to_me = [c for c in known if not c.is_closed]
        if known and not open_to_me:
            raise MeshgpuError("impossible", f"cannot run: {explain(resources, known)}", "meshgpu machines")
        if open_to_me and all(c.host and never_fits(resources, c.host) for c in open_to_me):
            reasons = explain(resources, open_to_me)
            raise MeshgpuError("impossible", f"cannot run anywhere: {reasons}", "meshgpu machines")

    def _stewards(self, job: JobId, guest: Guest, resources: Resources, machine: Member | None) -> tuple[NodeId, ...]:
        """Who holds the job: three rigs that are there, by rendezvous hash, so that the office shares that work evenly.

        Where fewer are there, one: the machine named by -m, else the best-ranked rig, else any, else this one.
        """
        everyone = self._candidates(replace(guest, cloud=CloudUse.OK), None)
        alive = [c for c in everyone if c.record is not None and not c.is_down and c.record.may_steward]
        rigs = [c for c in alive if self._log.members[c.node].role in STEWARD_ROLES]
        if len(rigs) >= MAX_STEWARDS:
            ordered = sorted((c.node for c in rigs), key=lambda node: digest(f"{job} {node}".encode()))
            return tuple(ordered[:MAX_STEWARDS])
        if machine is not None and any(c.node == machine.node for c in rigs):
            return (machine.node,)
        ranked = rank(resources, rigs, self._rng)
        if ranked:
            return (ranked[0],)
        return (next((c.node for c in rigs if c.node != self._node), self._node),)


def _start_within_s(now: Now, draft: Draft) -> float | None:
    """How long it may wait from now on: a span, because its stewards' clocks may be others. Raises MeshgpuError."""
    if draft.start_by_wall_s is None:
        return None
    left_s = draft.start_by_wall_s - now.wall_s
    if left_s <= 0:
        raise MeshgpuError("bad-request", "cannot run: the time by which it must start is over", "--start-by 30m")
    return left_s


def _recipients(candidates: Iterable[Candidate], machine: Member | None) -> dict[NodeId, bytes]:
    """{node: sealing key} of the machines that may run the job: `machine` alone where one is named.

    Raises MeshgpuError `no-sealing-key` where there are none.
    """
    keys = {
        candidate.node: candidate.record.sealing_key
        for candidate in candidates
        if candidate.record is not None
        and len(candidate.record.sealing_key) == SEALING_KEY_BYTES
        and not candidate.is_closed
        and (machine is None or candidate.node == machine.node)
    }
    if not keys:
        where = machine.name if machine is not None else "any machine that may run the job"
        raise MeshgpuError(
            "no-sealing-key",
            f"cannot pass secrets to {where}: no key to seal them to has been heard from there",
            "meshgpu machines; it needs an agent of this version that has answered once",
        )
    return keys
