"""
What the tables of a file tell without reading what it contains: the frames of an mp4 or mov file, of hours of video in
milliseconds (ISO/IEC 14496-12; boxes by their four letters); and of Matroska, WebM and AVI whether all of it is there
(RFC 8794 and 9559; RIFF).
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

_LARGEST = 2**28  # bytes of a table of contents that are read: of weeks of video
_ALIKE = 2**22  # samples that all have one size, of which no table says how many there really are


class _Unusable(Exception):
    """Of a kind that only libav makes sense of."""


def mp4_table(file: Any, track: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """
    When each sample is shown, int64 in the track's units, and whether it is a key frame, in the order they are
    decoded; and how long the last one lasts. None where the file is fragmented, hides frames by an edit list, or is
    no such file at all.

    Args:
        file: a path, bytes, or a seekable binary file object.
        track: the number of the video's track.
    """
    try:
        with _opened(file) as opened:
            return _read(opened, track)
    except (_Unusable, OSError, ValueError, IndexError, KeyError, struct.error):
        return None


def missing_bytes(file: Any) -> int:
    """By how many bytes a Matroska, WebM or AVI file is shorter than it says; 0 where that does not show."""
    try:
        with _opened(file) as opened:
            length = opened.seek(0, io.SEEK_END)
            opened.seek(0)
            head = opened.read(2**12)
            return max(_promised(head) - length, 0)
    except (OSError, IndexError):
        return 0


def _promised(head: bytes) -> int:
    """The length of a file by its first bytes."""
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if size < 2**32 - 8 else 0  # as long as it lasts
    at = 0
    for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML, and the Segment that holds all else
        if head[at : at + 4] != element:
            return 0
        width = 9 - head[at + 4].bit_length()  # of the size, by its leading zeros
        size = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # as long as it lasts: a live stream
            return 0
        at += 4 + width + size
    return at


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[Any]:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            yield opened
    else:
        yield io.BytesIO(file) if isinstance(file, bytes) else file


def _read(file: Any, track: int) -> tuple[np.ndarray, np.ndarray, int]:
    movie = dict(_boxes(memoryview(_table_of_contents(file)), several=(b"trak",)))
    if b"mvex" in movie:
        raise _Unusable("fragments")
    for trak in movie[b"trak"]:
        boxes = dict(_boxes(trak))
        header = boxes[b"tkhd"]
        if int.from_bytes(header[20:24] if header[0] else header[12:16], "big") == track:
            return _samples(boxes, movie[b"mvhd"])
    raise _Unusable("no such track")


def _table_of_contents(file: Any) -> bytes:
    end, at = file.seek(0, io.SEEK_END), 0
    while at + 8 <= end:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        if kind == b"moov" and head <= size <= min(_LARGEST, end - at):
            return file.read(size - head)
        if size < head or (at == 0 and kind not in (b"ftyp", b"wide", b"free", b"skip", b"mdat")):
            break
        at += size
    raise _Unusable("no table of contents")


def _boxes(data: memoryview, several: tuple[bytes, ...] = ()) -> Iterator[tuple[bytes, Any]]:
    """A box's boxes by kind; of those in `several`, all, in a list."""
    found: dict[bytes, list] = {kind: [] for kind in several}
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if size < 8:
            break
        content = data[at + 8 : at + size]
        if kind in found:
            found[kind].append(content)
        else:
            yield kind, content
        at += size
    yield from found.items()


def _samples(track: dict[bytes, memoryview], movie_header: memoryview) -> tuple[np.ndarray, np.ndarray, int]:
    media = dict(_boxes(track[b"mdia"]))
    tables = dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))
    header = media[b"mdhd"]
    unit = int.from_bytes(header[20:24] if header[0] else header[12:16], "big")
    counts, steps = _pairs(tables[b"stts"], ">u4")
    if counts.sum() != _count(tables):
        raise _Unusable("tables that do not fit each other")
    durations = np.repeat(steps, counts)
    times = np.cumsum(durations) - durations  # when decoded
    if b"ctts" in tables:
        counts, offsets = _pairs(tables[b"ctts"], ">i4")
        if counts.sum() != len(times):
            raise _Unusable("tables that do not fit each other")
        times = times + np.repeat(offsets, counts)
    keys = np.ones(len(times), bool)
    if b"stss" in tables:
        keys[:] = False
        keys[np.frombuffer(tables[b"stss"][8:], ">u4").astype(np.int64) - 1] = True
    if not len(times):
        raise _Unusable("no samples")
    last = int(durations[times.argmax()])
    shift = _shift(track, movie_header, unit, int(times.min()), int(times.max()))
    return times + shift, keys, last


def _count(tables: dict[bytes, memoryview]) -> int:
    """How many samples there are: as many as the table of their sizes lists."""
    if b"stsz" in tables:
        table = tables[b"stsz"]
        size, count = struct.unpack(">II", table[4:12])
        bits = 0 if size else 32
    else:
        table = tables[b"stz2"]
        bits, (count,) = table[7], struct.unpack(">I", table[8:12])
    if count > (8 * (len(table) - 12) // bits if bits else _ALIKE):
        raise _Unusable("more samples than are listed")
    return count


def _pairs(table: memoryview, second: str) -> tuple[np.ndarray, np.ndarray]:
    (count,) = struct.unpack(">I", table[4:8])
    rows = np.frombuffer(table[8 : 8 + 8 * count], np.dtype([("count", ">u4"), ("value", second)]))
    return rows["count"].astype(np.int64), rows["value"].astype(np.int64)


def _shift(track: dict[bytes, memoryview], movie_header: memoryview, unit: int, first: int, last: int) -> int:
    """What an edit list adds to all times, if it shows every frame."""
    if b"edts" not in track:
        return 0
    edits = dict(_boxes(track[b"edts"]))[b"elst"]
    (count,) = struct.unpack(">I", edits[4:8])
    layout = ">QqHH" if edits[0] else ">IiHH"
    entries = list(struct.iter_unpack(layout, edits[8 : 8 + count * struct.calcsize(layout)]))
    movie_unit = int.from_bytes(movie_header[20:24] if movie_header[0] else movie_header[12:16], "big")
    wait = 0
    if len(entries) == 2 and entries[0][1] == -1:
        wait = round(Fraction(entries[0][0] * unit, movie_unit))
        entries = entries[1:]
    if len(entries) != 1:
        raise _Unusable("an edit list of several parts")
    length, begin, rate, _ = entries[0]
    shown = Fraction(length * unit, movie_unit)
    if begin < 0 or begin > first or rate != 1 or (length and shown <= last - begin):
        raise _Unusable("an edit list that hides frames")
    return wait - begin


__all__ = ["mp4_table"]
