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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .video_chunks import Chunks, Misled, check_count, check_size
from .video_index import VideoIndex, VideoReadError, import_av, list_frames, list_packets, list_table
from .video_limits import Deadline, Limits
from .video_tables import missing_bytes

# What libav may open: formats that hold their frames themselves. Playlists and their like open other files, and hosts.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,obu,h264,hevc,vvc,vc1,gif,apng,mjpeg,nut,rm,mxf,dv,wtv,"
    "yuv4mpegpipe,dnxhd,dirac,bmp_pipe,jpeg_pipe,png_pipe,tiff_pipe,webp_pipe"
)
_SAFE = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
# Packets that are rather decoded than jumped over (ours): to begin anew costs about as much.
_NEAR = 8


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
        scale: height and width that upright frames are scaled to.

    `decoded` counts the frames that were decoded so far.
    """

    def __init__(
        self,
        source: Any,
        name: str,
        threads: int | None = None,
        limits: Limits | None = None,
        scale: tuple[int, int] | None = None,
    ):
        self.source, self.name, self.scale, self.decoded = source, name, scale, 0
        self.limits = limits or Limits()
        self.deadline = Deadline(name, self.limits)
        self.threads = threads or torch.get_num_threads()
        # Several readers of one file object would move each other's place.
        self.readers = self.threads if isinstance(source, str | bytes) else 1

    def read(self, choose: Callable[[VideoIndex], list[int]]) -> tuple[VideoIndex, list[int], np.ndarray]:
        """The index, what was chosen of it (ascending, each once), and those frames, uint8 [T, H, W, 3]."""
        for index, picks, _, pixels in self.stream(choose):
            read = index, picks, pixels
        return read

    def stream(
        self, choose: Callable[[VideoIndex], list[int]], size: int | None = None
    ) -> Iterator[tuple[VideoIndex, list[int], int, np.ndarray]]:
        """
        The same, `size` frames at a time, with the number of frames that came before. While they are looked at, the
        next are decoded. A file that turns out other than it says begins again, at 0 and with another index.
        """
        for index in self._indices():
            picks = choose(index)
            check_count(self.name, len(picks), self.limits)
            decoding = self._decode(index, picks, size or len(picks))
            with contextlib.suppress(Misled), contextlib.closing(decoding):
                for first, pixels in decoding:
                    with self.deadline.paused():
                        yield index, picks, first, pixels
                return
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
        yield self._judged(index)

    def by_table(self) -> VideoIndex | None:
        """By an mp4 file's table of contents; None for other files."""
        with self.opened() as (container, stream):
            return list_table(container, stream, self.source)

    def by_packets(self) -> VideoIndex:
        with self.opened() as (container, stream):
            return self._judged(list_packets(container, stream, self.deadline.check))

    def _judged(self, index: VideoIndex) -> VideoIndex:
        whole = index.problem or index.total == index.promised
        if not whole and (missing := missing_bytes(self.source)):
            index.problem = f"its last {missing:,} bytes are missing"
        return index

    def turned(self, index: VideoIndex) -> int:
        """By how many degrees, counterclockwise, the first frame is turned before it is shown; 0 if there is none."""
        with self.opened() as (container, stream):
            for frame in index.decode(container, stream, self.deadline.check):
                return round(frame.rotation) % 360
        return 0

    def _decode(self, index: VideoIndex, picks: list[int], size: int) -> Iterator[tuple[int, np.ndarray]]:
        stretches = _stretches(index, picks)
        chunks = Chunks(self.name, self.limits, self.deadline, len(picks), size, stretches is None, self.scale)
        readers = 1
        if stretches is None:
            work = [lambda: self._from_the_start(index, picks, chunks)]
        else:
            # Each stretch goes to whoever is free. Where one fills the room there is, more readers would only wait.
            longest = max(len(stretch.wanted) for stretch in stretches)
            fit = len(stretches) if size >= len(picks) else max(chunks.at_once // longest, 1)
            readers = min(self.readers, len(stretches), fit)
            waiting = deque(_joined(stretches, readers, chunks.at_once // readers))
            threads = max(self.threads // readers, 1)
            work = [lambda: self._read_stretches(index, waiting, chunks, threads)] * readers
        try:
            yield from chunks.filled_by(work, spare_thread=readers == 1 < self.threads)
        finally:
            self.decoded += chunks.decoded

    def _read_stretches(self, index: VideoIndex, waiting: deque[Stretch], chunks: Chunks, threads: int) -> None:
        damaged = import_av().error.FFmpegError
        fresh = True
        with self.opened(threads) as (container, stream):
            while True:
                try:
                    stretch = waiting.popleft()
                except IndexError:
                    return
                shown = None
                try:
                    packets = self._packets(container, stream, index, stretch.start, fresh, chunks.check)
                    for frame in _frames_of(packets, stream, index, stretch):
                        chunks.count()
                        packet = index.packet_of(frame.pts)
                        if packet is None or frame.is_corrupt or (shown is not None and frame.pts <= shown):
                            raise Misled
                        shown = frame.pts
                        if packet in stretch.wanted:
                            chunks.put(stretch.wanted.pop(packet), frame)
                except damaged as error:
                    raise Misled from error
                if stretch.wanted:
                    raise Misled
                fresh = False

    def _packets(
        self,
        container: Any,
        stream: Any,
        index: VideoIndex,
        start: int,
        fresh: bool,
        check: Callable[[], None],
    ) -> Iterator[tuple[int, Any]]:
        """The packets from number `start` on, with their numbers; `fresh`: nothing was read yet."""
        keys = np.flatnonzero(index.keys[: start + 1])
        for back in (1, 2, 4, 16, 64):  # some formats find what lies after the moment they are asked for
            if not (fresh and start == 0):
                beginning = int(index.pts[0] - 10 / index.time_base)
                container.seek(int(index.pts[keys[-back]]) if back <= len(keys) else beginning, stream=stream)
            begun = False
            for packet in container.demux(stream):
                check()
                number = index.packet_of(packet.pts) if packet.size else None
                begun = begun or number == start
                if begun and number is None:
                    raise Misled
                if begun:
                    yield number, packet
                elif not packet.size or (number is not None and number > start):
                    break
            if begun or back > len(keys):
                return

    def _from_the_start(self, index: VideoIndex, picks: list[int], chunks: Chunks) -> None:
        slots = {pick: slot for slot, pick in enumerate(picks)}
        stamps = None if index.from_frames else index.stamps.tolist()
        with self.opened(self.threads) as (container, stream):
            for number, frame in enumerate(index.decode(container, stream, chunks.check)):
                chunks.count()
                if stamps is not None and (number >= len(stamps) or frame.pts != stamps[number]):
                    raise Misled
                if number in slots:
                    chunks.put(slots.pop(number), frame)
                if not slots:
                    return
        raise Misled

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
    """For each place where decoding begins, how far it goes; None if nobody knows such places."""
    keys = np.flatnonzero(index.keys)
    if not index.seekable or not len(keys):
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


def _joined(stretches: list[Stretch], readers: int, room: int) -> list[Stretch]:
    """
    The stretches; of those that follow each other closely several are one, to be decoded without beginning anew, but
    not so long that it keeps one reader busy and the others waiting. No two have frames of each other's time.
    """
    work = sum(stretch.end - stretch.start + 1 for stretch in stretches)
    most = work if readers == 1 else work // (4 * readers)
    joined: list[Stretch] = []
    for stretch in stretches:
        last = joined[-1] if joined else None
        near = last and stretch.start - last.end <= _NEAR and stretch.end - last.start < most
        fits = last and len(last.wanted) + len(stretch.wanted) <= room
        if last and ((near and fits) or min(stretch.wanted.values()) < max(last.wanted.values())):
            last.end = max(last.end, stretch.end)
            last.wanted.update(stretch.wanted)
        else:
            joined.append(stretch)
    return joined


def _frames_of(packets: Iterator[tuple[int, Any]], stream: Any, index: VideoIndex, stretch: Stretch) -> Iterator[Any]:
    """The frames of a stretch in the order shown, without those that nobody needs."""
    context = stream.codec_context
    for number, packet in packets:
        wanted = number in stretch.wanted
        if number == stretch.start and index.starts_whole and not index.starts_whole(memoryview(packet)):
            raise Misled
        if index.can_skip:
            context.skip_frame = "DEFAULT" if wanted else "NONREF"
        if wanted or not index.intra:
            yield from packet.decode()
        if number == stretch.end:
            break
    yield from context.decode(None)  # what waits for its turn comes out without decoding more


__all__ = ["VideoFile"]
