"""What stands in for keys, disks full of code, and processes."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from meshgpu.core.events import AttemptBegan, AttemptFinished, AttemptProgressed, Event
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, JobId, KeyId, digest, key_id
from meshgpu.model.job import AttemptPlan, AttemptState, Phase, Result, StopMode
from meshgpu.model.trust import Signed, T
from meshgpu.sim.timeline import Timeline

SIGNAL_EXIT = {StopMode.STOP: 143, StopMode.KILL: 137}
"""Exit code by how a process was ended: 128 + SIGTERM, 128 + SIGKILL."""


class KeyRing:
    """Every key of a world, and every value that was ever encoded in it.

    A public key is the hash of its secret; a signature is the hash of secret and payload. Payloads are numbers that
    stand for values, so that nothing is serialised.
    """

    def __init__(self) -> None:
        self._secrets: dict[bytes, bytes] = {}
        self._publics: dict[KeyId, bytes] = {}
        self._values: dict[bytes, object] = {}
        self.signed: Callable[[object], None] = lambda _value: None
        """Told of every value that its rightful owner signs."""

    def make(self, name: str) -> bytes:
        """The public key of a new secret that only `name` decides."""
        secret = hashlib.sha256(b"secret " + name.encode()).digest()
        public = hashlib.sha256(b"public " + secret).digest()
        self._secrets[public] = secret
        self._publics[key_id(public)] = public
        return public

    def public(self, key: KeyId) -> bytes:
        return self._publics[key]

    def sign(self, key: KeyId, value: object) -> Signed:
        """What the owner of `key` could make of `value`."""
        kind, payload = type(value).__name__, self.encode(value)
        return Signed(kind, payload, key, self.signature(self._publics[key], kind, payload))

    def forge(self, key: KeyId, value: object) -> Signed:
        """What somebody else could make of it: a signature with another key."""
        kind, payload = type(value).__name__, self.encode(value)
        return Signed(kind, payload, key, self.signature(b"", kind, payload))

    def encode(self, value: object) -> bytes:
        payload = b"%d" % len(self._values)
        self._values[payload] = value
        return payload

    def decode(self, payload: bytes) -> object:
        return self._values.get(payload)

    def digest(self, signed: Signed) -> Digest:
        return digest(b"\0".join((signed.kind.encode(), signed.payload, signed.key.encode())))

    def signature(self, public_key: bytes, kind: str, payload: bytes) -> bytes:
        return hashlib.sha256(self._secrets.get(public_key, b"") + kind.encode() + b"\0" + payload).digest()


class ToyNotary:
    """Signs with the keys that one node owns; reads what anybody signed."""

    def __init__(self, ring: KeyRing, keys: tuple[bytes, ...]) -> None:
        self._ring = ring
        self._keys = frozenset(key_id(key) for key in keys)

    def sign(self, key: KeyId, value: object) -> Signed:
        if key not in self._keys:
            raise TrustError("no-such-key", f"cannot sign with the key {key}: it is not this node's")
        self._ring.signed(value)
        return self._ring.sign(key, value)

    def read(self, signed: Signed, public_key: bytes, kind: type[T]) -> T:
        if signed.signature != self._ring.signature(public_key, signed.kind, signed.payload):
            raise TrustError("not-allowed", "cannot read what was signed: the signature does not hold")
        return self._decode(signed, kind)

    def read_pinned(self, signed: Signed, digest: Digest, kind: type[T]) -> T:
        if self.digest(signed) != digest:
            raise TrustError("not-allowed", "cannot read what was signed: its digest is another")
        return self._decode(signed, kind)

    def digest(self, signed: Signed) -> Digest:
        return self._ring.digest(signed)

    def _decode(self, signed: Signed, kind: type[T]) -> T:
        value = self._ring.decode(signed.payload)
        if signed.kind != kind.__name__ or not isinstance(value, kind):
            raise TrustError("not-allowed", f"cannot read what was signed: it is no {kind.__name__}")
        return value


@dataclass(slots=True)
class Process:
    """What a guard knows: it outlives the agent, not the machine. result: None while it lives.

    outcome: what it comes to. is_stopping: whether it was told to end; a guard says so for one reason, the first.
    """

    plan: AttemptPlan
    started_wall_s: float
    outcome: AttemptState = AttemptState.EXITED
    is_stopping: bool = False
    result: Result | None = None
    ended_wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExecutorTiming:
    """Seconds, drawn evenly: to build the environment, to run, to end after SIGTERM.

    fails: part of the jobs that exit with 1. long: part of the jobs that run for `long_s`.
    stubborn: part of them that ends only when its guard kills it, `grace_s` after SIGTERM.
    """

    stage_s: tuple[float, float] = (0.05, 2.0)
    run_s: tuple[float, float] = (0.3, 9.0)
    long_s: tuple[float, float] = (20.0, 45.0)
    stop_s: tuple[float, float] = (0.05, 3.0)
    fails: float = 0.1
    long: float = 0.15
    stubborn: float = 0.1
    grace_s: float = 30.0


class FakeExecutor:
    """Runs attempts for one machine. `emit` reaches the agent that runs now, if one does.

    `lives` is told when an attempt may begin to live, `over` when nothing of it does (None: nobody will hear a result).
    """

    def __init__(
        self,
        timeline: Timeline,
        rng: random.Random,
        timing: ExecutorTiming,
        wall_s: Callable[[], float],
        emit: Callable[[Event], None],
        lives: Callable[[AttemptPlan], None],
        over: Callable[[AttemptPlan, Result | None], None],
    ) -> None:
        self._timeline = timeline
        self._rng = rng
        self._timing = timing
        self._wall_s = wall_s
        self._emit = emit
        self._lives = lives
        self._is_over = over
        self._staging: dict[tuple[JobId, int], AttemptPlan] = {}
        self._processes: dict[tuple[JobId, int], Process] = {}
        self._adopted: set[tuple[JobId, int]] = set()

    @property
    def living(self) -> list[AttemptPlan]:
        """Attempts that are being staged or have a process."""
        return [*self._staging.values(), *(found.plan for found in self._processes.values() if found.result is None)]

    # -- orders -------------------------------------------------------------------------------------------------------

    def start(self, plan: AttemptPlan, *, has_tree: Callable[[], bool]) -> None:
        key = (plan.spec.job, plan.epoch)
        self._staging[key] = plan
        self._lives(plan)
        staged_s = self._rng.uniform(*self._timing.stage_s)

        def staged() -> None:
            if self._staging.get(key) is not plan:
                return
            if has_tree():
                del self._staging[key]
                self._begin(key, plan)
            else:
                self._never(key, AttemptState.CRASHED, "no machine that has its tree answers")

        self._emit(AttemptProgressed(*key, Phase.STAGING, "environment"))
        self._timeline.after(staged_s, staged)

    def _begin(self, key: tuple[JobId, int], plan: AttemptPlan) -> None:
        process = self._processes[key] = Process(plan, self._wall_s())
        self._adopted.add(key)
        code = int(self._rng.random() < self._timing.fails)
        took_s = self._timing.long_s if self._rng.random() < self._timing.long else self._timing.run_s
        run_s = self._rng.uniform(*took_s)
        self._timeline.after(run_s, lambda: self._over(key, process, code))
        limit_s = plan.spec.timeout_s
        if limit_s is not None and limit_s < run_s:
            self._timeline.after(limit_s, lambda: self._time_out(key, process))
        self._emit(AttemptBegan(*key, process.started_wall_s))

    def adopt(self, plan: AttemptPlan) -> None:
        key = (plan.spec.job, plan.epoch)
        process = self._processes.get(key)
        if process is None:
            result = Result(AttemptState.CRASHED, None, "it did not outlive its agent")
            self._emit(AttemptFinished(*key, self._wall_s(), result))
            return
        self._adopted.add(key)
        if process.result is None:
            self._emit(AttemptBegan(*key, process.started_wall_s))
        else:
            self._emit(AttemptFinished(*key, process.ended_wall_s, process.result))

    def end(self, job: JobId, epoch: int, mode: StopMode) -> None:
        key = (job, epoch)
        if key in self._staging:
            self._never(key, AttemptState.ABANDONED, "stopped before it started")
            return
        process = self._processes.get(key)
        if process is not None:
            process.is_stopping = True
            delay_s = self._stop_s() if mode is StopMode.STOP else 0.02
            self._timeline.after(delay_s, lambda: self._over(key, process, SIGNAL_EXIT[mode]))

    def _time_out(self, key: tuple[JobId, int], process: Process) -> None:
        """The guard's doing, so also without an agent."""
        if process.result is None and not process.is_stopping:
            process.is_stopping, process.outcome = True, AttemptState.TIMED_OUT
            self._timeline.after(self._stop_s(), lambda: self._over(key, process, SIGNAL_EXIT[StopMode.STOP]))

    def _stop_s(self) -> float:
        is_stubborn = self._rng.random() < self._timing.stubborn
        return self._timing.grace_s if is_stubborn else self._rng.uniform(*self._timing.stop_s)

    # -- accidents ----------------------------------------------------------------------------------------------------

    def agent_died(self) -> None:
        """What was being staged dies with its agent; processes live on under their guards."""
        for plan in self._staging.values():
            self._is_over(plan, None)
        self._staging.clear()
        self._adopted.clear()

    def machine_died(self) -> None:
        self.agent_died()
        for process in self._processes.values():
            if process.result is None:
                self._is_over(process.plan, None)
        self._processes.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _never(self, key: tuple[JobId, int], outcome: AttemptState, reason: str) -> None:
        plan = self._staging.pop(key)
        result = Result(outcome, None, reason)
        self._is_over(plan, result)
        self._emit(AttemptFinished(*key, self._wall_s(), result))

    def _over(self, key: tuple[JobId, int], process: Process, code: int) -> None:
        if process.result is not None or self._processes.get(key) is not process:
            return
        process.result = Result(process.outcome, code)
        process.ended_wall_s = self._wall_s()
        self._is_over(process.plan, process.result)
        if key in self._adopted:
            self._emit(AttemptFinished(*key, process.ended_wall_s, process.result))
