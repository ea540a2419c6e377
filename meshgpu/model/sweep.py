"""A sweep: parameters, the space they span, and the trials that lie in it."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshgpu.errors import MeshgpuError

TRIALS_LIMIT: Final = 256
"""Of one sweep: how they all stand fits one message."""

PARAMS_LIMIT: Final = 64
TEXT_LIMIT: Final = 1_000
"""Characters of one value, or of a metric's name or pattern."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_EXAMPLE: Final = "--param lr=1e-4,1e-3, or --param lr=1e-5:1e-2:log"


class Method(StrEnum):
    """How trials are chosen: every combination, or at random."""

    GRID = "grid"
    RANDOM = "random"


class Goal(StrEnum):
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter: values to choose from, or, where there are none, all from `low` to `high`.

    is_log: drawn evenly on a logarithmic scale. is_whole: whole numbers only.
    """

    name: str
    choices: tuple[str, ...]
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Space:
    """What a sweep tries. parallel: trials at a time. seed: of what is drawn at random."""

    method: Method
    params: tuple[Param, ...]
    trials: int
    parallel: int
    seed: int


@dataclass(frozen=True, slots=True)
class Objective:
    """A number that jobs report, and whether less or more of it is better.

    pattern: regular expression (RE2's syntax) whose first group finds it in a line of the log; empty for what
    `meshgpu.log(name=…)` reports.
    """

    name: str
    goal: Goal
    pattern: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a sweep's space. number counts from 1; values are texts, in the order of the space's parameters."""

    number: int
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a job reported of its objective: the last value and the best one. step: of the last."""

    last: float
    best: float
    step: int | None = None


def parse_param(text: str) -> Param:
    """`lr=1e-4,1e-3`, `lr=1e-5:1e-2:log` or `bs=16:128:int`; raises MeshgpuError `bad-request`."""
    name, is_given, values = text.partition("=")
    if not is_given or _NAME.fullmatch(name) is None:
        raise _bad(f"cannot read the parameter {text!r}: expected NAME=VALUE,VALUE or NAME=MIN:MAX")
    parts = values.split(":")
    if len(parts) >= 2 and not any(_number(part) is None for part in parts[:2]):
        return _range(name, text, parts)
    choices = tuple(values.split(","))
    if "" in choices or any(len(choice) > TEXT_LIMIT for choice in choices):
        raise _bad(f"cannot read the parameter {text!r}: one of its values is empty or too long")
    if len(set(choices)) != len(choices):
        raise _bad(f"cannot read the parameter {text!r}: one of its values is there twice")
    return Param(name, choices)


def parse_objective(text: str, pattern: str = "") -> Objective:
    """`loss:min`, `accuracy:max`; raises MeshgpuError `bad-request`."""
    name, _, goal = text.rpartition(":")
    if goal not in list(Goal) or not name or len(name) > TEXT_LIMIT:
        raise MeshgpuError("bad-request", f"cannot read the metric {text!r}: expected NAME:min or NAME:max", "loss:min")
    return Objective(name, Goal(goal), pattern)


def is_better(objective: Objective, value: float, than: float) -> bool:
    return value < than if objective.goal is Goal.MIN else value > than


def _range(name: str, text: str, parts: list[str]) -> Param:
    low, high = _number(parts[0]), _number(parts[1])
    assert low is not None
    assert high is not None
    options = parts[2:]
    if not set(options) <= {"log", "linear", "int"}:
        raise _bad(f"cannot read the parameter {text!r}: after MIN:MAX may come log, linear or int")
    is_log, is_whole = "log" in options, "int" in options
    if not low < high or not abs(high - low) < math.inf:
        raise _bad(f"cannot read the parameter {text!r}: expected a smaller and a larger number")
    if is_log and low <= 0:
        raise _bad(f"cannot read the parameter {text!r}: a logarithmic range begins above 0")
    if is_whole and not (low.is_integer() and high.is_integer()):
        raise _bad(f"cannot read the parameter {text!r}: its ends are no whole numbers")
    return Param(name, (), low, high, is_log, is_whole)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bad(message: str) -> MeshgpuError:
    return MeshgpuError("bad-request", message, _EXAMPLE)
