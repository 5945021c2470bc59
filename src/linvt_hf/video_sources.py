"""Where a video comes from: what a caller gives to what can be opened, and no further than that."""

import base64
import binascii
import contextlib
import glob
import http.client
import io
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from .video_index import VideoReadError

# In a list or folder, files with these endings are the frames of one video. GIF is not among them: a list of GIFs is
# several.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_BLOCK, _MOST = 2**18, 2**23  # bytes asked of a server at a time, at first and at most
_KEPT = 2**26  # bytes of a server's answers that are kept


@dataclass(frozen=True)
class Limits:
    """
    What reading one video may take; all are ours, and None lifts a limit.

    frame_pixels: pixels of a frame.
    frames: frames that are returned.
    download_bytes: bytes fetched from a server, or held by a `data:` URL.
    seconds: from the beginning of the reading to its end.
    answer_seconds: that a server may keep silent.
    """

    frame_pixels: int | None = 2**26
    frames: int | None = 10_000
    download_bytes: int | None = 2**32
    seconds: float | None = 3600
    answer_seconds: float | None = 30


class Deadline:
    """When a reading must have come to its end."""

    def __init__(self, name: str, limits: Limits):
        self.name, self.seconds = name, limits.seconds
        self.end = None if limits.seconds is None else time.monotonic() + limits.seconds

    def check(self) -> None:
        """Raises `VideoReadError` once it has passed."""
        if self.end is not None and time.monotonic() > self.end:
            raise VideoReadError(f"{self.name} took longer to read than limits.seconds={self.seconds}; raise it.")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens meanwhile."""
        end, self.end, began = self.end, None, time.monotonic()
        try:
            yield
        finally:
            self.end = None if end is None else end + time.monotonic() - began


def locate(source: Any, limits: Limits) -> tuple[Any, str]:
    """
    What to open (an absolute path, bytes, or a seekable binary file object) and its name for messages; or the paths of
    the images of a folder or a glob, in a list, in the order of the numbers in their names.

    Raises `FileNotFoundError` for a path that does not exist, `VideoReadError` for what cannot be fetched, and
    `ValueError` for what is no source of a video.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise VideoReadError("the given file is empty (0 bytes).")
        return bytes(source), f"the given file of {len(source)} bytes"
    if isinstance(source, str | Path):
        return _locate_path(source, limits)
    if not hasattr(source, "read") or isinstance(source, io.TextIOBase):
        raise ValueError(
            f"a {type(source).__name__} is not a video: give a path, URL, bytes, binary file object, uint8 array or "
            "tensor [T, H, W, 3], or list of images."
        )
    name = f"the file object {getattr(source, 'name', type(source).__name__)!r}"
    file = source if hasattr(source, "seekable") and source.seekable() else io.BytesIO(source.read())
    if file.seek(0, io.SEEK_END) == 0:
        raise VideoReadError(f"{name} is empty (0 bytes).")
    return file, name


@contextlib.contextmanager
def located(source: Any, limits: Limits) -> Iterator[tuple[Any, str]]:
    """`locate`; what that opened, a server's file, is closed at the end."""
    file, name = locate(source, limits)
    try:
        yield file, name
    finally:
        if isinstance(getattr(file, "raw", None), HttpFile):
            file.close()


def _locate_path(source: str | Path, limits: Limits) -> tuple[Any, str]:
    path = str(source)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://|(data):", path) if isinstance(source, str) else None
    kind = (scheme[1] or scheme[2]).lower() if scheme else None
    if kind in ("http", "https"):
        name = repr(path.split("?")[0])  # a signed URL's query is not for logs
        return io.BufferedReader(HttpFile(path, name, limits), _BLOCK), name
    if kind == "data":
        return _of_data_url(path, limits)
    if kind == "file":
        path = url2pathname(urlsplit(path).path)
    if os.path.isdir(path) or (not os.path.exists(path) and glob.has_magic(path) and "\n" not in path):
        return images_of(path), repr(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path[:200]!r} is neither an existing file nor a file://, http(s):// or data: URL.")
    if os.path.getsize(path) == 0:
        raise VideoReadError(f"{path!r} is empty (0 bytes).")
    return os.path.abspath(path), repr(path)  # absolute, so that no name looks like one of FFmpeg's protocols


def images_of(path: str) -> list[str]:
    """The images of a folder, or those that a glob names, in the order of the numbers in their names."""
    folder = os.path.isdir(path)
    names = [os.path.join(path, name) for name in os.listdir(path)] if folder else glob.glob(path)
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not images:
        what = "is a folder without images; a video's folder holds its frames" if folder else "names no images"
        raise ValueError(f"{path!r} {what}.")
    return sorted(images, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def has_times(source: Any) -> bool:
    """Whether a source, as `read_video` takes it, is a file or a `Clip`, which know their frames' times."""
    if isinstance(source, str | Path):
        path = str(source)
        return "://" in path or path.startswith("data:") or not (os.path.isdir(path) or glob.has_magic(path))
    return isinstance(source, bytes | bytearray | memoryview) or hasattr(source, "read") or hasattr(source, "times")


def _of_data_url(url: str, limits: Limits) -> tuple[bytes, str]:
    head, comma, content = url[5:].partition(",")
    name = f"the data: URL ({head[:60]})"
    if limits.download_bytes is not None and len(content) * 3 // 4 > limits.download_bytes:
        raise VideoReadError(f"{name} holds more than limits.download_bytes={limits.download_bytes}.")
    try:
        data = base64.b64decode(content, validate=True) if head.endswith(";base64") else unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise VideoReadError(f"{name} is not base64 as it says.") from error
    if not comma or not data:
        raise VideoReadError(f"{name} holds nothing.")
    return data, name


# ---- files of a server ----


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only to where a caller could have pointed: a server must not make us open a local file."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise VideoReadError(f"the server redirects to {newurl[:100]!r}, which is not http or https.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # without urllib's handlers of files, ftp and data
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


class HttpFile(io.RawIOBase):
    """
    A server's file, of which only what is read is fetched; all of it, to a temporary file, where the server gives no
    parts. Counts against `limits.download_bytes`.
    """

    def __init__(self, url: str, name: str, limits: Limits):
        super().__init__()
        self.url, self.name, self.limits = url, name, limits
        self.fetched = self.at = 0
        self.blocks: dict[int, bytes] = {}  # by where they begin, the oldest first
        self.whole: Any = None
        self._opener, self._next, self._size = _opener(), 0, _BLOCK
        with self._request(0, _BLOCK) as answer:
            total = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status == 206 and total:
                self.length = int(total[1])
                self._keep(0, self._take(answer, _BLOCK))
            else:
                self.whole = tempfile.TemporaryFile()  # noqa: SIM115  closed with this file
                while piece := self._take(answer, _MOST):
                    self.whole.write(piece)
                self.length = self.whole.tell()
                promised = answer.headers.get("Content-Length", "")
                if promised.isdigit() and self.length < int(promised):
                    self.whole.close()
                    raise VideoReadError(
                        f"{name} cannot be fetched: the connection broke after {self.length} of {promised} bytes."
                    )
        if not self.length:
            raise VideoReadError(f"{name} is empty (0 bytes).")

    def _request(self, start: int, count: int) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + count - 1}"})
        try:
            return self._opener.open(request, timeout=self.limits.answer_seconds)
        except urllib.error.HTTPError as error:
            raise VideoReadError(
                f"{self.name} cannot be fetched: the server says {error.code} {error.reason}."
            ) from error
        except VideoReadError as error:
            raise VideoReadError(f"{self.name} cannot be fetched: {error}") from error
        except http.client.InvalidURL as error:  # which would repeat the whole of it
            raise VideoReadError(f"{self.name} cannot be fetched: it is no valid URL.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise VideoReadError(f"{self.name} cannot be fetched: {getattr(error, 'reason', error)}.") from error

    def _take(self, answer: http.client.HTTPResponse, count: int) -> bytes:
        try:
            data = answer.read(count)
        except (OSError, http.client.HTTPException) as error:
            raise VideoReadError(f"{self.name} cannot be fetched: the connection broke ({error}).") from error
        self.fetched += len(data)
        if self.limits.download_bytes is not None and self.fetched > self.limits.download_bytes:
            raise VideoReadError(
                f"{self.name} took more than limits.download_bytes={self.limits.download_bytes} to fetch; raise it."
            )
        return data

    def _keep(self, start: int, data: bytes) -> None:
        self.blocks[start] = data
        while len(self.blocks) > 1 and sum(map(len, self.blocks.values())) > _KEPT:
            del self.blocks[next(iter(self.blocks))]

    def _block(self) -> tuple[int, bytes]:
        """A piece of the file that holds the place where reading goes on."""
        for start, data in self.blocks.items():
            if start <= self.at < start + len(data):
                return start, data
        # Who reads on gets more at a time.
        self._size = min(2 * self._size, _MOST) if self.at == self._next else _BLOCK
        with self._request(self.at, self._size) as answer:
            if answer.status != 206:
                raise VideoReadError(
                    f"{self.name} cannot be fetched: the server gave parts of it, and now gives none."
                )
            data = self._take(answer, self._size)
        if not data:
            raise VideoReadError(f"{self.name} cannot be fetched: the server sent nothing.")
        self._keep(self.at, data)
        self._next = self.at + len(data)
        return self.at, data

    def readinto(self, buffer) -> int:
        if self.at >= self.length:
            return 0
        if self.whole is not None:
            self.whole.seek(self.at)
            count = self.whole.readinto(buffer)
        else:
            start, data = self._block()
            piece = data[self.at - start : self.at - start + len(buffer)]
            count = len(piece)
            buffer[:count] = piece
        self.at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence], 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self.whole is not None:
            self.whole.close()
        super().close()


__all__ = ["Deadline", "HttpFile", "IMAGE_SUFFIXES", "Limits", "has_times", "images_of", "locate", "located"]
