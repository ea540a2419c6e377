"""Whose Links show that two agents run with one key, and whose do not."""

import pytest

from meshgpu.core.membership.clones import CLONE_S, INSTANCES_KEPT, RETURNS, Clones
from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId

EVE, ADA = NodeId("e" * 52), NodeId("a" * 52)


def at(time_s: float) -> Now:
    return Now(time_s, 1_800_000_000.0 + time_s, "boot")


def opened(
    clones: Clones, instances: str, every_s: float = 1.0, since_s: float = 0.0, peer: NodeId = EVE
) -> list[bool]:
    """Links of one member open, one instance's after another's; whether each was news."""
    return [clones.link_opened(at(since_s + n * every_s), peer, one) for n, one in enumerate(instances)]


def test_two_that_take_turns_are_seen_once_each_has_come_back_and_it_is_news_once() -> None:
    clones = Clones()
    assert opened(clones, "abababab") == [False] * (1 + RETURNS) + [True] + [False] * 3
    assert clones.is_cloned(EVE)
    assert not clones.is_cloned(ADA)


@pytest.mark.parametrize("story", ["abcdefghij", "aaaaaaaaaa", "aabbbbccccc", "abab", "ababbbbbbb"])
def test_restarts_and_links_that_open_again_are_no_copy(story: str) -> None:
    """Nor does a Link that was on its way when its agent ended make one."""
    clones = Clones()
    assert not any(opened(clones, story))
    assert not clones.is_cloned(EVE)


def test_returns_that_lie_far_apart_do_not_add_up() -> None:
    clones = Clones()
    assert not any(opened(clones, "ab" * 10, every_s=CLONE_S))
    assert any(opened(clones, "ab" * 10, every_s=CLONE_S - 1.0, since_s=1e6))


def test_copy_is_forgiven_when_it_was_not_seen_for_long_and_news_again_after_that() -> None:
    clones = Clones()
    opened(clones, "ababab")  # last seen at 5 s
    clones.step(at(4.9 + CLONE_S))
    assert clones.is_cloned(EVE)
    clones.step(at(5.0 + CLONE_S))
    assert not clones.is_cloned(EVE)
    assert opened(clones, "abab", since_s=2000.0) == [False, False, True, False]


def test_each_sight_makes_it_last() -> None:
    clones = Clones()
    opened(clones, "ababab")
    opened(clones, "a", since_s=500.0)
    clones.step(at(499.0 + CLONE_S))
    assert clones.is_cloned(EVE)


def test_who_joins_again_after_it_was_put_out_begins_anew() -> None:
    clones = Clones()
    opened(clones, "ababab")
    clones.forget(EVE)
    assert not clones.is_cloned(EVE)
    assert not any(opened(clones, "abab", since_s=7.0))


def test_what_is_kept_of_one_member_is_bounded() -> None:
    clones = Clones()
    for number in range(10 * INSTANCES_KEPT):
        clones.link_opened(at(number), EVE, f"{number}")
    assert len(clones._instances[EVE]) == INSTANCES_KEPT
    clones.link_opened(at(1e4), EVE, f"{9 * INSTANCES_KEPT}")  # the oldest that is kept came back
    assert clones._returns[EVE] == (1, 1e4)
