"""Which signed requests are obeyed: signed by a user's key, for this mesh and this node, fresh, allowed."""

from typing import Final

from meshgpu.core.sweep import runnable
from meshgpu.core.trust.freshness import Challenges
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.sealing import SECRETS_LIMIT
from meshgpu.errors import StaleRequest, TrustError
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.ids import JobId, KeyId, NodeId, job_id
from meshgpu.model.job import Action, JobRequest, JobSpec, PlacingVote, quorum
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import STEWARD_ROLES, Notary, Signed, T, UserKey

MAX_STEWARDS: Final = 3
STOPPED: Final = "the machine that submitted it was revoked, and its jobs end"


class RequestRules:
    """Turns signed bytes into values that may be obeyed, or raises TrustError.

    challenges: what this node gives out where clocks differ; without them such requests are stale for good.
    """

    def __init__(self, notary: Notary, log: MeshLog, node: NodeId, challenges: Challenges | None = None) -> None:
        self._notary = notary
        self._log = log
        self._node = node
        self._challenges = challenges

    def verify_job(self, signed: Signed, trial: Trial | None) -> JobSpec:
        """A job that may run: a user of this mesh asked for it, or for the sweep that it is a trial of."""
        return runnable(self.verify_spec(signed), trial)

    def verify_spec(self, signed: Signed) -> JobSpec:
        """A job or a sweep that a user of this mesh really asked for, even if his machine was revoked since.

        Says nothing about its age, nor whether it may (still) be held or started.
        """
        user, spec = self._read_as_known_user(signed, JobSpec)
        if spec.mesh != self._log.mesh:
            raise TrustError("not-allowed", "cannot accept a job: it was signed for another mesh")
        if spec.job != job_id(signed.key, spec.nonce):
            raise TrustError("not-allowed", "cannot accept a job: its id is another user's to choose")
        if not spec.command or (spec.shell and len(spec.command) != 1):
            raise TrustError("bad-request", "cannot accept a job: it has no proper command")
        if spec.user != user.user or spec.submitter != user.node:
            raise TrustError("not-allowed", f"cannot accept a job of {spec.user}: it was signed by {user.user}")
        if spec.secrets is not None and not 1 <= len(spec.secrets.names) <= SECRETS_LIMIT:
            raise TrustError("bad-request", "cannot accept a job: it has no proper number of secrets")
        stewards = set(spec.stewards)
        if len(stewards) != len(spec.stewards) or len(stewards) not in (1, MAX_STEWARDS):
            raise TrustError("not-allowed", "cannot accept a job: it names no proper set of machines to hold it")
        if not stewards <= self._log.members.keys() | self._log.former.keys():
            raise TrustError("not-allowed", "cannot accept a job: it is to be held by a machine outside the mesh")
        return spec

    def verify_new_spec(self, signed: Signed) -> JobSpec:
        """The same, of somebody who is a user now, and for machines that may hold it now; however old."""
        spec = self.verify_spec(signed)
        self._check_user(signed)
        for steward in spec.stewards:
            role = self._log.members[steward].role if steward in self._log.members else "machine of before"
            if role not in STEWARD_ROLES:
                raise TrustError("not-allowed", f"cannot accept a job: a machine is to hold it, which is a {role}")
        return spec

    def check_fresh_spec(self, spec: JobSpec, fresh: Signed | None, now: Now, peer: NodeId) -> None:
        """Asked last, when a steward first stores it: the spec is new, or its user says now that it is to be held.

        Raises StaleRequest, with a challenge for `peer`.
        """
        if fresh is None:
            return self._check_fresh("a job", spec.issued_wall_s, b"", now, peer)
        request = self.verify_addressed(fresh, peer)
        if request.action is not Action.SUBMIT or request.job != spec.job:
            raise TrustError("not-allowed", "cannot accept a job: what came with it is about something else")
        return self._check_fresh("a job", request.issued_wall_s, request.challenge, now, peer)

    def check_may_start(self, signed: Signed) -> None:
        """Raises TrustError where a revocation ended the jobs of whoever signed this one."""
        if signed.key in self._log.stopped:
            raise TrustError("not-allowed", f"cannot start a job: {STOPPED}")

    def verify_request(self, signed: Signed, now: Now, peer: NodeId) -> JobRequest:
        """A user's request that is meant for this node, now, and came from the machine that signed it.

        Raises StaleRequest, with a challenge for `peer`, if all but its time is right.
        """
        request = self.verify_addressed(signed, peer)
        self.check_fresh_request(request, now, peer)
        return request

    def check_fresh_request(self, request: JobRequest, now: Now, peer: NodeId) -> None:
        """Asked last. Raises StaleRequest, with a challenge for `peer`."""
        what = f"a request to {request.action} a job"
        self._check_fresh(what, request.issued_wall_s, request.challenge, now, peer)

    def verify_addressed(self, signed: Signed, peer: NodeId) -> JobRequest:
        """The same, however old."""
        request = self.read_request(signed)
        self._check_user(signed)
        if self._log.users[signed.key].node != peer:
            raise TrustError("not-allowed", f"cannot {request.action} a job: another machine passed the request on")
        if request.node != self._node:
            raise TrustError("not-allowed", f"cannot {request.action} a job: the request was meant for another machine")
        return request

    def verify_cancel(self, signed: Signed, spec: JobSpec, sweep: JobId) -> JobRequest:
        """A user's own request to end this very job or its whole sweep, made to one of its stewards, however long ago.

        sweep: what `spec` is a trial of, else its own id.
        """
        request = self.read_request(signed)
        if request.action not in (Action.STOP, Action.KILL) or request.job not in (spec.job, sweep):
            raise TrustError("not-allowed", f"cannot stop {spec.name}: the request is about something else")
        if request.user != spec.user or request.node not in spec.stewards:
            raise TrustError("not-allowed", f"cannot stop {spec.name}: it belongs to {spec.user}")
        return request

    def read_request(self, signed: Signed) -> JobRequest:
        """What a user asked for, even if his machine was revoked since."""
        user, request = self._read_as_known_user(signed, JobRequest)
        if request.mesh != self._log.mesh or request.user != user.user:
            raise TrustError("not-allowed", f"cannot obey a request of {request.user}: it was signed by {user.user}")
        return request

    def verify_ticket(self, votes: tuple[Signed, ...], wanted: PlacingVote, stewards: tuple[NodeId, ...]) -> None:
        """Raises TrustError unless a quorum of `stewards` voted for `wanted` (whose own steward field is ignored)."""
        voters: set[NodeId] = set()
        for signed in votes[:MAX_STEWARDS]:
            for steward in stewards:
                member = self._log.members.get(steward)
                if member is not None and signed.key == KeyId(member.node):
                    vote = self._notary.read(signed, member.public_key, PlacingVote)
                    if vote == _as_voted_by(wanted, steward):
                        voters.add(steward)
        needed = quorum(stewards)
        if len(voters) < needed:
            raise TrustError(
                "not-allowed", f"cannot start a job: {len(voters)} of {needed} machines that hold it agree"
            )

    def _check_user(self, signed: Signed) -> None:
        if signed.key not in self._log.users:
            raise TrustError("not-allowed", "cannot obey a request: the machine that signed it is no member any more")

    def _read_as_known_user(self, signed: Signed, kind: type[T]) -> tuple[UserKey, T]:
        user = self._log.users.get(signed.key) or self._log.former_users.get(signed.key)
        if user is None:
            raise TrustError("not-allowed", "cannot obey a request: its key belongs to no user of this mesh")
        return user, self._notary.read(signed, user.public_key, kind)

    def _check_fresh(self, what: str, issued_wall_s: float, challenge: bytes, now: Now, peer: NodeId) -> None:
        """By an open challenge of `peer` where there is one in it, else by the clock."""
        age_s = now.wall_s - issued_wall_s
        if challenge:
            if self._challenges is not None and self._challenges.redeem(now, peer, challenge):
                return
            found = "what this machine asked to be signed with it is not open (any more)"
        elif abs(age_s) <= WALL_CLOCK_SLACK_S:
            return
        else:
            when = "ago" if age_s > 0 else "in the future"
            found = f"it was signed {abs(age_s):.0f} s {when}, expected at most {WALL_CLOCK_SLACK_S:.0f} s"
        nonce = self._challenges.issue(now, peer) if self._challenges is not None else b""
        raise StaleRequest(f"cannot accept {what}: {found}", nonce, now.wall_s, challenge)


def _as_voted_by(vote: PlacingVote, steward: NodeId) -> PlacingVote:
    return PlacingVote(vote.mesh, vote.job, vote.spec, vote.epoch, vote.node, vote.hold, steward)
