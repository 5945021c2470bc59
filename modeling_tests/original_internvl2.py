"""InternVL2's checkpoints as their authors store them, and their arithmetic on torch ops.

Read in OpenGVLab/InternVL at 2410d1dbf208: `internvl_chat/internvl/model/**`, `internvl_chat/internvl/conversation.py`
and `internvl_chat/internvl/train/dataset.py`.
"""

from math import log, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from original_internvl2_config import (
    CHECKPOINTS,
    MEAN,
    STD,
    generation_config,
    is_internlm2,
    is_phi3,
    published_config,
    tiny_config,
    write_tokenizer,
)
from original_parts import (
    IMAGE,
    Shapes,
    Tensors,
    attention,
    causal,
    embed,
    gelu,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    normalised,
    positions,
    qwen2,
    qwen2_shapes,
    random_tensors,
    read_checkpoint,
    read_config,
    resized,
    rms_norm,
    rotate,
    swiglu,
    write_json,
    write_weights,
)
from original_tokenizers import SlowTokenizer, read_byte_level, read_settings
from PIL import Image

__all__ = [
    "CHECKPOINTS",
    "frame_tokens",
    "logits",
    "prompt_ids",
    "published_config",
    "shapes",
    "tiny_config",
    "write",
]

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


def shapes(config: dict) -> Shapes:
    vision, llm = config["vision_config"], config["llm_config"]
    named = vision_shapes(vision)
    hidden, width = llm["hidden_size"], vision["hidden_size"] * round(1 / config["downsample_ratio"]) ** 2
    if is_internlm2(llm):
        named |= internlm2_shapes(llm)
    elif is_phi3(llm):
        named |= phi3_shapes(llm)
    else:
        named |= qwen2_shapes("language_model.model", llm, tied=False, head="language_model.lm_head.weight")
    named |= norm_shapes("mlp1.0", width, bias=True)
    named |= linear_shapes("mlp1.1", hidden, width, bias=True)
    return named | linear_shapes("mlp1.3", hidden, hidden, bias=True)


def vision_shapes(vision: dict) -> Shapes:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    named: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, hidden),
        "vision_model.embeddings.position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, hidden),
        "vision_model.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (hidden,),
    }
    for index in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        named |= {f"{layer}.ls1": (hidden,), f"{layer}.ls2": (hidden,)}
        named |= linear_shapes(f"{layer}.attn.qkv", 3 * hidden, hidden, bias=vision["qkv_bias"])
        if vision["qk_normalization"]:
            named |= norm_shapes(f"{layer}.attn.q_norm", hidden, bias=False)
            named |= norm_shapes(f"{layer}.attn.k_norm", hidden, bias=False)
        named |= linear_shapes(f"{layer}.attn.proj", hidden, hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc1", inner, hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc2", hidden, inner, bias=True)
        for norm in ("norm1", "norm2"):
            named |= norm_shapes(f"{layer}.{norm}", hidden, bias=vision["norm_type"] == "layer_norm")
    return named


def internlm2_shapes(llm: dict) -> Shapes:
    hidden, inner = llm["hidden_size"], llm["intermediate_size"]
    size = hidden // llm["num_attention_heads"]
    fused = (llm["num_attention_heads"] + 2 * llm["num_key_value_heads"]) * size
    named: Shapes = {"language_model.model.tok_embeddings.weight": (llm["vocab_size"], hidden)}
    for index in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        named |= linear_shapes(f"{layer}.attention.wqkv", fused, hidden, bias=llm["bias"])
        named |= linear_shapes(f"{layer}.attention.wo", hidden, hidden, bias=llm["bias"])
        named |= linear_shapes(f"{layer}.feed_forward.w1", inner, hidden, bias=False)
        named |= linear_shapes(f"{layer}.feed_forward.w3", inner, hidden, bias=False)
        named |= linear_shapes(f"{layer}.feed_forward.w2", hidden, inner, bias=False)
        named |= norm_shapes(f"{layer}.attention_norm", hidden, bias=False)
        named |= norm_shapes(f"{layer}.ffn_norm", hidden, bias=False)
    named |= norm_shapes("language_model.model.norm", hidden, bias=False)
    return named | linear_shapes("language_model.output", llm["vocab_size"], hidden, bias=False)


def phi3_shapes(llm: dict) -> Shapes:
    hidden, inner = llm["hidden_size"], llm["intermediate_size"]
    fused = hidden + 2 * llm["num_key_value_heads"] * hidden // llm["num_attention_heads"]
    named: Shapes = {"language_model.model.embed_tokens.weight": (llm["vocab_size"], hidden)}
    for index in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        named |= linear_shapes(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        named |= linear_shapes(f"{layer}.self_attn.qkv_proj", fused, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.gate_up_proj", 2 * inner, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
        named |= norm_shapes(f"{layer}.input_layernorm", hidden, bias=False)
        named |= norm_shapes(f"{layer}.post_attention_layernorm", hidden, bias=False)
    named |= norm_shapes("language_model.model.norm", hidden, bias=False)
    return named | linear_shapes("language_model.lm_head", llm["vocab_size"], hidden, bias=False)


def write(name: str, folder: Path, *, seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(shapes(config), seed, dtype), shards)
    write_tokenizer(name, folder)
    size = config["force_image_size"]
    preprocessor = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": size,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "generation_config.json", generation_config(name))
    return folder


def prompt(template: str, turns: list[tuple[str, str]], images: int) -> str:
    """Each turn ends in the template's mark and nothing else; several pictures stand one a line, as one does."""
    opening, end = ("<|{}|>\n", "<|end|>") if template == "phi3-chat" else ("<|im_start|>{}\n", "<|im_end|>")
    text = opening.format("system") + SYSTEM + end
    for number, (role, words) in enumerate(turns):
        text += opening.format(role) + ("<image>\n" * images if number == 0 else "") + words + end
    return text + opening.format("assistant")


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    config = read_config(folder)
    text = prompt(config["template"], turns, len(images))
    each = round(
        (config["force_image_size"] // config["vision_config"]["patch_size"] * config["downsample_ratio"]) ** 2
    )
    for image in images:
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * (each * len(tiles(config, image))) + "</img>", 1)
    if (Path(folder) / "tokenizer.model").exists():
        ids = SlowTokenizer.read(folder).encode(text)
    else:
        ids = read_byte_level(folder).encode(text).ids
    added = read_settings(folder)[0]
    context = next(id_ for id_, token in added.items() if token.content == "<IMG_CONTEXT>")
    return [IMAGE if id_ == context else id_ for id_ in ids]


def tiles(config: dict, image: Image.Image) -> list[Image.Image]:
    """The grid of at most `max_dynamic_patch` squares nearest to the picture's shape, then the whole picture."""
    size, most, image = config["force_image_size"], config["max_dynamic_patch"], image.convert("RGB")
    grids = [
        (w, h) for w in range(1, most + 1) for h in range(1, most + 1) if config["min_dynamic_patch"] <= w * h <= most
    ]
    aspect = image.width / image.height
    best, least = (1, 1), float("inf")
    for w, h in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        off = abs(aspect - w / h)
        # Of grids of one shape, a larger one only for a picture of more than half its area.
        if off < least or (off == least and image.width * image.height > 0.5 * size * size * w * h):
            best, least = (w, h), off
    whole = resized(image, size * best[0], size * best[1])
    corners = [(size * column, size * row) for row in range(best[1]) for column in range(best[0])]
    cut = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
    return [*cut, resized(image, size, size)] if config["use_thumbnail"] and len(cut) > 1 else cut


# Arithmetic ----------------------------------------------------------------------------------------------------------


def vision(config: dict, tensors: Tensors, tile: Image.Image) -> torch.Tensor:
    """One tile's last layer, without a last norm: [1 + N, D]."""
    settings = config["vision_config"]
    heads, eps = settings["num_attention_heads"], settings["layer_norm_eps"]
    norm = layer_norm if settings["norm_type"] == "layer_norm" else rms_norm
    embeddings = "vision_model.embeddings"
    kernel, bias = (tensors[f"{embeddings}.patch_embedding.{part}"] for part in ("weight", "bias"))
    patches = F.conv2d(normalised(tile, MEAN, STD)[None], kernel, bias, stride=settings["patch_size"])[0]  # [D, h, w]
    x = torch.cat([tensors[f"{embeddings}.class_embedding"][0], patches.flatten(1).T])  # [1 + N, D]
    x = x + tensors[f"{embeddings}.position_embedding"][0]
    for index in range(settings["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        q, k, v = linear(norm(x, tensors, f"{layer}.norm1", eps), tensors, f"{layer}.attn.qkv").chunk(3, -1)
        if settings["qk_normalization"]:  # over all heads' channels together
            q, k = rms_norm(q, tensors, f"{layer}.attn.q_norm", eps), rms_norm(k, tensors, f"{layer}.attn.k_norm", eps)
        attended = attention(*(part.unflatten(-1, (heads, -1)) for part in (q, k, v)))
        x = x + linear(attended, tensors, f"{layer}.attn.proj") * tensors[f"{layer}.ls1"]
        y = gelu(linear(norm(x, tensors, f"{layer}.norm2", eps), tensors, f"{layer}.mlp.fc1"))
        x = x + linear(y, tensors, f"{layer}.mlp.fc2") * tensors[f"{layer}.ls2"]
    return x


def visual_tokens(config: dict, tensors: Tensors, tile: Image.Image) -> torch.Tensor:
    x = vision(config, tensors, tile)[1:]  # [N, D]
    side, block = round(len(x) ** 0.5), round(1 / config["downsample_ratio"])
    x = x.view(side // block, block, side // block, block, -1)  # [h, 2, w, 2, D]
    x = x.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)  # [N / 4, 4 * D], a block's rows one after another
    x = linear(layer_norm(x, tensors, "mlp1.0", 1e-5), tensors, "mlp1.1")
    return linear(gelu(x), tensors, "mlp1.3")


def internlm2(llm: dict, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    heads, kv_heads, eps = llm["num_attention_heads"], llm["num_key_value_heads"], llm["rms_norm_eps"]
    size, base = llm["hidden_size"] // heads, llm["rope_theta"]
    longer = len(x) / llm["max_position_embeddings"]
    if longer > 1:  # the dynamic rule: a larger base once the text is longer than the model was trained for
        factor = llm["rope_scaling"]["factor"]
        base *= (factor * longer - (factor - 1)) ** (size / (size - 2))
    angles = positions(len(x), size, base)
    for index in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        y = linear(rms_norm(x, tensors, f"{layer}.attention_norm", eps), tensors, f"{layer}.attention.wqkv")
        # For each key and value head its queries, then the key, then the value.
        y = y.view(len(x), kv_heads, heads // kv_heads + 2, size)
        q, k, v = y[:, :, :-2].flatten(1, 2), y[:, :, -2], y[:, :, -1]
        attended = attention(rotate(q, angles), rotate(k, angles), v, causal(len(x)))
        x = x + linear(attended, tensors, f"{layer}.attention.wo")
        y = rms_norm(x, tensors, f"{layer}.ffn_norm", eps)
        x = x + swiglu(y, tensors, *(f"{layer}.feed_forward.{part}" for part in ("w1", "w3", "w2")))
    return rms_norm(x, tensors, "language_model.model.norm", eps)


def phi3(llm: dict, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    heads, kv_heads, eps = llm["num_attention_heads"], llm["num_key_value_heads"], llm["rms_norm_eps"]
    size, trained = llm["hidden_size"] // heads, llm["original_max_position_embeddings"]
    factors = llm["rope_scaling"]["long_factor" if len(x) > trained else "short_factor"]
    frequencies = 1 / (torch.tensor(factors) * llm["rope_theta"] ** (torch.arange(0, size, 2) / size))  # [d / 2]
    angles = torch.arange(len(x))[:, None] * frequencies  # [S, d / 2]
    scale = sqrt(1 + log(llm["max_position_embeddings"] / trained) / log(trained))
    sees = causal(len(x), llm["sliding_window"])
    for index in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        y = linear(rms_norm(x, tensors, f"{layer}.input_layernorm", eps), tensors, f"{layer}.self_attn.qkv_proj")
        q, k, v = y.unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], 1)
        attended = attention(rotate(q, angles, scale), rotate(k, angles, scale), v, sees)
        x = x + linear(attended, tensors, f"{layer}.self_attn.o_proj")
        y = rms_norm(x, tensors, f"{layer}.post_attention_layernorm", eps)
        gate, up = linear(y, tensors, f"{layer}.mlp.gate_up_proj").chunk(2, -1)
        x = x + linear(F.silu(gate) * up, tensors, f"{layer}.mlp.down_proj")
    return rms_norm(x, tensors, "language_model.model.norm", eps)


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read_checkpoint(folder)
    llm = config["llm_config"]
    ids = prompt_ids(folder, turns, images)
    visual = [visual_tokens(config, tensors, tile) for image in images for tile in tiles(config, image)]
    table = "tok_embeddings" if is_internlm2(llm) else "embed_tokens"
    x = embed(ids, tensors[f"language_model.model.{table}.weight"], visual)
    if is_internlm2(llm):
        return ids, linear(internlm2(llm, tensors, x), tensors, "language_model.output")
    if is_phi3(llm):
        return ids, linear(phi3(llm, tensors, x), tensors, "language_model.lm_head")
    angles = positions(len(x), llm["hidden_size"] // llm["num_attention_heads"], llm["rope_theta"])
    return ids, linear(qwen2(tensors, "language_model.model", llm, x, angles), tensors, "language_model.lm_head")


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """One tile a frame, the whole frame at the tile's size whatever its shape: [T, N, D]."""
    config, tensors = read_checkpoint(folder)
    size = config["force_image_size"]
    return torch.stack([visual_tokens(config, tensors, resized(frame, size, size)) for frame in frames])
