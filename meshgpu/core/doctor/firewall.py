"""What a firewall has to let through: as a table for the people who keep it, and as lines for ufw and firewalld."""

from dataclasses import dataclass
from typing import Final

MDNS_PORT: Final = 5353
INSTANCE_PORT: Final = 443
"""Where rented machines listen: offices let that out."""


@dataclass(frozen=True, slots=True)
class Rule:
    """direction: `out` or `both`, as this machine sees it. peer: where the other end is."""

    port: int
    protocol: str
    direction: str
    peer: str
    purpose: str


def rules(link_port: int, pairing_port: int) -> tuple[Rule, ...]:
    """All of it; nothing else is needed between machines."""
    return (
        Rule(link_port, "tcp", "both", "office", "machines speak to each other; files and logs"),
        Rule(pairing_port, "tcp", "both", "office", "joining, while an invite or `meshgpu admit` is open"),
        Rule(MDNS_PORT, "udp", "both", "office, 224.0.0.251", "machines find each other (multicast; or list seeds)"),
        Rule(
            INSTANCE_PORT, "tcp", "out", "Internet", "rented machines and the seller, only with `meshgpu burst setup`"
        ),
    )


def ufw_lines(link_port: int, pairing_port: int) -> tuple[str, ...]:
    """What ufw needs: it lets everything out unless it was told not to."""
    return tuple(
        f"sudo ufw allow {rule.port}/{rule.protocol}"
        for rule in rules(link_port, pairing_port)
        if rule.direction != "out"
    )


def firewalld_lines(link_port: int, pairing_port: int) -> tuple[str, ...]:
    """What firewalld needs, kept over restarts."""
    opened = [rule for rule in rules(link_port, pairing_port) if rule.direction != "out"]
    ports = [f"sudo firewall-cmd --permanent --add-port={rule.port}/{rule.protocol}" for rule in opened]
    return (*ports, "sudo firewall-cmd --reload")


def open_incoming(firewall: str, port: int) -> str:
    """Let TCP `port` in, in the words of the firewall that is here; `iptables` where none keeps rules."""
    match firewall:
        case "ufw":
            return f"sudo ufw allow {port}/tcp"
        case "firewalld":
            return f"sudo firewall-cmd --permanent --add-port={port}/tcp && sudo firewall-cmd --reload"
        case _:
            return f"sudo iptables -I INPUT -p tcp --dport {port} -j ACCEPT"


def open_outgoing(firewall: str, port: int) -> str:
    """Let connections to TCP `port` out."""
    match firewall:
        case "ufw":
            return f"sudo ufw allow out {port}/tcp"
        case "firewalld":
            direct = "sudo firewall-cmd --permanent --direct --add-rule ipv4 filter OUTPUT 0"
            return f"{direct} -p tcp --dport {port} -j ACCEPT && sudo firewall-cmd --reload"
        case _:
            return f"sudo iptables -I OUTPUT -p tcp --dport {port} -j ACCEPT"


def open_mdns(firewall: str, *, outgoing: bool = False) -> str:
    """Let multicast DNS in, or out."""
    match firewall:
        case "ufw":
            return f"sudo ufw allow {'out ' if outgoing else ''}{MDNS_PORT}/udp"
        case "firewalld" if not outgoing:
            return "sudo firewall-cmd --permanent --add-service=mdns && sudo firewall-cmd --reload"
        case _:
            chain = "OUTPUT" if outgoing else "INPUT"
            return f"sudo iptables -I {chain} -p udp --dport {MDNS_PORT} -j ACCEPT"
