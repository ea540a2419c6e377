"""The language of `--on` and `--not-on`."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.errors import MeshgpuError
from meshgpu.model.constraints import DEPTH_LIMIT, LENGTH_LIMIT, Facts, join, parse_constraint, version

RIG: Facts = {
    "machine": "rig7",
    "owner": "Ada",
    "cpus": 32.0,
    "memory": 67.2,
    "gpus": 2.0,
    "driver": version("580.105.08"),
    "name": "RTX 4090",
    "vram": 24.0,
    "cc": version("8.9"),
}
BARE: Facts = {"machine": "nas", "owner": "bob", "cpus": 4.0, "memory": 8.2, "gpus": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "vram>=24GB",
        "vram = 24",
        "vram>=24GB and name~4090",
        "name~'rtx 4090'",
        'name="RTX 4090"',
        "vram>=80GB or name~4090",
        "vram>=80GB or vram<=24GB and gpus=2",
        "not name~a100",
        "not (name~a100 or name~h100)",
        "NOT name~a100 AND vram>1",
        "memory>=64GB and memory<0.1TB and memory>64000MB",
        "cpus>16 and gpus!=1",
        "driver>=580 and driver<581 and driver>=580.99",
        "cc>=8 and cc>=8.9 and cc<9",
        "rig7",
        "rig8,RIG7",
        "rig8 or rig7",
        "machine~rig and owner=ada and name!~3090",
    ],
)
def test_constraint_holds(text: str) -> None:
    assert parse_constraint(text).holds(RIG)


@pytest.mark.parametrize(
    "text",
    [
        "vram>24GB",
        "vram>=80GB or name~4090 and gpus=1",
        "(vram>=80GB or name~4090) and gpus=1",
        "not vram>=24GB",
        "not not vram>=80GB",
        "rig8,rig",
        "cc>=10",
        "driver>=590",
        "owner=bob",
    ],
)
def test_constraint_does_not_hold(text: str) -> None:
    assert not parse_constraint(text).holds(RIG)


@pytest.mark.parametrize("text", ["vram>=1", "vram<=1000", "name~rtx", "name!~rtx", "cc!=8.9", "driver<999"])
def test_no_comparison_holds_with_what_is_not_known(text: str) -> None:
    assert not parse_constraint(text).holds(BARE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vram>=", "it ends where what vram is compared with is expected"),
        ("vram>>24", "'>' stands where what vram is compared with is expected"),
        ("vrm>=24GB", "did you mean vram?"),
        ("colour=red", "there are name, vram"),
        ("vram>=big", "a size, as 24GB"),
        ("cpus>=4GB", "a number"),
        ("cc>=new", "a version"),
        ("vram~24", "~ compares words"),
        ("name>4090", "= != ~ !~"),
        ("(name~4090", "a parenthesis is not closed"),
        ("name~4090)", "')' is one too many"),
        ("name~4090 vram>2", "'vram' is one too many"),
        ("and", "'and' stands where"),
        ("name~4090 and", "it ends where a field"),
        ('name~"4090', "nothing fits at"),
        ("(" * 30 + "rig7" + ")" * 30, f"nested more than {DEPTH_LIMIT} deep"),
        ("not " * 30 + "rig7", f"nested more than {DEPTH_LIMIT} deep"),
        ("x" * (LENGTH_LIMIT + 1), f"longer than {LENGTH_LIMIT}"),
    ],
)
def test_what_cannot_be_read_is_refused_and_says_where(text: str, found: str) -> None:
    with pytest.raises(MeshgpuError) as caught:
        parse_constraint(text)
    assert caught.value.code == "bad-request"
    assert found in caught.value.message
    assert "--on" in str(caught.value.hint)


@given(st.text(alphabet="()<>=!~ andortvm24GB,'\"", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(MeshgpuError):
        parse_constraint(text).holds(RIG)


def test_on_and_not_on_are_one_constraint() -> None:
    assert join("", "") == ""
    assert join(" rig7 ", "") == "rig7"
    assert join("", "rig7,rig8") == "not (rig7,rig8)"
    both = join("name~4090 or name~a100", "rig7")
    assert both == "(name~4090 or name~a100) and not (rig7)"
    assert not parse_constraint(both).holds(RIG)
    with pytest.raises(MeshgpuError):
        join("rig7", ") or (rig8")


def test_constraint_knows_whether_it_speaks_of_gpus() -> None:
    assert parse_constraint("rig7 or vram>=8GB").is_about_gpus
    assert not parse_constraint("rig7 and cpus>=8 and gpus>=1").is_about_gpus
