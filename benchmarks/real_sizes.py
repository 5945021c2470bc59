"""Wrapped image-LLMs in real sizes, with random weights and frames, for `end_to_end.py`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from measuring import peak_megabytes, seconds
from torch import Tensor

from linvt_hf import LinVTForConditionalGeneration
from linvt_hf.configuration_linvt import read_base_config
from linvt_hf.image_llm import build_image_llm
from linvt_hf.shapes.rows import Condenser, uniform_pooling

# As published, at the names of transformers; of `small`, which a CPU can run, every size is our choice.
SIZES = {
    "internvl2_8b": {
        "model_type": "internvl",
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 92553,
            "max_position_embeddings": 32768,
        },
        "image_seq_length": 256,
        "tie_word_embeddings": False,
    },
    "qwen2_vl_7b": {
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        },
        "tie_word_embeddings": False,
    },
    "small": {
        "model_type": "internvl",
        "vision_config": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": [224, 224],
            "patch_size": [14, 14],
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
            "max_position_embeddings": 32768,
        },
        "image_seq_length": 64,
        "tie_word_embeddings": False,
    },
}
LIGHT = {"bottleneck_size": 64, "num_heads": 4}  # for `small`: LinVT's own width is twice that of its language model
PATCHES = 32  # of 14 pixels, in each direction of a frame of Qwen2-VL
WORDS = 20  # before the video, and after it; the question, too


class Bench:
    """
    A base with LinVT, and inputs for it.

    Frames are squares of the base's size: 448 pixels and 256 tokens for both of 7 or 8 B, as InternVL2 has them.
    """

    def __init__(self, size: str, device: str, dtype: torch.dtype, repeats: int):
        self.device, self.dtype, self.repeats = device, dtype, repeats
        config = read_base_config(SIZES[size])
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                base = build_image_llm(config)
                self.model = LinVTForConditionalGeneration.from_image_llm(
                    base, config.text_config.vocab_size - 1, **(LIGHT if size == "small" else {})
                )
        finally:
            torch.set_default_dtype(before)
        self.model.eval().generation_config.eos_token_id = None
        self.tokenizer = self.model.video_tokenizer
        self.video_tokens = self.model.config.num_video_tokens
        self.chunk = self.model.config.frames_per_chunk
        self.qwen = SIZES[size]["model_type"] == "qwen2_vl"
        self.places = config.image_seq_length if not self.qwen else 256
        size = config.vision_config.image_size[0] if not self.qwen else None
        shape = (PATCHES**2, 3 * 2 * 14 * 14) if self.qwen else (1, 3, size, size)  # rows of one frame
        self.one_chunk = torch.randn(self.chunk, *shape, device=device, dtype=dtype).flatten(0, 1)

    def use(self, way: str, count: int = 1) -> int:
        """Puts a way to condense videos into the model; returns how many tokens it makes of so many frames."""
        if way == "LinVT":
            self.model.video_tokenizer = self.tokenizer
        elif way == "pooled":  # as many tokens as LinVT gives
            self.model.video_tokenizer = Condenser(uniform_pooling(self.video_tokens // 16, 4))
        else:
            self.model.video_tokenizer = Condenser(lambda tokens: tokens.flatten(1, 2))
        return self.places * count if way == "every frame" else self.video_tokens

    def frames(self, count: int, patches: int = PATCHES) -> dict[str, Tensor]:
        """Pixels of so many frames, as the vision encoder takes them; of Qwen2-VL `patches` high and wide."""
        rows = count * (patches**2 if self.qwen else 1)
        times = math.ceil(rows / len(self.one_chunk))
        pixels = (
            self.one_chunk[:rows] if times == 1 else self.one_chunk.repeat(times, *[1] * (self.one_chunk.ndim - 1))
        )
        inputs = {"pixel_values": pixels[:rows]}
        if self.qwen:
            inputs["image_grid_thw"] = torch.tensor([[1, patches, patches]]).expand(count, -1)
        return inputs

    def videos(self, lengths: list[int]) -> dict[str, Tensor]:
        """The same as inputs of the model, which gets a question beside them."""
        found = self.frames(sum(lengths))
        inputs = {"pixel_values_videos": found.pop("pixel_values"), "num_frames": torch.tensor(lengths)}
        inputs |= {f"frames_{name}": value for name, value in found.items()}
        return {**inputs, **self.question(len(lengths))}

    def question(self, batch: int = 1) -> dict[str, Tensor]:
        return {"question_ids": torch.full((batch, WORDS), 7, device=self.device)}

    def prompt(self, video_tokens: int, batch: int = 1) -> dict[str, Tensor]:
        words = torch.full((batch, WORDS), 7, device=self.device)
        places = torch.full((batch, video_tokens), self.model.config.video_token_id, device=self.device)
        input_ids = torch.cat([words, places, words], dim=1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def answer(self, inputs: dict, new_tokens: int = 1) -> Tensor:
        return self.model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )

    @torch.no_grad()
    def encode(self, frames: dict[str, Tensor]) -> list[Tensor]:
        inputs = dict(frames)
        pixels = inputs.pop("pixel_values")
        count = len(inputs.get("image_grid_thw", pixels))
        return self.model.image_llm.encode_frames(self.model.base, pixels, inputs, count, self.chunk)

    @contextmanager
    def compiled_encoder(self) -> Iterator[None]:
        vision = self.model.base.get_encoder("image")
        vision.compile()
        try:
            yield
        finally:
            vision._compiled_call_impl = None

    @torch.no_grad()
    def prefill(self, tokens: int) -> None:
        embeds = torch.zeros(1, tokens, self.model.config.hidden_size, device=self.device, dtype=self.dtype)
        self.model.base(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    def seconds(self, work: Callable[[], object], warm_up: int = 1) -> float:
        return seconds(work, self.device, self.repeats, warm_up)

    def peak(self, work: Callable[[], object]) -> float:
        return peak_megabytes(work, self.device)


class Film:
    """What `processor.stream` gives, of frames that are always the same."""

    times = duration = None

    def __init__(self, bench: Bench, num_frames: int):
        self.bench, self.num_frames = bench, num_frames

    def on(self, device) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        for start in range(0, self.num_frames, self.bench.chunk):
            stop = min(start + self.bench.chunk, self.num_frames)
            yield slice(start, stop), self.bench.frames(stop - start)

    def close(self) -> None:
        pass
