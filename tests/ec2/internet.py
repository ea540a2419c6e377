"""An Internet of network namespaces: an office behind its NAT on one side, the machines of a cloud on the other.

hosts - switch - router (198.51.100.2) - net (API server, 203.0.113.53) - igw (one to one NAT, firewall) - machines
"""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.ec2.machine import Machine

API_HOST: Final = "203.0.113.53"
OFFICE_ADDRESS: Final = "198.51.100.2"
OFFICE_PROVIDER: Final = "198.51.100.1"
OFFICE_GATEWAY: Final = "10.77.0.254"
CLOUD_NETWORK: Final = "54.0.0.0/8"
"""Where the public addresses of instances come from."""

CLOUD_GATEWAY: Final = "172.31.0.1"
METADATA_ADDRESS: Final = "169.254.169.254"

JOIN_S: Final = 5.0
"""Granted to each `on_end` while the Internet closes."""

ROUTER_RULES: Final = """
*nat
-A POSTROUTING -o wan -j MASQUERADE
COMMIT
*filter
:FORWARD DROP
-A INPUT -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -i wan -j DROP
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -i lan -o wan -j ACCEPT
COMMIT
"""

_numbers = itertools.count()


class Internet:
    """Owns every process, mount, namespace and directory of it; `close` ends them."""

    api_host: Final = API_HOST
    office_address: Final = OFFICE_ADDRESS

    def __init__(self) -> None:
        self._name = f"mgc{os.getpid()}-{next(_numbers)}"
        self._directory = Path(tempfile.mkdtemp(prefix="mgc-"))
        self._namespaces: list[str] = []
        self._lock = threading.Lock()  # instances boot and end in threads of their own
        self._instances = itertools.count()
        self._wired: dict[str, Machine] = {}  # {instance: machine that the gateway serves}
        self._rules: Sequence[tuple[str, int]] = ()
        self._switch = ""
        self.machines: dict[str, Machine] = {}
        try:
            self.namespace = self._make_namespace("net")
            self._router = self._make_namespace("router")
            self._igw = self._make_namespace("igw")
            self._connect()
        except BaseException:
            self.close()
            raise

    def argv(self, *command: str) -> list[str]:
        """Runs a command on the Internet itself, where the API server belongs."""
        return ["ip", "netns", "exec", self.namespace, *command]

    # -- the office ------------------------------------------------------------------------------------------------

    def attach(self, switch_namespace: str, host_namespaces: Iterable[str]) -> None:
        """Put the office's router on bridge br0 of a switch, and make it the gateway of these hosts.

        May be called again, for new hosts or for those whose cable was out, which loses their route.
        """
        if switch_namespace != self._switch:
            assert not self._switch, "the office has one switch"
            _ip(self._router, f"link add lan type veth peer name router netns {switch_namespace}")
            _ip(switch_namespace, "link set router master br0", "link set router up")
            _ip(self._router, f"addr add {OFFICE_GATEWAY}/24 dev lan", "link set lan up")
            self._switch = switch_namespace
        for namespace in host_namespaces:
            _ip(namespace, f"route replace default via {OFFICE_GATEWAY}")

    def cut_office(self) -> None:
        """Take the office's line to the Internet away; the office itself stays whole."""
        _ip(self._router, "link set wan down")

    def heal_office(self) -> None:
        _ip(self._router, "link set wan up", f"route replace default via {OFFICE_PROVIDER}")

    # -- the cloud -------------------------------------------------------------------------------------------------

    def allow(self, rules: Sequence[tuple[str, int]]) -> None:
        """From now on these TCP rules, (CIDR, port), let in to every instance; nothing else does.

        As in EC2 a connection that stands is tracked and lives on.
        """
        with self._lock:
            self._rules = tuple(rules)
            self._rewire()

    def boot(
        self,
        instance: str,
        public: str,
        private: str,
        user_data: bytes,
        on_end: Callable[[str], None],
        settings: Mapping[str, str] | None = None,
    ) -> Machine:
        """Start a machine; `on_end` is called once, from a thread of its own, whatever ends it (`close` too)."""
        with self._lock:
            number = next(self._instances)
            namespace = self._make_namespace(f"i{number}")
            port = f"vpc{number}"
            machine = Machine(instance, public, private, namespace, self._directory / instance, settings or {})
            _ip(namespace, f"link add eth0 type veth peer name {port} netns {self._igw}")
            _ip(
                namespace,
                f"addr add {private}/32 dev eth0",
                f"addr add {METADATA_ADDRESS}/32 dev lo",
                "link set eth0 up",
                f"route add default via {CLOUD_GATEWAY} dev eth0 onlink",
            )
            _ip(self._igw, f"link set {port} up", f"route add {private}/32 dev {port}")
            self._wired[instance] = machine
            self._rewire()
            self.machines[instance] = machine
        machine.boot(user_data, lambda: self._end(machine, on_end))
        return machine

    def close(self) -> None:
        """End it all. Consoles are gone afterwards."""
        for machine in list(self.machines.values()):
            machine.terminate()
        for machine in list(self.machines.values()):
            machine.join(JOIN_S)
        with self._lock:
            for namespace in list(self._namespaces):
                self._remove_namespace(namespace)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self, machine: Machine, on_end: Callable[[str], None]) -> None:
        try:
            with self._lock:
                if machine.namespace in self._namespaces:  # `close` no longer waits for this thread
                    del self._wired[machine.instance]
                    self._rewire()
                    self._remove_namespace(machine.namespace)
        finally:
            on_end(machine.instance)

    # -- how it is made --------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        net, router, igw = self.namespace, self._router, self._igw
        _ip(net, f"link add office type veth peer name wan netns {router}")
        _ip(net, f"link add cloud type veth peer name net netns {igw}")
        _ip(
            net,
            f"addr add {API_HOST}/32 dev lo",
            f"addr add {OFFICE_PROVIDER}/24 dev office",
            "link set office up",
            "addr add 100.64.0.1/30 dev cloud",
            "link set cloud up",
            f"route add {CLOUD_NETWORK} via 100.64.0.2",
        )
        _ip(
            router,
            f"addr add {OFFICE_ADDRESS}/24 dev wan",
            "link set wan up",
            f"route add default via {OFFICE_PROVIDER}",
        )
        _ip(
            igw,
            "addr add 100.64.0.2/30 dev net",
            "link set net up",
            "route add default via 100.64.0.1",
            f"addr add {CLOUD_GATEWAY}/32 dev lo",
            # Packets to an address that no instance has vanish, as they do in EC2.
            f"route add blackhole {CLOUD_NETWORK}",
            "route add blackhole 172.31.0.0/16",
        )
        for namespace in (net, router, igw):
            _run(["ip", "netns", "exec", namespace, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        _run(["ip", "netns", "exec", router, "iptables-restore"], ROUTER_RULES)
        self._rewire()

    def _rewire(self) -> None:
        """Bring the gateway's rules in line with the instances that there are and with what is allowed, at once."""
        translations = "".join(
            f"-A PREROUTING -d {machine.public} -j DNAT --to-destination {machine.private}\n"
            f"-A POSTROUTING -s {machine.private} -o net -j SNAT --to-source {machine.public}\n"
            for machine in self._wired.values()
        )
        allowed = "".join(
            f"-A FORWARD -o vpc+ -p tcp -s {cidr} --dport {port} -j ACCEPT\n" for cidr, port in self._rules
        )
        rules = (
            f"*nat\n{translations}COMMIT\n"
            "*filter\n:FORWARD DROP\n"
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n"
            "-A FORWARD -i vpc+ -o net -j ACCEPT\n"
            f"{allowed}COMMIT\n"
        )
        _run(["ip", "netns", "exec", self._igw, "iptables-restore"], rules)

    def _make_namespace(self, role: str) -> str:
        namespace = f"{self._name}-{role}"
        _run(["ip", "netns", "add", namespace])
        self._namespaces.append(namespace)
        _ip(namespace, "link set lo up")
        return namespace

    def _remove_namespace(self, namespace: str) -> None:
        """Whatever still runs in it is killed."""
        for pid in _run(["ip", "netns", "pids", namespace]).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        _run(["ip", "netns", "del", namespace])
        self._namespaces.remove(namespace)


def _ip(namespace: str, *commands: str) -> None:
    """Run `ip` commands in a namespace, in their order."""
    _run(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands) + "\n")


def _run(argv: Sequence[str], text: str = "") -> str:
    """What it prints; raises OSError with what it complains of."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}\n{text}")
    return done.stdout
