"""Faults of an office, planted one by one in real networks between real agents, and named by `doctor` with a remedy."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from tests.hosts.office import ip, until

pytestmark = [pytest.mark.hosts]

LINK, MDNS = "7443", "5353"
PAUSE_S = 3.0
"""Between two tries: a machine is knocked for six times a minute, and what was heard 5 s ago still counts."""

FAKE_NVML = Path(__file__).parent.parent / "fake_nvml"

PLANTED = """
import pathlib, time, types
import meshgpu
meshgpu.__version__ = "0.0.1"
from meshgpu.adapters import boot_clock, surroundings
boot_clock.time = types.SimpleNamespace(
    time=lambda: time.time() - 3 * 3600, clock_gettime=time.clock_gettime, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME
)
surroundings._USERNS = pathlib.Path(__file__).with_name("userns")
"""
"""Read by Python at its start: an old agent that lives three hours ago, under a kernel as Ubuntu 24.04 has it."""

BROKEN_BWRAP = """#!/bin/sh
echo "bwrap: setting up uid map: Permission denied" >&2
exit 1
"""

HOLD_MDNS = f"""
import socket, sys
holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
holder.bind(("", {MDNS}))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada, bob and cyd, with whom all is well."""
    hosts = [office.host(name) for name in ("ada", "bob", "cyd")]
    office.form_mesh(*hosts)
    return hosts


def examined(host: Any) -> dict[str, Any]:
    """{check: what was found}."""
    done = host.meshgpu("doctor", "--json", code=None)
    assert done.returncode in (0, 1), done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def named(host: Any, check: str, *words: str) -> Any:
    """The check, once it has failed with these words in what was found; raises AssertionError where it never does."""
    seen: list[Any] = []

    def is_named() -> bool:
        if seen:
            time.sleep(PAUSE_S)
        seen.append(examined(host)[check])
        return seen[-1]["state"] == "fail" and all(word in seen[-1]["found"] for word in words)

    try:
        until(is_named)
    except AssertionError:
        raise AssertionError(f"{check} on {host.name}: {seen}") from None
    return seen[-1]


@contextmanager
def rule(host: Any, *words: str) -> Iterator[None]:
    """A rule of the host's own firewall, for a while."""
    command = ["iptables", "-w", "-I", *words]
    subprocess.run(host.argv(*command), check=True, capture_output=True)
    try:
        yield
    finally:
        command[2] = "-D"
        subprocess.run(host.argv(*command), check=True, capture_output=True)


def test_all_is_well_in_both_directions(lab: Any) -> None:
    checks = examined(lab[0])
    assert {name for name, check in checks.items() if check["state"] in ("warn", "fail")} <= {"disk"}, checks
    assert checks["link port"]["found"] == "port 7443; bob and cyd knocked, and came through"
    assert checks["way out"]["found"] == "this machine reaches bob and cyd"
    assert checks["discovery"]["found"] == "mDNS works both ways with bob and cyd"
    assert checks["clock"]["found"] == "agrees with bob and cyd"


@pytest.mark.parametrize(
    ("verdict", "word"),
    [(("DROP",), "got no answer"), (("REJECT", "--reject-with", "tcp-reset"), "met a refusal")],
)
def test_firewall_on_the_link_port_is_named_by_those_who_knock(lab: Any, verdict: tuple[str, ...], word: str) -> None:
    with rule(lab[0], "INPUT", "-p", "tcp", "--dport", LINK, "--syn", "-j", *verdict):
        found = named(lab[0], "link port", f"bob and cyd knocked at {lab[0].address}:7443 and {word}")
        assert found["hint"] == "sudo iptables -I INPUT -p tcp --dport 7443 -j ACCEPT"


def test_blocked_way_out_is_named_although_all_links_are_open(lab: Any) -> None:
    with rule(lab[0], "OUTPUT", "-p", "tcp", "--dport", LINK, "--syn", "-j", "DROP"):
        found = named(lab[0], "way out", "7443 of bob and cyd cannot be reached: outgoing connections are blocked")
        assert found["hint"] == "sudo iptables -I OUTPUT -p tcp --dport 7443 -j ACCEPT"


def test_filtered_multicast_is_named_with_its_direction(lab: Any) -> None:
    _, bob, cyd = lab
    with (
        rule(bob, "INPUT", "-p", "udp", "--dport", MDNS, "-j", "DROP"),
        rule(cyd, "OUTPUT", "-p", "udp", "--dport", MDNS, "-j", "DROP"),
    ):
        found = named(bob, "discovery", "multicast is filtered on its way in", "ada and cyd")
        assert found["hint"] == "sudo iptables -I INPUT -p udp --dport 5353 -j ACCEPT"
        found = named(cyd, "discovery", "multicast is filtered on its way out", "do not reach ada and bob")
        assert found["hint"] == "sudo iptables -I OUTPUT -p udp --dport 5353 -j ACCEPT"
        with rule(bob, "OUTPUT", "-p", "udp", "--dport", MDNS, "-j", "DROP"):
            found = named(bob, "discovery", "multicast is filtered both ways between here and ada and cyd")
            assert "seeds" in found["hint"]


# -- a machine with much that is wrong --------------------------------------------------------------------------------


class Engine(BaseHTTPRequestHandler):
    """A container engine without the NVIDIA runtime."""

    def do_GET(self) -> None:
        body = json.dumps({"ServerVersion": "28.2.2", "Runtimes": {"runc": {}}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as its base class names it
        pass


@contextmanager
def engine(path: Path) -> Iterator[None]:
    with ThreadingUnixStreamServer(str(path), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    directory.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=0700", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@contextmanager
def holder_of_mdns(host: Any) -> Iterator[None]:
    """A program that takes UDP port 5353 for itself."""
    command = host.argv(sys.executable, "-c", HOLD_MDNS)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()


def add_interface(host: Any, name: str, address: str, *kind: str) -> None:
    """An interface that leads nowhere."""
    ip("-n", host.namespace, "link", "add", name, "type", *kind)
    ip("-n", host.namespace, "addr", "add", address, "dev", name)
    ip("-n", host.namespace, "link", "set", name, "up")


@pytest.fixture(scope="module")
def ill(office: Any, lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `doctor` finds on dan, whose owner did everything wrong."""
    planted = tmp_path_factory.mktemp("planted")
    (planted / "sitecustomize.py").write_text(PLANTED)
    (planted / "userns").write_text("1\n")
    (planted / "bwrap").write_text(BROKEN_BWRAP)
    (planted / "bwrap").chmod(0o755)
    subprocess.run([sys.executable, FAKE_NVML / "build.py", planted], check=True, timeout=60)
    gpus = (FAKE_NVML / "two_gpus.txt").read_text()
    (planted / "gpus.txt").write_text(gpus.replace("GPU-51a1", "GPU-d0c7"))
    dan = office.host(
        "dan",
        PYTHONPATH=str(planted),
        PATH=f"{planted}:/usr/sbin:/usr/bin:/sbin:/bin",
        LD_LIBRARY_PATH=str(planted),
        FAKE_NVML=str(planted / "gpus.txt"),
        DOCKER_HOST=f"unix://{planted}/docker.sock",
    )
    add_interface(dan, "ppp0", "10.8.0.6/24", "veth", "peer", "name", "ppp1")
    add_interface(dan, "build0", "172.30.0.1/16", "bridge")
    with small_disk(dan.home), holder_of_mdns(dan), engine(planted / "docker.sock"):
        office.join(lab[0], dan)
        until(lambda: office.sees_all(dan, 4), "dan does not see the others")
        (dan.home / "agent.sock").chmod(0o666)
        yield examined(dan)


@pytest.mark.parametrize(
    ("check", "state", "words", "remedy"),
    [
        ("addresses", "warn", ("10.8.0.6 on ppp0 (a VPN", "172.30.0.1 on build0 (a network of c"), '["eth0"]'),
        ("clock", "fail", ("3 h 0 min behind that of ada, bob and cyd",), "timedatectl set-ntp true"),
        ("containers", "fail", ("Docker 28.2.2 has no NVIDIA runtime",), "nvidia-container-toolkit"),
        ("discovery", "fail", ("UDP port 5353 is taken by python",), "ss -ulpn"),
        ("disk", "fail", ("nearly full",), "du -xhd1"),
        ("fence", "fail", ("AppArmor keeps bubblewrap", "Permission denied"), "bwrap-userns-restrict"),
        ("socket", "fail", ("open to other accounts (mode 0666)",), "chmod 0600"),
        ("versions", "warn", ("0.0.1 is one behind", "0.1.0 runs on ada, bob and cyd"), "uv tool upgrade"),
    ],
)
def test_fault_that_was_planted_is_named_with_its_remedy(
    ill: dict[str, Any], check: str, state: str, words: tuple[str, ...], remedy: str
) -> None:
    found = ill[check]
    assert found["state"] == state, found
    for word in words:
        assert word in found["found"]
    assert remedy in found["hint"]


def test_what_is_well_with_a_machine_that_is_ill_is_not_accused(ill: dict[str, Any]) -> None:
    for check in ("agent", "mesh", "names", "link port", "way out", "links", "gpus", "audit"):
        assert ill[check]["state"] == "ok", ill[check]


def test_wrong_interface_is_named_and_no_firewall_is_blamed(office: Any, lab: Any) -> None:
    eve = office.host("eve", MESHGPU_INTERFACES="eth1")
    add_interface(eve, "eth1", "192.168.9.5/24", "veth", "peer", "name", "eth2")
    ip("-n", eve.namespace, "link", "set", "eth2", "up")
    office.join(lab[0], eve)
    until(lambda: any(m["name"] == "eve" and m["state"] == "alive" and m["cpus"] for m in machines(lab[0])))
    found = named(eve, "addresses", "come to 192.168.9.5:7443 (eth1), but are on the network of eth0")
    assert found["hint"].startswith("echo 'interfaces = [\"eth0\"]' >> ")
    assert examined(eve)["link port"]["state"] == "skipped"


def machines(host: Any) -> Any:
    return host.json("machines")["machines"]


def test_machine_without_its_agent_is_told_from_one_that_is_off(lab: Any, wait_until: Callable[..., None]) -> None:
    ada, bob, cyd = lab
    cyd.kill_agent()
    wait_until(lambda: "cyd is on, but no agent runs there" in examined(bob)["links"]["found"])
    cyd.cut()
    try:
        links = examined(ada)["links"]
        assert links["state"] == "warn"
        assert links["hint"].startswith(f"ping -c3 {cyd.address}")
        assert "cyd is off or out of reach" in links["found"] or "cyd was on this network lately" in links["found"]
    finally:
        cyd.heal()
