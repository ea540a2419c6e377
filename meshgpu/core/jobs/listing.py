"""What of the jobs that a user may see fits one answer: a list is one message, and a message one frame."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.model.ids import JobId
from meshgpu.model.job import JobState, Register
from meshgpu.model.messages import SignedView, TrialView

VIEWS_LIMIT_BYTES: Final = 700_000
"""Of the specs in one answer, newest first: with their registers they fit a frame of 1 MiB."""

REGISTER_BYTES: Final = 600
GPU_BYTES: Final = 60
"""What a register, and a GPU in it, add to their spec in an answer, besides what people read."""

TRIAL_REASON_CHARACTERS: Final = 200
"""Of why a trial waits or failed, in a list; asked for alone it tells all."""


def listed(
    own: Iterable[HeldJob], shared: Iterable[HeldJob], trials: Mapping[JobId, Mapping[int, HeldJob]]
) -> tuple[SignedView, ...]:
    """The newest of `own`, then of `shared`, each sweep with its trials. trials: {sweep: {number: trial}}.

    What others share takes only the room that is left: nobody can crowd a user's own jobs out.
    """
    room = VIEWS_LIMIT_BYTES
    views: list[SignedView] = []
    for job in (*_newest(own), *_newest(shared)):
        view = replace(job.view(), trials=_trials(trials.get(job.spec.job, {})))
        room -= len(view.spec.payload) + sum(map(_size, (view.register, *(t.register for t in view.trials))))
        if room < 0:
            break
        views.append(view)
    return tuple(views)


def _newest(jobs: Iterable[HeldJob]) -> list[HeldJob]:
    told = [job for job in jobs if job.state is not JobState.DRAFT and job.trial is None]
    return sorted(told, key=lambda job: (-job.register.submitted_wall_s, job.spec.job))


def _trials(trials: Mapping[int, HeldJob]) -> tuple[TrialView, ...]:
    """Short enough that a whole sweep fits."""
    return tuple(
        TrialView(job.trial, _brief(job.register)) for _, job in sorted(trials.items()) if job.trial is not None
    )


def _brief(register: Register) -> Register:
    result = register.result and replace(register.result, reason="")
    return replace(register, detail="", reason=register.reason[:TRIAL_REASON_CHARACTERS], result=result)


def _size(register: Register) -> int:
    """Bytes of a register on the wire, at most: its reason is told twice, in its result as well."""
    words = 2 * len((register.detail + register.reason).encode())
    return REGISTER_BYTES + words + GPU_BYTES * len(register.gpus)
