"""What reading one video may take."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .video_index import VideoReadError


@dataclass(frozen=True)
class Limits:
    """
    What reading one video may take; all are ours, and None lifts a limit.

    frame_pixels: pixels of a frame.
    frames: frames that are returned.
    download_bytes: bytes fetched from a server, or held by a `data:` URL.
    seconds: from the beginning of the reading to its end.
    answer_seconds: that a server may keep silent.
    private_addresses: whether servers of this machine and of private networks are asked, by name, number or redirect;
        False where strangers say what is read. No proxy is used then, as it would look the names up itself.
    """

    frame_pixels: int | None = 2**26
    frames: int | None = 10_000
    download_bytes: int | None = 2**32
    seconds: float | None = 3600
    answer_seconds: float | None = 30
    private_addresses: bool = True


class Deadline:
    """When a reading must have come to its end."""

    def __init__(self, name: str, limits: Limits):
        self.name, self.seconds = name, limits.seconds
        self.end = None if limits.seconds is None else time.monotonic() + limits.seconds

    def check(self) -> None:
        """Raises `VideoReadError` once it has passed."""
        end = self.end  # once: another thread may pause it in between
        if end is not None and time.monotonic() > end:
            raise VideoReadError(f"{self.name} took longer to read than limits.seconds={self.seconds}; raise it.")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens meanwhile."""
        end, self.end, began = self.end, None, time.monotonic()
        try:
            yield
        finally:
            self.end = None if end is None else end + time.monotonic() - began


__all__ = ["Deadline", "Limits"]
