"""Which frames a video file holds, when each is shown, and where decoding may begin."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .video_tables import mp4_table

_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
# Formats whose packets say when their frames are shown. Others (AVI, raw streams) do where nothing is reordered.
_DATED = (_MP4, "matroska,webm", "mpegts", "flv")
# Codecs of which a key frame, and all that is shown after it, is decoded without anything before it.
_SEEKABLE = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video"),
    *("prores", "mjpeg", "ffv1", "dnxhd"),
)
# Codecs whose decoder can leave out frames that no other refers to, without changing the rest.
_SKIPPING = ("h264", "mpeg4", "mpeg2video", "mpeg1video")


class VideoReadError(ValueError):
    """A video that cannot be read, or not in the way that was asked for, in one sentence."""


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading a video file needs PyAV: pip install av. Arrays, tensors and lists of images work without it."
        ) from error
    return av


@dataclass
class VideoIndex:
    """
    A video's packets, in the order they are decoded, and its frames, in the order they are shown.

    pts: int64 [packets], when each is shown, in units of `time_base`; without `dated`, of no meaning.
    keys: bool [packets], where decoding may begin, for what is shown from there on.
    order: int64 [frames], each frame's packet.
    dated: whether every packet says when it is shown, and no two the same.
    seekable: whether decoding may begin at any of `keys`.
    can_skip: whether the decoder can leave out frames that no other refers to.
    from_frames: whether all was learned by decoding; else from packets, which may mislead.
    times: float64 [frames], seconds from the first frame; None where nobody knows.
    duration: seconds, from the first frame to the end of the last; None where nobody knows.
    starts_whole: for a key frame's packet, whether the picture is whole there at once; None where all are.
    problem: what is wrong with the file, where something was met; this may grow while it is decoded.
    """

    format: str
    codec: str
    width: int
    height: int
    time_base: Any
    rate: Any  # frames a second, by the header
    promised: int  # frames, by the header; 0 where it does not tell
    from_frames: bool
    pts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    dated: bool = False
    seekable: bool = False
    can_skip: bool = False
    times: np.ndarray | None = None
    duration: float | None = None
    starts_whole: Callable[[memoryview], bool] | None = None
    problem: str | None = None

    @property
    def total(self) -> int:
        return len(self.order)

    @cached_property
    def intra(self) -> bool:
        """Whether no frame refers to another."""
        return self.seekable and bool(self.keys.all())

    @property
    def stamps(self) -> np.ndarray:
        return self.pts[self.order]

    def packet_of(self, pts: int | None) -> int | None:
        """The packet of what is shown at that time; None if there is none."""
        if pts is None:
            return None
        place = int(np.searchsorted(self._ascending, pts))
        found = place < len(self._ascending) and self._ascending[place] == pts
        return int(self._ascending_packets[place]) if found else None

    @cached_property
    def _ascending_packets(self) -> np.ndarray:
        return np.argsort(self.pts, kind="stable")

    @cached_property
    def _ascending(self) -> np.ndarray:
        return self.pts[self._ascending_packets]

    def nearest_keys(self, picks: list[int]) -> list[int]:
        """For each frame the key frame that is shown nearest to it, each once; the frames as they are without keys."""
        keys = np.flatnonzero(self.keys[self.order]) if self.seekable else np.zeros(0, np.int64)
        if not len(keys):
            return picks
        stamps = self.stamps
        after = np.searchsorted(keys, picks).clip(0, len(keys) - 1)
        before = (after - 1).clip(0)
        left, right = (abs(stamps[keys[side]] - stamps[picks]) for side in (before, after))
        return sorted(set(keys[np.where(left <= right, before, after)].tolist()))

    def decode(self, container: Any, stream: Any, check: Callable[[], None]) -> Iterator[Any]:
        """
        All frames that can be decoded, in the order shown; `problem` tells of others. `check` is called for each
        packet, and may raise.
        """
        error, count = import_av().error, 0
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except error.FFmpegError as broken:
                self.problem = f"it breaks off after frame {count} ({broken.strerror})"
                return
            if packet is None:
                return
            check()
            try:
                frames = packet.decode()
            except error.FFmpegError as broken:  # the packets after it can be good
                self.problem = f"after frame {count} a part of it cannot be decoded ({broken.strerror})"
                continue
            for frame in frames:
                if frame.is_corrupt:  # what could not be decoded is made up
                    self.problem = f"frame {count} is not whole"
                count += 1
                yield frame

    def finish(
        self, pts: np.ndarray | list[int | None], durations: Sequence[int | None], shown: Sequence[bool]
    ) -> None:
        """Order and times, from what is listed of each packet, or each frame."""
        visible = np.flatnonzero(np.asarray(shown, bool))
        known = isinstance(pts, np.ndarray) or None not in pts
        self.pts = np.asarray(pts if known else np.zeros(len(pts)), np.int64)
        self.order = visible[np.argsort(self.pts[visible], kind="stable")] if known else visible
        stamps = self.stamps
        gap = float(1 / self.rate) if self.rate else None
        if known and len(stamps) and (stamps[1:] > stamps[:-1]).all():
            self.dated = bool((self._ascending[1:] > self._ascending[:-1]).all())
            self.times = (stamps - stamps[0]) * float(self.time_base)
            if last := durations[self.order[-1]]:
                gap = float(int(last) * self.time_base)
            elif len(stamps) > 1:
                gap = self.times[-1] / (len(stamps) - 1)
        elif gap:
            self.times = np.arange(self.total) * gap
        if self.times is not None and gap and self.total:
            self.duration = float(self.times[-1] + gap)


def list_table(container: Any, stream: Any, file: Any) -> VideoIndex | None:
    """What the table of contents of an mp4 file tells; None for other files, and tables that leave something open."""
    index = _header(container, stream, from_frames=False)
    table = mp4_table(file, stream.id) if index.format == _MP4 else None
    if table is None:
        return None
    pts, index.keys, last = table
    index.finish(pts, np.full(len(pts), last), np.ones(len(pts), bool))
    _judge(index, stream.codec_context)
    index.starts_whole = _key_test(index.codec, stream.codec_context.extradata)
    return index


def list_packets(container: Any, stream: Any, check: Callable[[], None]) -> VideoIndex:
    """What the packets tell, without decoding; `dated` says whether that can be believed."""
    index, context = _header(container, stream, from_frames=False), stream.codec_context
    key_tells = _key_test(index.codec, context.extradata)
    pts, durations, keys, shown = [], [], [], []
    try:
        for packet in container.demux(stream):
            check()
            if packet.size:
                pts.append(packet.pts)
                durations.append(packet.duration)
                keys.append(packet.is_keyframe and (key_tells is None or key_tells(memoryview(packet))))
                shown.append(not packet.is_discard and (index.codec != "vp8" or bool(memoryview(packet)[0] & 16)))
    except import_av().error.FFmpegError as error:
        index.problem = f"it breaks off after packet {len(pts)} ({error.strerror})"
    entries = len(stream.index_entries or ()) if index.format == _MP4 else 0
    if not index.problem and len(pts) < entries:
        index.problem = f"it breaks off after {len(pts)} of {entries} packets"
    index.keys = np.array(keys, bool)
    index.finish(pts, durations, shown)
    _judge(index, context)
    return index


def _judge(index: VideoIndex, context: Any) -> None:
    believed = index.format in _DATED or not context.has_b_frames
    index.seekable = index.dated and believed and index.codec in _SEEKABLE
    index.can_skip = index.codec in _SKIPPING or (index.codec == "hevc" and _is_one_layer(context.extradata))


def list_frames(container: Any, stream: Any, check: Callable[[], None]) -> VideoIndex:
    """What the frames tell, by decoding all of them."""
    index = _header(container, stream, from_frames=True)
    marks = [(frame.pts, frame.duration) for frame in index.decode(container, stream, check)]
    pts, durations = map(list, zip(*marks, strict=True)) if marks else ([], [])
    if None not in pts and any(a >= b for a, b in zip(pts[:-1], pts[1:], strict=True)):
        pts = [None] * len(pts)  # frames come in the order they are shown, so these are no times
    index.finish(pts, durations, [True] * len(pts))
    return index


def _header(container: Any, stream: Any, from_frames: bool) -> VideoIndex:
    context = stream.codec_context
    return VideoIndex(
        format=container.format.name,
        codec=context.codec.canonical_name,
        width=context.width,
        height=context.height,
        time_base=stream.time_base,
        rate=stream.average_rate,
        promised=stream.frames,
        from_frames=from_frames,
    )


def _key_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """
    H.264 also calls a frame a key frame from which on the picture only builds up (intra refresh). This tells those
    where it is whole at once.
    """
    if codec != "h264":
        return None
    length = (extradata[4] & 3) + 1 if extradata and extradata[0] == 1 else None  # else start codes

    def whole_at_once(packet: memoryview) -> bool:
        for unit in _units(packet, length):
            kind = unit[0] & 31 if len(unit) else 0
            if kind == 5:  # IDR
                return True
            if kind == 1:  # a slice: what would tell comes before it
                return False
            if kind == 6 and (recovery := _message(unit, 6)):
                return bool(recovery[0] & 128)  # it is in 0 frames, as exp-Golomb writes it
        return False

    return whole_at_once


def _is_one_layer(extradata: bytes | None) -> bool:
    """Of HEVC, whose frames of a higher temporal layer may refer to what its decoder takes for referred to by none."""
    return bool(extradata) and len(extradata) > 22 and extradata[0] == 1 and extradata[21] >> 3 & 7 == 1


def _message(unit: memoryview, wanted: int) -> bytes:
    """The content of a supplemental message of this type in a NAL unit; empty if there is none."""
    data, at = bytes(unit[1:1024]).replace(b"\0\0\3", b"\0\0"), 0
    while at + 2 < len(data):  # the last byte ends the unit
        header = []
        for _ in ("type", "size"):
            value = 0
            while at < len(data) - 1 and data[at] == 255:
                value, at = value + 255, at + 1
            header.append(value + data[at])
            at += 1
        kind, size = header
        if kind == wanted:
            return data[at : at + size]
        at += size
    return b""


def _units(packet: memoryview, length: int | None) -> Iterator[memoryview]:
    """The NAL units of a packet, each after its length in so many bytes, or after a start code."""
    if length is not None:
        at = 0
        while at + length < len(packet):
            size = int.from_bytes(packet[at : at + length], "big")
            at += length
            yield packet[at : at + size]
            at += size
        return
    data, at = bytes(packet[:4096]), 0
    while (at := data.find(b"\0\0\1", at)) >= 0:
        at += 3
        yield packet[at:]


__all__ = ["VideoIndex", "VideoReadError", "import_av", "list_frames", "list_packets", "list_table"]
