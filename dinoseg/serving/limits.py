"""Limits of requests and uploads, and the exceptions that refuse a request by a named rule."""

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
    """Limits of a server.

    Args:
        image_mib: largest request with an image, in MiB.
        max_pixels: of an image, and of all images in a batch.
        queue: concurrent requests, from their first byte to their answer; further ones get a 503 with Retry-After.
        timeout: seconds for a request to arrive, and again for its answer.
    """

    image_mib: Positive = 20.0
    max_pixels: Count = 2**24
    queue: Count = 64
    timeout: Positive = 60.0

    @property
    def patience(self) -> float:
        """Seconds within which every request in progress is answered."""
        return 2 * self.timeout

    def check_wait(self, wait_ms: float) -> None:
        """Refuse a wait for batching that is so long that every request would time out.

        Raises:
            UserError: if `wait_ms` reaches the timeout; the message names both.
        """
        if wait_ms >= 1000 * self.timeout:
            raise UserError(
                f"mode.wait_ms={wait_ms:g} reaches the request timeout (mode.limits.timeout={self.timeout:g} seconds): "
                "every request would time out. Set fewer milliseconds."
            )


class Refused(Exception):
    """A refused request: an HTTP status, the rule's name for programs, and a sentence for people.

    `retry_after`: seconds after which the request may be tried again; None: trying again does not help.
    """

    def __init__(self, status: int, rule: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.rule, self.message, self.retry_after = status, rule, message, retry_after


class HungUp(Exception):
    """The client has disconnected, and its answer is no longer needed."""


def not_stored(error: OSError) -> Refused:
    """Log a failed write of a file, and return the refusal for its client."""
    logger.error("Cannot store an upload or its results: %s", error)
    return Refused(507, "disk", f"The server cannot store it ({error.strerror}). Try again later.")


@dataclass(frozen=True)
class ClipLimits:
    """Limits of videos in the app, and the lifetime of their results.

    Args:
        video_mib: largest video, in MiB.
        max_seconds: longest video; at 60 frames a second, a faster one has to be shorter.
        at_once: clips that are processed at once.
        held: uploads that are stored at once, with their results; the oldest finished one is evicted.
        keep_minutes: minutes without a request after which an upload is removed.
    """

    video_mib: Positive = 200.0
    max_seconds: Positive = 60.0
    at_once: Count = 2
    held: Count = 32
    keep_minutes: Positive = 30.0

    @property
    def max_frames(self) -> int:
        """Largest number of frames of a video."""
        return int(60 * self.max_seconds)
