"""Each check of `doctor`: the fault that it is for is named with its remedy, and nothing is said where all is well."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Interface

import pytest

from meshgpu.core.doctor import machine, mesh, network
from meshgpu.core.doctor.examination import OF_MACHINE, OF_MESH, examine
from meshgpu.model.doctor import (
    AgentFacts,
    EngineFacts,
    Facts,
    Finding,
    Help,
    Interface,
    InterfaceKind,
    MachineFacts,
    Membership,
    OtherMachine,
    SocketFacts,
    State,
)
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, GpuId, NodeId
from meshgpu.model.inventory import (
    DRIVER_FORBIDDEN,
    DRIVER_MISMATCH,
    DRIVER_NOT_LOADED,
    DRIVER_SILENT,
    DRIVER_TOO_OLD,
    NO_DRIVER,
    Gpu,
    Inventory,
)
from meshgpu.model.messages import KnockAnswer, KnockResult

ANSWERED, REFUSED, SILENT = KnockOutcome.ANSWERED, KnockOutcome.REFUSED, KnockOutcome.SILENT
GB = 10**9
ADA, BOB, CYD = (NodeId(name) for name in ("ada", "bob", "cyd"))
DOOR = Address("10.0.0.1:7443")
DOORS = {BOB: Address("10.0.0.2:7443"), CYD: Address("10.0.0.3:7443")}
GPUS = (Gpu(GpuId("GPU-1"), 0, "NVIDIA GeForce RTX 4090", 24 * 2**30),)


def interface(name: str, address: str, kind: InterfaceKind = InterfaceKind.OFFICE) -> Interface:
    return Interface(name, IPv4Interface(address), kind)


ETH0 = interface("eth0", "10.0.0.1/24")
WELL = MachineFacts(
    "/home/ada/.local/share/meshgpu/1",
    "/usr/bin/python3",
    Inventory(8, 32 * GB, GPUS, "580.1", "13.0"),
    (interface("lo", "127.0.0.1/8", InterfaceKind.LOOPBACK), ETH0),
    disk_free_bytes=500 * GB,
    disk_total_bytes=1000 * GB,
    keep_free_bytes=50 * GB,
    fence="bubblewrap",
    engine=EngineFacts("28.2", gives_gpus=True),
    is_clock_kept=True,
    socket=SocketFacts("/home/ada/agent.sock", 0o600, is_own=True),
)


def other(node: NodeId, outcome: KnockOutcome = ANSWERED, **changes: object) -> OtherMachine:
    behind = node if outcome is ANSWERED else None
    usual = OtherMachine(
        node, node, "0.3.1", (DOORS[node],), is_linked=True, doors=(KnockResult(DOORS[node], outcome, behind),)
    )
    return replace(usual, **changes)  # type: ignore[arg-type]  # each test says which


def help_of(
    node: NodeId,
    outcome: KnockOutcome = ANSWERED,
    *,
    address: Address = DOOR,
    behind: NodeId | None = ADA,
    hears: bool = True,
    announces: bool = True,
    is_heard: bool = True,
    clock_gap_s: float = 0.1,
) -> Help:
    found = KnockResult(address, outcome, behind if outcome is ANSWERED else None)
    return Help(node, node, KnockAnswer("q", (found,), hears, announces, 0.0), is_heard, clock_gap_s)


AGENT = AgentFacts(
    "0.3.0",
    ADA,
    "lab",
    "0123456789ab",
    Membership.MEMBER,
    members=3,
    link_port=7443,
    wanted_port=7443,
    addresses=(DOOR,),
    others=(other(BOB), other(CYD)),
    help=(help_of(BOB), help_of(CYD)),
)


def agent(**changes: object) -> AgentFacts:
    return replace(AGENT, **changes)  # type: ignore[arg-type]  # each test says which


def about(**changes: object) -> MachineFacts:
    return replace(WELL, **changes)  # type: ignore[arg-type]  # each test says which


def named(finding: Finding, state: State, found: str, remedy: str) -> bool:
    """Whether a fault is named so, with a remedy."""
    assert finding.state is state, finding
    assert found in finding.found, finding
    assert finding.remedy is not None, finding
    assert remedy in finding.remedy, finding
    return True


def test_nothing_is_wrong_and_nothing_is_to_be_done_where_all_is_well() -> None:
    findings = examine(Facts(WELL, AGENT))
    assert {finding.state for finding in findings} == {State.OK}, findings
    assert {finding.remedy for finding in findings} == {None}
    assert len({finding.name for finding in findings}) == len(findings) == len(OF_MACHINE) + len(OF_MESH) + 1


def test_each_check_goes_by_the_name_in_the_list() -> None:
    assert [check(WELL).name for _, check in OF_MACHINE] == [name for name, _ in OF_MACHINE]
    assert [check(AGENT, WELL).name for _, check in OF_MESH] == [name for name, _ in OF_MESH]


def test_without_an_agent_the_other_checks_run_still() -> None:
    no_agent = Finding("agent", State.FAIL, "no agent answers at /x", "meshgpu up")
    findings = {finding.name: finding for finding in examine(Facts(about(disk_free_bytes=0), no_agent=no_agent))}
    assert findings["agent"] == no_agent
    assert findings["disk"].state is State.FAIL
    assert findings["clock"].state is State.OK
    skipped = {name for name, finding in findings.items() if finding.state is State.SKIPPED}
    assert skipped == {"mesh", "names", "versions", "addresses", "link port", "way out", "links"}
    assert all("needs the agent" in findings[name].found for name in skipped)


# -- mesh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "state", "found", "remedy"),
    [
        ({"membership": Membership.NONE}, State.WARN, "in no mesh yet", "meshgpu init, or meshgpu join"),
        ({"membership": Membership.FORMER}, State.FAIL, "no member of lab any more", "meshgpu leave"),
        ({"membership": Membership.ENDED}, State.FAIL, "lease has expired", "meshgpu burst status"),
        ({"frozen": ("ada on rig1",)}, State.FAIL, "ada on rig1 signed two different", "meshgpu admin remove"),
        ({"refused": "bad signature"}, State.FAIL, "refused: bad signature", "meshgpu admin ls"),
    ],
)
def test_trouble_with_the_membership_is_named(
    changes: dict[str, object], state: State, found: str, remedy: str
) -> None:
    assert named(mesh.membership(agent(**changes), WELL), state, found, remedy)


def test_name_that_two_machines_were_given_is_named() -> None:
    finding = mesh.names(agent(clashes=("rig1-abcd",)), WELL)
    assert named(finding, State.WARN, "rig1-abcd", "meshgpu join --name")


@pytest.mark.parametrize(
    ("own", "theirs", "state", "found"),
    [
        ("0.3.0", ("0.3.1", "0.3.9"), State.OK, "everywhere the same"),
        ("0.3.0", ("0.2.0", "0.3.0"), State.OK, "bob one behind"),
        ("0.3.0", ("0.4.0", "0.3.0"), State.WARN, "0.3.0 is one behind: 0.4.0 runs on bob"),
        ("0.3.0", ("0.4.0", "0.5.2"), State.FAIL, "0.3.0 is too old here: 0.5.2 runs on cyd"),
        ("0.9.0", ("1.0.0", "0.9.0"), State.FAIL, "too old here: 1.0.0 runs on bob"),
        ("0.3.0", ("0.1.0", "0.3.0"), State.FAIL, "too old for 0.3.0 here: bob"),
        ("0.3.0", ("", "no version"), State.OK, "meshgpu 0.3.0"),
    ],
)
def test_agent_that_is_too_old_is_named(own: str, theirs: tuple[str, str], state: State, found: str) -> None:
    others = (other(BOB, version=theirs[0]), other(CYD, version=theirs[1]))
    finding = mesh.versions(agent(version=own, others=others), WELL)
    assert (finding.state, found in finding.found) == (state, True), finding
    assert (finding.remedy is None) == (state is State.OK)


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (interface("ppp0", "10.8.0.6/24", InterfaceKind.TUNNEL), "10.8.0.6 on ppp0 (a VPN or tunnel)"),
        (interface("br-work", "172.30.0.1/16", InterfaceKind.CONTAINERS), "172.30.0.1 on br-work (a network of cont"),
    ],
)
def test_address_of_a_vpn_or_of_containers_that_is_announced_is_named(bad: Interface, what: str) -> None:
    strange = Address(f"{bad.address.ip}:7443")
    here = about(interfaces=(ETH0, bad))
    finding = network.addresses(agent(addresses=(DOOR, strange)), here)
    assert named(finding, State.WARN, what, 'interfaces = ["eth0"]\' >> /home/ada/.local/share/meshgpu/1/config.toml')
    assert named(network.addresses(agent(addresses=(strange,)), here), State.FAIL, what, "config.toml")


def test_wrong_interface_is_named_and_is_no_firewall() -> None:
    lost = Address("192.168.9.1:7443")
    here = about(interfaces=(ETH0, interface("eth1", "192.168.9.1/24")))
    seen = agent(addresses=(lost,), help=(help_of(BOB, SILENT, address=lost),))
    assert named(network.addresses(seen, here), State.FAIL, "(eth1), but are on the network of eth0", '["eth0"]')
    assert network.way_in(seen, here).state is State.SKIPPED


def test_one_address_of_several_that_nobody_reaches_is_named() -> None:
    lost = Address("192.168.9.1:7443")
    here = about(interfaces=(ETH0, interface("eth1", "192.168.9.1/24")))
    knocks = (KnockResult(DOOR, ANSWERED, ADA), KnockResult(lost, SILENT))
    helped = Help(BOB, "bob", KnockAnswer("q", knocks, hears=True, announces=True, wall_s=0.0), True, 0.0)
    finding = network.addresses(agent(addresses=(DOOR, lost), help=(helped,)), here)
    assert named(finding, State.WARN, "nobody reaches 192.168.9.1:7443", '["eth0"]')


@pytest.mark.parametrize(("behind", "who"), [(BOB, "itself"), (CYD, "cyd"), (None, "something else")])
def test_address_behind_which_others_are_is_named(behind: NodeId | None, who: str) -> None:
    finding = network.addresses(agent(help=(help_of(BOB, ANSWERED, behind=behind),)), WELL)
    assert named(finding, State.FAIL, f"bob finds {who}", "ip -4 addr")


def test_machine_without_an_address_is_named() -> None:
    assert named(network.addresses(agent(addresses=()), WELL), State.FAIL, "no address in the office", "ip -4 addr")


# -- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("firewall", "remedy"),
    [
        ("ufw", "sudo ufw allow 7443/tcp"),
        ("firewalld", "sudo firewall-cmd --permanent --add-port=7443/tcp && sudo firewall-cmd --reload"),
        ("", "sudo iptables -I INPUT -p tcp --dport 7443 -j ACCEPT"),
    ],
)
@pytest.mark.parametrize(("outcome", "word"), [(SILENT, "got no answer"), (REFUSED, "met a refusal")])
def test_firewall_on_the_link_port_is_named(outcome: KnockOutcome, word: str, firewall: str, remedy: str) -> None:
    seen = agent(help=(help_of(BOB, outcome), help_of(CYD, outcome)))
    finding = network.way_in(seen, about(firewall=firewall))
    assert named(finding, State.FAIL, f"bob and cyd knocked at 10.0.0.1:7443 and {word}", remedy)
    assert finding.remedy == remedy


def test_one_peer_that_comes_through_shows_that_no_firewall_is_here() -> None:
    assert network.way_in(agent(help=(help_of(BOB, SILENT), help_of(CYD))), WELL).state is State.OK


def test_link_port_that_was_taken_is_named() -> None:
    finding = network.way_in(agent(wanted_port=7443, link_port=40001), WELL)
    assert named(finding, State.WARN, "port 7443 was taken: others reach this machine at port 40001", "ss -ltnp")
    assert network.way_in(agent(wanted_port=0, link_port=40001), WELL).state is State.OK


def test_nothing_is_said_of_the_way_in_where_nobody_knocked() -> None:
    busy = Help(BOB, "bob", KnockAnswer("q", (), False, False, 0.0, is_busy=True), False, 0.0)
    finding = network.way_in(agent(help=()), WELL)
    assert (finding.state, "bob and cyd did not say" in finding.found) == (State.SKIPPED, True)
    finding = network.way_in(agent(help=(), others=()), WELL)
    assert (finding.state, "nobody is linked" in finding.found) == (State.SKIPPED, True)
    finding = network.way_in(agent(help=(busy,)), WELL)
    assert (finding.state, "asked too often" in finding.found) == (State.SKIPPED, True)


@pytest.mark.parametrize(
    ("firewall", "remedy"),
    [
        ("ufw", "sudo ufw allow out 7443/tcp"),
        ("firewalld", "--direct --add-rule ipv4 filter OUTPUT 0 -p tcp --dport 7443 -j ACCEPT"),
        ("", "sudo iptables -I OUTPUT -p tcp --dport 7443 -j ACCEPT"),
    ],
)
def test_blocked_way_out_is_named(firewall: str, remedy: str) -> None:
    shut = (other(BOB, SILENT), other(CYD, REFUSED))
    finding = network.way_out(agent(others=shut), about(firewall=firewall))
    assert named(finding, State.FAIL, "TCP port 7443 of bob and cyd cannot be reached", remedy)


def test_one_door_alone_does_not_tell_on_which_side_it_is_shut() -> None:
    finding = network.way_out(agent(others=(other(BOB, SILENT),)), WELL)
    assert named(finding, State.WARN, "blocked on the way out here, or by a firewall there", "there: meshgpu doctor")
    unlinked = other(BOB, SILENT, is_linked=False, is_neighbour=True)
    assert network.way_out(agent(others=(unlinked,)), WELL).state is State.SKIPPED
    both = (unlinked, other(CYD, SILENT, is_linked=False, is_neighbour=True))
    assert named(
        network.way_out(agent(others=both), WELL), State.WARN, "was on this network lately: off, or", "iptables"
    )


def test_machine_that_is_off_says_nothing_of_the_way_out() -> None:
    gone = other(CYD, SILENT, is_linked=False)
    assert network.way_out(agent(others=(other(BOB), gone)), WELL).state is State.OK
    both = (gone, other(BOB, SILENT, is_linked=False))
    assert network.way_out(agent(others=both), WELL).state is State.SKIPPED


@pytest.mark.parametrize(
    ("away", "found", "remedy"),
    [
        (other(CYD, SILENT, is_linked=False), "cyd is off or out of reach", "ping -c3 10.0.0.3"),
        (other(CYD, SILENT, is_linked=False, is_neighbour=True), "its port is silent: off, or", "on cyd: meshgpu d"),
        (other(CYD, REFUSED, is_linked=False), "cyd is on, but no agent runs there", "on cyd: meshgpu up"),
        (other(CYD, is_linked=False), "cyd answers, and no Link has opened yet", "meshgpu doctor"),
        (other(CYD, is_linked=False, doors=()), "no address of cyd is known", "on cyd: meshgpu up"),
        (
            other(CYD, is_linked=False, doors=(KnockResult(DOORS[CYD], ANSWERED, BOB),)),
            "at the address of cyd somebody else answers",
            "on cyd: meshgpu doctor",
        ),
    ],
)
def test_machine_that_is_not_linked_is_named_with_what_shows_of_it(away: OtherMachine, found: str, remedy: str) -> None:
    assert named(network.links(agent(others=(other(BOB), away)), WELL), State.WARN, found, remedy)
    assert named(network.links(agent(others=(away,)), WELL), State.FAIL, found, remedy)


# -- discovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_heard", "hears", "found"),
    [
        (False, False, "multicast is filtered both ways between here and bob and cyd"),
        (False, True, "filtered on its way in: announcements of bob and cyd do not arrive"),
        (True, False, "filtered on its way out: this machine's announcements do not reach bob and cyd"),
    ],
)
def test_filtered_multicast_is_named_with_its_direction(is_heard: bool, hears: bool, found: str) -> None:
    helped = tuple(help_of(node, is_heard=is_heard, hears=hears) for node in (BOB, CYD))
    assert named(network.discovery(agent(help=helped), WELL), State.FAIL, found, "5353")
    assert named(network.discovery(agent(help=helped), about(firewall="ufw")), State.FAIL, found, "sudo ufw allow")
    one = (helped[0], help_of(CYD))
    assert network.discovery(agent(help=one), WELL).state is State.OK


def test_who_announces_nothing_is_not_missed() -> None:
    quiet = help_of(BOB, announces=False, is_heard=False)
    assert network.discovery(agent(help=(quiet,), sightings=1), WELL).state is State.OK
    unheard = help_of(BOB, hears=False)
    assert network.discovery(agent(help=(unheard,), announces=False), WELL).state is State.OK


def test_multicast_is_not_expected_across_a_router() -> None:
    far = other(BOB, addresses=(Address("10.5.0.2:7443"),))
    finding = network.discovery(agent(others=(far,), help=(help_of(BOB, hears=False, is_heard=False),)), WELL)
    assert finding.state is State.SKIPPED


@pytest.mark.parametrize(
    ("holder", "remedy"), [("avahi-daemon", "disallow-other-stacks=no"), ("mdnsd", "ss -ulpn"), ("", "ss -ulpn")]
)
def test_port_5353_that_is_taken_is_named(holder: str, remedy: str) -> None:
    taken = about(mdns_fault="cannot listen for mDNS on UDP port 5353: Address already in use", mdns_holder=holder)
    for finding in (network.discovery(AGENT, taken), network.mdns_port(taken)):
        assert named(finding, State.FAIL, holder or "Address already in use", remedy)


# -- clock -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "state", "found", "remedy"),
    [
        ((3600.0 * 3, 3600.0 * 3), State.FAIL, "3 h 0 min behind that of bob and cyd", network.SET_CLOCK),
        ((-50.0, -50.0), State.WARN, "50 s ahead of that of bob and cyd", network.SET_CLOCK),
        ((0.0, 300.0), State.WARN, "that of cyd is 5 min ahead; this one is right", "on cyd: sudo timedatectl"),
        ((-130.0,), State.FAIL, "130 s ahead of that of bob; one of the two is wrong", "here and on bob: sudo"),
    ],
)
def test_clock_that_is_wrong_is_named_and_whose_it_is(
    gaps: tuple[float, ...], state: State, found: str, remedy: str
) -> None:
    helped = tuple(help_of(node, clock_gap_s=gap) for node, gap in zip((BOB, CYD), gaps, strict=False))
    finding = network.clock(agent(help=helped), WELL)
    assert named(finding, state, found.replace("130 s", "2 min"), remedy)


def test_clock_is_asked_of_the_kernel_where_nobody_helps() -> None:
    assert network.clock(agent(help=()), about(is_clock_kept=True)).state is State.OK
    assert network.clock(agent(help=()), about(is_clock_kept=None)).state is State.SKIPPED
    finding = network.clock(agent(help=()), about(is_clock_kept=False))
    assert named(finding, State.WARN, "follows no time server", network.SET_CLOCK)


# -- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("note", "remedy"),
    [
        (DRIVER_MISMATCH, "sudo reboot"),
        (DRIVER_SILENT, "sudo reboot"),
        (DRIVER_NOT_LOADED, "sudo modprobe nvidia"),
        (DRIVER_FORBIDDEN, "/dev/nvidia"),
        (DRIVER_TOO_OLD, "install"),
    ],
)
def test_driver_that_does_not_work_is_named(note: str, remedy: str) -> None:
    finding = machine.gpus(about(inventory=Inventory(8, GB, gpu_note=note)))
    assert named(finding, State.FAIL, note.partition(":")[0], remedy)


def test_machine_that_has_no_gpu_is_not_ill() -> None:
    assert machine.gpus(about(inventory=Inventory(8, GB, gpu_note=NO_DRIVER))).state is State.SKIPPED


def test_gpu_that_is_lost_is_named() -> None:
    finding = machine.gpus(about(gpu_faults=("lost: reset the machine",)))
    assert named(finding, State.FAIL, "lost: reset the machine", "nvidia-smi")


def test_engine_without_the_nvidia_runtime_is_named_where_gpus_are() -> None:
    plain = EngineFacts("28.2", gives_gpus=False)
    finding = machine.containers(about(engine=plain))
    assert named(finding, State.FAIL, "Docker 28.2 has no NVIDIA runtime", "nvidia-container-toolkit")
    assert machine.containers(about(engine=plain, inventory=Inventory(8, GB))).state is State.OK


def test_engine_that_may_not_be_used_is_named_and_none_is_no_fault() -> None:
    closed = EngineFacts(fault="ada may not use the engine", remedy="usermod -aG docker ada")
    assert named(machine.containers(about(engine=closed)), State.WARN, "may not use", "usermod")
    assert machine.containers(about(engine=EngineFacts())).state is State.SKIPPED


@pytest.mark.parametrize(
    ("changes", "state", "found", "remedy"),
    [
        ({"has_bubblewrap": False}, State.FAIL, "other users' jobs are refused", "sudo apt install bubblewrap"),
        ({"restricts_userns": True}, State.FAIL, "AppArmor keeps bubblewrap from user", "bwrap-userns-restrict"),
        ({"is_fence_wanted": False}, State.WARN, "other users' jobs are refused", "config.toml"),
        ({}, State.FAIL, "bubblewrap does not work", "bwrap --unshare-user"),
    ],
)
def test_missing_fence_is_named_with_what_keeps_it(
    changes: dict[str, object], state: State, found: str, remedy: str
) -> None:
    finding = machine.fence(about(fence="", fence_reason="bubblewrap does not work: Permission denied", **changes))
    assert named(finding, state, found, remedy)


def test_restriction_does_no_harm_where_another_fence_works() -> None:
    finding = machine.fence(about(fence="landlock", fence_reason="bubblewrap does not work", restricts_userns=True))
    assert finding.state is State.OK


@pytest.mark.parametrize(
    ("free_gb", "kept_gb", "state"),
    [(49, 50, State.FAIL), (51, 50, State.WARN), (100, 50, State.OK), (0.9, 0, State.FAIL), (2, 0, State.OK)],
)
def test_disk_that_is_nearly_full_is_named(free_gb: float, kept_gb: float, state: State) -> None:
    finding = machine.disk(about(disk_free_bytes=int(free_gb * GB), keep_free_bytes=int(kept_gb * GB)))
    assert (finding.state, finding.remedy is None) == (state, state is State.OK)


def test_full_disk_says_how_much_is_left_and_from_when_on_files_are_refused() -> None:
    found = machine.disk(about(disk_free_bytes=2 * GB, keep_free_bytes=50 * GB)).found
    assert found.startswith("nearly full: 2.0 of 1000 GB free below /home/ada")
    assert found.endswith("; files are refused below 50 GB")
    left = machine.disk(about(disk_free_bytes=GB // 5, keep_free_bytes=0)).found
    assert (left.startswith("nearly full: 0.2 of 1000 GB"), "refused" in left) == (True, False)


@pytest.mark.parametrize(
    ("facts", "found", "remedy"),
    [
        (SocketFacts("/s", 0o600, is_own=False), "belongs to another account", "sudo meshgpu doctor"),
        (SocketFacts("/s", 0o666, is_own=True), "open to other accounts (mode 0666)", "chmod 0600 /s"),
        (SocketFacts("/s", 0o400, is_own=True), "closed to its own account (mode 0400)", "chmod 0600 /s"),
    ],
)
def test_socket_with_wrong_permissions_is_named(facts: SocketFacts, found: str, remedy: str) -> None:
    assert named(machine.socket(about(socket=facts)), State.FAIL, found, remedy)


# -- no check breaks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda: agent(others=(), help=(), addresses=()),
        lambda: agent(others=(), help=(help_of(BOB),)),
        lambda: agent(addresses=(Address("[fd00::1]:7443"), Address("name:7443"))),
        lambda: AgentFacts("", ADA),
    ],
)
def test_whatever_is_missing_every_check_has_a_finding(change: Callable[[], AgentFacts]) -> None:
    findings = examine(Facts(MachineFacts("/x", "python", Inventory(0, 0)), change()))
    assert len(findings) == len(OF_MACHINE) + len(OF_MESH) + 1
