"""What a sweep's steward does next: which trials begin, and when the sweep is over. Its trials are jobs."""

from collections.abc import Collection

from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.sweep import expand
from meshgpu.model.job import JobState
from meshgpu.model.sweep import Trial


def beginning(sweep: HeldJob, trials: Collection[HeldJob]) -> list[Trial]:
    """The trials that begin now. They begin in order, so that what exists tells what comes next, also after a crash."""
    space = sweep.spec.sweep
    assert space is not None
    if sweep.state not in (JobState.QUEUED, JobState.ACTIVE):
        return []
    unfinished = sum(not trial.is_over for trial in trials)
    first = len(trials) + 1
    last = min(space.trials, len(trials) + space.parallel - unfinished)
    return [expand(space, number) for number in range(first, last + 1)]


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
