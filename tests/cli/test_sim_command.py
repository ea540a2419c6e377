"""The command `sim`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

from meshgpu.cli.sim_command import WEIGHTS, caption, figure
from meshgpu.model.messages import GossipDelta, GossipDigest, Message
from meshgpu.model.trust import Signed
from meshgpu.sim.meshes import OurMesh, Scale
from meshgpu.sim.study import Plan
from meshgpu.sim.weather import Weather
from meshgpu.wire.codec import encode

Cli = Callable[..., Result]


def test_small_study_prints_a_table_and_draws_it(cli: Cli, tmp_path: Path) -> None:
    drawing = tmp_path / "sim.svg"
    done = cli("sim", "--nodes", "5,3", "--seconds", "10", "--cut", "2:4", "--seed", "7", "--plot", str(drawing))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].endswith("halved from 2 to 4 s · 20% starved · pauses of 20 s · 10 s · seed 7")
    assert lines.index("3 machines") < lines.index("5 machines")
    assert sum("all know a change, p99, ms" in line for line in lines) == 2
    root = ElementTree.fromstring(drawing.read_text())
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"3", "5", "All know a change, ms", lines[0]} <= words


def test_json_names_every_figure_with_its_unit(cli: Cli) -> None:
    (pair,) = json.loads(cli("sim", "--nodes", "3", "--seconds", "10", "--json").stdout)
    assert pair["nodes"] == 3
    units = {row["what"]: row["unit"] for row in pair["figures"]}
    assert units["all know a change, p50"] == "ms"
    assert units["sent by each machine, idle"] == "B/s"
    assert all(row["meshgpu"] is not None for row in pair["figures"])


@pytest.mark.parametrize(
    ("flags", "found", "expected"),
    [
        (("--nodes", "4,many"), "'4,many'", "numbers from 2 to 1,000"),
        (("--nodes", "1"), "'1'", "numbers from 2 to 1,000"),
        (("--cut", "90:60"), "'90:60' as --cut", "two numbers that do not fall, at most 300"),
        (("--nodes", "4", "--cut", "60:400"), "'60:400' as --cut", "at most 300"),
        (("--delay", "fast"), "'fast' as --delay", "two numbers that do not fall"),
        (("--delay", "0:inf"), "'0:inf' as --delay", "two numbers"),
        (("--plot", "sim.png"), "sim.png", "ends in .svg"),
    ],
)
def test_option_that_cannot_be_read_is_named_with_what_was_expected(
    cli: Cli, flags: tuple[str, ...], found: str, expected: str
) -> None:
    done = cli("sim", *flags)
    assert done.exit_code == 2
    assert found in done.stderr
    assert expected in done.stderr


def test_sim_is_left_out_of_the_list_of_commands(cli: Cli) -> None:
    lines = [line.split() for line in cli("--help").stdout.splitlines()]
    assert not any(line[:1] == ["sim"] for line in lines)
    assert any(line[:1] == ["run"] for line in lines)


def test_messages_weigh_what_the_wire_makes_of_them() -> None:
    """A signed payload stands for its value: it weighs what the value does, with a signature of 64 bytes."""
    mesh = OurMesh(1, 3, Weather(), None)
    ring = mesh.world.office.ring
    told: list[Message] = []
    mesh.world.network.sent = told.append
    mesh.change(0)
    mesh.timeline.run_until(mesh.timeline.time_s + 5.0)
    scale = Scale(WEIGHTS, ring.decode)
    delta = next(message for message in told if isinstance(message, GossipDelta))
    real = [Signed(s.kind, encode(ring.decode(s.payload)), s.key, bytes(64)) for s in delta.entries]
    assert scale.weigh(delta) == WEIGHTS.frame(GossipDelta(tuple(real))) > 500
    digest = next(message for message in told if isinstance(message, GossipDigest))
    assert scale.weigh(digest) == WEIGHTS.frame(digest) < 200


def test_figures_keep_three_digits() -> None:
    shown = {0.0: "0", 0.05339: "0.0534", 2.9951: "3.00", 18.14: "18.1", 4533.9: "4,534", math.inf: "never"}
    assert {value: figure(value) for value in shown} == shown
    assert figure(math.nan) == "-"


def test_caption_tells_only_what_was_asked_for() -> None:
    calm = Plan(starved=0.0, pause_s=0.0)
    assert caption(calm, (4, 64)) == "delay 0.2 to 3 ms · no loss · 300 s · seed 1"


def test_caption_says_that_large_meshes_were_studied_for_less_long() -> None:
    assert caption(Plan(), (4, 64, 256)).endswith(" · 300 s, 75 s of 256 · seed 1")
    assert caption(Plan(seconds=120.0), (4, 256)).endswith(" · 120 s · seed 1")
