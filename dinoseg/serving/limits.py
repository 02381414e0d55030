"""What one request may cost, and how it is refused: by a rule that has a name."""

import logging
from dataclasses import dataclass
from typing import Annotated

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Positive, Range

logger = logging.getLogger(__name__)
MIB = 2**20
Port = Annotated[int, Range("a port from 0 to 65535", 0, 65535)]


@dataclass(frozen=True)
class Limits:
    """What a server takes in.

    Args:
        image_mib: largest request that brings an image, in MiB.
        max_pixels: of an image, and of all that the model sees at once.
        queue: requests in hand at once, from their first byte to their answer; one more is told to come back.
        timeout: seconds for a request to come whole, and again for its answer.
    """

    image_mib: Positive = 20.0
    max_pixels: Count = 2**24
    queue: Count = 64
    timeout: Positive = 60.0

    @property
    def patience(self) -> float:
        """The seconds within which every request in hand has its answer."""
        return 2 * self.timeout

    def check_wait(self, wait_ms: float) -> None:
        """Refuse a wait for other images in which every request would run out of time.

        Raises:
            UserError: naming both.
        """
        if wait_ms >= 1000 * self.timeout:
            raise UserError(
                f"mode.wait_ms={wait_ms:g} is as long as an answer may take (mode.limits.timeout={self.timeout:g} "
                "seconds): no request would get one. Give fewer milliseconds."
            )


class Refused(Exception):
    """A request that gets no answer but this: an HTTP status, the rule's name for programs, and a sentence for people.

    `retry_after` are the seconds after which it may be tried again; None: it is of no use.
    """

    def __init__(self, status: int, rule: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.rule, self.message, self.retry_after = status, rule, message, retry_after


class HungUp(Exception):
    """The client has gone: nobody waits for an answer."""


def not_kept(error: OSError) -> Refused:
    """Log what the system says of a file, and return what its client is told."""
    logger.error("An upload or what is made of it cannot be kept: %s", error)
    return Refused(507, "disk", f"The server cannot keep it ({error.strerror}). Try again later.")


@dataclass(frozen=True)
class ClipLimits:
    """What the app takes in of videos, and how long it keeps what it made.

    Args:
        video_mib: largest video, in MiB.
        max_seconds: longest video; at 60 frames a second, a faster one has to be shorter.
        at_once: clips that are worked on at once.
        held: uploads that are kept at once, with their results; the oldest finished one makes room.
        keep_minutes: after which what nobody has asked for is removed.
    """

    video_mib: Positive = 200.0
    max_seconds: Positive = 60.0
    at_once: Count = 2
    held: Count = 32
    keep_minutes: Positive = 30.0

    @property
    def max_frames(self) -> int:
        """The largest number of frames of a video."""
        return int(60 * self.max_seconds)
