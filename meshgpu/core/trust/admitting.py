"""The admitter's window: which joining machine is compared with now, what both people said, and when it is over.

Who stands between two machines knows the admitter's digits as soon as it has the admitter's nonce, and can hang up
where they do not suit it. So every conversation that was answered is a guess, and a window answers only so many. But
most are cheap to make: a window closes early only where its own person declined, or let the time pass, again and
again; what anybody else ends is held against the address that it came from.
"""

from dataclasses import dataclass
from typing import Final

from meshgpu.core.trust.comparing import Knock, Terms, check_commitment, digits, transcript
from meshgpu.core.trust.strangers import Strangers
from meshgpu.errors import MeshgpuError, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, digest
from meshgpu.model.pairing import Possession
from meshgpu.model.trust import Notary, Signed

WINDOW_LIFE_S: Final = 600.0
COMPARISON_LIFE_S: Final = 120.0
"""From the digits on the screen to both key presses."""
REVEAL_LIFE_S: Final = 10.0
"""Two messages of two machines: one that is silent for longer keeps others out."""
DECLINED_LIMIT: Final = 5
"""Comparisons to which the admin did not agree: somebody wastes his time, or stands in between."""
ANSWERED_LIMIT: Final = 25
"""Guesses at a million digits that a window allows, from whichever addresses: one that is open gives in once in 40,000
times. A stranger needs seven addresses to use them up."""

_AGAIN: Final = "meshgpu admit"


@dataclass(frozen=True, slots=True)
class Agreed:
    """Both people saw the same digits: what may be written to the log."""

    knock: Knock
    terms: Terms


@dataclass(slots=True)
class _Talk:
    knock: Knock
    commitment: Digest
    terms: Terms
    nonce: bytes
    ends_boot_s: float
    host: str
    digits: str = ""
    here: bool = False
    there: bool = False


class Window:
    """Open from `opened` for ten minutes, one admission, or too many that came to nothing; one comparison at a time.

    strangers: hears of each address whose conversation failed. wanted: the only machine name that is let in, None for
    any. A conversation is named by its commitment, which nobody else can know. Every method takes the moment and first
    ends what has lasted too long.
    """

    def __init__(self, notary: Notary, strangers: Strangers, opened: Now, wanted: str | None = None) -> None:
        self._notary = notary
        self._strangers = strangers
        self._ends_boot_s = opened.boot_s + WINDOW_LIFE_S
        self._wanted = wanted
        self._talk: _Talk | None = None
        self._ended: dict[Digest, str] = {}  # why each failed; ANSWERED_LIMIT at most
        self._declined = 0
        self._agreed: Agreed | None = None
        self._agreed_with: Digest | None = None

    def is_open(self, now: Now) -> bool:
        """Whether a machine may still be admitted through it."""
        self._tick(now)
        return self._agreed is None and not self._is_worn_out and now.boot_s < self._ends_boot_s

    def why_closed(self) -> str:
        """What ended it without an admission, as its admin reads it."""
        if self._declined >= DECLINED_LIMIT:
            return f"the window closed: {DECLINED_LIMIT} comparisons were declined"
        if len(self._ended) >= ANSWERED_LIMIT:
            return f"the window closed: {ANSWERED_LIMIT} tries came to nothing: somebody here may be guessing"
        return f"no machine was admitted in {WINDOW_LIFE_S / 60:.0f} minutes"

    def knock(self, now: Now, knock: Knock, commitment: Digest, terms: Terms, nonce: bytes, host: str) -> bytes:
        """Begin a conversation; returns `nonce`, 32 random bytes made for it alone, which may leave only now.

        host: the address that asks. Raises MeshgpuError `busy`, or TrustError `bad-invite` where the window is closed
        or waits for another name.
        """
        if not self.is_open(now):
            raise _refused("nobody takes in machines there now", "ask an admin there to run: meshgpu admit")
        name = knock.newcomer.name
        if self._wanted not in (None, name):
            raise _refused(f"the admin there waits for {self._wanted}, not for {name}", f"meshgpu admit {name}")
        if self._talk is not None:
            taken = "cannot join: the admin there compares digits with another machine now"
            raise MeshgpuError("busy", taken, "try again in two minutes: meshgpu join")
        if commitment in self._ended:
            raise _refused("this conversation was over before", "meshgpu join")
        self._talk = _Talk(knock, commitment, terms, nonce, now.boot_s + REVEAL_LIFE_S, host)
        return nonce

    def reveal(self, now: Now, commitment: Digest, nonce: bytes, by_node: Signed, by_user: Signed) -> str:
        """Check the joiner's nonce and its Possessions; returns the digits to show. Raises TrustError `bad-invite`.

        A joiner that fails has lost its conversation.
        """
        talk = self._of(now, commitment)
        if talk.digits:
            raise _refused("the nonce was shown before", "meshgpu join")
        about = transcript(talk.knock, talk.terms, nonce, talk.nonce)
        newcomer = talk.knock.newcomer
        try:
            check_commitment(commitment, talk.knock, nonce)
            for signed, key in ((by_node, newcomer.public_key), (by_user, newcomer.user_key)):
                if self._notary.read(signed, key, Possession) != Possession(digest(about)):
                    raise _refused("its keys were not there when it asked", _AGAIN)
        except TrustError as error:
            self._fail(now, error.message)
            raise
        talk.digits = digits(about)
        talk.ends_boot_s = now.boot_s + COMPARISON_LIFE_S
        return talk.digits

    def compared(self) -> tuple[Knock, Terms]:
        """What the digits on the screen stand for; only right after `reveal`."""
        assert self._talk is not None
        return self._talk.knock, self._talk.terms

    def press(self, now: Now, *, same: bool) -> Agreed | None:
        """The admin's key press. Returns what is agreed once both did. Raises TrustError where nothing is compared."""
        self._tick(now)
        if self._talk is None or not self._talk.digits:
            raise _refused("no digits are on the screen now", _AGAIN)
        if not same:
            self._declined += 1
            self._fail(now, "the admin there saw other digits, or said no")
            return None
        self._talk.here = True
        return self._conclude(self._talk)

    def agree(self, now: Now, commitment: Digest) -> Agreed | None:
        """The joiner's person saw the same digits; also its question whether the admin did.

        Returns what is agreed, None while the admin has not pressed. Raises TrustError with why it ended.
        """
        if self._agreed is not None and commitment == self._agreed_with:
            return self._agreed
        talk = self._of(now, commitment)
        if not talk.digits:
            self._fail(now, "it agreed to digits that nobody has seen")
            raise _refused("it agreed to digits that nobody has seen", _AGAIN)
        talk.there = True
        return self._conclude(talk)

    def leave(self, now: Now, commitment: Digest, why: str) -> None:
        """The joiner's person said no, or its connection is lost. `why` is what the admin hears."""
        self._of(now, commitment)
        self._fail(now, why)

    def end_of(self, commitment: Digest) -> str | None:
        """Why that conversation failed, None if it did not."""
        return self._ended.get(commitment)

    @property
    def _is_worn_out(self) -> bool:
        return self._declined >= DECLINED_LIMIT or len(self._ended) >= ANSWERED_LIMIT

    def _of(self, now: Now, commitment: Digest) -> _Talk:
        self._tick(now)
        if self._talk is None or self._talk.commitment != commitment:
            raise _refused(self._ended.get(commitment, "there is no such conversation"), "meshgpu join")
        return self._talk

    def _conclude(self, talk: _Talk) -> Agreed | None:
        if not (talk.here and talk.there):
            return None
        self._agreed, self._agreed_with, self._talk = Agreed(talk.knock, talk.terms), talk.commitment, None
        return self._agreed

    def _fail(self, now: Now, why: str) -> None:
        assert self._talk is not None
        self._ended[self._talk.commitment] = why
        self._strangers.failed(now, self._talk.host)
        self._talk = None

    def _tick(self, now: Now) -> None:
        if self._talk is None:
            return
        if now.boot_s >= self._talk.ends_boot_s:
            self._declined += bool(self._talk.digits and not self._talk.here)
            self._fail(now, "nobody compared the digits in time" if self._talk.digits else "it was silent for too long")
        elif now.boot_s >= self._ends_boot_s:
            self._fail(now, "the window in which machines are taken in closed")


def _refused(why: str, hint: str) -> TrustError:
    return TrustError("bad-invite", f"cannot join by comparing digits: {why}", hint)
