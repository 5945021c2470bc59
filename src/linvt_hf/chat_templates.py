"""What chat templates do with videos and questions: where a video goes, and which of the words are the question."""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

VIDEO_TOKEN = "<|linvt_video|>"
_BLOCKS = ("text", "image", "video")

# Goes before the base's own chat template: a video block becomes text that holds the video's placeholder, so that
# every template can place it. Everything else reaches the base's template as it was.
_VIDEOS_TO_TEXT = """\
{%- set linvt = namespace(messages=[], content=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}
{%- set linvt.content = [] -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'video' -%}
{%- set linvt.content = linvt.content + [{'type': 'text', 'text': 'VIDEO_PROMPT'}] -%}
{%- else -%}{%- set linvt.content = linvt.content + [block] -%}{%- endif -%}
{%- endfor -%}
{%- set linvt.messages = linvt.messages + [dict(message, content=linvt.content)] -%}
{%- else -%}{%- set linvt.messages = linvt.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = linvt.messages -%}
"""


def chat_template_with_videos(base_template: str, video_prompt: str, video_token: str = VIDEO_TOKEN) -> str:
    """The base's chat template, taught where videos go. `video_prompt` holds `{video}`, e.g. "{video}\\n"."""
    text = video_prompt.format(video=video_token).replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return _VIDEOS_TO_TEXT.replace("VIDEO_PROMPT", text) + base_template


def with_times(texts: list[str], frames: dict[str, Tensor], video_token: str, form: dict[str, str]) -> list[str]:
    """
    Prompts that say after each video how long it is or when its frames are, where that is known.

    Args:
        frames: of all videos in order, `num_frames` [V], `frame_times` [V, max T] and `video_durations` [V], seconds,
            a duration below zero where nobody knows.
        form: `sentence`, which may hold {duration}, {count} and {times}; `time`, one of these; `between` them; and
            `after`, what stands right after a video in a prompt, behind which the sentence goes.
    """
    videos = iter(range(len(frames["num_frames"]) if "frame_times" in frames else 0))
    said = []
    for text in texts:
        start, *parts = text.split(video_token)
        for part in parts:
            number = next(videos, None)
            duration = -1.0 if number is None else float(frames["video_durations"][number])
            after = form["after"] if part.startswith(form["after"]) else ""
            sentence = ""
            if duration >= 0:
                count = int(frames["num_frames"][number])
                each = [form["time"].format(time) for time in frames["frame_times"][number, :count].tolist()]
                sentence = form["sentence"].format(duration=duration, count=count, times=form["between"].join(each))
            start += video_token + after + sentence + part[len(after) :]
        said.append(start)
    return said


@lru_cache(maxsize=16)
def turn_marks(template: str, special_tokens: tuple) -> tuple[str, str]:
    """
    What a template writes right before and right after a user's words; two empty texts where that cannot be told.

    Learned by rendering: user says A, assistant says B, user says C; the marks are what both user turns share.
    """

    def render(as_blocks: bool) -> str:
        turns = [("user", "LINVTA"), ("assistant", "LINVTB"), ("user", "LINVTC")]
        chat = [{"role": r, "content": [{"type": "text", "text": t}] if as_blocks else t} for r, t in turns]
        rendered, _ = render_jinja_template(
            conversations=[chat], chat_template=template, add_generation_prompt=True, **dict(special_tokens)
        )
        return rendered[0]

    # What begins a conversation or ends an answer stands before a turn and belongs to none. As one character, of no
    # text, it is shared by two turns as a whole or not at all, and can be left out.
    tokens = dict(special_tokens)
    ends = {tokens[name]: sign for name, sign in (("bos_token", "\ue000"), ("eos_token", "\ue001")) if name in tokens}

    for as_blocks in (True, False):
        try:
            rendered = render(as_blocks)
        except Exception:  # a template may refuse either form of content in whatever way it likes
            continue
        for token, sign in ends.items():
            rendered = rendered.replace(token, sign)
        if parts := re.fullmatch("(.*)LINVTA(.*)LINVTB(.*)LINVTC(.*)", rendered, flags=re.DOTALL):
            first, answer, second, last = parts.groups()
            header = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
            footer = os.path.commonprefix([answer, last])
            for token, sign in ends.items():
                header, footer = header.rpartition(sign)[2], footer.replace(sign, token)
            return header, footer
    return "", ""


def blocks_of(message: dict, kind: str) -> list[dict]:
    """
    A message's blocks of one type; none of a message that is plain text. Raises `ValueError` for a block of a type
    that templates would leave out without a word, and the model would answer without.
    """
    content = message.get("content")
    blocks = [] if not content or isinstance(content, str) else list(content)
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") not in _BLOCKS:
            told = f"type {block['type']!r}" if isinstance(block, dict) and "type" in block else "no type"
            raise ValueError(f"A message holds a block of {told}; blocks are of type {', '.join(map(repr, _BLOCKS))}.")
    return [block for block in blocks if block["type"] == kind]


def videos_of(messages: list[dict]) -> list[Any]:
    """The videos of messages, in order. Raises `ValueError` for a block that should hold one."""
    videos = []
    for block in (block for message in messages for block in blocks_of(message, "video")):
        given = [block[name] for name in ("video", "url", "path") if block.get(name) is not None]
        if not given:
            raise ValueError(f"A block of type 'video' holds {', '.join(sorted(block))}; give it a 'video'.")
        videos.append(given[0])
    return videos


def with_videos(messages: list[dict], videos: Iterator[Any]) -> list[dict]:
    """The messages with the next ones of `videos` instead of theirs."""

    def of_block(block: dict) -> dict:
        return {"type": "video", "video": next(videos)} if block["type"] == "video" else block

    def of_content(content):
        return content if not content or isinstance(content, str) else [of_block(block) for block in content]

    return [{**message, "content": of_content(message.get("content"))} for message in messages]


def users_words(messages: list[dict], turn: Literal["newest", "first"] = "newest") -> str:
    """The text of the newest, or the first, user turn that has any."""
    if turn not in ("newest", "first"):
        raise ValueError(f"question_turn is {turn!r}; it is 'newest' or 'first'.")
    for message in messages if turn == "first" else reversed(messages):
        if message["role"] == "user":
            content = message.get("content") or ""
            words = content if isinstance(content, str) else " ".join(b["text"] for b in blocks_of(message, "text"))
            if words.strip():
                return words.strip()
    return ""


__all__ = [
    "VIDEO_TOKEN",
    "blocks_of",
    "chat_template_with_videos",
    "turn_marks",
    "users_words",
    "videos_of",
    "with_times",
    "with_videos",
]
