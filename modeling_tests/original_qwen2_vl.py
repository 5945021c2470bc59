"""Qwen2-VL's checkpoints as their authors store them, and their arithmetic on torch ops.

Read in transformers, where the authors put the model (`models/qwen2_vl`), and in copies of the Hub's config.json.
"""

from math import ceil, floor, sqrt
from pathlib import Path

import torch
from original_parts import (
    IMAGE,
    Published,
    Shapes,
    Tensors,
    attention,
    embed,
    gelu,
    inverse_frequencies,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    normalised,
    qwen2,
    qwen2_shapes,
    random_tensors,
    read_checkpoint,
    read_config,
    resized,
    rotate,
    write_json,
    write_weights,
)
from original_tokenizers import byte_level_ids, qwen_tokens, read_byte_level, write_byte_level
from PIL import Image

CONFIG = "config.json on the Hub, in vendored copies; the count is the Hub's"
CHECKPOINTS = {
    "qwen2_vl_2b": Published("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600, "apache-2.0", CONFIG),
    "qwen2_vl_7b": Published("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616, "apache-2.0", CONFIG),
    "qwen2_vl_72b": Published("Qwen/Qwen2-VL-72B-Instruct", 73_400_000_000, "tongyi-qianwen", CONFIG, 50_000_000),
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# hidden, intermediate, layers, heads, key and value heads, vocabulary
SIZES = {
    "qwen2_vl_2b": (1536, 8960, 28, 12, 2, 151936),
    "qwen2_vl_7b": (3584, 18944, 28, 28, 4, 152064),
    "qwen2_vl_72b": (8192, 29568, 80, 64, 8, 152064),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def published_config(name: str) -> dict:
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[name]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_token_id": 151655,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": name == "qwen2_vl_2b",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": hidden,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vision_token_id": 151654,
        "vocab_size": vocabulary,
    }


def tiny_config(name: str) -> dict:
    config = published_config(name)
    ids = byte_level_ids([token.content for token in qwen_tokens()])
    config |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    config |= {f"{part}_token_id": ids[f"<|{part}|>"] for part in ("vision_start", "vision_end")}
    config |= {f"{part}_token_id": ids[f"<|{part}_pad|>"] for part in ("vision", "image", "video")}
    config |= {"hidden_size": 64, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"num_key_value_heads": 2, "vocab_size": 320, "max_window_layers": 2}
    config["rope_scaling"]["mrope_section"] = [2, 3, 3]
    config["vision_config"] |= {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    config["vision_config"] |= {"patch_size": 4, "spatial_patch_size": 4}
    return config


def shapes(config: dict) -> Shapes:
    vision = config["vision_config"]
    width, patch, merged = vision["embed_dim"], vision["patch_size"], vision["spatial_merge_size"] ** 2
    kernel = (width, vision["in_chans"], vision["temporal_patch_size"], patch, patch)
    named: Shapes = {"visual.patch_embed.proj.weight": kernel}
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        named |= norm_shapes(f"{block}.norm1", width, bias=True)
        named |= norm_shapes(f"{block}.norm2", width, bias=True)
        named |= linear_shapes(f"{block}.attn.qkv", 3 * width, width, bias=True)
        named |= linear_shapes(f"{block}.attn.proj", width, width, bias=True)
        named |= linear_shapes(f"{block}.mlp.fc1", vision["mlp_ratio"] * width, width, bias=True)
        named |= linear_shapes(f"{block}.mlp.fc2", width, vision["mlp_ratio"] * width, bias=True)
    named |= norm_shapes("visual.merger.ln_q", width, bias=True)
    named |= linear_shapes("visual.merger.mlp.0", merged * width, merged * width, bias=True)
    named |= linear_shapes("visual.merger.mlp.2", vision["hidden_size"], merged * width, bias=True)
    return named | qwen2_shapes("model", config, tied=config["tie_word_embeddings"])


def write(name: str, folder: Path, *, seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(shapes(config), seed, dtype), shards)
    added = qwen_tokens()
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": [token.content for token in added[1:]],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_byte_level(folder, "qwen2", added, settings)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    # The published least and most pixels are 4 and 16,384 merged patches.
    merged = (config["vision_config"]["patch_size"] * config["vision_config"]["spatial_merge_size"]) ** 2
    preprocessor = {
        "image_mean": MEAN,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": STD,
        "max_pixels": 48 * merged,
        "merge_size": config["vision_config"]["spatial_merge_size"],
        "min_pixels": 4 * merged,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": config["vision_config"]["temporal_patch_size"],
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.001,
        "transformers_version": "4.37.0",
    }
    write_json(folder / "generation_config.json", generation)
    return folder


def prompt(turns: list[tuple[str, str]], counts: list[int]) -> str:
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    pictures = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts)
    for number, (role, words) in enumerate(turns):
        text += f"<|im_start|>{role}\n{pictures if number == 0 else ''}{words}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    config = read_config(folder)
    counts = [rows * columns for rows, columns in (merged_grid(folder, image) for image in images)]
    ids = read_byte_level(folder).encode(prompt(turns, counts)).ids
    return [IMAGE if id_ == config["image_token_id"] else id_ for id_ in ids]


def merged_grid(folder: Path, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of visual tokens: the picture's own, within the least and most pixels."""
    settings = read_config(folder, "preprocessor_config.json")
    side = settings["patch_size"] * settings["merge_size"]
    rows, columns = max(1, round(image.height / side)), max(1, round(image.width / side))
    pixels, area = image.height * image.width, rows * columns * side * side
    if area > settings["max_pixels"]:
        shrink = sqrt(pixels / settings["max_pixels"])
        rows, columns = (max(1, floor(length / shrink / side)) for length in (image.height, image.width))
    elif area < settings["min_pixels"]:
        grow = sqrt(settings["min_pixels"] / pixels)
        rows, columns = (ceil(length * grow / side) for length in (image.height, image.width))
    return rows, columns


def visual_tokens(config: dict, tensors: Tensors, image: Image.Image, grid: tuple[int, int]) -> torch.Tensor:
    """A picture is a clip of two like frames; every block of 2 x 2 patches becomes one token: [rows * columns, D]."""
    vision = config["vision_config"]
    merge, patch, heads = vision["spatial_merge_size"], vision["patch_size"], vision["num_heads"]
    rows, columns = grid[0] * merge, grid[1] * merge
    pixels = normalised(resized(image, columns * patch, rows * patch), MEAN, STD)  # [3, H, W]
    patches = pixels.view(3, rows, patch, columns, patch).permute(1, 3, 0, 2, 4)  # [rows, columns, 3, p, p]
    kernel = tensors["visual.patch_embed.proj.weight"].sum(2)  # [D, 3, p, p], over two like frames
    x = blocks(torch.einsum("rcipq,dipq->rcd", patches, kernel), merge)  # [N, D]
    places = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1
    )  # [rows, columns, 2]
    frequencies = inverse_frequencies(vision["embed_dim"] // heads // 2, 10000.0)  # [d / 4]
    angles = (blocks(places.float(), merge)[..., None] * frequencies).flatten(1)  # [N, d / 2], of rows then of columns
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        y = linear(layer_norm(x, tensors, f"{block}.norm1", 1e-6), tensors, f"{block}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in y.chunk(3, -1))
        x = x + linear(attention(rotate(q, angles), rotate(k, angles), v), tensors, f"{block}.attn.proj")
        y = linear(layer_norm(x, tensors, f"{block}.norm2", 1e-6), tensors, f"{block}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), tensors, f"{block}.mlp.fc2")
    x = layer_norm(x, tensors, "visual.merger.ln_q", 1e-6).unflatten(0, (-1, merge * merge)).flatten(1)
    return linear(gelu(linear(x, tensors, "visual.merger.mlp.0")), tensors, "visual.merger.mlp.2")


def blocks(x: torch.Tensor, merge: int) -> torch.Tensor:
    """[rows, columns, D] -> [rows * columns, D], the places of one merged token next to each other."""
    rows, columns, _ = x.shape
    x = x.view(rows // merge, merge, columns // merge, merge, -1)
    return x.transpose(1, 2).flatten(0, 3)


def text_angles(config: dict, ids: list[int], grids: list[tuple[int, int]]) -> torch.Tensor:
    """[S, d / 2]: each channel turns by time, row or column, which differ at a picture's tokens and nowhere else."""
    places, at, pictures = [], 0, iter(grids)
    while len(places) < len(ids):
        if ids[len(places)] == IMAGE:
            rows, columns = next(pictures)
            places += [(at, at + row, at + column) for row in range(rows) for column in range(columns)]
            at += max(rows, columns)
        else:
            places.append((at, at, at))
            at += 1
    size = config["hidden_size"] // config["num_attention_heads"]
    angles = torch.tensor(places).float()[..., None] * inverse_frequencies(size, config["rope_theta"])  # [S, 3, d / 2]
    parts = angles.split(config["rope_scaling"]["mrope_section"], -1)
    return torch.cat([part[:, axis] for axis, part in enumerate(parts)], -1)


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read_checkpoint(folder)
    ids = prompt_ids(folder, turns, images)
    grids = [merged_grid(folder, image) for image in images]
    visual = [visual_tokens(config, tensors, image, grid) for image, grid in zip(images, grids, strict=True)]
    x = embed(ids, tensors["model.embed_tokens.weight"], visual)
    x = qwen2(tensors, "model", config, x, text_angles(config, ids, grids))
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return ids, linear(x, tensors, head)


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """Each frame as a picture of its own, so frames of one size: [T, N, D]."""
    config, tensors = read_checkpoint(folder)
    return torch.stack([visual_tokens(config, tensors, frame, merged_grid(folder, frame)) for frame in frames])
