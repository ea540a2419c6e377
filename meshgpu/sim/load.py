"""What people do in a simulated office: run, stop, kill, watch and list, from whatever machine they sit at."""

from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import Answered
from meshgpu.core.events import ActionAsked, JobsAsked, RunAsked, WatchStarted, WatchStopped
from meshgpu.model.constraints import ANYWHERE, Where
from meshgpu.model.ids import Digest, KeyId, UserName, digest
from meshgpu.model.job import Action, CloudUse, Draft, EnvironmentRequest, JobView, Priority
from meshgpu.model.resources import GB, NO_GPU, GpuRequest, Resources
from meshgpu.model.sweep import Method, Param, Space
from meshgpu.sim.invariants import Ledger, trials_of
from meshgpu.sim.machine import Machine
from meshgpu.sim.timeline import Timeline

REQUESTS: Final = (
    None,
    NO_GPU,
    GpuRequest(1),
    GpuRequest(1),
    GpuRequest(2),
    GpuRequest(1, 8 * GB, shared=True),
    GpuRequest(1, 5 * GB, shared=True),
    GpuRequest(1, 24 * GB),
    GpuRequest(1, model="4090"),
    GpuRequest(1, model="a100"),
)
"""What `-g` may have said; None where it was absent."""

WISHES: Final = (
    (Priority.NORMAL, False),
    (Priority.LOW, True),
    (Priority.NORMAL, False),
    (Priority.HIGH, False),
    (Priority.NORMAL, True),
)
"""Priority, and whether the job gives way; in turn."""

PLACES: Final = (ANYWHERE, ANYWHERE, Where("cpus>=8"), Where("vram>=20GB or gpus=0"), Where("not rig1"))
"""What `--on` may have said; in turn."""


@dataclass(slots=True)
class People:
    """Acts on machines of one world. Which jobs were ever asked for is written to the ledger."""

    timeline: Timeline
    ledger: Ledger
    is_near_a_cloud: bool = False
    queries: int = 0
    refused: int = 0

    def run_something(self, *, is_limited: bool = False) -> None:
        """A random job from a random machine that is on. is_limited: it may not wait, or not run, for long."""
        rng = self.timeline.rng
        found = self._seat()
        if found is None:
            return
        machine, _, key = found
        gpus = rng.choice(REQUESTS)
        cpus = rng.choice((0, 0, 1, 2))
        named = rng.choice(sorted(m.setup.name for m in self.ledger.machines.values())) if rng.random() < 0.4 else ""
        on = PLACES[self.queries % len(PLACES)] if gpus is not None and gpus.count else ANYWHERE
        resources = None if gpus is None else Resources(gpus, cpus, on=on)
        cloud = self._wish() if self.is_near_a_cloud else None
        start_within_s = rng.choice((None, rng.uniform(0.5, 30.0))) if is_limited else None
        timeout_s = rng.uniform(0.5, 20.0) if is_limited else None
        retries = 1 if is_limited else cloud is not CloudUse.NEVER
        self.run(
            machine,
            key,
            named,
            resources,
            cloud=cloud,
            retries=retries,
            start_within_s=start_within_s,
            timeout_s=timeout_s,
        )

    def _wish(self) -> CloudUse | None:
        """What `--cloud` says."""
        return self.timeline.rng.choice((None, CloudUse.NEVER, CloudUse.NEVER, CloudUse.OK, CloudUse.ONLY))

    def sweep_something(self) -> None:
        """A sweep from a random machine that is on."""
        rng = self.timeline.rng
        found = self._seat()
        if found is not None:
            trials = rng.randrange(2, 9)
            space = Space(Method.RANDOM, (Param("lr", (), 1e-4, 1e-1, True),), trials, rng.randrange(1, 5), 1)
            machine, _, key = found
            self.run(machine, key, "", Resources(rng.choice((NO_GPU, GpuRequest(1)))), space=space)

    def run(
        self,
        machine: Machine,
        key: KeyId,
        named: str,
        resources: Resources | None,
        name: str = "train",
        space: Space | None = None,
        cloud: CloudUse | None = None,
        retries: int = 0,
        start_within_s: float | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Submit at `machine`; returns the query."""
        self.queries += 1
        query = f"run{self.queries}"
        tree = digest(query.encode())
        machine.trees.add(tree)
        priority, preemptible = WISHES[self.queries % len(WISHES)]
        asked = replace(draft(name, named, resources, tree), cloud=cloud, retries=retries, timeout_s=timeout_s)
        asked = replace(asked, priority=priority, preemptible=preemptible)
        if start_within_s is not None:
            asked = replace(asked, start_by_wall_s=machine.now().wall_s + start_within_s)
        if space is not None:
            asked = replace(asked, command=(*asked.command, "{lr}"), sweep=space, retries=2)
        machine.post(RunAsked(query, key, asked))
        return query

    def end_something(self, action: Action) -> None:
        """Stop or kill a job that was confirmed, from any machine where its user has an account."""
        rng = self.timeline.rng
        jobs = sorted(self.ledger.confirmed)
        if not jobs:
            return
        view = self.ledger.confirmed[rng.choice(jobs)].view
        found = self._seat(view.spec.user)
        if found is not None:
            self.end(found[0], found[2], view, action)

    def end(self, machine: Machine, key: KeyId, view: JobView, action: Action) -> None:
        self.queries += 1
        self.ledger.stops_asked |= {view.spec.job, *(trial.job for trial in trials_of(view.spec))}
        machine.post(ActionAsked(f"end{self.queries}", key, action, view.spec.job, view.spec.stewards))

    def watch_something(self) -> None:
        """Follow a job for a while, and list one's jobs."""
        rng = self.timeline.rng
        jobs = sorted(self.ledger.confirmed)
        if not jobs:
            return
        view = self.ledger.confirmed[rng.choice(jobs)].view
        found = self._seat(view.spec.user)
        if found is None:
            return
        machine, _, key = found
        self.queries += 1
        machine.post(JobsAsked(f"list{self.queries}", key))
        machine.post(WatchStarted(key, view.spec.job, view.spec.stewards))
        self.timeline.after(rng.uniform(1.0, 20.0), lambda: machine.post(WatchStopped(view.spec.job)))

    def heard(self, answer: Answered) -> None:
        self.refused += bool(answer.code)

    def _seat(self, user: UserName | None = None) -> tuple[Machine, UserName, KeyId] | None:
        """A machine that is on, and an account on it (of `user`, where given)."""
        seats = [
            (machine, owner, key)
            for machine in self.ledger.machines.values()
            if machine.agent is not None
            for owner, key in machine.setup.accounts.items()
            if user in (None, owner)
        ]
        return self.timeline.rng.choice(seats) if seats else None


def draft(name: str, machine: str, resources: Resources | None, tree: Digest) -> Draft:
    command = ("python", f"{name}.py")
    return Draft(name, command, False, (), EnvironmentRequest(), tree, 1000, 1, machine, resources)
