"""Tiny wrapped models, what their own processors make of a few videos and images, and upstream's view of them."""

import copy
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_bases import LLM, TINY_LINVT, save_tiny_base, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from linvt_hf import LinVTConfig, LinVTProcessor, wrap

# Upstream's tests look classes up by name in these lists; `AutoModelForImageTextToText.register`, which LinVT calls,
# does not add to them. Listed, the model gets labels and is held to what every image-text-to-text model owes.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["linvt"] = "LinVTForConditionalGeneration"

# All frames in one chunk: upstream's test of gradient checkpointing counts on each layer running once a pass.
SETTINGS = {**TINY_LINVT, "frames_per_chunk": 32}
BATCH, NUM_FRAMES = 2, 2


@dataclass
class Wrapped:
    video_token_id: int
    processor: LinVTProcessor
    inputs: dict[str, torch.Tensor]
    image_inputs: dict[str, torch.Tensor]


@lru_cache
def wrapped(base: str) -> Wrapped:
    with tempfile.TemporaryDirectory() as folder:
        model, processor = wrap(save_tiny_base(base, Path(folder)), num_frames=None, **SETTINGS)
    processor.frame_kwargs.pop("size", None)  # the tiny image processor's own, which is small
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, NUM_FRAMES, 40, 56, 3), dtype=np.uint8)
    prompts = [f"{processor.video_token}{question}" for question in ("What happens?", "Who is there?")]
    inputs = processor(text=prompts, videos=list(pixels))
    images = processor.image_processor([[Image.fromarray(video[0])] for video in pixels], return_tensors="pt")
    names = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
    image_inputs = {name: images[name] for name in names if name in images}
    return Wrapped(model.config.video_token_id, processor, dict(inputs), image_inputs)


class LinVTModelTester:
    """What upstream's tests ask about a model: its config, its inputs, and the sizes of its language model."""

    is_training = True
    batch_size = BATCH
    hidden_size = LLM["hidden_size"]
    num_hidden_layers = LLM["num_hidden_layers"]
    num_attention_heads = LLM["num_attention_heads"]
    tied = None  # tie the embeddings, whatever the tiny base does

    def __init__(self, base: str):
        self.base = base
        self.seq_length = wrapped(base).inputs["input_ids"].shape[1]

    def get_config(self) -> LinVTConfig:
        base_config = tiny_config(self.base)  # fresh: no model has fixed its attention yet
        if self.tied is not None:
            base_config.tie_word_embeddings = base_config.get_text_config().tie_word_embeddings = self.tied
        return LinVTConfig(base_config=base_config, video_token_id=wrapped(self.base).video_token_id, **SETTINGS)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), copy.deepcopy(wrapped(self.base).inputs)
