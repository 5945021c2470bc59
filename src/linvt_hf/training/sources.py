"""
Data files in, conversations out.

`read_source` reads a file in any of the layouts below and checks each record before training starts; what is wrong
is one sentence that names the file and the line. Videos and images stay paths: a sample opens them when it is made.

Layouts of a record:

- `messages`: as chat templates take them; content is a text or a list of blocks, `{"type": "video", "path": ..}`.
- `conversations`: LLaVA's, `[{"from": "human", "value": ..}, {"from": "gpt", "value": ..}]` beside `video` or `image`,
  with `<video>` or `<image>` where each goes. LLaVA-Video-178K writes `<image>` for its videos, so in a record with
  videos alone that means a video. ShareGPTVideo's `video` names a folder of frames, and its `<video>` may come last.
- `QA`: VideoChat2-IT's, `[{"i": instruction, "q": question, "a": answer}]` beside `video` or `image`. The first
  instruction stands before the first question; where there is no question (captions) it is the question.

Without a placeholder, what a record names beside its turns comes first in its first turn.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..video_reading import is_one_video

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_PLACEHOLDER = re.compile(r"<\|?(video|image)(?:_token|_pad|_placeholder)?\|?>")
_MEDIA_KEYS = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}
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
        if not self.weight > 0:
            raise ValueError(f"{self.path}: weight is {self.weight}; it must be above 0, or leave the source out.")
        check_sampling(self.num_frames, self.fps, f"{self.path}: ")


@dataclass
class Conversation:
    """
    One record.

    messages: turns `{"role", "content"}`, content a list of blocks `{"type": "text", "text"}`, `{"type": "video",
        "video"}` and `{"type": "image", "image"}`. Relative paths were made absolute. The last turn is an answer.
    origin: where it came from, "file:line" or "file: record 12".
    num_frames, fps: how its videos are sampled, instead of the run's settings.
    """

    messages: list[dict]
    origin: str
    num_frames: int | None = None
    fps: float | None = None


def read_source(source: DataSource) -> list[Conversation]:
    """
    All conversations of a source.

    Raises `FileNotFoundError` for a data file, video or image that is not there, and `ValueError` for a record that
    cannot be used; both name file and line.
    """
    path = Path(source.path)
    if not path.exists():
        raise FileNotFoundError(f"There is no data file {source.path}.")
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
    conversations = _conversations(records, media, source.check_media, source.num_frames, source.fps)
    if not conversations:
        raise ValueError(f"{source.path} holds no records.")
    return conversations


def read_records(
    records: Iterable[dict],
    *,
    name: str = "records",
    media: str | Path = ".",
    check_media: bool = True,
    num_frames: int | None = None,
    fps: float | None = None,
) -> list[Conversation]:
    """
    Conversations of records that are in memory already: dicts in any of the layouts, or a `datasets.Dataset`. Videos
    and images may then be arrays and pictures as well as paths. Raises what `read_source` raises, by `name`.
    """
    check_sampling(num_frames, fps, f"{name}: ")
    if hasattr(records, "with_format"):
        records = _rows(records)
    numbered = ((f"{name}: record {number}", record) for number, record in enumerate(records, 1))
    conversations = _conversations(numbered, Path(media), check_media, num_frames, fps)
    if not conversations:
        raise ValueError(f"{name} holds no records.")
    return conversations


def check_sampling(num_frames: int | None, fps: float | None, where: str = "") -> None:
    """Raises `ValueError` for settings that no video can be sampled by."""
    if (num_frames is not None and num_frames < 1) or (fps is not None and not fps > 0):
        raise ValueError(f"{where}num_frames must be at least 1 and fps above 0; got {num_frames} and {fps}.")


# ---- files to records, each with where it stands ----


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: the line is not JSON ({error.msg}).") from error


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, or, as some files with this ending are, one record a line."""
    text = path.read_text(encoding="utf-8-sig")
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


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read: pip install 'linvt_hf[train]'.") from error
    number = 0
    for batch in ParquetFile(path).iter_batches(batch_size=1000):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}: record {number}", record


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


# ---- records to conversations ----


class _Media:
    """Videos and images as a record names them, to what readers take: absolute paths, or what is there already."""

    def __init__(self, folder: Path, check: bool):
        self.folder = os.path.abspath(folder)
        self.check = check
        self.there: dict[str, bool] = {}  # many records share a video

    def __call__(self, value: Any, kind: str, origin: str) -> Any:
        if isinstance(value, dict):  # as the image and video columns of `datasets` are stored
            if value.get("bytes") is not None:
                return value["bytes"]
            value = value.get("path")
        if isinstance(value, (list, tuple)):
            return [self(item, "frame", origin) for item in value]
        if not isinstance(value, (str, Path)):
            return value
        if not str(value):
            raise ValueError(f"{origin}: the path of its {kind} is empty.")
        if "://" in str(value):
            return str(value)
        path = os.path.normpath(os.path.join(self.folder, value))
        if self.check and not self.there.setdefault(path, os.path.exists(path)):
            raise FileNotFoundError(
                f"{origin}: there is no {kind} at {path}; `media` names the folder of relative paths."
            )
        return path


def _conversations(records, media: Path, check_media: bool, num_frames, fps) -> list[Conversation]:
    find = _Media(media, check_media)
    return [
        Conversation(_messages(record, origin, find), origin, num_frames=num_frames, fps=fps)
        for origin, record in records
    ]


def _messages(record: Any, origin: str, find: _Media) -> list[dict]:
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: a record must be an object with fields, not {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}  # Parquet fills what is missing
    turns = _turns(record, origin)
    given = {kind: _given(record, kind) for kind in ("video", "image")}
    if given["video"] and "start" in record and "end" in record:
        raise ValueError(
            f"{origin}: asks for {record['start']} to {record['end']} of its video, and only whole videos are read; "
            "cut the video and leave start and end out."
        )
    messages = [{"role": role, "content": _blocks(content, role, origin)} for role, content in turns]
    _check_turns(messages, origin)
    _place_media(messages, given, origin)
    for message in messages:
        for block in message["content"]:
            if (kind := block["type"]) != "text":
                block[kind] = find(block[kind], kind, origin)
    return messages


def _turns(record: dict, origin: str) -> list[tuple[str, Any]]:
    """(role, content) of each turn; roles by the names of chat templates."""
    if "messages" in record:
        turns = [(_role(turn, "role", origin), turn.get("content") or "") for turn in record["messages"]]
    elif "conversations" in record:
        keys = ("from", "value")
        if record["conversations"] and "role" in record["conversations"][0]:
            keys = ("role", "content")
        turns = [(_role(turn, keys[0], origin), turn.get(keys[1]) or "") for turn in record["conversations"]]
        turns = [(role, text.strip() if isinstance(text, str) else text) for role, text in turns]
    elif "QA" in record:
        turns = []
        for pair in record["QA"]:
            texts = [pair.get("q") or ""] if turns else [pair.get("i") or "", pair.get("q") or ""]
            turns.append(("user", "\n".join(text.strip() for text in texts if text.strip())))
            turns.append(("assistant", (pair.get("a") or "").strip()))
    else:
        raise ValueError(
            f"{origin}: has the fields {', '.join(map(str, record)) or '(none)'}, and none of messages, "
            "conversations and QA, which say what was asked and answered."
        )
    system = record.get("system_prompt") or record.get("system")
    return [("system", system), *turns] if isinstance(system, str) and "messages" not in record else turns


def _role(turn: Any, key: str, origin: str) -> str:
    role = turn.get(key) if isinstance(turn, dict) else None
    if role not in ROLES:
        raise ValueError(f"{origin}: a turn is by {role!r}, and known are {', '.join(ROLES)}.")
    return ROLES[role]


def _given(record: dict, kind: str) -> list:
    """The videos or images a record names beside its turns."""
    values: list = []
    for key in (kind, kind + "s"):
        value = record.get(key)
        if value is None or (isinstance(value, (str, list, tuple)) and not value):
            continue
        several = isinstance(value, (list, tuple)) and not (kind == "video" and is_one_video(value))
        values.extend(value if several else [value])
    return values


def _blocks(content: Any, role: str, origin: str) -> list[dict]:
    """Content as blocks; a video or image that is still to be placed has None for what it shows."""
    if isinstance(content, str):
        return _split_text(content)
    blocks = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            if block.get("text"):
                blocks.append({"type": "text", "text": block["text"]})
        elif kind in _MEDIA_KEYS:
            if block.get("video_start") is not None or block.get("video_end") is not None:
                raise ValueError(f"{origin}: asks for a part of a video, and only whole videos are read; cut it.")
            value = next((block[key] for key in _MEDIA_KEYS[kind] if block.get(key) is not None), None)
            blocks.append({"type": kind, kind: value})
        else:
            raise ValueError(
                f"{origin}: a turn of the {role} holds a block of type {kind!r}; known are text, video and image."
            )
    return blocks


def _split_text(text: str) -> list[dict]:
    """
    A text at its placeholders. Line breaks beside a placeholder belong to it, since chat templates write their own,
    and so does space at the turn's ends.
    """
    blocks: list[dict] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        blocks += [{"type": "text", "text": text[end : match.start()]}, {"type": match[1], match[1]: None}]
        end = match.end()
    blocks.append({"type": "text", "text": text[end:]})
    for index, block in enumerate(blocks):
        if block["type"] == "text" and len(blocks) > 1:
            if index > 0:
                block["text"] = re.sub(
                    r"^[ \t]*\n\s*" if index > 1 or blocks[0]["text"] else r"^\s+", "", block["text"]
                )
            if index < len(blocks) - 1:
                last = index == len(blocks) - 3 and not blocks[-1]["text"]
                block["text"] = re.sub(r"\s+$" if last else r"\s*\n[ \t]*$", "", block["text"])
    return [block for block in blocks if block["type"] != "text" or block["text"]]


_NEXT = {"nothing": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


def _check_turns(messages: list[dict], origin: str) -> None:
    before = "nothing"
    for number, message in enumerate(messages, 1):
        role, blocks = message["role"], message["content"]
        if role not in _NEXT[before]:
            raise ValueError(
                f"{origin}: turn {number} is by {role}, after {before}; user and assistant take turns, the user "
                "first, with at most one turn of the system before them."
            )
        if role != "user" and any(block["type"] != "text" for block in blocks):
            raise ValueError(f"{origin}: turn {number}, by {role}, holds a video or image; only the user's may.")
        if role == "assistant" and not "".join(block["text"] for block in blocks).strip():
            raise ValueError(f"{origin}: turn {number} is an empty answer; there is nothing to learn from it.")
        before = role
    if before != "assistant":
        raise ValueError(f"{origin}: has no answer{' to its last question' if len(messages) > 2 else ''}.")


def _place_media(messages: list[dict], given: dict[str, list], origin: str) -> None:
    """Puts what a record names beside its turns into the places for it; without places it comes first."""
    blocks = [block for message in messages for block in message["content"] if block["type"] != "text"]
    places = [block for block in blocks if block[block["type"]] is None]
    own = {block["type"] for block in blocks if block[block["type"]] is not None}
    if given["video"] and not given["image"]:  # LLaVA-Video-178K's way of writing
        for block in places:
            block.clear()
            block.update(type="video", video=None)
    first: list[dict] = []
    for kind, values in given.items():
        open_places = [block for block in places if block["type"] == kind]
        if values and not open_places and kind not in own:
            first += [{"type": kind, kind: value} for value in values]
        elif len(open_places) != len(values):
            raise ValueError(
                f"{origin}: its turns hold {len(open_places)} places for a {kind}, but it names {len(values)} "
                f"{kind}s beside them; give one for each place."
            )
        else:
            for block, value in zip(open_places, values, strict=True):
                block[kind] = value
    next(message for message in messages if message["role"] == "user")["content"][:0] = first
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise ValueError(f"{origin}: turn {number}, by {message['role']}, is empty.")


__all__ = ["Conversation", "DataSource", "check_sampling", "read_records", "read_source"]
