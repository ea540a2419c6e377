"""What a sweep's steward does next: which trials begin, and when the sweep is over. Its trials are jobs."""

from collections.abc import Collection
from itertools import islice

from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.sweep import expand
from meshgpu.model.job import JobState
from meshgpu.model.sweep import Trial


def beginning(sweep: HeldJob, trials: Collection[HeldJob]) -> list[Trial]:
    """The trials that begin now: in order, those first that this steward has not heard of, begun or not."""
    space = sweep.spec.sweep
    assert space is not None
    if sweep.state not in (JobState.QUEUED, JobState.ACTIVE):
        return []
    room = space.parallel - sum(not trial.is_over for trial in trials)
    known = {trial.trial.number for trial in trials if trial.trial is not None}
    unknown = (number for number in range(1, space.trials + 1) if number not in known)
    return [expand(space, number) for number in islice(unknown, max(room, 0))]


def ending(sweep: HeldJob, trials: Collection[HeldJob]) -> tuple[JobState, str] | None:
    """How the sweep ends now, and why; None while it goes on."""
    space = sweep.spec.sweep
    assert space is not None
    is_cancelled = sweep.state is JobState.CANCELLING
    if any(not trial.is_over for trial in trials) or not (is_cancelled or len(trials) == space.trials):
        return None
    if is_cancelled:
        return JobState.CANCELLED, ""
    failed = sum(trial.state is not JobState.SUCCEEDED for trial in trials)
    return (
        (JobState.FAILED, f"{failed} of {space.trials} trials did not succeed") if failed else (JobState.SUCCEEDED, "")
    )
