"""Which instances have no right to live, judged by their tags."""

from dataclasses import replace

from meshgpu.core.burst.reaper import LOST_OWNER_S, Reaper
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.cloud import Instance, InstanceState, LaunchId, Market
from meshgpu.model.ids import JobId, MeshId, NodeId

WALL_S = 1_800_000_000.0
ME, OTHER = NodeId("m" * 52), NodeId("o" * 52)


def at(boot_s: float) -> Now:
    return Now(boot_s, WALL_S + boot_s, "boot")


def instance(name: str, owner: NodeId = ME, need: str = "", launched_s: float = 0.0) -> Instance:
    return Instance(
        name,
        LaunchId(name),
        MeshId("5e" * 32),
        owner,
        JobId((need or name[-1]) * 26),
        InstanceState.RUNNING,
        "",
        WALL_S + launched_s,
        WALL_S + 3600.0,
        "g6.xlarge",
        Market.SPOT,
        1.0,
    )


class Judge:
    """The reaper of `ME`, in a mesh whose burst peers are `peers`; instances in `busy` run jobs."""

    def __init__(self) -> None:
        self.reaper = Reaper(ME)
        self.peers = {ME, OTHER}
        self.busy: set[str] = set()

    def names(self, boot_s: float, *instances: Instance, mine: tuple[str, ...] = ()) -> list[str]:
        doomed = self.reaper.doomed(
            at(boot_s),
            instances,
            [LaunchId(name) for name in mine],
            lambda node: node in self.peers,
            lambda found: found.instance in self.busy,
        )
        return [found.instance for found, _ in doomed]


def test_known_instance_within_its_lease_lives() -> None:
    assert Judge().names(100, instance("i-a"), instance("i-b", OTHER), mine=("i-a",)) == []


def test_instance_beyond_its_lease_ends_whoever_rented_it() -> None:
    judge, over = Judge(), 3600.0 + WALL_CLOCK_SLACK_S
    assert judge.names(over, instance("i-b", OTHER)) == []
    assert judge.names(over + 1, instance("i-b", OTHER)) == ["i-b"]


def test_younger_of_two_for_one_need_ends() -> None:
    older, younger = instance("i-a", OTHER, "n", 10.0), instance("i-b", ME, "n", 20.0)
    assert Judge().names(100, younger, older, mine=("i-b",)) == ["i-b"]
    ending = replace(older, state=InstanceState.ENDING)
    assert Judge().names(100, younger, ending, mine=("i-b",)) == []


def test_instance_of_a_launch_that_this_node_does_not_know_ends() -> None:
    assert Judge().names(100, instance("i-a")) == ["i-a"]


def test_instance_whose_burst_peer_stays_away_ends_after_a_grace() -> None:
    judge = Judge()
    judge.peers = {ME}
    theirs = instance("i-b", OTHER)
    assert judge.names(0, theirs) == []
    assert judge.names(LOST_OWNER_S - 1, theirs) == []
    assert judge.names(LOST_OWNER_S, theirs) == ["i-b"]


def test_burst_peer_that_comes_back_starts_the_grace_anew() -> None:
    judge = Judge()
    judge.peers = {ME}
    theirs = instance("i-b", OTHER)
    judge.names(0, theirs)
    judge.peers = {ME, OTHER}
    judge.names(300, theirs)
    judge.peers = {ME}
    assert judge.names(310, theirs) == []
    assert judge.names(LOST_OWNER_S + 300, theirs) == []


def test_instance_that_works_is_left_to_its_lease() -> None:
    judge = Judge()
    judge.peers, judge.busy = {ME}, {"i-b"}
    judge.names(0, instance("i-b", OTHER))
    assert judge.names(LOST_OWNER_S + 100, instance("i-b", OTHER)) == []
