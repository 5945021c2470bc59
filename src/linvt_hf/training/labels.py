"""
Conversations to token ids and labels.

A sample is the prompt exactly as inference writes it, followed by the answer's tokens: `input_ids` before an answer
are those that `apply_chat_template(add_generation_prompt=True)` gives, whatever the tokenizer would do to both as one
text. Labels are the answer and the mark that ends its turn (`<|im_end|>`, `</s>`), so that the model learns to stop; a
template that writes no such mark gets the tokenizer's end-of-sequence token. What a template writes after the mark, a
line break mostly, is left out: generation is over by then.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

from ..processing_linvt import LinVTProcessor

IGNORED = -100
# Entries with one value a token, and what an answer's tokens have there, as far as bases agree.
_PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


def encode_text(
    processor: LinVTProcessor, messages: list[dict], turns: str = "each", frames: dict[str, Tensor] | None = None
) -> BatchFeature:
    """
    One sample with labels, but for what comes from the frames of its videos.

    Args:
        messages: turns whose content is blocks and whose last is the answer to learn.
        turns: "each" learns the last answer and conditions the videos on the newest question, as inference does with
            this prompt. "all" learns every answer of the conversation and conditions on all its questions, never on
            answers.
        frames: of the videos, as the processor gives them, for prompts that say when they are.

    Returns what the processor gives for the prompt, with the answers appended and `labels`, [1, S].

    Raises `ValueError` where a chat template writes an answer otherwise than it is given.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = messages[: answers[-1]]
    text = _render(processor, prompt, answer_next=True)
    inputs = _tokens(processor, prompt, text, frames)
    ids = inputs["input_ids"][0].tolist()
    labels = [IGNORED] * len(ids)
    first = len(ids)
    if turns == "all":
        for index in answers[:-1]:
            history = _render(processor, messages[:index], answer_next=True)
            earlier = _tokens(processor, messages[:index], history, frames)["input_ids"][0].tolist()
            answer = _answer_ids(processor, messages[: index + 1], history, end=False)
            end = len(earlier) + len(answer)
            if ids[: len(earlier)] != earlier or ids[len(earlier) : end] != answer:
                raise ValueError(
                    "The chat template or the tokenizer writes an earlier turn otherwise than the newest one, so its "
                    "answer cannot be found in the whole conversation; use turns='each'."
                )
            labels[len(earlier) : end] = answer
            first = min(first, len(earlier))
    answer = _answer_ids(processor, messages[: answers[-1] + 1], text)
    _append(inputs, answer, first, processor.answer_token_type)
    inputs["labels"] = torch.tensor([labels + answer])  # also instead of any that the base's processor gave
    if question := _question(prompt, turns):
        count = sum(block["type"] == "video" for message in prompt for block in message["content"])
        if count:
            inputs.update(processor._questions([""], [question], [count], count))
    return inputs


# ---- the prompt, as inference has it ----


def _tokens(processor: LinVTProcessor, messages: list[dict], text: str, frames: dict | None) -> BatchFeature:
    """What `apply_chat_template(tokenize=True)` gives for a prompt whose text it is, but for frames and questions."""
    images = [block["image"] for message in messages for block in message["content"] if block["type"] == "image"]
    # As apply_chat_template does it: templates that write the first token themselves get no second one.
    bos = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
    (text,) = processor.with_video_tokens([text], frames or {})
    inputs = processor._text_and_images([text], [images] if images else None, {"return_tensors": "pt", **special})
    return BatchFeature(dict(inputs))


def _render(processor: LinVTProcessor, messages: list[dict], answer_next: bool) -> str:
    """The template's text; templates ask for a block's type, not for its pixels."""
    bare = [
        {**message, "content": [b if b["type"] == "text" else {"type": b["type"]} for b in message["content"]]}
        for message in messages
    ]
    return processor.apply_chat_template(bare, add_generation_prompt=answer_next, tokenize=False)


def _question(prompt: list[dict], turns: str) -> str:
    """The words that condition the videos: the newest user turn's that has any, or those of all user turns."""
    said = (
        " ".join(block["text"] for block in message["content"] if block["type"] == "text").strip()
        for message in reversed(prompt)
        if message["role"] == "user"
    )
    words = [text for text in said if text]
    return "\n".join(reversed(words)) if turns == "all" else words[0] if words else ""


# ---- the answer ----


def _answer_ids(processor: LinVTProcessor, messages: list[dict], prompt: str, end: bool = True) -> list[int]:
    """
    Token ids of the last message's answer and its end mark, as they follow those of the prompt with this text.

    `end` adds the end-of-sequence token where the template writes no end mark.
    """
    tokenizer = processor.tokenizer
    whole = _render(processor, messages, answer_next=False)
    answer = "".join(block["text"] for block in messages[-1]["content"]).strip()
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
    elif whole.startswith(prompt.rstrip()):  # some end the prompt with a space that a whole turn does without
        rest = whole[len(prompt.rstrip()) :].lstrip()
    else:
        rest = ""
    start = rest.find(answer)
    if start < 0 or rest[:start].strip():
        raise ValueError(
            "The chat template writes an answer otherwise after its generation prompt than in a finished turn, so the "
            f"two cannot be told apart: {prompt[-40:]!r} and {whole[-40 - len(answer) :][:80]!r}; give the processor "
            "a chat template where the one begins the other."
        )
    start += len(answer)
    mark = _end_of_mark(tokenizer, rest[start:])
    ids = _continuation(tokenizer, prompt, rest[: start + mark])
    return [*ids, tokenizer.eos_token_id] if end and not mark and tokenizer.eos_token_id is not None else ids


def _end_of_mark(tokenizer: PreTrainedTokenizerBase, after: str) -> int:
    """Where the end mark, the first special token, ends in what a template writes after an answer; 0 for none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = [(after.find(token), -len(token)) for token in {*tokenizer.all_special_tokens, *added} if token in after]
    start, length = min(marks, default=(0, 0))
    return start - length


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """Ids of a text that continues a prompt whose own ids are settled."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before, whole = ids(prompt), ids(prompt + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # The prompt's last letters and the answer's first would make one token. Inference has the prompt's ids before it
    # asks, so the answer is split alone; after a line break, for tokenizers that treat a text's start as a new word.
    for lead in ("", "\n"):
        alone = ids(lead + text)[len(ids(lead)) :]
        if tokenizer.decode(before + alone) == tokenizer.decode(whole):
            return alone
    raise ValueError(
        f"The tokenizer has no tokens for an answer that begins {text[:20]!r} after a prompt that ends "
        f"{prompt[-20:]!r}; give the processor a chat template that ends its prompt in a token of its own."
    )


def _append(inputs: BatchFeature, answer: list[int], first_answer: int, token_type: int) -> None:
    """The answer's tokens at the end of each entry that has one value a token, in place."""

    def extend(row: Tensor, values: Any) -> Tensor:
        return torch.cat([row, torch.tensor([values], dtype=row.dtype)], dim=1)

    inputs["input_ids"] = extend(inputs["input_ids"], answer)
    for name, value in _PER_TOKEN.items():
        if name in inputs:
            inputs[name] = extend(inputs[name], [value] * len(answer))
    if token_type and "token_type_ids" in inputs:
        inputs["token_type_ids"][:, first_answer:] = token_type  # what is learned must not be read from behind


__all__ = ["IGNORED", "encode_text"]
