"""Tiny wrapped models, built once a run, and what tests feed them."""

import functools
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bases import TINY_FRAMES, TINY_LINVT, save_tiny_base

from linvt_hf import LinVTForConditionalGeneration, LinVTProcessor, wrap


@functools.cache
def base_folder(name: str) -> Path:
    return save_tiny_base(name, Path(os.environ["HF_HOME"]) / "tiny-bases" / name)


@functools.cache
def wrapped(name: str) -> tuple[LinVTForConditionalGeneration, LinVTProcessor]:
    """A tiny wrapped model in evaluation mode, the same object every time: tests that change it take a copy."""
    try:
        torch.manual_seed(0)
        model, processor = wrap(base_folder(name), num_frames=4, frame_kwargs=TINY_FRAMES.get(name), **TINY_LINVT)
    except ValueError as error:
        if "optional dependencies: torchvision" in str(error):
            pytest.skip(f"this version of transformers has no image processor of {name} without torchvision")
        raise
    # Larger than the usual start, so that what should matter matters visibly.
    with torch.no_grad():
        for parameter in model.video_tokenizer.parameters():
            if parameter.ndim > 1 and parameter.shape[-1] > 3:
                parameter.normal_(std=0.15)
    return model.eval(), processor


def noise_video(frames: int = 5, seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    """Frames that all differ, uint8 [T, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def chat(*content, answer: str | None = None) -> list[dict]:
    """One user turn of videos (arrays, paths), images (PIL) and texts, and perhaps an answer."""
    blocks = []
    for item in content:
        if isinstance(item, str):
            blocks.append({"type": "text", "text": item})
        elif hasattr(item, "getbbox"):
            blocks.append({"type": "image", "image": item})
        else:
            blocks.append({"type": "video", "video": item})
    messages = [{"role": "user", "content": blocks}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(processor: LinVTProcessor, *chats, add_generation_prompt: bool = True, **processor_kwargs):
    """Model inputs for one or several chats."""
    return processor.apply_chat_template(
        list(chats) if len(chats) > 1 else chats[0],
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


@contextmanager
def between_frames_and_words(model, context):
    """Enters `context` when the vision encoder has its frames, and leaves it when the language model is called."""
    encode_frames, entered = model.image_llm.encode_frames, []

    def encoded(*args):
        tokens = encode_frames(*args)
        entered.append(context.__enter__())
        return tokens

    def leave(*_):
        if entered:
            entered.clear()
            context.__exit__(None, None, None)

    model.image_llm.encode_frames = encoded
    hook = model.base.register_forward_pre_hook(leave)
    try:
        yield
    finally:
        leave()
        hook.remove()
        del model.image_llm.encode_frames
