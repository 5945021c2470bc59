"""The videos and images of a request: fetched, within limits, and only from where a stranger may point."""

import hashlib
import io
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from ..asking.answers import in_one_line
from ..video_limits import Limits
from ..video_sources import located
from .protocol import ApiError, ImagePart, Message, TextPart, VideoPart

_BLOCK = 2**20
_IMAGE_BYTES = 2**25  # ours
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class MediaRules:
    """
    What a request may show the model.

    limits: of fetching and reading one video. files: a folder whose files may be named by path, if any.
    most: videos and images of one request.
    """

    limits: Limits
    files: Path | None = None
    most: int = 16


class Media:
    """
    Of one request.

    Args:
        folder: where videos lie until the request is answered; what it holds belongs to this request.
        end: when all must have been fetched, by `time.monotonic`.
    """

    def __init__(self, rules: MediaRules, folder: Path, end: float = math.inf):
        self._rules, self._folder, self._end = rules, folder, end
        self._pixels = 0  # of its images
        self._shown: dict[str, str] = {}  # files by what a request calls them

    def chat(self, messages: list[Message]) -> list[dict]:
        """Messages as an engine takes them, with all that they show fetched. Raises `ApiError`."""
        parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
        if (count := sum(not isinstance(part, TextPart) for part in parts)) > self._rules.most:
            raise ApiError(400, f"The request has {count} videos and images, and {self._rules.most} are the most.")
        try:
            return [self._turn(message) for message in messages]
        except (ValueError, OSError) as error:
            raise ApiError(400, self.in_the_requests_words(error)) from error

    def in_the_requests_words(self, error: Exception) -> str:
        """What went wrong, in one line that does not say where files lie here."""
        text = in_one_line(error)
        for file, shown in self._shown.items():
            text = text.replace(repr(file), shown).replace(file, shown)
        for folder in (self._folder, self._rules.files):
            text = text if folder is None else text.replace(f"{folder.resolve()}/", "")
        return text

    def _turn(self, message: Message) -> dict:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return {"role": role, "content": [{"type": "text", "text": message.content}]}
        return {"role": role, "content": [self._block(part) for part in message.content]}

    def _block(self, part: TextPart | ImagePart | VideoPart) -> dict:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            return {"type": "image", "image": self._image(part.image_url.url)}
        video, key = self._video(part.video_url.url)
        return {"type": "video", "video": video, "key": key}

    def _video(self, url: str) -> tuple[str, str]:
        """Its file, and what tells it from others."""
        if (path := self._allowed(url)) is not None:
            about = path.stat()
            self._shown[str(path)] = repr(url)
            return str(path), f"{path} {about.st_mtime_ns} {about.st_size}"
        file, content = self._folder / str(len(self._shown)), hashlib.sha256()
        self._shown[str(file)] = "the data: URL" if url[:5].lower() == "data:" else repr(url.split("?")[0])
        with file.open("wb") as out:
            for piece in self._pieces(url, self._rules.limits):
                content.update(piece)
                out.write(piece)
        return str(file), content.hexdigest()

    def _image(self, url: str) -> Image.Image:
        path, limits = self._allowed(url), self._rules.limits
        most = min(limits.download_bytes or _IMAGE_BYTES, _IMAGE_BYTES)
        data = path.read_bytes() if path else b"".join(self._pieces(url, replace(limits, download_bytes=most)))
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            self._pixels += image.width * image.height
            if limits.frame_pixels is not None and self._pixels > limits.frame_pixels:
                raise ApiError(
                    400,
                    f"The request's images have {self._pixels:,} pixels up to one of {image.width} x {image.height}; "
                    f"{limits.frame_pixels:,} are the most.",
                )
            return image.convert("RGB")
        except ApiError:
            raise
        except Exception as error:  # each format fails in ways of its own
            raise ApiError(400, "An image_url holds nothing that can be read as an image.") from error

    def _pieces(self, url: str, limits: Limits) -> Iterator[bytes]:
        left = max(self._end - time.monotonic(), 0.0)
        limits = replace(limits, seconds=left if limits.seconds is None else min(limits.seconds, left))
        with located(url, limits) as (file, _):
            source = io.BytesIO(file) if isinstance(file, bytes) else file
            while piece := source.read(_BLOCK):
                yield piece

    def _allowed(self, url: str) -> Path | None:
        """The file that a path or a file:// URL names, if it may; None for URLs of servers and with data."""
        if re.match("(?i)(https?://|data:)", url):
            return None
        is_file_url = url.lower().startswith("file://")
        if self._rules.files is None or ("://" in url and not is_file_url):
            raise ApiError(400, "A url must be an http(s):// or a data: URL; this server opens nothing else.")
        folder = self._rules.files.resolve()
        path = (folder / (url2pathname(urlsplit(url).path) if is_file_url else url)).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise ApiError(400, "A path must be of a file in the folder whose files this server opens.")
        return path
