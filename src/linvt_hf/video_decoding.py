"""
The wanted frames of a video file, exactly as a decode of the whole file gives them, with as little decoding as that
takes.

First every packet is listed, by the file's table of contents or by reading it, none decoded: `VideoIndex`. That tells
which frames there are, when each is shown, and where decoding may begin. Then each wanted frame is decoded from the
last such place before it, on several threads in several parts of the file at once; frames that no other refers to are
skipped on the way. Wherever the decoded frames are not what was listed, the file is decoded from its beginning
instead, which no file can mislead.
"""

import contextlib
import io
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .video_index import VideoIndex, VideoReadError, import_av, list_frames, list_packets, list_table
from .video_sources import Deadline, Limits

# What libav may open: formats that hold their frames themselves. Playlists and their like open other files, and hosts.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,obu,h264,hevc,vvc,vc1,gif,apng,mjpeg,nut,rm,mxf,dv,wtv,"
    "yuv4mpegpipe,dnxhd,dirac,bmp_pipe,jpeg_pipe,png_pipe,tiff_pipe,webp_pipe"
)
_SAFE = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
# Packets that are rather decoded than jumped over (ours): to begin anew costs about as much.
_NEAR = 8


class _Misled(Exception):
    """The decoded frames are not what the packets said."""


@dataclass
class Stretch:
    """Packets `start` to `end` of a file, decoded in one go, and the slots of the frames wanted of them."""

    start: int
    end: int
    wanted: dict[int, int]  # packet to slot


class VideoFile:
    """
    The first video stream of a file, other than a song's cover.

    Args:
        source: a path, bytes, or a seekable binary file object.
        name: for messages.
        threads: that decode; None for as many as PyTorch uses, which is one in a data loader's workers.
        limits: the seconds count from here.

    `decoded` counts the frames that were decoded so far.
    """

    def __init__(self, source: Any, name: str, threads: int | None = None, limits: Limits | None = None):
        self.source, self.name, self.decoded = source, name, 0
        self.limits = limits or Limits()
        self.deadline = Deadline(name, self.limits)
        self.threads = threads or torch.get_num_threads()
        # Several readers of one file object would move each other's place.
        self.readers = self.threads if isinstance(source, str | bytes) else 1

    def read(self, choose: Callable[[VideoIndex], list[int]]) -> tuple[VideoIndex, list[int], np.ndarray]:
        """The index, what was chosen of it (ascending, each once), and those frames, uint8 [T, H, W, 3]."""
        for index in self._indices():
            picks = choose(index)
            check_count(self.name, len(picks), self.limits)
            with contextlib.suppress(_Misled):
                return index, picks, self._decode(index, picks)
        raise VideoReadError(
            f"{self.name} cannot be read: its pictures turn on the way, or are others each time it is decoded."
        )

    def index(self) -> VideoIndex:
        """Which frames there are, with as little reading as tells; none is decoded where packets can be believed."""
        return next(self._indices())

    def _indices(self) -> Iterator[VideoIndex]:
        """What tells which frames there are, the quickest first; the last, by decoding all of them, cannot mislead."""
        for listed in (self.by_table, self.by_packets):
            index = listed()
            if index is not None and index.dated:
                yield index
        with self.opened(self.threads) as (container, stream):
            index = list_frames(container, stream, self.deadline.check)
        self.decoded += index.total
        yield index

    def by_table(self) -> VideoIndex | None:
        """By an mp4 file's table of contents; None for other files."""
        with self.opened() as (container, stream):
            return list_table(container, stream, self.source)

    def by_packets(self) -> VideoIndex:
        with self.opened() as (container, stream):
            return list_packets(container, stream, self.deadline.check)

    def turned(self, index: VideoIndex) -> int:
        """By how many degrees, counterclockwise, the first frame is turned before it is shown; 0 if there is none."""
        with self.opened() as (container, stream):
            for frame in index.decode(container, stream, self.deadline.check):
                return round(frame.rotation) % 360
        return 0

    def _decode(self, index: VideoIndex, picks: list[int]) -> np.ndarray:
        stretches = _stretches(index, picks)
        if stretches is None:
            return self._from_the_start(index, picks)
        parts = _share(stretches, self.readers)
        frames, threads = _Frames(self, len(picks)), max(self.threads // len(parts), 1)
        if len(parts) == 1:
            self.decoded += self._read_part(index, parts[0], frames, threads)
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                counts = pool.map(lambda part: self._read_part(index, part, frames, threads), parts)
                self.decoded += sum(counts)
        return frames.pixels

    def _read_part(self, index: VideoIndex, part: list[Stretch], frames: "_Frames", threads: int) -> int:
        damaged = import_av().error.FFmpegError
        decoded = 0
        with self.opened(threads) as (container, stream):
            for number, stretch in enumerate(part):
                shown = None
                try:
                    packets = self._packets(container, stream, index, stretch.start, fresh=number == 0)
                    for frame in _frames_of(packets, stream, index, stretch):
                        decoded += 1
                        packet = index.packet_of(frame.pts)
                        if packet is None or frame.is_corrupt or (shown is not None and frame.pts <= shown):
                            raise _Misled
                        shown = frame.pts
                        if packet in stretch.wanted:
                            frames.put(stretch.wanted.pop(packet), frame)
                except damaged as error:
                    raise _Misled from error
                if stretch.wanted:
                    raise _Misled
        return decoded

    def _packets(
        self, container: Any, stream: Any, index: VideoIndex, start: int, fresh: bool
    ) -> Iterator[tuple[int, Any]]:
        """The packets from number `start` on, with their numbers; `fresh`: nothing was read yet."""
        keys = np.flatnonzero(index.keys[: start + 1])
        for back in (1, 2, 4, 16, 64):  # some formats find what lies after the moment they are asked for
            if not (fresh and start == 0):
                beginning = int(index.pts[0] - 10 / index.time_base)
                container.seek(int(index.pts[keys[-back]]) if back <= len(keys) else beginning, stream=stream)
            begun = False
            for packet in container.demux(stream):
                self.deadline.check()
                number = index.packet_of(packet.pts) if packet.size else None
                begun = begun or number == start
                if begun and number is None:
                    raise _Misled
                if begun:
                    yield number, packet
                elif not packet.size or (number is not None and number > start):
                    break
            if begun or back > len(keys):
                return

    def _from_the_start(self, index: VideoIndex, picks: list[int]) -> np.ndarray:
        frames, slots = _Frames(self, len(picks), resize=True), {pick: slot for slot, pick in enumerate(picks)}
        stamps = None if index.from_frames else index.stamps.tolist()
        with self.opened(self.threads) as (container, stream):
            for number, frame in enumerate(index.decode(container, stream, self.deadline.check)):
                self.decoded += 1
                if stamps is not None and (number >= len(stamps) or frame.pts != stamps[number]):
                    raise _Misled
                if number in slots:
                    frames.put(slots.pop(number), frame)
                if not slots:
                    return frames.pixels
        raise _Misled

    @contextlib.contextmanager
    def opened(self, threads: int = 1) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream, from the file's start."""
        av, source = import_av(), self.source
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif not isinstance(source, str):
            source.seek(0)
        try:
            container = av.open(source, metadata_errors="replace", options=_SAFE)
        except av.error.FFmpegError as error:
            raise VideoReadError(f"{self.name} cannot be read as a video: {error.strerror}.") from error
        with container:
            cover = av.stream.Disposition.attached_pic  # a song's cover is a video stream too
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise VideoReadError(f"{self.name} holds no video stream.")
            if streams[0].codec_context is None:
                raise VideoReadError(f"{self.name} holds video of a kind that nothing here can decode.")
            check_size(self.name, streams[0].width, streams[0].height, self.limits)
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.thread_count = threads
            yield container, streams[0]


# ---- what is decoded ----


def _stretches(index: VideoIndex, picks: Sequence[int]) -> list[Stretch] | None:
    """For each place where decoding begins, how far it goes; None if it only begins at the first packet."""
    keys = np.flatnonzero(index.keys)
    if not index.seekable or len(keys) < 2:
        return None
    found: dict[int, Stretch] = {}
    for slot, pick in enumerate(picks):
        packet = int(index.order[pick])
        number = int(np.searchsorted(keys, packet, "right")) - 1
        # Of an open group of pictures, what is shown before its key frame refers to the group before.
        while number >= 0 and index.pts[keys[number]] > index.pts[packet]:
            number -= 1
        start = int(keys[number]) if number >= 0 else 0
        stretch = found.setdefault(start, Stretch(start, packet, {}))
        stretch.end = max(stretch.end, packet)
        stretch.wanted[packet] = slot
    return [found[start] for start in sorted(found)]


def _share(stretches: list[Stretch], readers: int) -> list[list[Stretch]]:
    """The stretches in as many parts, of about as much work each; in a part, those that lie near are one."""
    work = np.cumsum([stretch.end - stretch.start + 1 + _NEAR for stretch in stretches])
    parts: list[list[Stretch]] = [[] for _ in range(readers)]
    for stretch, done in zip(stretches, work, strict=True):
        part = parts[min(int((done - 1) * readers / work[-1]), readers - 1)]
        if part and stretch.start - part[-1].end <= _NEAR:
            part[-1].end = max(part[-1].end, stretch.end)
            part[-1].wanted.update(stretch.wanted)
        else:
            part.append(stretch)
    return [part for part in parts if part]


def _frames_of(packets: Iterator[tuple[int, Any]], stream: Any, index: VideoIndex, stretch: Stretch) -> Iterator[Any]:
    """The frames of a stretch in the order shown, without those that nobody needs."""
    context = stream.codec_context
    for number, packet in packets:
        wanted = number in stretch.wanted
        if number == stretch.start and index.starts_whole and not index.starts_whole(memoryview(packet)):
            raise _Misled
        if index.can_skip:
            context.skip_frame = "DEFAULT" if wanted else "NONREF"
        if wanted or not index.intra:
            yield from packet.decode()
        if number == stretch.end:
            break
    yield from context.decode(None)  # what waits for its turn comes out without decoding more


class _Frames:
    """Frames to pixels of one array, each in its slot, from several threads."""

    def __init__(self, file: VideoFile, count: int, resize: bool = False):
        self.file, self.count, self.resize, self.pixels = file, count, resize, None
        self._lock, self._own, self._size = threading.Lock(), threading.local(), None

    def put(self, slot: int, frame: Any) -> None:
        if not hasattr(self._own, "convert"):  # one for all frames: each new one starts its own threads
            self._own.convert = import_av().video.reformatter.VideoReformatter()
        size = (frame.width, frame.height)
        check_size(self.file.name, *size, self.file.limits)
        with self._lock:
            self._size = self._size or size
        if size != self._size and not self.resize:
            raise _Misled  # which frame is the first, whose size counts, only a reading in order tells
        width, height = self._size
        plane = self._own.convert.reformat(frame, format="rgb24", width=width, height=height).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        picture = upright(rows[:, : 3 * width].reshape(height, width, 3), frame)
        with self._lock:
            if self.pixels is None:
                self.pixels = np.empty((self.count, *picture.shape), np.uint8)
        if picture.shape != self.pixels.shape[1:]:
            raise _Misled
        self.pixels[slot] = picture


def check_size(name: str, width: int, height: int, limits: Limits) -> None:
    """Raises `VideoReadError` for frames that are too large."""
    if limits.frame_pixels is not None and width * height > limits.frame_pixels:
        raise VideoReadError(
            f"{name} has frames of {width} x {height}, {width * height:,} pixels, and limits.frame_pixels is "
            f"{limits.frame_pixels:,}; raise it to read them."
        )


def check_count(name: str, frames: int, limits: Limits) -> None:
    """Raises `VideoReadError` for too many frames."""
    if limits.frames is not None and frames > limits.frames:
        raise VideoReadError(
            f"{name}: {frames:,} frames are asked for, and limits.frames is {limits.frames:,}; ask for fewer "
            "(num_frames), or raise it."
        )


def upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """A frame's picture [H, W, 3] mirrored and turned, as its display matrix says."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    right, down, _, x, y, *_ = np.frombuffer(matrix, np.int32).tolist()  # where the picture's axes point
    if right * y - down * x < 0:  # mirrored: first from left to right, and the axis points the other way
        picture, right, down = picture[:, ::-1], -right, -down
    return np.rot90(picture, round(-math.atan2(down, right) / (math.pi / 2)))  # counterclockwise


__all__ = ["VideoFile", "check_count", "check_size", "upright"]
