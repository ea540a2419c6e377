"""Which file a machine joins by, and when it gives up or tries again."""

import pytest

from meshgpu.core.trust.join_file import FIRST_PAUSE_S, LONGEST_PAUSE_S, fault_of, is_over, names_for, pause_s
from meshgpu.model.ids import NodeId, is_name


@pytest.mark.parametrize(("mode", "owner"), [(0o600, 1000), (0o400, 1000), (0o600, 0), (0o400, 0)])
def test_file_of_root_or_the_agents_account_that_nobody_else_reads_is_believed(mode: int, owner: int) -> None:
    assert fault_of(mode, owner, 1000) == ""


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o700, 0o4600])
def test_file_that_others_may_read_or_change_is_not_believed(mode: int) -> None:
    assert "others might read" in fault_of(mode, 1000, 1000)


@pytest.mark.parametrize("own", [0, 1000])
def test_file_of_another_account_is_not_believed(own: int) -> None:
    assert "belongs to the account 1001" in fault_of(0o600, 1001, own)


@pytest.mark.parametrize(
    ("code", "over"),
    [("bad-invite", True), ("wrong-mesh", True), ("no-answer", False), ("busy", False), ("name-taken", False)],
)
def test_only_a_string_that_will_never_work_is_given_up(code: str, over: bool) -> None:
    assert is_over(code) is over


def test_pauses_grow_to_a_bound_and_differ_between_machines() -> None:
    pauses = [pause_s(tries, 1.0) for tries in range(1, 40)]
    assert (pauses[0], pauses[1], pauses[-1]) == (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, LONGEST_PAUSE_S)
    assert pause_s(1, 0.0) == FIRST_PAUSE_S / 2


def test_second_name_is_one_even_for_the_longest_host_name() -> None:
    node = NodeId("k7qa" + "b" * 48)
    assert names_for("rig", node) == ("rig", "rig-k7qa")
    assert is_name(names_for("r" * 40, node)[1])
    assert names_for("r" * 40, node)[1].endswith("-k7qa")
