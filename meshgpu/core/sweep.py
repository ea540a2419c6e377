"""Search spaces and their expansion: which values a trial gets, whether values lie in the space, what a trial runs."""

import math
import random
import re
import shlex
from dataclasses import replace
from typing import Final

from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import trial_id
from meshgpu.model.job import JobSpec
from meshgpu.model.sweep import PARAMS_LIMIT, TRIALS_LIMIT, Method, Param, Space, Trial

NAME_CHARACTERS: Final = 34
"""Of a sweep's name in those of its trials: with a number they fit the 40 of a name."""


def check_space(space: Space, command: tuple[str, ...]) -> None:
    """Raises MeshgpuError `bad-request` for a space that cannot be tried with the command."""
    names = [param.name for param in space.params]
    if not space.params or len(names) > PARAMS_LIMIT:
        raise _bad(f"cannot sweep: {len(names)} parameters, expected 1 to {PARAMS_LIMIT}", "--param lr=1e-4,1e-3")
    if len(set(names)) != len(names):
        raise _bad("cannot sweep: a parameter is there twice", "meshgpu sweep --help")
    ranges = [param.name for param in space.params if not param.choices]
    if space.method is Method.GRID and ranges:
        raise _bad(f"cannot make a grid of the range of {ranges[0]}: name its values", "meshgpu sweep random …")
    if not 1 <= space.trials <= TRIALS_LIMIT:
        raise _bad(
            f"cannot sweep: {space.trials} trials, expected 1 to {TRIALS_LIMIT}", "fewer values, or sweep random"
        )
    if space.method is Method.GRID and space.trials != grid_size(space.params):
        raise _bad(
            f"cannot sweep: a grid of {grid_size(space.params)} trials, not {space.trials}", "leave out --trials"
        )
    if space.parallel < 1:
        raise _bad("cannot sweep: no trial at a time", "--parallel 4")
    unused = [name for name in names if not any(_placeholder(name).search(word) for word in command)]
    if unused:
        shown = f"--{unused[0]} {{{unused[0]}}}"
        raise _bad(f"cannot sweep: the command has no place for {unused[0]}", f"… {shown}, or :{unused[0]}:")


def grid_size(params: tuple[Param, ...]) -> int:
    return math.prod(len(param.choices) for param in params)


def expand(space: Space, number: int) -> Trial:
    """The trial of that number, from 1; the same wherever and whenever it is asked for."""
    if space.method is Method.GRID:
        rest, values = number - 1, []
        for param in reversed(space.params):  # the last parameter changes first
            rest, position = divmod(rest, len(param.choices))
            values.append(param.choices[position])
        return Trial(number, tuple(reversed(values)))
    rng = random.Random(f"meshgpu sweep {space.seed} {number}")  # noqa: S311  # reproducible on purpose
    return Trial(number, tuple(_draw(param, rng.random()) for param in space.params))


def _draw(param: Param, uniform: float) -> str:
    """The value at `uniform` (0 to 1) of the parameter's range."""
    if param.choices:
        return param.choices[int(uniform * len(param.choices))]
    if param.is_log:
        value = math.exp(math.log(param.low) + uniform * (math.log(param.high) - math.log(param.low)))
    elif param.is_whole:
        value = param.low + uniform * (param.high - param.low + 1) - 0.5
    else:
        value = param.low + uniform * (param.high - param.low)
    value = min(max(float(f"{value:.6g}"), param.low), param.high)
    return str(round(value)) if param.is_whole else repr(value)


def is_in(space: Space, trial: Trial) -> bool:
    """Whether a trial may belong to the sweep."""
    if not 1 <= trial.number <= space.trials or len(trial.values) != len(space.params):
        return False
    return all(_is_value(param, value) for param, value in zip(space.params, trial.values, strict=True))


def _is_value(param: Param, text: str) -> bool:
    if param.choices:
        return text in param.choices
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", text) is None:
        return False
    value = float(text)
    return param.low <= value <= param.high and (not param.is_whole or value.is_integer())


def runnable(spec: JobSpec, trial: Trial | None) -> JobSpec:
    """The job that may run: `spec` itself, or a trial of it. Raises TrustError for a whole sweep, and as trial_spec."""
    if trial is not None:
        return trial_spec(spec, trial)
    if spec.sweep is not None:
        raise TrustError("not-allowed", "cannot run a sweep: its trials run")
    return spec


def trial_spec(spec: JobSpec, trial: Trial) -> JobSpec:
    """The job that a trial of the sweep `spec` is. Raises TrustError where it lies outside what was signed."""
    if spec.sweep is None or not is_in(spec.sweep, trial):
        raise TrustError("not-allowed", "cannot accept a trial: it lies outside the space that its user signed")
    values = dict(zip((param.name for param in spec.sweep.params), trial.values, strict=True))
    return replace(
        spec,
        job=trial_id(spec.job, trial.number),
        name=f"{spec.name[:NAME_CHARACTERS].rstrip('-')}-{trial.number}",
        command=tuple(_fill(word, values, is_shell=spec.shell) for word in spec.command),
        sweep=None,
    )


def _fill(word: str, values: dict[str, str], *, is_shell: bool) -> str:
    for name, value in values.items():
        text = shlex.quote(value) if is_shell else value
        word = _placeholder(name).sub(text.replace("\\", r"\\"), word)
    return word


def _placeholder(name: str) -> re.Pattern[str]:
    """`{lr}` or `:lr:`; other braces and colons stay as they are, and `${lr}` is the shell's."""
    return re.compile(rf"(?<!\$)\{{{re.escape(name)}\}}|:{re.escape(name)}:")


def _bad(message: str, hint: str) -> MeshgpuError:
    return MeshgpuError("bad-request", message, hint)
