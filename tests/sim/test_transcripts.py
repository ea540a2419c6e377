"""Stories that people review: what each machine heard, kept and said, for one job in a quiet office."""

from collections.abc import Callable

from meshgpu.model.ids import JobId, NodeId
from meshgpu.model.job import Action, JobState
from meshgpu.model.messages import CommitAnswer, Message
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.sim.fakes import ExecutorTiming
from meshgpu.sim.network import Network
from meshgpu.sim.transcript import Story
from meshgpu.sim.world import World, WorldConfig

ONE_GPU = Resources(GpuRequest(1))
TIMING = ExecutorTiming(stage_s=(0.2, 0.2), run_s=(5.0, 5.0), long=0.0, fails=0.0, stop_s=(0.5, 0.5))

Compare = Callable[[str, str], None]


class Quiet:
    """An office of three equal machines in which nothing happens but what the test does."""

    def __init__(self) -> None:
        self.story = Story()
        self.world = World(1, WorldConfig(size=3, is_plain=True, executor=TIMING, transcript=self.story))
        self.world.start()
        self.world.run(10.0)
        self.story.lines.clear()

    def run(self, at: str, on: str = "") -> str:
        machine = self.world.named(at)
        return self.world.people.run(machine, next(iter(machine.setup.accounts.values())), on, ONE_GPU)

    def stop(self, at: str) -> None:
        machine = self.world.named(at)
        view = next(iter(self.world.ledger.confirmed.values())).view
        self.world.people.end(machine, next(iter(machine.setup.accounts.values())), view, Action.STOP)

    def note(self, text: str) -> None:
        self.story.note(self.world.timeline.time_s, text)

    @property
    def job(self) -> JobId:
        return next(iter(self.world.ledger.submitted))

    def state(self) -> JobState:
        steward = self.world.machines[self.world.ledger.submitted[self.job].stewards[0]]
        assert steward.agent is not None
        view = steward.agent.stewardship.view(self.job)
        return view.register.state if view else JobState.DRAFT

    def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        ends = self.world.timeline.time_s + within_s
        while not condition():
            assert self.world.timeline.time_s < ends, self.story.text()
            self.world.run(0.01)

    def finish(self, compare: Compare, name: str, state: JobState) -> None:
        self.until(lambda: self.state() is state)
        self.world.settle(120.0)
        assert self.world.ledger.started == len(self.world.ledger.results)
        compare(name, self.story.text())


def lose(network: Network, kind: type[Message]) -> None:
    """Break the Link under the next message of a kind, which is lost."""
    original = network.send

    def send(source: NodeId, target: NodeId, message: Message) -> None:
        if isinstance(message, kind):
            network.send = original  # type: ignore[method-assign]  # only once
            network.cut(source, target)
            network.heal(source, target)
        original(source, target, message)

    network.send = send  # type: ignore[method-assign]  # a planted fault


def test_plain_run_on_another_machine(compare: Compare) -> None:
    quiet = Quiet()
    quiet.run("rig0", on="rig1")
    quiet.finish(compare, "plain_run", JobState.SUCCEEDED)


def test_commit_acknowledgement_lost(compare: Compare) -> None:
    """Nothing starts before the steward has recorded it; the job runs once."""
    quiet = Quiet()
    lose(quiet.world.network, CommitAnswer)
    quiet.run("rig0", on="rig1")
    quiet.finish(compare, "commit_acknowledgement_lost", JobState.SUCCEEDED)
    assert quiet.world.ledger.started == 1


def test_stop_while_placing(compare: Compare) -> None:
    quiet = Quiet()
    lose(quiet.world.network, CommitAnswer)
    quiet.run("rig0", on="rig1")
    quiet.until(lambda: bool(quiet.world.answers) and quiet.state() is JobState.PLACING)
    quiet.note("ada stops the job")
    quiet.stop("rig0")
    quiet.finish(compare, "stop_while_placing", JobState.CANCELLED)
    assert quiet.world.ledger.started == 0


def test_submitter_crash_after_confirmation(compare: Compare) -> None:
    quiet = Quiet()
    quiet.run("rig0", on="rig1")
    quiet.until(lambda: bool(quiet.world.answers))
    quiet.note("rig0 loses power for good")
    quiet.world.named("rig0").power_off()
    quiet.finish(compare, "submitter_crash", JobState.SUCCEEDED)


def test_steward_restart_while_running(compare: Compare) -> None:
    """The job runs on; its result waits until somebody hears it."""
    quiet = Quiet()
    quiet.run("rig0", on="rig1")
    quiet.until(lambda: bool(quiet.world.answers) and bool(quiet.world.ledger.started))
    quiet.world.run(1.0)
    quiet.note("the agent of rig2, which holds the job, crashes")
    quiet.world.named("rig2").crash_agent()
    quiet.until(lambda: bool(quiet.world.ledger.results))
    quiet.world.run(3.0)
    quiet.note("and starts again")
    quiet.world.named("rig2").start_agent()
    quiet.finish(compare, "steward_restart", JobState.SUCCEEDED)
    assert quiet.world.ledger.started == 1
