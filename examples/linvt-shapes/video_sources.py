"""Where a video comes from: what a caller gives to what can be opened, and no further than that."""

import base64
import binascii
import contextlib
import glob
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from .video_http import BLOCK, HttpFile
from .video_index import VideoReadError
from .video_limits import Limits

# In a list or folder, files with these endings are the frames of one video. GIF is not among them: a list of GIFs is
# several.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://|((?i:data)):", path) if isinstance(source, str) else None
    kind = (scheme[1] or scheme[2]).lower() if scheme else None
    if kind in ("http", "https"):
        name = repr(path.split("?")[0])  # a signed URL's query is not for logs
        return io.BufferedReader(HttpFile(path, name, limits), BLOCK), name
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
        return "://" in path or path[:5].lower() == "data:" or not (os.path.isdir(path) or glob.has_magic(path))
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


__all__ = ["IMAGE_SUFFIXES", "has_times", "images_of", "locate", "located"]
