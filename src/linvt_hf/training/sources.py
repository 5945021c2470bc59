"""
Data files in, conversations out.

`read_source` reads a file of records in any layout that `records` knows and checks each before training starts; what
is wrong is one sentence that names the file and the line. Videos and images stay paths: a sample opens them when it is
made.
"""

import json
import math
import os
import pickle
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import Conversation, MediaFinder, conversation_of

_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass
class DataSource:
    """
    One entry of a run's data.

    path: a .json, .jsonl or .parquet file, or a folder that `datasets.save_to_disk` wrote.
    weight: how often each record is used an epoch: 0.5 is a random half, another one each epoch, 2 is twice.
    media: folder of relative video and image paths; by default the folder of the data file.
    split: of a folder with several.
    num_frames, fps: how this source's videos are sampled, instead of the run's settings.
    check_media: whether each video and image must be there already when the source is read.
    """

    path: str
    weight: float = 1.0
    media: str | None = None
    split: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    check_media: bool = True

    def __post_init__(self):
        self.path = os.fspath(self.path)
        self.media = None if self.media is None else os.fspath(self.media)
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"{self.path}: weight is {self.weight}; it must be above 0 and finite, or leave the source out."
            )
        check_sampling(self.num_frames, self.fps, f"{self.path}: ")

    def check_there(self) -> None:
        if not Path(self.path).exists():
            raise FileNotFoundError(f"There is no data file {self.path}.")


class Conversations(Sequence):
    """
    Conversations, packed into one piece of memory and made anew whenever one is asked for.

    As objects, millions of them take several times as much, and that once more in each of a data loader's processes:
    looking at an object writes to it (its count of references), so its memory does not stay shared.
    """

    def __init__(self, conversations: Iterable[Conversation] = ()):
        self._packed = bytearray()
        self._starts = array("Q", [0])
        self._objects: dict[int, Conversation] = {}
        for conversation in conversations:
            self.append(conversation)

    def append(self, conversation: Conversation) -> None:
        if _only_names(conversation):
            values = conversation.messages, conversation.origin, conversation.num_frames, conversation.fps
            self._packed += pickle.dumps(values, pickle.HIGHEST_PROTOCOL)
        else:  # videos in memory stay the objects they are: they are large, and a feature cache knows them by identity
            self._objects[len(self)] = conversation
        self._starts.append(len(self._packed))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._objects:
            return self._objects[index]
        return Conversation(*pickle.loads(self._packed[self._starts[index] : self._starts[index + 1]]))


def _only_names(conversation: Conversation) -> bool:
    """Whether videos and images are paths and URLs, or lists of them."""
    shown = [block[block["type"]] for message in conversation.messages for block in message["content"]]
    return all(isinstance(part, str) for value in shown for part in (value if isinstance(value, list) else [value]))


def read_source(source: DataSource) -> Conversations:
    """
    All conversations of a source.

    Raises `FileNotFoundError` for a data file, video or image that is not there, and `ValueError` for a record that
    cannot be used; both name file and line.
    """
    source.check_there()
    path = Path(source.path)
    records: Iterator[tuple[str, Any]]
    if path.is_dir():
        records = _saved_dataset(path, source.split)
    elif path.suffix == ".jsonl":
        records = _json_lines(path)
    elif path.suffix == ".json":
        records = _json_file(path)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    else:
        raise ValueError(
            f"{source.path} ends in '{path.suffix}'; data is read from {', '.join(_SUFFIXES)} files and from folders "
            "of datasets.save_to_disk."
        )
    media = Path(source.media) if source.media else path if path.is_dir() else path.parent
    return _conversations(records, source.path, media, source.check_media, source.num_frames, source.fps)


def read_records(
    records: Iterable[dict],
    *,
    name: str = "records",
    media: str | Path = ".",
    check_media: bool = True,
    num_frames: int | None = None,
    fps: float | None = None,
) -> Conversations:
    """
    Conversations of records that are in memory already: dicts in any of the layouts, or a `datasets.Dataset`. Videos
    and images may then be arrays and pictures as well as paths. Raises what `read_source` raises, by `name`.
    """
    check_sampling(num_frames, fps, f"{name}: ")
    if hasattr(records, "with_format"):
        records = _rows(records)
    numbered = ((f"{name}: record {number}", record) for number, record in enumerate(records, 1))
    return _conversations(numbered, name, Path(media), check_media, num_frames, fps)


def check_sampling(num_frames: int | None, fps: float | None, where: str = "") -> None:
    """Raises `ValueError` for settings that no video can be sampled by."""
    if (num_frames is not None and num_frames < 1) or (fps is not None and not 0 < fps < math.inf):
        raise ValueError(
            f"{where}num_frames must be at least 1 and fps above 0 and finite; got {num_frames} and {fps}."
        )


# ---- files to records, each with where it stands ----


def _decoded(content: bytes, path: Path, line: int = 1) -> str:
    """The text of a file, or of its part that begins in `line`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: this is not UTF-8; save the file in that encoding.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            line = _decoded(content, path, number)
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: the line is not JSON ({error.msg}).") from error


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, or, as some files with this ending are, one record a line."""
    text = _decoded(path.read_bytes(), path)
    space, decoder = re.compile(r"\s*"), json.JSONDecoder()
    place = space.match(text).end()
    if place == len(text):
        return
    if text[place] != "[":
        yield from _json_lines(path)
        return
    place = space.match(text, place + 1).end()
    line, counted, number = 1, 0, 0
    while place < len(text) and text[place] != "]":
        number, line, counted = number + 1, line + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno} (record {number}): this is not JSON ({error.msg}).") from error
        yield f"{path}:{line} (record {number})", record
        place = space.match(text, place).end()
        if text[place : place + 1] == ",":
            place = space.match(text, place + 1).end()
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise ValueError(f"{path}:{line}: a comma or ] should follow record {number}; the file may be cut off.")
    if place == len(text):
        raise ValueError(f"{path} ends after record {number} without a ]; the file may be cut off.")
    place = space.match(text, place + 1).end()
    if place < len(text):
        line = text.count("\n", 0, place) + 1
        raise ValueError(f"{path}:{line}: more follows the list of {number} records; make one list of all.")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read: pip install 'linvt_hf[train]'.") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: record {number}", record
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file beyond record {number}; it may be cut off.") from error


def _saved_dataset(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(f"{path} needs datasets to be read: pip install 'linvt_hf[train]'.") from error
    try:
        data = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is a folder, but not one that datasets.save_to_disk wrote.") from error
    if isinstance(data, dict):
        if split is None and len(data) > 1:
            raise ValueError(f"{path} has the splits {', '.join(data)}; name one with split.")
        if split is not None and split not in data:
            raise ValueError(f"{path} has no split {split}; it has {', '.join(data)}.")
        data = data[split or next(iter(data))]
    for number, record in enumerate(_rows(data), 1):
        yield f"{path}: record {number}", record


def _rows(dataset) -> Iterator[dict]:
    """A `datasets.Dataset`'s records, images and videos still encoded: as they come they would be decoded here."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _conversations(records, name: str, media: Path, check_media: bool, num_frames, fps) -> Conversations:
    find = MediaFinder(media, check_media)
    found = Conversations()
    for origin, record in records:
        conversation = conversation_of(record, origin, find)
        conversation.num_frames, conversation.fps = num_frames, fps
        found.append(conversation)
    if not found:
        raise ValueError(f"{name} holds no records.")
    return found


__all__ = ["Conversation", "Conversations", "DataSource", "check_sampling", "read_records", "read_source"]
