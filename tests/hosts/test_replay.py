"""Somebody on the same switch records a whole session and says all of it again: nothing comes of it.

A door of the test's own, which obeys whatever bytes arrive, shows that the recording and the repetition are real.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import eavesdropper
from tests.hosts.eavesdropper import Capture, Flow
from tests.hosts.office import ip, until
from tests.hosts.screen import admit_by_digits

pytestmark = [pytest.mark.hosts]

LINK_PORT, PAIRING_PORT, PLAIN_PORT = 7443, 7444, 7999
SECRET = "s3cr3t-5d0a91c7"
PRINTED = "pr1nted-0b7f44e2"
FETCHED = "f3tched-c19a6d83"
USER = "quentin-3f"
JOB = "nightly-8c"
MACHINE = "bob-71"
ORDER = b"0rder-of-a-plain-door\n"

PLAIN = f"""
import selectors, socket, sys
chosen = selectors.DefaultSelector()
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    door = socket.socket(socket.AF_INET, kind)
    door.bind(("0.0.0.0", {PLAIN_PORT}))
    chosen.register(door, selectors.EVENT_READ)
    if kind == socket.SOCK_STREAM:
        door.listen(64)
print("open", flush=True)
while True:
    for key, _ in chosen.select():
        if key.fileobj.type == socket.SOCK_DGRAM:
            data, way = key.fileobj.recv(4096), "frame "
        else:
            connection, _ = key.fileobj.accept()
            connection.settimeout(2)
            data, way = connection.recv(4096), "stream "
            connection.send(b"done")
            connection.close()
        print(way + data.decode(), end="", flush=True)
"""

ASK = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PLAIN_PORT})) as connection:
    connection.sendall({ORDER!r})
    connection.recv(4)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
    speaker.sendto({ORDER!r}, (sys.argv[1], {PLAIN_PORT}))
"""


@dataclass
class Session:
    """ada founded the mesh, bob runs her jobs, dan looks on, mallory only has a cable to the same switch."""

    ada: Any
    bob: Any
    dan: Any
    mallory: Any
    recording: Path
    obeyed: Path
    invites: list[str]

    @property
    def office(self) -> tuple[Any, ...]:
        return self.ada, self.bob, self.dan

    def jobs(self) -> list[tuple[str, str, Any]]:
        rows = self.ada.json("ps", "-a", "--all-users")["jobs"]
        return sorted((row["id"], row["state"], row.get("exit_code")) for row in rows)

    def standing(self) -> tuple[Any, ...]:
        """All that somebody else may not change."""
        machines = [sorted(row["name"] for row in host.json("machines")["machines"]) for host in self.office]
        started = sorted(str(path) for host in self.office for path in host.home.glob("jobs/*/*/guard.json"))
        admins = [host.json("admin", "ls")["admins"] for host in self.office]
        return self.jobs(), machines, started, admins, [host.agent_pid() for host in self.office]


def make_hub(office: Any) -> None:
    """The switch forgets who is where, and so shows everybody everything."""
    ip("-n", office.switch, "link", "set", "br0", "type", "bridge", "ageing_time", "0")
    for index in range(1, len(office.hosts) + 1):
        ip("-n", office.switch, "link", "set", f"p{index}", "type", "bridge_slave", "learning", "off", "flood", "on")


@pytest.fixture(scope="module")
def session(office: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    directory = tmp_path_factory.mktemp("wire")
    ada, bob, dan, mallory = (office.host(name) for name in ("ada", MACHINE, "dan", "mallory"))
    make_hub(office)
    recording, obeyed = directory / "recording", directory / "obeyed"
    record = mallory.argv(sys.executable, eavesdropper.__file__, "record", str(recording))
    with (
        obeyed.open("w") as output,
        subprocess.Popen(ada.argv(sys.executable, "-c", PLAIN), stdout=output) as door,
        subprocess.Popen(record, stdout=subprocess.PIPE, text=True) as recorder,
    ):
        try:
            assert recorder.stdout is not None
            assert recorder.stdout.readline() == "listening\n"
            lived = live(office, Session(ada, bob, dan, mallory, recording, obeyed, []), directory)
            recorder.send_signal(signal.SIGTERM)
            assert recorder.wait(10) == 0
            yield lived
        finally:
            for process in (recorder, door):
                process.kill()


def live(office: Any, session: Session, directory: Path) -> Session:
    """ada founds, invites bob, lets dan in by digits, and runs a job on bob's machine that prints, has a secret and
    leaves a file; another she stops."""
    ada, bob = session.ada, session.bob
    ada.meshgpu("init", "--mesh", "lab", "--name", "ada", "--user", USER, "--yes")
    session.invites.append(ada.meshgpu("invite").stdout.split()[-1])
    bob.meshgpu("join", "--name", MACHINE, "--yes", session.invites[0])
    admit_by_digits(ada, session.dan)
    until(lambda: office.sees_all(ada, 3))
    (directory / "project").mkdir()
    (directory / "project" / "in.txt").write_text(FETCHED)
    ada.settings["TOKEN"] = SECRET
    try:
        options = ("-m", MACHINE, "-g", "0", "--no-env", "--name", JOB, "--secret", "TOKEN")
        command = f"echo {PRINTED}; test -n $TOKEN; cp in.txt left.txt"
        done = ada.meshgpu("run", *options, "--", command, directory=directory / "project")
    finally:
        del ada.settings["TOKEN"]
    assert PRINTED in done.stdout
    (job,) = [row["id"] for row in ada.json("ps", "-a")["jobs"]]
    ada.meshgpu("cp", f"runs/{job}/left.txt", str(directory / "fetched"))
    assert (directory / "fetched").read_text() == FETCHED
    options = ("-d", "--json", "-m", MACHINE, "-g", "0", "--no-env", "--name", JOB)
    done = ada.meshgpu("run", *options, "--", "sleep", "600", directory=directory / "project")
    stopped = str(json.loads(done.stdout)["id"])
    ada.meshgpu("stop", stopped)
    ada.meshgpu("wait", stopped, code=None)
    subprocess.run(bob.argv(sys.executable, "-c", ASK, ada.address), check=True, timeout=10)
    until(lambda: session.obeyed.read_text().count(ORDER.decode()) == 2)
    return session


@pytest.fixture(scope="module")
def capture(session: Session) -> Capture:
    return eavesdropper.read(session.recording)


def said(capture: Capture, port: int) -> list[tuple[Flow, bytes, bytes]]:
    """Each connection to `port` of ada or bob with what both sides of it said."""
    return [
        (flow, capture.streams.get(flow, b""), capture.streams.get(flow.back, b""))
        for flow in capture.clients
        if flow.target[1] == port
    ]


def test_listener_on_the_switch_hears_both_sides_of_every_conversation(session: Session, capture: Capture) -> None:
    """Else all that follows would prove nothing."""
    office = {host.address for host in session.office}
    for port in (LINK_PORT, PAIRING_PORT, PLAIN_PORT):
        heard = said(capture, port)
        assert heard, port
        assert all({flow.source[0], flow.target[0]} < office for flow, _, _ in heard)
        assert any(there and back for _, there, back in heard), port
    assert any(len(there) + len(back) > 4_000 for _, there, back in said(capture, LINK_PORT))
    assert capture.mdns


def test_nothing_private_is_on_the_wire(session: Session, capture: Capture) -> None:
    wire = [*capture.frames, *capture.streams.values()]
    for public in (ORDER, b"_meshgpu", b"lab"):
        assert any(public in data for data in wire), f"the search finds what is there: {public!r}"
    (invite,) = session.invites
    secret = invite.split("-")[3]
    assert len(secret) == 20
    for private in (invite, secret, SECRET, PRINTED, FETCHED, USER, JOB, MACHINE, "sleep 600", "left.txt"):
        data = private.encode()
        for form in (data, data.upper(), data.hex().encode()):
            assert not any(form in seen for seen in wire), private


def test_session_that_is_said_again_changes_nothing(
    office: Any, session: Session, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    ada, mallory = session.ada, session.mallory
    invite = ada.meshgpu("invite").stdout.split()[-1]  # the pairing listener is open again
    before = session.standing()
    command = mallory.argv(sys.executable, eavesdropper.__file__, "replay", str(session.recording))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout)
    assert tried["frames"] > 200, tried
    assert tried["mdns"] > 2, tried
    doors = {f"{ada.address}:{PAIRING_PORT}", *(f"{host.address}:{LINK_PORT}" for host in session.office)}
    assert doors & tried["streams"].keys() > {f"{ada.address}:{PAIRING_PORT}"}, tried
    for door in doors & tried["streams"].keys():
        streams, noticed = tried["streams"][door]
        assert streams > noticed > 2, tried
    obeyed = session.obeyed.read_text()
    assert obeyed.count("frame " + ORDER.decode()) > 1, "a door without defence obeys a frame that comes again"
    assert obeyed.count("stream " + ORDER.decode()) > 1, "and a stream"

    wait_until(lambda: all(office.sees_all(host, 3) for host in session.office), "they do not see each other any more")
    assert session.standing() == before
    for host in session.office:
        assert "Traceback" not in (host.home / "agent.log").read_text()
    done = ada.meshgpu("run", "-m", MACHINE, "-g", "0", "--no-env", "--", "echo", "alive", directory=tmp_path)
    assert done.stdout == "alive\n"
    third = office.host("cyd")
    make_hub(office)
    third.meshgpu("join", "--name", "cyd", "--yes", invite)  # nobody used it up
    wait_until(lambda: office.sees_all(third, 4))
