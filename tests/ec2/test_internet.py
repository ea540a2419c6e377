"""The machines and the network of the EC2 look-alike: each promise that the tests of renting lean on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from meshgpu.agent.user_data import make_user_data
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.ids import MeshId
from tests.ec2.internet import Internet
from tests.ec2.machine import Machine
from tests.hosts.conftest import needs_namespaces
from tests.hosts.office import Office, until

pytestmark = [pytest.mark.hosts]

EVERYBODY = "0.0.0.0/0"
VENV = str(Path(sys.executable).parent)
DECADE_S = 315_360_000.0

LISTEN = """
import socket, threading
def serve(port):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        connection, caller = listener.accept()
        connection.sendall(caller[0].encode())
        connection.close()
for port in (443, 8080):
    threading.Thread(target=serve, args=(port,)).start()
"""
DIAL = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0) as connection:
    print(connection.recv(99).decode())
"""
ASK = """
import http.client, json, sys
connection = http.client.HTTPConnection("169.254.169.254", timeout=5)
connection.request(sys.argv[1], "/latest/" + sys.argv[2], headers=json.loads(sys.argv[3]))
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""
TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"


class Cloud:
    """The Internet, an office with one host, and the instances that are over."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.office = Office()
        try:
            self.host = self.office.host("ada")
            self.internet = Internet()
        except BaseException:
            self.office.close()
            raise
        self.internet.attach(self.office.switch, [self.host.namespace])

    def boot(self, user_data: bytes, settings: dict[str, str] | None = None) -> Machine:
        number = len(self.internet.machines)
        addresses = (f"54.214.7.{number}", f"172.31.16.{number + 4}")
        return self.internet.boot(f"i-{number}", *addresses, user_data, self.ended.append, settings)

    def is_over(self, machine: Machine) -> bool:
        return machine.instance in self.ended and not machine.is_alive

    def close(self) -> None:
        self.internet.close()
        self.office.close()


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    needs_namespaces()
    cloud = Cloud()
    try:
        yield cloud
    finally:
        cloud.close()


@pytest.fixture
def boot(cloud: Cloud) -> Iterator[Callable[..., Machine]]:
    """Boots machines with a script; they end with the test."""
    booted: list[Machine] = []

    def boot(script: str, **settings: str) -> Machine:
        booted.append(cloud.boot(f"#!/bin/bash\nset -eu\n{script}\n".encode(), settings))
        return booted[-1]

    yield boot
    for machine in booted:
        machine.terminate()
        print(f"--- console of {machine.instance}\n{machine.console.read_text()}")


@pytest.fixture
def listener(boot: Callable[..., Machine]) -> Machine:
    """A machine that tells callers their address, on two ports."""
    return boot(f"exec {sys.executable} -c {shlex.quote(LISTEN)}")


@pytest.fixture
def idle(boot: Callable[..., Machine]) -> Machine:
    machine = boot("echo up")
    until(says(machine, "up"))
    return machine


def dial(argv: Callable[..., list[str]], address: str, port: int) -> str:
    """What the listener there says; empty if it cannot be reached."""
    command = argv(sys.executable, "-c", DIAL, address, str(port))
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def ask(machine: Machine, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """(status, text) of the metadata service's answer on that machine, which must have started."""
    command = machine.argv(sys.executable, "-c", ASK, method, path, json.dumps(headers))
    status, _, text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(" ")
    return int(status), text.strip()


def says(machine: Machine, text: str) -> Callable[[], bool]:
    return lambda: text in machine.console.read_text()


def pids_in(namespace: str, command: str) -> list[int]:
    """Of the processes in that network whose command line starts so."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    lines = {}
    for pid in map(int, found.stdout.split()):
        try:
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except FileNotFoundError:  # it has just ended
            continue
    return [pid for pid, line in lines.items() if line.startswith(command)]


def unit(name: str, *lines: str) -> str:
    body = "\n".join(lines)
    return f"cat > /etc/systemd/system/{name} <<'END'\n{body}\nEND\nsystemctl daemon-reload\n"


# -- who reaches whom ------------------------------------------------------------------------------------------------


def test_office_reaches_an_allowed_port_and_no_other(cloud: Cloud, listener: Machine) -> None:
    office = cloud.internet.office_address
    cloud.internet.allow([(f"{office}/32", 443)])
    until(lambda: dial(cloud.host.argv, listener.public, 443) == office)
    assert dial(cloud.host.argv, listener.public, 8080) == ""
    cloud.internet.allow([(EVERYBODY, 8080)])
    assert dial(cloud.host.argv, listener.public, 8080) == office
    assert dial(cloud.host.argv, listener.public, 443) == ""


def test_port_allowed_to_others_stays_closed(cloud: Cloud, listener: Machine) -> None:
    cloud.internet.allow([("198.51.100.77/32", 443), (f"{cloud.internet.office_address}/32", 8080)])
    until(lambda: dial(cloud.host.argv, listener.public, 8080) != "")
    assert dial(cloud.host.argv, listener.public, 443) == ""


def test_machine_booted_later_has_the_same_rules(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    cloud.internet.allow([(EVERYBODY, 443)])
    machines = [boot(f"exec {sys.executable} -c {shlex.quote(LISTEN)}") for _ in range(2)]
    until(lambda: all(dial(cloud.host.argv, machine.public, 443) for machine in machines))


def test_cloud_cannot_dial_into_the_office(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    """Not even when the Internet hands it a route to the office's own addresses."""
    office = cloud.internet.office_address
    routes = ["10.77.0.0/24", "via", office]
    subprocess.run(cloud.internet.argv("ip", "route", "add", *routes), check=True)
    inside = subprocess.Popen(cloud.host.argv(sys.executable, "-c", LISTEN))
    try:
        until(lambda: dial(cloud.host.argv, cloud.host.address, 443) != "")
        machine = boot("sleep 1000")
        for address in (cloud.host.address, office):
            for argv in (machine.argv, cloud.internet.argv):
                assert dial(argv, address, 443) == ""
    finally:
        inside.kill()
        inside.wait()
        subprocess.run(cloud.internet.argv("ip", "route", "del", *routes), check=True)


def test_both_reach_the_api_under_their_public_addresses(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    api = subprocess.Popen(cloud.internet.argv(sys.executable, "-c", LISTEN))
    try:
        until(lambda: dial(cloud.host.argv, cloud.internet.api_host, 443) == cloud.internet.office_address)
        machine = boot("sleep 1000")
        assert dial(machine.argv, cloud.internet.api_host, 443) == machine.public
    finally:
        api.kill()
        api.wait()


def test_cut_line_stops_traffic_until_it_is_healed(cloud: Cloud, listener: Machine) -> None:
    cloud.internet.allow([(EVERYBODY, 443)])
    until(lambda: dial(cloud.host.argv, listener.public, 443) != "")
    cloud.internet.cut_office()
    try:
        assert dial(cloud.host.argv, listener.public, 443) == ""
    finally:
        cloud.internet.heal_office()
    assert dial(cloud.host.argv, listener.public, 443) == cloud.internet.office_address


def test_route_lost_with_the_cable_comes_back(cloud: Cloud, listener: Machine) -> None:
    cloud.internet.allow([(EVERYBODY, 443)])
    cloud.host.cut()
    cloud.host.heal()
    cloud.internet.attach(cloud.office.switch, [cloud.host.namespace])
    until(lambda: dial(cloud.host.argv, listener.public, 443) != "")


# -- the metadata service --------------------------------------------------------------------------------------------


def test_metadata_wants_a_token_of_its_own(idle: Machine) -> None:
    assert ask(idle, "GET", "meta-data/instance-id", {})[0] == 401
    assert ask(idle, "GET", "meta-data/instance-id", {TOKEN: "guessed"})[0] == 401
    assert ask(idle, "PUT", "api/token", {})[0] == 400
    assert ask(idle, "PUT", "api/token", {TTL: "60", "X-Forwarded-For": "10.0.0.1"})[0] == 403
    status, token = ask(idle, "PUT", "api/token", {TTL: "60"})
    assert status == 200
    assert ask(idle, "GET", "meta-data/instance-id", {TOKEN: token}) == (200, idle.instance)
    assert ask(idle, "GET", "meta-data/public-ipv4", {TOKEN: token}) == (200, idle.public)
    assert ask(idle, "GET", "meta-data/no-such-thing", {TOKEN: token})[0] == 404


def test_metadata_shows_notices_once_they_are_given(idle: Machine) -> None:
    _, token = ask(idle, "PUT", "api/token", {TTL: "60"})
    spot, rebalance = "meta-data/spot/instance-action", "meta-data/events/recommendations/rebalance"
    assert ask(idle, "GET", spot, {TOKEN: token})[0] == 404
    assert ask(idle, "GET", rebalance, {TOKEN: token})[0] == 404
    idle.notice_spot("2030-01-01T00:00:00Z")
    idle.recommend_rebalance("2029-12-31T23:00:00Z")
    action = {"action": "terminate", "time": "2030-01-01T00:00:00Z"}
    assert json.loads(ask(idle, "GET", spot, {TOKEN: token})[1]) == action
    assert ask(idle, "GET", rebalance, {TOKEN: token})[0] == 200


def test_metadata_expires_its_tokens(idle: Machine) -> None:
    _, token = ask(idle, "PUT", "api/token", {TTL: "1"})
    assert ask(idle, "GET", "meta-data/instance-id", {TOKEN: token})[0] == 200
    until(lambda: ask(idle, "GET", "meta-data/instance-id", {TOKEN: token})[0] == 401)


# -- the machine's life ----------------------------------------------------------------------------------------------


def test_machine_is_one_of_its_own(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    """It has its own host name, processes, units, /run and /var/lib, and may make namespaces as a fenced job does."""
    machine = boot(
        "hostname\necho $WHO sees $(ls -d /proc/[0-9]* | wc -l) processes\n"
        "ls -A /etc/systemd/system /run/netns 2>&1 || true\n"
        "mkdir /var/lib/meshgpu\necho kept > /var/lib/meshgpu/mark\n"
        "bwrap --ro-bind / / --unshare-pid --proc /proc --dev /dev true\necho all is well",
        WHO="ada",
    )
    until(says(machine, "all is well"), "it does not come that far")
    console = machine.console.read_text()
    assert "ip-172-31-16-" in console
    count = int(console.partition("ada sees ")[2].split()[0])
    assert 3 <= count < 12
    assert "/run/netns'" in console
    assert (machine.home / "mark").read_text() == "kept\n"
    assert not Path("/var/lib/meshgpu/mark").exists()


def test_machine_outlives_its_user_data(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    machine = boot("(sleep 0.5; echo orphan ends) &\necho script ends")
    until(says(machine, "orphan ends"))
    assert machine.is_alive
    assert cloud.ended.count(machine.instance) == 0


@pytest.mark.parametrize("command", ["shutdown -P now", "poweroff", "systemctl poweroff"])
def test_shutdown_ends_the_machine_once(cloud: Cloud, boot: Callable[..., Machine], command: str) -> None:
    machine = boot(f"sleep 1000 &\n{command}\nsleep 1000")
    until(lambda: cloud.is_over(machine), "it does not end", 5.0)
    machine.terminate()
    machine.join(5.0)
    assert cloud.ended.count(machine.instance) == 1
    assert machine.namespace not in namespaces()


def test_scheduled_shutdown_can_be_called_off(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    ends, stays, waits = boot("shutdown -P +0"), boot("shutdown -P +1\nshutdown -c"), boot("shutdown -P +60")
    until(lambda: cloud.is_over(ends), "it does not end", 5.0)
    for machine in (stays, waits):
        until(says(machine, "ended with 0"))
        assert machine.is_alive


@pytest.mark.slow
def test_scheduled_shutdown_comes_after_its_minutes(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    start = time.monotonic()
    machine = boot("shutdown -P +1")
    until(lambda: cloud.is_over(machine), "it does not end", 70.0)
    assert time.monotonic() - start >= 60.0


@pytest.mark.parametrize(("left_s", "ends"), [(2.0, True), (-60.0, True), (3600.0, False)])
def test_timer_ends_the_machine_at_its_moment(
    cloud: Cloud, boot: Callable[..., Machine], left_s: float, ends: bool
) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=left_s)
    machine = boot(
        unit("end.service", "[Service]", "Type=oneshot", "ExecStart=/usr/sbin/poweroff")
        + unit("end.timer", "[Timer]", f"OnCalendar={moment:%Y-%m-%d %H:%M:%S} UTC")
        + "systemctl enable --now end.timer\necho armed"
    )
    if ends:
        until(lambda: cloud.is_over(machine), "it does not end", max(left_s, 0.0) + 5.0)
    else:
        until(says(machine, "armed"))
        assert machine.is_alive


def test_terminate_ends_it_at_once(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    machine = boot("trap '' TERM\nsleep 1000 &\necho up\nwait")
    until(says(machine, "up"))
    start = time.monotonic()
    machine.terminate()
    assert time.monotonic() - start < 1.0
    assert not machine.is_alive
    machine.join(5.0)
    assert cloud.ended.count(machine.instance) == 1
    assert machine.namespace not in namespaces()


def test_service_comes_back_after_it_is_killed(boot: Callable[..., Machine]) -> None:
    machine = boot(
        unit(
            "watch.service",
            "[Service]",
            "Environment=WHO=me 'HOW=as I like'",
            "ExecStart=bash -c 'echo $$WHO $WHO does it $HOW; exec sleep 1234'",
            "Restart=always",
            "RestartSec=0.2",
        )
        + "systemctl enable --now watch.service"
    )
    until(lambda: machine.console.read_text().count("me does it as I like") == 1)
    until(lambda: len(pids_in(machine.namespace, "sleep 1234")) == 1)
    (first,) = pids_in(machine.namespace, "sleep 1234")
    os.kill(first, signal.SIGKILL)
    until(lambda: pids_in(machine.namespace, "sleep 1234") not in ([], [first]), "it does not come back", 5.0)
    assert machine.console.read_text().count("me does it as I like") == 2


def test_service_may_clean_up_before_the_machine_ends(cloud: Cloud, boot: Callable[..., Machine]) -> None:
    script = 'trap "sleep 0.3; echo swept; exit" TERM; echo up; while :; do sleep 0.05; done'
    machine = boot(
        unit("sweep.service", "[Service]", f"ExecStart=bash -c '{script}'", "Restart=always")
        + "systemctl enable --now sweep.service\nsleep 0.3\nshutdown -P now"
    )
    until(lambda: cloud.is_over(machine), "it does not end", 5.0)
    assert says(machine, "swept")()


def test_service_that_cannot_start_fails_the_command(boot: Callable[..., Machine]) -> None:
    machine = boot(
        "systemctl enable --now absent.service || echo first refused\n"
        + unit("lost.service", "[Service]", "Type=exec", "ExecStart=/no/such/program")
        + "systemctl enable --now lost.service || echo second refused"
    )
    until(says(machine, "second refused"))
    assert says(machine, "first refused")()


# -- all of it -------------------------------------------------------------------------------------------------------


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_agent_of_a_rented_machine_comes_up(cloud: Cloud) -> None:
    """The user data that meshgpu makes, as it is: the agent listens where the office may dial it."""
    now_s = time.time()
    terms = BootTerms(MeshId("ab" * 32), LaunchId("l" * 26), b"k" * 32, 443, InstanceTerms(now_s + 600.0, 300.0, 300.0))
    data, _ = make_user_data(terms, "true", now_s)
    cloud.internet.allow([(f"{cloud.internet.office_address}/32", 443)])
    start = time.monotonic()
    machine = cloud.boot(data, {"PATH": VENV})
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 443), 1.0)"
    command = cloud.host.argv(sys.executable, "-c", connect, machine.public)
    try:
        until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, "nobody listens")
        print(f"the agent listens after {time.monotonic() - start:.1f} s")
        (agent,) = pids_in(machine.namespace, f"{VENV}/python {VENV}/meshgpu agent --cloud")
        os.kill(agent, signal.SIGKILL)
        until(lambda: pids_in(machine.namespace, f"{VENV}/python {VENV}/meshgpu agent") not in ([], [agent]))
    finally:
        machine.terminate()
        print(machine.console.read_text())


def test_close_leaves_nothing() -> None:
    needs_namespaces()
    ended: list[str] = []
    internet = Internet()
    machine = internet.boot("i-1", "54.214.9.9", "172.31.1.9", b"#!/bin/sh\nsleep 4321", ended.append)
    other = subprocess.Popen(internet.argv("sleep", "4321"))
    until(lambda: len(pids_in(machine.namespace, "sleep 4321")) == 1)
    inside = pids_in(machine.namespace, "")
    internet.close()
    assert ended == ["i-1"]
    assert other.wait(5.0) == -signal.SIGKILL
    assert not any(Path(f"/proc/{pid}").exists() for pid in inside)
    assert internet.namespace.removesuffix("net") not in namespaces()
    assert not machine.console.exists()


def test_internet_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_namespaces()
    monkeypatch.setattr("tests.ec2.internet.ROUTER_RULES", "*nonsense")
    before = namespaces()
    with pytest.raises(OSError, match="iptables-restore"):
        Internet()
    assert {line for line in namespaces().splitlines() if f"mgc{os.getpid()}" in line} <= set(before.splitlines())


def test_machines_die_with_the_process_that_owns_them() -> None:
    needs_namespaces()
    script = (
        "import time; from tests.ec2.internet import Internet\n"
        "machine = Internet().boot('i-1', '54.214.9.9', '172.31.1.9', b'#!/bin/sh\\nsleep 4321', print)\n"
        "print(machine.namespace, machine.console, flush=True); time.sleep(1000)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    namespace, console = owner.stdout.readline().split()
    try:
        until(lambda: len(pids_in(namespace, "sleep 4321")) == 1)
        owner.kill()
        until(lambda: pids_in(namespace, "") == [], "the machine lives on", 5.0)
    finally:
        owner.kill()
        owner.communicate()
        shutil.rmtree(Path(console).parent.parent)  # nobody else is left to remove it, nor the namespaces
        for line in namespaces().splitlines():
            if line.startswith(f"mgc{owner.pid}-"):
                subprocess.run(["ip", "netns", "del", line.split()[0]], check=True)
