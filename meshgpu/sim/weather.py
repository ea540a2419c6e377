"""What paths between machines are like: delay, jitter and loss, as TCP streams and as datagrams feel them."""

import random
from dataclasses import dataclass
from typing import Final

RESEND_S: Final = 0.2
"""After which TCP sends again what was lost; it doubles each time. Linux: TCP_RTO_MIN, include/net/tcp.h."""


@dataclass(frozen=True, slots=True)
class Weather:
    """delay_s: what each packet takes, drawn evenly. jitter_s: mean of what comes on top, drawn exponentially.
    loss: probability that a packet is lost, below 1.
    """

    delay_s: tuple[float, float] = (0.0002, 0.003)
    jitter_s: float = 0.0
    loss: float = 0.0

    def packet_s(self, rng: random.Random) -> float:
        """How long a packet is under way that is not lost."""
        low, high = self.delay_s
        took_s = low + (high - low) * rng.random()
        return took_s + rng.expovariate(1.0 / self.jitter_s) if self.jitter_s else took_s

    def stream_s(self, rng: random.Random) -> float:
        """How long a message on a stream is under way: what is lost is sent again, by the timer alone.

        Fast retransmission and tail loss probes, which often mend a loss sooner, are left out.
        """
        waited_s, resend_s = 0.0, RESEND_S
        while self.loss and rng.random() < self.loss:
            waited_s += resend_s
            resend_s *= 2
        return waited_s + self.packet_s(rng)

    def datagram_s(self, rng: random.Random) -> float | None:
        """The same of a datagram; None if it is lost."""
        return None if self.loss and rng.random() < self.loss else self.packet_s(rng)
