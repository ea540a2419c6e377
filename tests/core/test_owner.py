"""Whose jobs a machine takes."""

import pytest

from meshgpu.core.owner import OwnerPolicy, Permission, permission
from meshgpu.model.ids import UserName

ADA, BOB = UserName("ada"), UserName("bob")


@pytest.mark.parametrize(
    ("policy", "user", "fence", "may", "fenced"),
    [
        (OwnerPolicy(), ADA, "", True, False),
        (OwnerPolicy(), ADA, "bubblewrap", True, False),
        (OwnerPolicy(), BOB, "bubblewrap", True, True),
        (OwnerPolicy(), BOB, "", False, False),
        (OwnerPolicy(trusted=(BOB,)), BOB, "", True, False),
        (OwnerPolicy(trusted=(BOB,)), BOB, "bubblewrap", True, True),
        (OwnerPolicy(lends=False), ADA, "bubblewrap", False, False),
        (OwnerPolicy(lends=False, trusted=(BOB,)), BOB, "bubblewrap", False, False),
    ],
)
def test_owner_has_the_last_word(policy: OwnerPolicy, user: UserName, fence: str, may: bool, fenced: bool) -> None:
    found = permission(policy, user, ADA, fence)
    assert (not found.refusal, found.needs_fence) == (may, fenced)


def test_refusal_names_owner_and_remedy() -> None:
    found: Permission = permission(OwnerPolicy(), BOB, ADA, "")
    assert "its owner ada only" in found.refusal
    assert "bubblewrap" in found.refusal
