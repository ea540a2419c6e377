"""What the owner of a machine allows: may this user's job run here, and must it be shut in?"""

from dataclasses import dataclass

from meshgpu.model.ids import UserName


@dataclass(frozen=True, slots=True)
class OwnerPolicy:
    """lends: False keeps every job away. trusted: users whose jobs run here even where no fence works."""

    lends: bool = True
    trusted: tuple[UserName, ...] = ()


@dataclass(frozen=True, slots=True)
class Permission:
    """refusal: empty if the job may run. needs_fence: whether it must be shut in."""

    refusal: str = ""
    needs_fence: bool = False


def permission(policy: OwnerPolicy, user: UserName, owner: UserName, fence: str) -> Permission:
    """An owner's own job needs no fence; another user's runs fenced, or not at all, unless the owner trusts him."""
    if not policy.lends:
        return Permission(refusal="lends nothing at the moment")
    if user == owner:
        return Permission()
    if fence:
        return Permission(needs_fence=True)
    if user in policy.trusted:
        return Permission()
    return Permission(
        refusal=f"lends to its owner {owner} only: nothing there can shut in another user's job"
        f" (remedy, on that machine: apt install bubblewrap)"
    )
