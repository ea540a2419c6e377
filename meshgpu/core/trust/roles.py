"""What a peer may say to us, by its role. A machine of the office may say everything; it is checked anyway."""

from typing import Final

from meshgpu.model.messages import (
    AttemptReport,
    CommitAnswer,
    GossipDelta,
    GossipDigest,
    LogDelta,
    Message,
    OfferAnswer,
)
from meshgpu.model.trust import Member, Role

FROM_CLOUD: Final = (GossipDigest, GossipDelta, LogDelta, OfferAnswer, CommitAnswer, AttemptReport)
"""A rented instance tells of itself and of its attempts, and repeats entries of the log, which others signed."""


def may_say(member: Member, message: Message) -> bool:
    return member.role is not Role.CLOUD or isinstance(message, FROM_CLOUD)
