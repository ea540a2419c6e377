"""Spaces, the trials that lie in them, and the jobs that trials are."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.core.sweep import check_space, expand, grid_size, is_in, trial_spec
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.ids import JobId, is_name, trial_id
from meshgpu.model.job import JobSpec
from meshgpu.model.sweep import Goal, Method, Objective, Param, Space, Trial, is_better, parse_objective, parse_param
from meshgpu.model.trust import Signed

Sign = Callable[..., tuple[JobSpec, Signed]]
GRID = Space(Method.GRID, (Param("lr", ("1e-4", "1e-3")), Param("opt", ("adam", "sgd", "it's"))), 6, 2, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-4,1e-3", Param("lr", ("1e-4", "1e-3"))),
        ("lr=1e-5:1e-2:log", Param("lr", (), 1e-5, 1e-2, is_log=True)),
        ("bs=16:128:int", Param("bs", (), 16.0, 128.0, is_whole=True)),
        ("bs=16:128:log:int", Param("bs", (), 16.0, 128.0, is_log=True, is_whole=True)),
        ("x=0:1:linear", Param("x", (), 0.0, 1.0)),
        ("data=a:b,c", Param("data", ("a:b", "c"))),
        ("name=only", Param("name", ("only",))),
    ],
)
def test_parameters_are_read_as_people_type_them(text: str, expected: Param) -> None:
    assert parse_param(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lr",
        "lr=",
        "=1",
        "lr=a,,b",
        "lr=a,a",
        "lr=2:1",
        "lr=1:1",
        "lr=0:1:log",
        "lr=1:2:cubic",
        "bs=1.5:3:int",
        "l r=1",
    ],
)
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(MeshgpuError) as raised:
        parse_param(text)
    assert raised.value.code == "bad-request"
    assert raised.value.hint


@pytest.mark.parametrize("text", ["lr=1:1e999", "lr=-1e308:1e308", "lr=nan:1", "lr=" + "x" * 2000])
def test_endless_ranges_and_values_are_refused(text: str) -> None:
    with pytest.raises(MeshgpuError):
        parse_param(text)


def test_metrics_are_read_with_their_goal() -> None:
    assert parse_objective("val/loss:min") == Objective("val/loss", Goal.MIN, "")
    for text in ("loss", "loss:", ":min", "loss:most"):
        with pytest.raises(MeshgpuError):
            parse_objective(text)
    assert is_better(parse_objective("loss:min"), 1.0, 2.0)
    assert is_better(parse_objective("loss:max"), 2.0, 1.0)


def test_a_grid_tries_every_combination_once() -> None:
    trials = [expand(GRID, number).values for number in range(1, GRID.trials + 1)]
    assert trials[:3] == [("1e-4", "adam"), ("1e-4", "sgd"), ("1e-4", "it's")]
    assert len(set(trials)) == grid_size(GRID.params) == 6


params = st.one_of(
    st.builds(lambda n: Param("c", tuple(map(str, range(n)))), st.integers(1, 5)),
    st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.booleans(), st.booleans())
    .map(lambda t: (min(t[:2]), max(t[:2]), t[2], t[3]))
    .map(
        lambda t: Param("r", (), float(int(t[0]) + 1), float(int(t[1]) + 2), t[2], t[3]) if t[3] else Param("r", (), *t)
    )
    .filter(lambda p: p.low < p.high),
)


@given(params, st.integers(0, 2**32), st.integers(1, 50))
def test_what_is_drawn_lies_in_the_space(param: Param, seed: int, number: int) -> None:
    space = Space(Method.RANDOM, (param, replace(param, name="other")), 50, 1, seed)
    trial = expand(space, number)
    assert is_in(space, trial)
    assert expand(space, number) == trial


def test_draws_are_spread_over_the_range() -> None:
    space = Space(
        Method.RANDOM, (Param("lr", (), 1e-4, 1.0, is_log=True), Param("k", (), 1, 4, is_whole=True)), 400, 1, 7
    )
    drawn = [expand(space, number).values for number in range(1, 401)]
    assert 0.4 < sum(float(lr) < 1e-2 for lr, _ in drawn) / 400 < 0.6
    assert {k for _, k in drawn} == {"1", "2", "3", "4"}
    assert 0.15 < sum(k == "4" for _, k in drawn) / 400 < 0.35


def test_draws_do_not_depend_on_the_machine_or_its_hash_seed() -> None:
    space = Space(Method.RANDOM, (Param("x", (), 0.0, 1.0),), 3, 1, 42)
    assert [expand(space, n).values for n in (1, 2, 3)] == [("0.232652",), ("0.286598",), ("0.543854",)]


@pytest.mark.parametrize(
    "trial",
    [
        Trial(0, ("1e-4", "adam")),
        Trial(7, ("1e-4", "adam")),
        Trial(1, ("1e-5", "adam")),
        Trial(1, ("1e-4", "adam; rm -rf ~")),
        Trial(1, ("1e-4",)),
        Trial(1, ("1e-4", "adam", "x")),
    ],
)
def test_trial_outside_what_was_signed_is_refused(signed: Sign, rules: RequestRules, trial: Trial) -> None:
    _, envelope = signed(command=("train", "{lr}", "{opt}"), sweep=GRID)
    with pytest.raises(TrustError, match="outside the space"):
        rules.verify_job(envelope, trial)


@pytest.mark.parametrize("text", ["0.5", "11", "nan", "inf", "5.5", "", "5 ", "0x5", "1_0", "٥"])
def test_number_outside_its_range_or_in_disguise_is_refused(text: str) -> None:
    space = Space(Method.RANDOM, (Param("n", (), 1.0, 10.0, is_whole=True),), 1, 1, 0)
    assert is_in(space, Trial(1, ("5",)))
    assert not is_in(space, Trial(1, (text,)))


def test_a_sweep_itself_never_runs_and_a_job_of_its_own_has_no_trials(signed: Sign, rules: RequestRules) -> None:
    _, sweep = signed(command=("train", "{lr}", "{opt}"), sweep=GRID)
    with pytest.raises(TrustError, match="its trials run"):
        rules.verify_job(sweep, None)
    _, job = signed(number=2)
    with pytest.raises(TrustError):
        rules.verify_job(job, Trial(1, ()))


def test_trial_is_a_job_with_its_values_in_the_command(signed: Sign, rules: RequestRules) -> None:
    command = ("train.py", "--lr={lr}", "${lr}", "--opt", ":opt:", '{"lr": {lr}, "a": {}}', "{other}")
    spec, envelope = signed(name="a" * 40, command=command, sweep=GRID)
    trial = rules.verify_job(envelope, Trial(6, ("1e-3", "it's")))
    assert trial.command == ("train.py", "--lr=1e-3", "${lr}", "--opt", "it's", '{"lr": 1e-3, "a": {}}', "{other}")
    assert trial.job == trial_id(spec.job, 6) != spec.job
    assert trial.sweep is None
    assert is_name(trial.name)


def test_values_are_quoted_for_a_shell(signed: Sign) -> None:
    spec, _ = signed(command=("train --opt {opt} --path \\1 {lr}",), shell=True, sweep=GRID)
    assert trial_spec(spec, Trial(1, ("1e-4", "it's"))).command == ("train --opt 'it'\"'\"'s' --path \\1 1e-4",)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": ()}, "0 parameters"),
        ({"params": (GRID.params[0], GRID.params[0])}, "twice"),
        ({"params": (Param("lr", (), 0, 1), GRID.params[1])}, "name its values"),
        ({"trials": 5}, "a grid of 6 trials, not 5"),
        ({"trials": 10**6}, "expected 1 to"),
        ({"parallel": 0}, "no trial at a time"),
        ({"params": (*GRID.params, Param("seed", ("1",)))}, "no place for seed"),
    ],
)
def test_space_that_cannot_be_tried_is_refused(changes: dict[str, object], says: str) -> None:
    check_space(GRID, ("train", "{lr}", ":opt:"))
    with pytest.raises(MeshgpuError, match=says):
        check_space(replace(GRID, **changes), ("train", "{lr}", ":opt:"))  # type: ignore[arg-type]  # Space's fields


def test_numbers_of_trials_name_different_jobs() -> None:
    ids = {trial_id(job, n) for job in (random_job(1), random_job(2)) for n in (1, 11, 111)}
    assert len(ids) == 6


def random_job(seed: int) -> JobId:
    return JobId("".join(random.Random(seed).choices("abcdefg234567", k=26)))
