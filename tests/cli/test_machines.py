"""Commands about machines and meshes: machines, discover, init, invite, join, up, down, version; and errors."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

from meshgpu import __version__
from meshgpu.cli import mesh_commands
from meshgpu.cli.main import COMMANDS
from meshgpu.cli.render import show_error
from meshgpu.core.trust.joining import write_invite
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, MeshId, NodeId
from meshgpu.model.pairing import InviteString

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]
INVITE = write_invite(InviteString(MeshId("a" * 64), NodeId("b" * 52), "c" * 20, (Address("10.0.0.1:7444"),)))


def gpu(index: int, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA GeForce RTX 4090",
        "memory_total_bytes": 24_564 * 2**20,
        "memory_free_bytes": 24_564 * 2**20,
        "utilization_percent": 0,
        "temperature_c": 38,
        "power_w": 20.0,
        "fault": "",
        "withheld": "",
        "jobs": [],
    }
    assert not changes.keys() - facts.keys()
    return facts | changes


def machine(name: str, *gpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": name,
        "id": name * 4,
        "state": "alive",
        "self": False,
        "roles": ["rig"],
        "owner": "bob",
        "cpus": 16,
        "memory_bytes": 64 * 10**9,
        "fence": "bubblewrap",
        "lending": "polite",
        "paused": False,
        "paused_until": None,
        "gpu_note": "",
        "down_s": None,
        "version": "0.1",
        "address": "10.0.0.7:7443",
        "load": 3,
        "jobs": 0,
        "heard_s": 1.0,
        "capacity_s": 4.0,
        "doubted_by": [],
        "cloned": False,
        "gpus": list(gpus),
    }
    assert not changes.keys() - facts.keys()
    return facts | changes


AGENT: dict[str, Any] = {
    "version": __version__,
    "pid": 7,
    "home": "/home/ada/.local/share/meshgpu/1234",
    "node": "n" * 52,
    "name": "xps13",
    "mesh": None,
    "user": None,
    "link_port": 7443,
    "wanted_port": 7443,
    "addresses": [],
    "fence": "bubblewrap",
    "lending": "polite",
    "gpus": [],
    "gpu_note": "no NVIDIA driver is loaded",
    "started_at": 1.0,
}


def sighting(node: str, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "node": node * 8,
        "name": node,
        "mesh_name": "lab",
        "mesh_tag": "a3f9",
        "ours": False,
        "self": False,
        "pairing": False,
        "addresses": ["10.0.0.7:7443"],
        "gpus": "1x RTX 4090 24GB",
    }
    assert not changes.keys() - facts.keys()
    return facts | changes


def test_machines_show_one_line_per_gpu(cli: Cli, stub: "StubAgent") -> None:
    busy = gpu(0, utilization_percent=97, temperature_c=64, memory_free_bytes=13 * 2**30)
    busy["jobs"] = [{"id": "k", "display": "train-k7q", "user": "alice", "waits": False}]
    small = gpu(1, name="NVIDIA GeForce RTX 3060", memory_total_bytes=12 * 2**30, memory_free_bytes=None)
    small |= {"utilization_percent": None, "temperature_c": None, "fault": "lost: reset the machine"}
    stub.on(
        "GET /v1/machines",
        {
            "machines": [
                machine("ada", self=True, gpu_note="no NVIDIA driver is loaded"),
                machine("cyd", small, busy),
                machine("bob", gpu(0), fence=""),
                machine("dan", gpu(0), state="down", down_s=185.0),
                machine("eve", gpu(0), state="suspect"),
                machine("fay", gpu(0)),
                machine("gus", gpu(0), cloned=True),
            ]
        },
    )
    assert cli("machines").stdout.splitlines() == [
        "MACHINE     GPU              TEMP  UTIL      MEMORY  STATE",
        "ada (this)  no GPU              -     -           -  no NVIDIA driver is loaded",
        "cyd [0]     RTX 4090 24 GB  64 °C  97 %  11 / 24 GB  train-k7q (alice)",
        "    [1]     RTX 3060 12 GB      -     -           -  lost: reset the machine",
        "bob         RTX 4090 24 GB  38 °C   0 %   0 / 24 GB  free for bob only",
        "dan         RTX 4090 24 GB      -     -           -  out of touch 3 m",
        "eve         RTX 4090 24 GB      -     -           -  does not answer",
        "fay         RTX 4090 24 GB  38 °C   0 %   0 / 24 GB  free",
        "gus         RTX 4090 24 GB      -     -           -  runs twice: meshgpu doctor",
    ]


def test_machines_say_at_length_what_each_says_of_itself_and_how_old_that_is(cli: Cli, stub: "StubAgent") -> None:
    silent = {"heard_s": None, "capacity_s": None, "load": None, "address": "", "version": "", "lending": ""}
    view = {
        "machines": [
            machine("ada", gpu(0), self=True, owner="ada", heard_s=None),
            machine("bob", fence="", paused=True, jobs=2, capacity_s=7300.0),
            machine("cyd", state="suspect", owner="cyd", doubted_by=["ada", "bob"], **silent),
        ]
    }
    stub.on("GET /v1/machines", view)
    assert cli("machines", "-v").stdout.splitlines()[5:] == [
        "MACHINE  STATE    HEARD  OWNER  LENDS    FENCE         LOAD  JOBS    AS OF  ADDRESS        AGENT  DOUBTED BY",
        "ada      alive        -  ada    polite   bubblewrap  3 / 16     0      4 s  10.0.0.7:7443  0.1    -",
        "bob      alive      1 s  bob    nothing  none        3 / 16     2  2 h 1 m  10.0.0.7:7443  0.1    -",
        "cyd      suspect      -  cyd    -        bubblewrap       -     0        -  -              -      ada, bob",
    ]


def test_machines_show_what_a_machine_is_where_it_is_no_plain_rig(cli: Cli, stub: "StubAgent") -> None:
    stub.on(
        "GET /v1/machines",
        {
            "machines": [
                machine("ada", gpu(0), self=True, roles=["burst"]),
                machine("bob", gpu(0), roles=["submitter"]),
                machine("cyd", roles=["viewer"], self=True),
                machine("dan", gpu(0), gpu(1), roles=["cloud"]),
                machine("eve", gpu(0), roles=["viewer"], state="down", down_s=185.0),
                machine("fay", gpu(0)),
            ]
        },
    )
    assert cli("machines").stdout.splitlines() == [
        "MACHINE             GPU              TEMP  UTIL     MEMORY  STATE",
        "ada (this, burst)   RTX 4090 24 GB  38 °C   0 %  0 / 24 GB  free",
        "bob (submitter)     RTX 4090 24 GB  38 °C   0 %  0 / 24 GB  not lent",
        "cyd (this, viewer)  no GPU              -     -          -  not lent",
        "dan (cloud) [0]     RTX 4090 24 GB  38 °C   0 %  0 / 24 GB  free",
        "            [1]     RTX 4090 24 GB  38 °C   0 %  0 / 24 GB  free",
        "eve (viewer)        RTX 4090 24 GB      -     -          -  out of touch 3 m",
        "fay                 RTX 4090 24 GB  38 °C   0 %  0 / 24 GB  free",
    ]
    shown = json.loads(cli("machines", "--json").stdout)["machines"]
    assert [machine["roles"] for machine in shown[:2]] == [["burst"], ["submitter"]]


def test_machines_json_is_the_contract(cli: Cli, stub: "StubAgent") -> None:
    view = {"machines": [machine("ada", gpu(0))]}
    stub.on("GET /v1/machines", view | {"more": 1})
    assert json.loads(cli("machines", "--json").stdout) == view


def test_init_names_machine_mesh_and_user_and_shows_the_recovery_key_once(
    cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_commands, "host_name", lambda: "xps13")
    monkeypatch.setattr(mesh_commands, "account_name", lambda: "ada")
    stub.on("GET /v1/agent", AGENT)
    founded = {"mesh": "lab", "name": "xps13", "node": "n", "user": "ada", "recovery_key": "secret words"}
    stub.on("POST /v1/init", founded)
    result = cli("init")
    assert result.stdout.splitlines()[0] == "xps13 is the first machine of lab; you are ada."
    assert result.stdout.count("secret words") == 1
    assert stub.body("POST /v1/init") == {"mesh": "lab", "name": "xps13", "user": "ada"}
    assert json.loads(cli("init", "--mesh", "office", "--name", "rig-1", "--user", "bob", "--json").stdout) == founded
    assert stub.body("POST /v1/init") == {"mesh": "office", "name": "rig-1", "user": "bob"}


def test_init_refuses_invalid_names_before_anything_happens(cli: Cli, stub: "StubAgent") -> None:
    for option in ("--name", "--user", "--mesh"):
        assert cli("init", option, "").exit_code == 2
    assert cli("invite", "--user", "").exit_code == 2
    result = cli("init", "--name", "Ada's PC")
    assert (result.exit_code, stub.seen) == (2, [])
    assert result.stderr.endswith("hint: --name ada-s-pc\n")


def test_names_default_to_host_and_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Adas_PC.office.example")
    assert mesh_commands.host_name() == "adas-pc"
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert mesh_commands.account_name() == "user"


def test_invite_prints_the_string_alone_on_stdout(cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    stub.on("POST /v1/invites", invited(user="bob"))
    result = cli("invite", "--user", "bob")
    assert result.stdout == "mgpu1-abc\n"
    assert result.stderr == "Good for one machine of bob, for 10 m. On that machine: meshgpu join …\n"
    assert stub.body("POST /v1/invites") == {"user": "bob", "role": "rig", "uses": 1, "life_s": 600.0}


def invited(**changes: Any) -> dict[str, Any]:
    return {"invite": "mgpu1-abc", "expires_at": 1600.0, "user": "ada", "role": "rig", "uses": 1} | changes


def test_invite_in_a_file_is_for_its_account_alone_and_on_no_screen(
    cli: Cli, stub: "StubAgent", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    stub.on("POST /v1/invites", invited(expires_at=1000.0 + 8 * 3600, role="viewer", uses=20))
    out = tmp_path / "join"
    result = cli("invite", "--uses", "20", "--for", "8h", "--role", "viewer", "--out", str(out))
    assert (out.read_text(), out.stat().st_mode & 0o777) == ("mgpu1-abc\n", 0o600)
    assert result.stdout == ""
    assert "mgpu1" not in result.stderr
    assert result.stderr.startswith("Good for 20 machines of ada as viewer, for 8 h 0 m, while this agent runs.")
    assert stub.body("POST /v1/invites") == {"user": None, "role": "viewer", "uses": 20, "life_s": 28800.0}
    shown = cli("invite", "--out", str(tmp_path / "other"), "--json").stdout
    assert json.loads(shown)["invite"] is None


ADA = {"user": "ada", "machine": "nas", "key": "k"}
BOB = {"user": "bob", "machine": "rig-b", "key": "l"}


@pytest.mark.parametrize(
    ("admins", "candidates", "advised"),
    [([ADA], [BOB, ADA], True), ([ADA], [], False), ([ADA, BOB], [BOB], False)],
)
def test_only_admin_is_told_how_to_make_a_second(
    cli: Cli, stub: "StubAgent", admins: list[Any], candidates: list[Any], advised: bool
) -> None:
    stub.on("POST /v1/invites", invited())
    stub.on("GET /v1/admins", {"admins": admins, "candidates": candidates})
    result = cli("invite")
    assert ("A second is wise, should this machine be lost: meshgpu admin add bob@rig-b\n" in result.stderr) is advised
    assert result.stdout == "mgpu1-abc\n"
    assert "second" not in cli("invite", "--json").stderr


def test_only_admin_is_told_so_after_an_admission(cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshgpu.cli.compare_commands.is_attended", lambda: True)
    stub.on_stream("POST /v1/admit", {"type": "admitted", "name": "rig-b", "user": "bob", "role": "rig"})
    stub.on("GET /v1/admins", {"admins": [ADA], "candidates": [BOB]})
    result = cli("admit")
    assert result.stdout == "rig-b is a member now: a rig of bob.\n"
    assert result.stderr.endswith("meshgpu admin add bob@rig-b\n")


def test_invite_overwrites_no_file_and_leaves_none_where_it_fails(cli: Cli, stub: "StubAgent", tmp_path: Path) -> None:
    out = tmp_path / "join"
    out.write_text("mine")
    result = cli("invite", "--out", str(out))
    assert (result.exit_code, out.read_text(), stub.seen) == (2, "mine", [])
    assert f"cannot write the invite to {out}: it is there already" in result.stderr
    stub.on_failure("POST /v1/invites", 403, "not-an-admin", "no admin")
    assert cli("invite", "--out", str(tmp_path / "new")).exit_code == 125
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--uses", "0"), ("--uses", "101"), ("--for", "59s"), ("--for", "8d"), ("--for", "soon"), ("--role", "burst")],
)
def test_invite_out_of_bounds_is_refused_before_anything_happens(
    cli: Cli, stub: "StubAgent", arguments: tuple[str, str], tmp_path: Path
) -> None:
    result = cli("invite", *arguments, "--out", str(tmp_path / "join"))
    assert (result.exit_code, stub.seen, list(tmp_path.glob("join"))) == (2, [], [])
    assert "expected" in result.stderr


def test_join_says_what_is_lent_before_it_joins(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", AGENT | {"gpus": ["RTX 4090"]})
    joined = {"mesh": "lab", "name": "rig-b", "node": "n", "user": "bob", "inviter": "ada", "role": "rig"}
    stub.on("POST /v1/join", joined | {"gpus": ["RTX 4090 24 GB"], "fence": "bubblewrap"})
    result = cli("join", f" {INVITE}\n", "--yes", "--name", "rig-b", "--seed", "10.0.0.1", "--seed", "ada:7443")
    assert result.stderr.splitlines() == [
        "rig-b will lend: RTX 4090",
        "To: every user of the mesh",
        "Jobs of others are shut in by bubblewrap: they see the system read-only and their own files.",
        "You come first: when another program uses a GPU, the job on it leaves within 30 s.",
        "To take it back: meshgpu pause [2h]. To stop lending: meshgpu down (jobs that run go on)",
    ]
    assert "rig-b is in lab, let in by ada; you are bob." in result.stdout
    assert stub.body("POST /v1/join") == {"invite": INVITE, "name": "rig-b", "seeds": ["10.0.0.1", "ada:7443"]}


@pytest.mark.parametrize(
    ("role", "does"),
    [
        ("rig", "It lends no GPU (fence: bubblewrap)."),
        ("submitter", "It submits jobs and lends nothing."),
        ("viewer", "It looks on: it lends nothing and submits nothing."),
    ],
)
def test_newcomer_reads_what_it_became(role: str, does: str) -> None:
    joined: Any = {"mesh": "lab", "name": "rig-b", "node": "n", "user": "bob", "inviter": "ada", "role": role}
    lines = mesh_commands.welcome(joined | {"fence": "bubblewrap", "gpus": []})
    assert (lines[1], "meshgpu run" in lines[2]) == (does, role != "viewer")


def test_join_reads_the_invite_where_no_other_account_sees_it(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", AGENT | {"gpus": ["RTX 4090"]})
    joined = {"mesh": "lab", "name": "rig-b", "node": "n", "user": "bob", "inviter": "ada", "role": "rig"}
    stub.on("POST /v1/join", joined | {"gpus": ["RTX 4090 24 GB"], "fence": "bubblewrap"})
    assert cli("join", "--yes", "--name", "rig-b", input=f"{INVITE}\nmore").exit_code == 0
    assert stub.body("POST /v1/join") == {"invite": INVITE, "name": "rig-b", "seeds": []}
    assert cli("join", "--yes", input="").exit_code == 2


def two_windows(stub: "StubAgent", *more: dict[str, Any]) -> None:
    doors = [sighting("ada", pairing=True), sighting("bob", pairing=True, mesh_name="office", mesh_tag="b7c2")]
    stub.on("GET /v1/agent", AGENT)
    stub.on("GET /v1/discover", {"machines": [sighting("cyd"), *doors, *more]})


def compared(stub: "StubAgent", mesh: str) -> None:
    joined = {"type": "joined", "mesh": mesh, "name": "rig-b", "node": "n", "user": "bob", "inviter": "ada"}
    stub.on_stream("POST /v1/join/compare", joined | {"fence": "bubblewrap", "gpus": [], "role": "rig"})


def test_join_goes_to_the_mesh_that_is_named(cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_commands, "is_attended", lambda: True)
    two_windows(stub)
    compared(stub, "office")
    for mesh in ("office", "b7c2"):
        result = cli("join", "--yes", "--name", "rig-b", "--as", "bob", "--mesh", mesh)
        assert result.exit_code == 0
        assert stub.body("POST /v1/join/compare")["node"] == "bob" * 8


def test_join_asks_which_of_several_meshes_is_meant(
    cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_commands, "is_attended", lambda: True)
    two_windows(stub)
    compared(stub, "office")
    result = cli("join", "--yes", "--name", "rig-b", "--as", "bob", input="2\n")
    assert result.stderr.splitlines()[-2:] == [
        "  1  lab (a3f9), at 10.0.0.7:7443",
        "  2  office (b7c2), at 10.0.0.7:7443",
    ]
    assert stub.body("POST /v1/join/compare")["node"] == "bob" * 8


def test_join_names_the_meshes_where_nobody_says_which(
    cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_commands, "is_attended", lambda: True)
    two_windows(stub)
    result = cli("join", "--yes", "--name", "rig-b", "--as", "bob", input="")
    assert (result.exit_code, "into lab, office, and nobody said which" in result.stderr) == (125, True)
    assert "hint: meshgpu join --mesh a3f9" in result.stderr
    assert "POST /v1/join/compare" not in stub.targets()


def test_join_without_a_person_or_a_string_names_the_meshes_that_are_open(cli: Cli, stub: "StubAgent") -> None:
    two_windows(stub, sighting("dan", pairing=True, mesh_tag="c0de"))
    result = cli("join", "--yes", "--name", "rig-b", input="")
    assert result.exit_code == 2
    assert "these take in machines now: lab (a3f9), lab (c0de), office\n" in result.stderr
    assert "POST /v1/join" not in stub.targets()


@pytest.mark.parametrize("arguments", [(INVITE,), ("--seed", "10.0.0.1", "--as", "bob")])
def test_mesh_is_not_chosen_where_something_else_says_it(
    cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(mesh_commands, "is_attended", lambda: True)
    result = cli("join", "--yes", "--name", "rig-b", "--mesh", "lab", *arguments)
    assert (result.exit_code, stub.seen) == (2, [])
    assert "mesh" in result.stderr


def test_errors_of_others_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(MeshgpuError("failed", "cannot do it: \x1b]0;owned\x07\x1b[2J\n  second line\r", "pay\x9b31m"))
    assert capsys.readouterr().err.splitlines() == [
        "error: cannot do it: \\x1b]0;owned\\x07\\x1b[2J",
        "  second line\\r",
        "hint: pay\\x9b31m",
    ]


def test_join_declined_joins_nothing(cli: Cli, stub: "StubAgent", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_commands, "is_attended", lambda: True)
    monkeypatch.setattr(mesh_commands, "confirmed", lambda question, *, yes: False)
    stub.on("GET /v1/agent", AGENT)
    result = cli("join", INVITE, "--name", "rig-b")
    assert result.exit_code == 1
    assert "rig-b will lend: its processors (no GPU was found)" in result.stderr
    assert "POST /v1/join" not in stub.targets()


def test_join_lends_nothing_unasked(cli: Cli, stub: "StubAgent") -> None:
    result = cli("join", INVITE)
    assert (result.exit_code, stub.seen) == (2, [])
    assert result.stderr.endswith("no terminal is here\nhint: --yes\n")


@pytest.mark.parametrize("text", ["", "hello", "mgpu1-abc"])
def test_join_refuses_what_is_no_invite_before_it_says_what_is_lent(cli: Cli, stub: "StubAgent", text: str) -> None:
    result = cli("join", "--yes", "--", text)
    assert (result.exit_code, stub.seen) == (2, [])
    assert "will lend" not in result.stderr


def test_machine_without_a_fence_consents_to_its_owner_only() -> None:
    agent: Any = AGENT | {"fence": ""}
    assert mesh_commands.consent("rig-b", agent)[1] == "To: its owner only, for that reason"


def test_discover_names_meshes_and_members(cli: Cli, stub: "StubAgent") -> None:
    stranger = sighting("cyd", mesh_name=None, name=None, gpus=None, pairing=True, addresses=[])
    stub.on("GET /v1/agent", AGENT | {"started_at": time.time()})
    stub.on("GET /v1/discover", {"machines": [sighting("ada", ours=True), stranger]})
    assert cli("discover").stdout.splitlines() == [
        "MESH  MACHINE   GPUS              ADDRESS        STATE",
        "lab   ada       1x RTX 4090 24GB  10.0.0.7:7443  member",
        "a3f9  cydcydcy  -                 -              takes in machines now",
    ]
    assert len(json.loads(cli("discover", "--json").stdout)["machines"]) == 2
    assert stub.targets()[1] == "GET /v1/discover?seconds=1.5"
    stub.replies["GET /v1/agent"] = [AGENT]
    cli("discover")
    assert stub.targets()[-1] == "GET /v1/discover?seconds=0.3"


def test_up_shows_who_is_there_and_what_to_type_next(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", AGENT)
    stub.on("GET /v1/discover", {"machines": [sighting("ada"), sighting("bob"), sighting("xps13", self=True)]})
    lines = cli("up").stdout.splitlines()
    assert lines[0].startswith("this machine: xps13 · no NVIDIA driver is loaded · agent ")
    assert lines[1:] == [
        "on this network: lab · 2 machines · 2 × RTX 4090 24GB",
        "next: meshgpu join (an admin runs: meshgpu admit), or meshgpu init (your own mesh)",
    ]
    stub.replies["GET /v1/agent"] = [AGENT | {"mesh": {"id": "m", "name": "lab"}, "user": "ada", "gpu_note": ""}]
    stub.replies["GET /v1/discover"] = [{"machines": [sighting("bob", ours=True)]}]
    lines = cli("up").stdout.splitlines()
    assert lines[1:] == [
        "mesh lab · you are ada · 1 other member seen",
        "next: meshgpu machines, meshgpu run -- python train.py, meshgpu admit",
    ]


def test_up_says_that_a_port_was_taken(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", AGENT | {"link_port": 40001})
    stub.on("GET /v1/discover", {"machines": []})
    assert "port 7443 was taken: the other machines reach this one at port 40001\n" in cli("up").stdout
    stub.replies["GET /v1/agent"] = [AGENT | {"link_port": 40001, "wanted_port": 0}]
    assert "taken" not in cli("up").stdout


def test_down_without_an_agent_is_no_error(cli: Cli) -> None:
    result = cli("down")
    assert (result.exit_code, result.stderr) == (0, "no agent runs here\n")


def test_version_names_an_agent_of_another_version(cli: Cli, stub: "StubAgent") -> None:
    stub.on("GET /v1/agent", AGENT | {"version": "0.0.9"})
    result = cli("version")
    assert result.stdout == f"meshgpu {__version__}\n"
    assert result.stderr == "the agent is 0.0.9: meshgpu down && meshgpu up\n"
    assert json.loads(cli("version", "--json").stdout) == {"version": __version__, "agent": "0.0.9"}
    assert cli("--version").stdout == f"meshgpu {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert "Usage: meshgpu " + command in result.stdout
    assert not any(word in result.stdout.lower() for word in ("steward", "epoch", "pydantic"))


def test_unknown_command_names_the_nearest(cli: Cli) -> None:
    result = cli("machnies")
    assert (result.exit_code, result.stderr) == (2, "error: there is no command 'machnies'\nhint: meshgpu machines\n")


def test_too_long_a_home_is_told_before_the_kernel_does(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHGPU_HOME", "/tmp/" + "x" * 120)
    result = cli("ps")
    assert result.exit_code == 125
    assert "136 bytes, 107 at most" in result.stderr
    assert "hint: export MESHGPU_HOME=" in result.stderr


def test_home_that_is_no_directory_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MESHGPU_HOME", str(tmp_path / "file"))
    assert f"error: cannot keep an agent in {tmp_path}/file: it is no directory" in cli("up").stderr
    monkeypatch.setenv("MESHGPU_HOME", "~/mesh")
    assert 'hint: export MESHGPU_HOME="$HOME/mesh"' in cli("up").stderr


def test_bad_request_of_the_agent_is_usage(cli: Cli, stub: "StubAgent") -> None:
    stub.on_failure("GET /v1/machines", 400, "bad-request", "what?")
    result = cli("machines")
    assert (result.exit_code, result.stderr) == (2, "error: what?\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_back(cli: Cli, shell: str) -> None:
    assert "_MESHGPU_COMPLETE" in cli("completion", shell).stdout


def test_completion_of_another_shell_is_refused(cli: Cli) -> None:
    assert cli("completion", "tcsh").exit_code == 2
