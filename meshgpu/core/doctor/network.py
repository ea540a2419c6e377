"""What lies between machines: addresses, the way in and out, multicast, clocks.

The way in is judged by peers that were asked to knock here, the way out by knocking at theirs: a Link that is open says
of one direction only that it works.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from meshgpu.core.doctor.firewall import open_incoming, open_mdns, open_outgoing
from meshgpu.core.doctor.words import count, listed, span
from meshgpu.model.clock import WALL_CLOCK_SLACK_S
from meshgpu.model.doctor import AgentFacts, Finding, Help, Interface, InterfaceKind, MachineFacts, OtherMachine, State
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.messages import KnockResult

CLOCK_WARN_S: Final = 30.0
"""A quarter of what requests bear: a clock that follows a time server is within milliseconds."""

SET_CLOCK: Final = "sudo timedatectl set-ntp true"
_KINDS: Final = {InterfaceKind.TUNNEL: "a VPN or tunnel", InterfaceKind.CONTAINERS: "a network of containers"}


# -- where this machine is to be found -------------------------------------------------------------------------------


def addresses(agent: AgentFacts, about: MachineFacts) -> Finding:
    """Addresses that lead others nowhere, or to themselves: of containers, of a VPN, of the wrong network."""
    announced = {address: _interface(about, address) for address in agent.addresses}
    if not announced:
        found = "this machine has no address in the office network, so nobody can reach it"
        return Finding("addresses", State.FAIL, found, "ip -4 addr")
    strange = {a: i for a, i in announced.items() if i is not None and i.kind in _KINDS}
    if strange:
        lines = [f"{_host(address)} on {i.name} ({_KINDS[i.kind]})" for address, i in strange.items()]
        state = State.WARN if len(strange) < len(announced) else State.FAIL
        found = f"others are told to come to {listed(lines)}"
        return Finding("addresses", state, found, _choose(about, _office(about) - _names(strange.values())))
    wrong = _wrong_interface(agent, about)
    if wrong is not None:
        return wrong
    if elsewhere := _led_elsewhere(agent):
        return elsewhere
    lost = [address for address in announced if _is_lost(agent, address)]
    if lost and len(lost) < len(announced):
        good = _names(i for address, i in announced.items() if address not in lost)
        found = f"nobody reaches {listed(lost)}, one of {count(len(announced), 'address', 'addresses')} of this machine"
        return Finding("addresses", State.WARN, found, _choose(about, good))
    return Finding("addresses", State.OK, ", ".join(_spelt(address, i) for address, i in announced.items()))


def _wrong_interface(agent: AgentFacts, about: MachineFacts) -> Finding | None:
    """None of the announced addresses is in a network where a linked machine is, and another interface is."""
    if not _is_unreached(agent):
        return None
    peers = [_host(a) for other in agent.others if other.is_linked for a in other.addresses]
    shared = {i.name for i in about.interfaces for peer in peers if _is_in(i, peer) and i.kind is InterfaceKind.OFFICE}
    told = _names(_interface(about, address) for address in agent.addresses)
    if not shared or shared & told:
        return None
    found = f"others are told to come to {listed(agent.addresses)} ({listed(sorted(told) or ['?'])}), but are "
    found += f"on the network of {listed(sorted(shared))}: the wrong interface"
    return Finding("addresses", State.FAIL, found, _choose(about, shared))


def _led_elsewhere(agent: AgentFacts) -> Finding | None:
    """Behind one of this machine's addresses a peer finds another one, perhaps itself."""
    for help_ in agent.help:
        for knock in help_.answer.knocks:
            if knock.outcome is KnockOutcome.ANSWERED and knock.node != agent.node:
                names = {other.node: other.name for other in agent.others}
                who = "itself" if knock.node == help_.node else names.get(knock.node or NodeId(""), "something else")
                found = f"at {knock.address}, an address of this machine, {help_.name} finds {who}"
                return Finding("addresses", State.FAIL, found, f"ip -4 addr | grep {_host(knock.address)}")
    return None


def _choose(about: MachineFacts, interfaces: Iterable[str]) -> str:
    chosen = ", ".join(f'"{name}"' for name in sorted(interfaces)) or '"INTERFACE"'
    return f"echo 'interfaces = [{chosen}]' >> {about.home}/config.toml && meshgpu down && meshgpu up"


# -- the way in ------------------------------------------------------------------------------------------------------


def way_in(agent: AgentFacts, about: MachineFacts) -> Finding:
    """Whether what peers try arrives at the Link port."""
    port = agent.link_port
    helpers = _helpers(agent)
    if _is_unreached(agent) and _wrong_interface(agent, about) is None:
        who = listed(help_.name for help_ in helpers)
        knocks = [knock for help_ in helpers for knock in help_.answer.knocks]
        is_refused = all(knock.outcome is KnockOutcome.REFUSED for knock in knocks)
        what = "met a refusal" if is_refused else "got no answer"
        found = f"{who} knocked at {listed(agent.addresses)} and {what}: a firewall here blocks TCP port {port}"
        return Finding("link port", State.FAIL, found, open_incoming(about.firewall, port))
    reached = sorted({help_.name for help_ in helpers if _reaches(agent, help_)})
    taken = agent.wanted_port not in (0, port)
    if taken:
        found = f"port {agent.wanted_port} was taken: others reach this machine at port {port}"
        remedy = f"ss -ltnp 'sport = :{agent.wanted_port}'; then meshgpu down && meshgpu up"
        return Finding("link port", State.WARN, found, remedy)
    if reached:
        return Finding("link port", State.OK, f"port {port}; {listed(reached)} knocked, and came through")
    if _is_unreached(agent):
        return Finding("link port", State.SKIPPED, f"port {port}; nobody comes to the address announced")
    if len(helpers) < len(agent.help):
        return Finding("link port", State.SKIPPED, f"port {port}; {agent.help[0].name} was asked too often: try again")
    if linked := [other.name for other in agent.others if other.is_linked]:
        return Finding("link port", State.SKIPPED, f"port {port}; {listed(linked)} did not say what they found")
    return Finding("link port", State.SKIPPED, f"port {port}; nobody is linked who could knock")


def _helpers(agent: AgentFacts) -> list[Help]:
    return [help_ for help_ in agent.help if help_.answer.knocks and not help_.answer.is_busy]


def _is_unreached(agent: AgentFacts) -> bool:
    """Peers have knocked at every address, and found nobody at any."""
    knocks = [knock for help_ in _helpers(agent) for knock in help_.answer.knocks]
    return bool(knocks) and all(knock.outcome is not KnockOutcome.ANSWERED for knock in knocks)


def _is_lost(agent: AgentFacts, address: Address) -> bool:
    """Peers have knocked there, and none found this machine."""
    knocks = [knock for help_ in _helpers(agent) for knock in help_.answer.knocks if knock.address == address]
    return bool(knocks) and all(knock.outcome is not KnockOutcome.ANSWERED for knock in knocks)


def _reaches(agent: AgentFacts, help_: Help) -> bool:
    return any(_is_behind(agent.node, knock) for knock in help_.answer.knocks)


def _is_behind(node: str, knock: KnockResult) -> bool:
    return knock.outcome is KnockOutcome.ANSWERED and knock.node == node


# -- the way out -----------------------------------------------------------------------------------------------------


def way_out(agent: AgentFacts, about: MachineFacts) -> Finding:
    """Whether this machine reaches ports of machines that are there: they are linked, or answered ARP lately."""
    tried = [other for other in agent.others if other.doors and (other.is_linked or other.is_neighbour)]
    shut = [other for other in tried if not any(knock.outcome is KnockOutcome.ANSWERED for knock in other.doors)]
    if not tried:
        return Finding("way out", State.SKIPPED, "no other machine is there to try")
    if len(shut) < len(tried):
        came = listed(other.name for other in tried if other not in shut)
        return Finding("way out", State.OK, f"this machine reaches {came}")
    if not any(other.is_linked for other in shut) and len(shut) == 1:
        return Finding("way out", State.SKIPPED, f"only {shut[0].name} could be tried, which does not answer")
    ports = sorted({knock.address.rpartition(":")[2] for other in shut for knock in other.doors})
    remedy = open_outgoing(about.firewall, int(ports[0]))
    where = f"TCP port {listed(ports)} of {listed(other.name for other in shut)}"
    linked = sum(1 for other in shut if other.is_linked)
    if linked > 1:
        found = f"{where} cannot be reached: outgoing connections are blocked here"
        return Finding("way out", State.FAIL, found, remedy)
    came = "its Link is open:" if linked == len(shut) else "it was on this network lately: off, or"
    found = f"{where} does not answer here, though {came} blocked on the way out here, or by a firewall there"
    return Finding("way out", State.WARN, found, f"there: meshgpu doctor; here: {remedy}")


def links(agent: AgentFacts, _: MachineFacts) -> Finding:
    """Which machines answer, and what is the matter with the others, as far as it shows from here."""
    away = [other for other in agent.others if not other.is_linked]
    total = count(len(agent.others), "other machine")
    if not away:
        return Finding("links", State.OK, f"{len(agent.others)} of {total} linked" if agent.others else "no others yet")
    stories = [_why_away(other) for other in away]
    state = State.WARN if len(away) < len(agent.others) else State.FAIL
    found = f"{len(agent.others) - len(away)} of {total} linked; " + "; ".join(found for found, _ in stories)
    return Finding("links", state, found, stories[0][1])


def _why_away(other: OtherMachine) -> tuple[str, str]:
    """(what is found of it, what to do)."""
    outcomes = {knock.outcome for knock in other.doors}
    if any(_is_behind(other.node, knock) for knock in other.doors):
        return f"{other.name} answers, and no Link has opened yet", "meshgpu doctor, in a minute"
    if KnockOutcome.ANSWERED in outcomes:
        return f"at the address of {other.name} somebody else answers", f"on {other.name}: meshgpu doctor"
    if KnockOutcome.REFUSED in outcomes:
        return f"{other.name} is on, but no agent runs there", f"on {other.name}: meshgpu up"
    if other.is_neighbour:
        found = f"{other.name} was on this network lately, and its port is silent: off, or a firewall there"
        return found, f"ping -c3 {_host(other.doors[0].address)}; on {other.name}: meshgpu doctor"
    if not other.doors:
        return f"no address of {other.name} is known", f"on {other.name}: meshgpu up"
    return f"{other.name} is off or out of reach", f"ping -c3 {_host(other.doors[0].address)}"


# -- multicast -------------------------------------------------------------------------------------------------------


def mdns_port(about: MachineFacts) -> Finding:
    """UDP port 5353, which others may have shared with nobody."""
    if not about.mdns_fault:
        return Finding("discovery", State.OK, "UDP port 5353 can be had")
    holder = about.mdns_holder
    found = f"UDP port 5353 is taken by {holder}, which does not share it" if holder else about.mdns_fault
    if holder.startswith("avahi"):
        remedy = (
            "sudo sed -i s/^disallow-other-stacks=yes/disallow-other-stacks=no/ /etc/avahi/avahi-daemon.conf && "
            "sudo systemctl restart avahi-daemon && meshgpu down && meshgpu up"
        )
        return Finding("discovery", State.FAIL, found, remedy)
    return Finding("discovery", State.FAIL, found, "sudo ss -ulpn 'sport = :5353'; then meshgpu down && meshgpu up")


def discovery(agent: AgentFacts, about: MachineFacts) -> Finding:
    """Whether announcements get from here to peers of the same network, and from them to here."""
    if about.mdns_fault:
        return mdns_port(about)
    near = [help_ for help_ in agent.help if not help_.answer.is_busy and _is_near(agent, about, help_)]
    speaking = [help_ for help_ in near if help_.answer.announces]
    is_deaf = bool(speaking) and not any(help_.is_heard for help_ in speaking)
    is_mute = agent.announces and bool(near) and not any(help_.answer.hears for help_ in near)
    who = listed(help_.name for help_ in near) if near else ""
    if is_deaf and is_mute:
        found = f"multicast is filtered both ways between here and {who}: new machines are not found"
        return Finding("discovery", State.FAIL, found, _filtered(agent, about, near))
    if is_deaf:
        found = f"multicast is filtered on its way in: announcements of {who} do not arrive"
        return Finding("discovery", State.FAIL, found, open_mdns(about.firewall))
    if is_mute and speaking:
        found = f"multicast is filtered on its way out: this machine's announcements do not reach {who}"
        return Finding("discovery", State.FAIL, found, open_mdns(about.firewall, outgoing=True))
    if speaking:
        return Finding("discovery", State.OK, f"mDNS works both ways with {listed(h.name for h in speaking)}")
    if not agent.announces:
        return Finding("discovery", State.OK, "this machine announces nothing, as config.toml says")
    if agent.sightings:
        return Finding("discovery", State.OK, f"mDNS works here; {count(agent.sightings, 'other machine')} seen")
    if agent.help and not near:
        return Finding("discovery", State.SKIPPED, "linked machines are in other networks, where mDNS does not reach")
    return Finding("discovery", State.SKIPPED, "no other machine was seen by mDNS, and none is linked that could tell")


def _filtered(agent: AgentFacts, about: MachineFacts, near: list[Help]) -> str:
    """A firewall here, or the switch: then machines find each other by a seed."""
    if about.firewall:
        return open_mdns(about.firewall)
    hosts = [_host(a) for other in agent.others if other.node == near[0].node for a in other.addresses[:1]]
    seeds = ", ".join(f'"{host}"' for host in hosts) or '"HOST"'
    line = f"echo 'seeds = [{seeds}]' >> {about.home}/config.toml && meshgpu down && meshgpu up"
    return f"{open_mdns('')}; if the switch does it: {line}"


def _is_near(agent: AgentFacts, about: MachineFacts, help_: Help) -> bool:
    """Whether a peer is in a network of this machine: multicast crosses no router."""
    hosts = [_host(a) for other in agent.others if other.node == help_.node for a in other.addresses]
    return any(_is_in(interface, host) for host in hosts for interface in about.interfaces)


# -- clocks ----------------------------------------------------------------------------------------------------------


def kernel_clock(about: MachineFacts) -> Finding:
    """What the kernel says of its clock; whether it is right, only another machine can tell."""
    if about.is_clock_kept is None:
        return Finding("clock", State.SKIPPED, "nobody to compare it with")
    if about.is_clock_kept:
        return Finding("clock", State.OK, "follows a time server")
    return Finding("clock", State.WARN, "follows no time server, as far as the kernel knows", SET_CLOCK)


def clock(agent: AgentFacts, about: MachineFacts) -> Finding:
    """Whose clock is wrong: this one if most peers differ from it. One peer alone cannot tell which of the two."""
    if not agent.help:
        return kernel_clock(about)
    apart = [help_ for help_ in agent.help if abs(help_.clock_gap_s) >= CLOCK_WARN_S]
    if not apart:
        return Finding("clock", State.OK, f"agrees with {listed(h.name for h in agent.help)}")
    worst = max(apart, key=lambda help_: abs(help_.clock_gap_s))
    side = "behind" if worst.clock_gap_s > 0 else "ahead of"
    gap = span(worst.clock_gap_s)
    state = State.FAIL if abs(worst.clock_gap_s) > WALL_CLOCK_SLACK_S else State.WARN
    if len(agent.help) == 1:
        found = f"{gap} {side} that of {worst.name}; one of the two is wrong"
        return Finding("clock", state, found, f"here and on {worst.name}: {SET_CLOCK}")
    if 2 * len(apart) > len(agent.help):
        return Finding("clock", state, f"{gap} {side} that of {listed(h.name for h in apart)}", SET_CLOCK)
    found = f"that of {worst.name} is {gap} {'ahead' if worst.clock_gap_s > 0 else 'behind'}; this one is right"
    return Finding("clock", State.WARN, found, f"on {worst.name}: {SET_CLOCK}")


# -- addresses and interfaces ----------------------------------------------------------------------------------------


def _host(address: Address) -> str:
    return address.rpartition(":")[0]


def _interface(about: MachineFacts, address: Address) -> Interface | None:
    return next((i for i in about.interfaces if str(i.address.ip) == _host(address)), None)


def _spelt(address: Address, interface: Interface | None) -> str:
    return f"{_host(address)} ({interface.name})" if interface else _host(address)


def _names(interfaces: Iterable[Interface | None]) -> set[str]:
    return {interface.name for interface in interfaces if interface is not None}


def _office(about: MachineFacts) -> set[str]:
    return _names(interface for interface in about.interfaces if interface.kind is InterfaceKind.OFFICE)


def _is_in(interface: Interface, host: str) -> bool:
    try:
        return interface.kind is not InterfaceKind.LOOPBACK and IPv4Address(host) in interface.address.network
    except ValueError:
        return False
