"""
Records of data files to conversations, each checked; what is wrong is one sentence that says where.

Layouts of a record:

- `messages`: as chat templates take them; content is a text or a list of blocks, `{"type": "video", "path": ..}`.
- `conversations`: LLaVA's, `[{"from": "human", "value": ..}, {"from": "gpt", "value": ..}]` beside `video` or `image`,
  with `<video>` or `<image>` where each goes. LLaVA-Video-178K writes `<image>` for its videos, so in a record with
  videos alone that means a video. ShareGPTVideo's `video` names a folder of frames, and its `<video>` may come last.
- `QA`: VideoChat2-IT's, `[{"i": instruction, "q": question, "a": answer}]` beside `video` or `image`. The first
  instruction stands before the first question; where there is no question (captions) it is the question.

Without a placeholder, what a record names beside its turns comes first in its first turn. `start` and `end` beside
`video`, or `video_start` and `video_end` in a block, are the seconds between which a video is read.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..video_reading import is_one_video
from ..video_sampling import Sampling

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_PLACEHOLDER = re.compile(r"<\|?(video|image)(?:_token|_pad|_placeholder)?\|?>")
_MEDIA_KEYS = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}


@dataclass
class Conversation:
    """
    One record.

    messages: turns `{"role", "content"}`, content a list of blocks `{"type": "text", "text"}`, `{"type": "video",
        "video"}` and `{"type": "image", "image"}`. Relative paths were made absolute. The last turn is an answer. Of a
        video that is read in part, the block has `start`, `end` or both, in seconds.
    origin: where it came from, "file:line" or "file: record 12".
    num_frames, fps: how its videos are sampled, instead of the run's settings.
    """

    messages: list[dict]
    origin: str
    num_frames: int | None = None
    fps: float | None = None


class MediaFinder:
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
        if value is None or isinstance(value, (int, float)):
            raise ValueError(f"{origin}: gives {value!r} as its {kind}, which is no path.")
        if not isinstance(value, (str, Path)):
            return value
        if not str(value):
            raise ValueError(f"{origin}: the path of its {kind} is empty.")
        if "://" in str(value):
            return str(value)
        path = os.path.normpath(os.path.join(self.folder, value))
        if path not in self.there:
            self.there[path] = not self.check or os.path.exists(path)
        if not self.there[path]:
            raise FileNotFoundError(
                f"{origin}: there is no {kind} at {path}; `media` names the folder of relative paths."
            )
        return path


def conversation_of(record: Any, origin: str, find: MediaFinder) -> Conversation:
    """
    A record of any layout. Raises `ValueError` for one that cannot be used, `FileNotFoundError` for a video or image
    that is not there, both with `origin`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: a record must be an object with fields, not {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}  # Parquet fills what is missing
    turns = _turns(record, origin)
    given = {kind: _given(record, kind) for kind in ("video", "image")}
    messages = [{"role": role, "content": _blocks(content, role, origin)} for role, content in turns]
    if messages and messages[0] == {"role": "system", "content": []}:
        del messages[0]  # nothing is said before they speak
    _check_turns(messages, origin)
    _place_media(messages, given, origin)
    part = _part(record, "", origin) if given["video"] else {}
    for message in messages:
        for block in message["content"]:
            if block["type"] == "video":
                block.update(part)
            if (kind := block["type"]) != "text":
                block[kind] = find(block[kind], kind, origin)
    return Conversation(messages, origin)


def _turns(record: dict, origin: str) -> list[tuple[str, Any]]:
    """(role, content) of each turn; roles by the names of chat templates."""
    layout = next((key for key in ("messages", "conversations", "QA") if key in record), None)
    if layout is None:
        raise ValueError(
            f"{origin}: has the fields {', '.join(map(str, record)) or '(none)'}, and none of messages, "
            "conversations and QA, which say what was asked and answered."
        )
    items = record[layout]
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{origin}: its {layout} must be a list of objects with fields.")
    if layout == "QA":
        turns = []
        for pair in items:
            asked = [_words(pair.get(key), "user", origin).strip() for key in (("q",) if turns else ("i", "q"))]
            turns.append(("user", "\n".join(text for text in asked if text)))
            turns.append(("assistant", _words(pair.get("a"), "assistant", origin).strip()))
    else:
        names = ("from", "value") if any("from" in item for item in items) else ("role", "content")
        turns = [(_role(item.get(names[0]), origin), item.get(names[1])) for item in items]
        if layout == "conversations":
            turns = [(role, text.strip() if isinstance(text, str) else text) for role, text in turns]
    system = record.get("system_prompt") or record.get("system")
    return [("system", system), *turns] if isinstance(system, str) and system.strip() else turns


def _role(role: Any, origin: str) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{origin}: a turn is by {role!r}, and known are {', '.join(ROLES)}.")
    return ROLES[role]


def _words(said: Any, role: str, origin: str) -> str:
    if said is None:
        return ""
    if not isinstance(said, str):
        raise ValueError(f"{origin}: a turn of the {role} says {said!r}, which is no text.")
    return said


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


def _part(fields: dict, prefix: str, origin: str) -> dict[str, float]:
    """`start` and `end` of a video, where they are given."""
    part = {name: fields[prefix + name] for name in ("start", "end") if fields.get(prefix + name) is not None}
    try:
        Sampling(**part)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return part


def _blocks(content: Any, role: str, origin: str) -> list[dict]:
    """Content as blocks; a video or image that is still to be placed has None for what it shows."""
    if not isinstance(content, (list, tuple)):
        return _split_text(_words(content, role, origin))
    blocks = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            if words := _words(block.get("text"), role, origin):
                blocks.append({"type": "text", "text": words})
        elif kind in _MEDIA_KEYS:
            value = next((block[key] for key in _MEDIA_KEYS[kind] if block.get(key) is not None), None)
            blocks.append({"type": kind, kind: value, **_part(block, "video_", origin)})
        else:
            raise ValueError(
                f"{origin}: a turn of the {role} holds a block of type {kind!r}; known are text, video and image."
            )
    return blocks


def _split_text(text: str) -> list[dict]:
    """
    A text at its placeholders. Line breaks beside a placeholder belong to it, since chat templates write their own,
    and so does any space if no words come before it or none after it.
    """
    parts = _PLACEHOLDER.split(text)  # a text, what stands there, a text, ...
    texts, kinds = parts[::2], parts[1::2]
    if kinds:
        texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
        for index in range(1, len(texts)):
            texts[index] = re.sub(r"^[ \t]*\n\s*" if any(texts[:index]) else r"^\s+", "", texts[index])
        for index in reversed(range(len(texts) - 1)):
            texts[index] = re.sub(r"\s*\n[ \t]*$" if any(texts[index + 1 :]) else r"\s+$", "", texts[index])
    blocks: list[dict] = [{"type": "text", "text": texts[0]}]
    for kind, words in zip(kinds, texts[1:], strict=True):
        blocks += [{"type": kind, kind: None}, {"type": "text", "text": words}]
    return [block for block in blocks if block["type"] != "text" or block["text"]]


# Who may speak after whom.
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
            block.pop("image", None)
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


__all__ = ["Conversation", "MediaFinder", "ROLES", "conversation_of"]
