"""What nobody may find in a log, in what commands print, on a command line or in a job's environment.

All agents log at the most talkative level, and each process of ours that starts another says with which arguments and
environment. What is searched for: secrets of invites and recovery keys, good and wrong ones; the value of `--secret`;
private keys.
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshgpu.core.trust.joining import read_invite, write_invite
from meshgpu.model.ids import Address
from tests.hosts.office import MESHGPU, until
from tests.hosts.screen import admit_by_digits

pytestmark = [pytest.mark.hosts]

CANARY = "c4n4ry-0d51b7e94a"
WRONG_KEY = "wr0ng-words-9a1f3c"
WRONG_SECRET = "y5w2u3ikdb7nqo4tzc6m"

TALKATIVE = """
import asyncio, json, logging, os, sys
basic = logging.basicConfig
logging.basicConfig = lambda **options: basic(**(options | {"level": logging.DEBUG}))

def hear(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        with open(os.environ["SPOKEN"], "a") as file:
            file.write(repr(arguments) + "\\n")

sys.addaudithook(hear)
"""
"""Read by Python at the start of each command and agent. SPOKEN: where it notes what is started, and how."""


@dataclass
class Lab:
    """What was said in all, and what must not have been. asked: what printed a secret because somebody asked for it."""

    ada: Any
    bob: Any
    cyd: Any
    spoken: Path
    printed: list[tuple[str, str]] = field(default_factory=list)
    unspoken: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def hosts(self) -> tuple[Any, ...]:
        return self.ada, self.bob, self.cyd

    def told(self, host: Any, *arguments: str, line: str = "", code: int = 0) -> "subprocess.CompletedProcess[str]":
        """`meshgpu ARGUMENTS` with a line on its standard input; all that it prints is kept."""
        done = subprocess.run(
            host.argv(MESHGPU, *arguments),
            env=host.environment(),
            cwd=host.home.parent,
            input=f"{line}\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        self.printed.append((" ".join(arguments), done.stdout + done.stderr))
        return done


@pytest.fixture(scope="module")
def lab(office: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    directory = tmp_path_factory.mktemp("talkative")
    (directory / "sitecustomize.py").write_text(TALKATIVE)
    spoken = directory / "spoken"
    settings = {"PYTHONPATH": str(directory), "SPOKEN": str(spoken), "PYTHONASYNCIODEBUG": "1"}
    ada, bob, cyd = (office.host(name, **settings) for name in ("ada", "bob", "cyd"))
    lab = Lab(ada, bob, cyd, spoken)
    mask = os.umask(0)  # of every command and agent: none may rely on a kinder one
    try:
        live(lab)
    finally:
        os.umask(mask)
    for host in lab.hosts:
        for path in (host.home / "keys").glob("*.pem"):
            if path.name != "device-ca.pem":
                lab.unspoken[f"{host.name}'s {path.name}"] = path.read_text().splitlines()[1]
    return lab


def live(lab: Lab) -> None:
    ada, bob, cyd = lab.hosts
    founded = json.loads(ada.meshgpu("init", "--mesh", "lab", "--name", "ada", "--yes", "--json").stdout)
    lab.unspoken["recovery key"] = founded["recovery_key"]
    string = ada.meshgpu("invite").stdout.split()[-1]
    invite = read_invite(string)
    lab.unspoken["invite"] = invite.secret
    lab.unspoken["wrong invite"] = WRONG_SECRET

    wrong = write_invite(replace(invite, secret=WRONG_SECRET))
    nowhere = write_invite(replace(invite, addresses=(Address("127.0.0.1:1"),)))
    mistyped = string[:-1] + ("a" if string[-1] != "a" else "b")
    refused = [
        (mistyped, 2, "a character"),
        (f"{string} {string}", 2, "the form"),
        (wrong, 125, ""),
        (nowhere, 125, ""),
    ]
    for as_json in ((), ("--json",)):
        for line, code, why in refused:
            done = lab.told(bob, "join", "-", "--name", "bob", "--yes", *as_json, line=line, code=code)
            assert f"cannot {'read' if why else 'join'}" in done.stderr
            assert why in done.stderr
    lab.told(bob, "join", "-", "--name", "bob", "--yes", line=string)
    lab.told(bob, "join", "-", "--name", "bob", "--yes", line=string, code=125)

    there, here = admit_by_digits(ada, cyd)
    lab.printed += [("admit", there), ("join by digits", here)]

    lab.unspoken["secret"] = CANARY
    run_with_secret(lab)
    lab.unspoken["wrong recovery key"] = WRONG_KEY
    lab.told(bob, "recover", line=WRONG_KEY, code=125)
    lab.told(bob, "recover", "--json", line=WRONG_KEY, code=125)
    done = lab.told(bob, "recover", line=founded["recovery_key"])
    assert "is an admin now" in done.stdout
    for host in lab.hosts:
        for arguments in (["doctor"], ["machines", "--json"], ["ps", "-a", "--json"], ["admin", "ls", "--json"]):
            process = host.meshgpu(*arguments, code=None)
            lab.printed.append((" ".join(arguments), process.stdout + process.stderr))


def run_with_secret(lab: Lab) -> None:
    """A job of ada's on bob's machine; its environment is looked at while it runs."""
    ada = lab.ada
    until(lambda: any(row["name"] == "bob" and row["cpus"] for row in ada.json("machines")["machines"]))
    ada.settings["TOKEN"] = CANARY
    try:
        options = ("-d", "--json", "-m", "bob", "-g", "0", "--no-env", "--secret", "TOKEN", "-e", "PLAIN=plain")
        done = ada.meshgpu("run", *options, "--", "sleep", "601", directory=ada.home.parent)
    finally:
        del ada.settings["TOKEN"]
    lab.printed.append(("run", done.stdout + done.stderr))
    job = json.loads(done.stdout)["id"]
    until(lambda: any(environments("sleep\x00601\x00")), "the job did not start")
    shown = next(environments("sleep\x00601\x00")).decode(errors="replace")
    lab.environment = {name: value for name, _, value in (text.partition("=") for text in shown.split("\0")) if name}
    for arguments in (["info", job], ["info", job, "--json"], ["why", job, "--json"], ["logs", job], ["stop", job]):
        process = ada.meshgpu(*arguments, code=None)
        lab.printed.append((" ".join(arguments), process.stdout + process.stderr))
    ada.meshgpu("wait", job, code=None)


def environments(command: str) -> Iterator[bytes]:
    """Of the processes that run exactly `command`, its words ended by NUL."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_text() == command:
                yield (entry / "environ").read_bytes()
        except OSError:
            continue


def forms(text: str) -> list[str]:
    """How it could stand somewhere: as it is, in capitals, as bytes, in base64; a key also without its wrapping."""
    values = [text.encode()]
    if len(text) == 64:  # the one line of a PEM file
        pem = f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n".encode()
        private = load_pem_private_key(pem, None)
        values.append(private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
    shown = [text, text.upper()]
    for value in values:
        shown += [value.hex(), repr(value)[2:-1]]
        for offset in range(3):
            whole = base64.b64encode(b"x" * offset + value).decode()
            shown += [whole[4:-4], whole[4:-4].replace("+", "-").replace("/", "_")]
    return shown


def found(lab: Lab, text: str) -> list[str]:
    """Which of the unspoken stand in it."""
    return [name for name, secret in lab.unspoken.items() if any(form in text for form in forms(secret))]


def test_search_finds_what_is_there(lab: Lab) -> None:
    """Else all that follows would prove nothing."""
    assert {"secret", "invite", "recovery key", "ada's node.pem", "bob's user-0.pem"} <= lab.unspoken.keys()
    assert {"wrong invite", "wrong recovery key", "cyd's sealing.pem"} <= lab.unspoken.keys()
    for name, secret in lab.unspoken.items():
        for form in forms(secret):
            assert found(lab, f"<{form}>") == [name]
    for host in lab.hosts:
        assert " DEBUG " in (host.home / "agent.log").read_text()
    assert "'agent', '--home'" in lab.spoken.read_text()
    assert "guard.py" in lab.spoken.read_text()


def test_no_log_has_a_secret(lab: Lab) -> None:
    for host in lab.hosts:
        assert found(lab, (host.home / "agent.log").read_text()) == [], host.name
    for path in (path for host in lab.hosts for path in host.home.glob("jobs/*/*/guard.err")):
        assert found(lab, path.read_text()) == [], path


def test_no_command_prints_a_secret_that_it_was_given(lab: Lab) -> None:
    for command, printed in lab.printed:
        assert found(lab, printed) == [], command
        assert "Traceback" not in printed, command
    assert len(lab.printed) > 25


def test_no_process_was_started_with_a_secret(lab: Lab) -> None:
    assert found(lab, lab.spoken.read_text()) == []


def test_job_has_the_secret_it_asked_for_and_no_other(lab: Lab) -> None:
    assert lab.environment["TOKEN"] == CANARY
    assert lab.environment["PLAIN"] == "plain"
    for name, value in lab.environment.items():
        assert found(lab, f"{name}={value}") == (["secret"] if name == "TOKEN" else []), name


def test_no_file_has_what_was_said_once(lab: Lab) -> None:
    """Keys are in their directory, and nowhere else; recovery key, invites and values are on no disk."""
    searched = 0
    for host in lab.hosts:
        for path in host.home.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.parent.name != "keys":
                searched += 1
                assert found(lab, path.read_bytes().decode("latin-1")) == [], path
    assert searched > 20


def test_every_file_of_an_agent_is_its_accounts_alone(lab: Lab) -> None:
    """But for what jobs make themselves and the environments they read, which lie in directories that are."""
    names = set()
    for host in lab.hosts:
        assert host.home.stat().st_mode & 0o077 == 0
        for path in host.home.rglob("*"):
            inside = path.relative_to(host.home).parts
            is_for_jobs = (inside[0] == "jobs" and len(inside) > 3) or (inside[0] == "environments" and len(inside) > 1)
            if not (is_for_jobs or path.is_symlink()):
                names.add(inside[0])
                assert path.stat().st_mode & 0o077 == 0, f"{host.name}: {path} has mode {path.stat().st_mode:o}"
    assert {"keys", "state.db", "agent.log", "agent.sock", "jobs", "chunks"} <= names


def test_agent_does_not_start_on_a_key_that_others_could_read_and_closes_the_rest(lab: Lab) -> None:
    cyd = lab.cyd
    cyd.meshgpu("down")
    key, database, log = cyd.home / "keys" / "user-0.pem", cyd.home / "state.db", cyd.home / "agent.log"
    for path in (key, database):
        path.chmod(0o644)
    refused = cyd.meshgpu("up", code=125)
    assert f"cannot use {key}: its mode is 0644, expected 0600" in refused.stderr
    assert f"chmod 600 {key}" in refused.stderr
    key.chmod(0o600)
    database.chmod(0o644)
    cyd.meshgpu("up")
    assert database.stat().st_mode & 0o077 == 0
    assert f"{database} was open to other accounts (mode 0644)" in log.read_text()
