"""Colleagues and strangers on the same switch: who may run, see and fetch what."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from meshgpu.wire.certificates import der

pytestmark = [pytest.mark.hosts]

KNOCK = """
import asyncio, sys
from pathlib import Path
from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, node_id
from meshgpu.ports import Anchor, DialFailed, LinkOpened

async def nothing(peer, request):
    return
    yield b""

async def main(address, ca_of_bob):
    keys = KeyFiles(Path(sys.argv[1]))
    link = GrpcLink(keys, BootClock(), ["0.0.0.0"], 0)
    outcome = asyncio.get_running_loop().create_future()
    def emit(event):
        if isinstance(event, (LinkOpened, DialFailed)) and not outcome.done():
            outcome.set_result(event)
    await link.start(emit, nothing)
    bob = await link.identify(address)
    link.trust([Anchor(bob, ca_of_bob)])
    link.dial(bob, address)
    print(type(await asyncio.wait_for(outcome, 15)).__name__)
    try:
        async for message in link.fetch(bob, [address], b"LogsWanted\\0"):
            print("got", message)
        print("stream ended")
    except MeshgpuError as error:
        print("refused", error.code)
    await link.stop()

asyncio.run(main(Address(sys.argv[2]), bytes.fromhex(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada founded it; bob is hers and has no fence; cyd is hers and fenced; eve is a colleague; mallory is nobody."""
    ada, bob, cyd = office.host("ada"), office.host("bob", MESHGPU_FENCE="none"), office.host("cyd")
    office.form_mesh(ada, bob, cyd)
    eve, mallory = office.host("eve"), office.host("mallory")
    office.join(ada, eve, "--user", "eve")
    mallory.meshgpu("up")
    return ada, bob, cyd, eve, mallory


def submit(host: Any, machine: str, *command: str, directory: Path) -> str:
    done = host.meshgpu("run", "-d", "--json", "-m", machine, "--", *command, directory=directory)
    return str(json.loads(done.stdout)["id"])


def test_another_users_job_is_refused_where_no_fence_works(
    lab: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    ada, _, _, eve, _ = lab
    wait_until(lambda: any(m["name"] == "bob" and m["cpus"] for m in eve.json("machines")["machines"]))
    done = eve.meshgpu("run", "-m", "bob", "--", "true", directory=tmp_path, code=125)
    assert "lends to its owner" in done.stderr
    assert "bubblewrap" in done.stderr
    ada.meshgpu("run", "-m", "bob", "--", "true", directory=tmp_path)


def test_another_users_job_is_shut_in_where_a_fence_works(
    lab: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    _, _, cyd, eve, _ = lab
    wait_until(lambda: any(m["name"] == "cyd" and m["cpus"] for m in eve.json("machines")["machines"]))
    secret = cyd.home / "keys"
    command = f"ls {secret} && echo open; touch {cyd.home.parent}/planted && echo planted; echo done"
    done = eve.meshgpu("run", "-m", "cyd", "--", command, directory=tmp_path)
    assert done.stdout == "done\n"
    assert not (cyd.home.parent / "planted").exists()


def test_another_users_job_is_nowhere_to_be_found(lab: Any, tmp_path: Path) -> None:
    ada, _, _, eve, _ = lab
    (tmp_path / "secret.txt").write_text("secret")
    name = submit(ada, "cyd", "sh", "-c", "echo secret; cp secret.txt left.txt", directory=tmp_path)
    ada.meshgpu("wait", name)
    assert all(row["id"] != name for row in eve.json("ps", "-a")["jobs"])
    for arguments in (["logs", name], ["stop", name], ["kill", name], ["info", name], ["ls", f"runs/{name}"]):
        done = eve.meshgpu(*arguments, code=125)
        assert "secret" not in done.stdout
        assert "cannot find a job" in done.stderr
    done = eve.meshgpu("cp", f"runs/{name}/left.txt", str(tmp_path / "stolen"), code=125)
    assert not (tmp_path / "stolen").exists()


def test_stranger_sees_what_machines_announce_and_nothing_else(lab: Any) -> None:
    mallory = lab[4]
    seen = json.loads(mallory.meshgpu("discover", "--json").stdout)["machines"]
    others = [row for row in seen if not row["self"]]
    assert {row["mesh_name"] for row in others} == {"lab"}
    assert {row["name"] for row in others} == {None}
    for arguments in (["machines"], ["ps", "-a"], ["run", "--", "true"]):
        done = mallory.meshgpu(*arguments, code=125)
        assert "in no mesh" in done.stderr


def test_stranger_gets_no_link_and_no_stream(lab: Any, tmp_path: Path) -> None:
    ada, bob, _, _, mallory = lab
    ca = der(x509.load_pem_x509_certificate((bob.home / "keys" / "device-ca.pem").read_bytes()))
    script = tmp_path / "knock.py"
    script.write_text(KNOCK)
    command = [sys.executable, str(script), str(tmp_path / "keys"), f"{bob.address}:7443", ca.hex()]
    done = subprocess.run(mallory.argv(*command), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["DialFailed", "refused no-answer"], done.stderr
    assert ada.json("machines")


def test_used_and_mistyped_invites_are_refused(lab: Any) -> None:
    ada, _, _, _, mallory = lab
    invite = ada.meshgpu("invite").stdout.split()[-1]
    wrong = invite[:-1] + ("a" if invite[-1] != "a" else "b")
    done = mallory.meshgpu("join", "--name", "mallory", "--yes", wrong, code=2)
    assert "a character of it is wrong" in done.stderr
    mallory.meshgpu("join", "--name", "mallory", "--yes", invite)
    again = mallory.meshgpu("join", "--name", "mallory", "--yes", invite, code=125)
    assert "is in the mesh lab already" in again.stderr


# -- another account of the machine ------------------------------------------------------------------------------------

NOBODY = 65534
ORDERS = (
    "POST /v1/init", "POST /v1/invites", "POST /v1/join", "POST /v1/down", "POST /v1/pause", "POST /v1/resume",
    "POST /v1/burst", "POST /v1/trees", "PUT /v1/chunks", "POST /v1/jobs", "GET /v1/jobs", "GET /v1/jobs/JOB",
    "GET /v1/jobs/JOB/why", "GET /v1/jobs/JOB/events", "POST /v1/jobs/JOB/stop", "GET /v1/jobs/JOB/files",
    "GET /v1/jobs/JOB/files/left.txt", "GET /v1/sweeps/JOB", "POST /v1/admins/add", "POST /v1/admins/remove",
    "POST /v1/recover", "POST /v1/leave", "POST /v1/revoke", "POST /v1/role", "POST /v1/admit",
    "POST /v1/join/compare", "POST /v1/press",
)  # fmt: skip
WANTED = {"name": "bob", "role": "viewer", "stops_jobs": True, "anyway": True, "digits": "123 456", "same": True}
"""What the orders name, all in one."""
REFUSALS = ("not-allowed", "not-in-mesh", "bad-invite")
"""The last is of `press`: that account compares no digits."""


@contextmanager
def account(uid: int) -> Iterator[None]:
    """What this process opens meanwhile, it opens as that account."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def ask(path: Path, order: str, body: bytes = b"{}") -> tuple[int, Any]:
    """(HTTP status, document) of what the agent answers at its control socket."""
    head = f"{order} HTTP/1.1\r\nHost: agent\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(head.encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_another_account_cannot_talk_to_an_agent_that_is_not_its_own(lab: Any, office: Any, tmp_path: Path) -> None:
    ada = lab[0]
    job = submit(ada, "ada", "sh", "-c", "echo printed", directory=tmp_path)
    ada.meshgpu("wait", job)
    admin = ada.json("admin", "ls")["admins"][0]
    persons = {"POST /v1/admins/remove": f"{admin['user']}@{admin['machine']}"}
    path = ada.home / "agent.sock"
    assert ask(path, f"GET /v1/jobs/{job}")[0] == 200
    before = ada.json("machines")["machines"][0]["name"], ada.json("admin", "ls"), ada.json("ps", "-a")
    for directory in (office.directory, ada.home.parent, ada.home):  # as if somebody had opened all that is in its way
        directory.chmod(0o755)
    try:
        with account(NOBODY), pytest.raises(PermissionError):
            ask(path, "GET /v1/agent")
        path.chmod(0o666)
        for order in ORDERS:
            wanted = json.dumps(WANTED | {"user": persons.get(order, "eve")}).encode()
            with account(NOBODY):
                status, said = ask(path, order.replace("JOB", job), wanted)
            assert 400 < status < 500, (order, said)
            assert said["error"]["code"] in REFUSALS, (order, said)
    finally:
        path.chmod(0o600)
        for directory in (office.directory, ada.home.parent, ada.home):
            directory.chmod(0o700)
    assert before == (ada.json("machines")["machines"][0]["name"], ada.json("admin", "ls"), ada.json("ps", "-a"))
