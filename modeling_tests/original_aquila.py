"""Aquila-VL's checkpoint as its authors store it, and its arithmetic on torch ops.

Read in LLaVA-VL/LLaVA-NeXT at df179663ae8b: `llava/model/llava_arch.py`, `llava/mm_utils.py`, `llava/conversation.py`,
`llava/model/multimodal_encoder/siglip_encoder.py`.
"""

from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from original_parts import (
    Published,
    Shapes,
    Tensors,
    embed,
    gelu,
    linear,
    linear_shapes,
    normalised,
    positions,
    qwen2,
    qwen2_shapes,
    random_tensors,
    read_checkpoint,
    resized,
    siglip,
    siglip_shapes,
    write_json,
    write_weights,
)
from original_tokenizers import byte_level_ids, in_chunks, qwen_tokens, read_byte_level, write_byte_level
from PIL import Image
from tokenizers import AddedToken

CHECKPOINTS = {
    "aquila_2b": Published(
        repo="BAAI/Aquila-VL-2B-llava-qwen",
        parameters=2_179_000_000,
        licence="apache-2.0",
        source="4.36 GB of bfloat16 on the Hub; it holds for 26 SigLIP layers and a head of its own only",
        tolerance=1_000_000,
    )
}
# config.json names the tower and says only its `mm_hidden_size`; its image size is the least pinpoint's.
TOWERS = {
    1152: {"intermediate_size": 4304, "num_hidden_layers": 26, "patch_size": 14},
    32: {"intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 7},
}


def published_config(name: str) -> dict:
    """Not seen in the file: the `mm_` fields, here LLaVA-OneVision's, and `tie_word_embeddings`, here as stored."""
    sides = range(384, 2304 + 1, 384)
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[width, height] for width in sides for height in sides],
        "image_split_resolution": None,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "mm_hidden_size": 1152,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def tiny_config(name: str) -> dict:
    config = published_config(name)
    ids = byte_level_ids([token.content for token in added_tokens()])
    sides = range(37, 222 + 1, 37)  # five patches of seven and a rest, as 384 is twenty-seven of fourteen and a rest
    return config | {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_size": 48,
        "image_grid_pinpoints": [[width, height] for width in sides for height in sides],
        "intermediate_size": 56,
        "mm_hidden_size": 32,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 352,  # above the tokenizer's own, as 151,936 is above 151,665
    }


def tower_config(config: dict) -> dict:
    """google/siglip-so400m-patch14-384 without its last layer and head, or a toy of as many heads."""
    return {
        **TOWERS[config["mm_hidden_size"]],
        "hidden_size": config["mm_hidden_size"],
        "image_size": min(min(pinpoint) for pinpoint in config["image_grid_pinpoints"]),
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 16,
    }


def added_tokens() -> list[AddedToken]:
    """Qwen2.5's, at 151643 and on."""
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
    plain += ["<|repo_name|>", "<|file_sep|>"]
    return qwen_tokens() + [AddedToken(token, normalized=False, special=False) for token in plain]


def shapes(config: dict) -> Shapes:
    hidden = config["hidden_size"]
    named = qwen2_shapes("model", config, tied=False)
    named["model.image_newline"] = (hidden,)
    named |= siglip_shapes("model.vision_tower.vision_tower.vision_model", tower_config(config), head=False)
    named |= linear_shapes("model.mm_projector.0", hidden, config["mm_hidden_size"], bias=True)
    return named | linear_shapes("model.mm_projector.2", hidden, hidden, bias=True)


def write(name: str, folder: Path, *, seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(shapes(config), seed, dtype), shards)
    added = added_tokens()
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": [token.content for token in added[1:] if token.special],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_byte_level(folder, "qwen2", added, settings)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    write_json(folder / "generation_config.json", generation)
    return folder


def prompt(turns: list[tuple[str, str]], images: int) -> str:
    """The template `qwen_1_5`; several pictures stand one a line, as one does."""
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, (role, words) in enumerate(turns):
        pictures = "<image>\n" * images if number == 0 else ""
        text += f"<|im_start|>{role}\n{pictures}{words}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    config, tensors = read_checkpoint(folder)
    counts = [len(image_tokens(config, tensors, image)) for image in images]
    return in_chunks(read_byte_level(folder), prompt(turns, len(images)), counts)


def best_pinpoint(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """The resolution that keeps most of the picture's pixels, and of those the one with least padding."""

    def kept_and_wasted(pinpoint: list[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / size[0], pinpoint[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    return tuple(max(pinpoints, key=kept_and_wasted))


def crops(image: Image.Image, pinpoint: tuple[int, int], side: int) -> list[Image.Image]:
    """The whole picture squashed to a square, then the squares of the picture fitted into black, row by row."""
    image = image.convert("RGB")
    (width, height), (across, down) = image.size, (pinpoint[0] / image.width, pinpoint[1] / image.height)
    if across < down:
        fitted = resized(image, pinpoint[0], min(ceil(height * across), pinpoint[1]))
    else:
        fitted = resized(image, min(ceil(width * down), pinpoint[0]), pinpoint[1])
    padded = Image.new("RGB", pinpoint)
    padded.paste(fitted, ((pinpoint[0] - fitted.width) // 2, (pinpoint[1] - fitted.height) // 2))
    corners = [(x, y) for y in range(0, pinpoint[1], side) for x in range(0, pinpoint[0], side)]
    return [resized(image, side, side), *(padded.crop((x, y, x + side, y + side)) for x, y in corners)]


def square_tokens(config: dict, tensors: Tensors, square: Image.Image) -> torch.Tensor:
    """The last stored layer's output, before the last norm, through the projector: [N, D]."""
    tower = tower_config(config)
    pixels = normalised(square, [0.5] * 3, [0.5] * 3)
    x = siglip(tensors, "model.vision_tower.vision_tower.vision_model", tower, pixels, tower["num_hidden_layers"])
    return linear(gelu(linear(x, tensors, "model.mm_projector.0")), tensors, "model.mm_projector.2")


def image_tokens(config: dict, tensors: Tensors, image: Image.Image) -> torch.Tensor:
    """The whole picture's tokens, then its crops' as one grid without the padding, a newline ending each row."""
    tower = tower_config(config)
    side = tower["image_size"]
    grid = side // tower["patch_size"]
    pinpoint = best_pinpoint(image.size, config["image_grid_pinpoints"])
    whole, *parts = (square_tokens(config, tensors, square) for square in crops(image, pinpoint, side))
    columns, rows = pinpoint[0] // side, pinpoint[1] // side
    x = torch.stack(parts).view(rows, columns, grid, grid, -1).permute(4, 0, 2, 1, 3)  # [D, rows, g, columns, g]
    x = without_padding(x.flatten(1, 2).flatten(2, 3), image.size)  # [D, h, w]
    most = int(config["image_aspect_ratio"].removeprefix("anyres_max_"))
    times = (x.shape[1] * x.shape[2] / (most * grid**2)) ** 0.5
    if times > 1.1:
        smaller = [int(x.shape[1] // times), int(x.shape[2] // times)]
        x = F.interpolate(x[None], smaller, mode="bilinear")[0]
    newline = tensors["model.image_newline"][:, None, None].expand(-1, x.shape[1], 1)  # [D, h, 1]
    return torch.cat([whole, torch.cat([x, newline], 2).flatten(1).T])


def without_padding(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    _, height, width = x.shape
    if size[0] / size[1] > width / height:
        edge = (height - int(size[1] * (width / size[0]))) // 2
        return x[:, edge : height - edge]
    edge = (width - int(size[0] * (height / size[1]))) // 2
    return x[:, :, edge : width - edge]


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read_checkpoint(folder)
    visual = [image_tokens(config, tensors, image) for image in images]
    ids = in_chunks(read_byte_level(folder), prompt(turns, len(images)), [len(tokens) for tokens in visual])
    x = embed(ids, tensors["model.embed_tokens.weight"], visual)
    angles = positions(len(x), config["hidden_size"] // config["num_attention_heads"], config["rope_theta"])
    return ids, linear(qwen2(tensors, "model", config, x, angles), tensors, "lm_head")


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """Each frame squashed to one square and halved in both directions, rounded up; no newline: [T, N, D]."""
    config, tensors = read_checkpoint(folder)
    side = tower_config(config)["image_size"]
    grid = side // tower_config(config)["patch_size"]
    x = torch.stack([square_tokens(config, tensors, resized(frame, side, side)) for frame in frames])  # [T, N, D]
    x = x.transpose(1, 2).unflatten(2, (grid, grid))  # [T, D, g, g]
    x = F.interpolate(x, [ceil(grid / 2)] * 2, mode="bilinear")
    return x.flatten(2).transpose(1, 2)
