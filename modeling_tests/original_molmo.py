"""Molmo's checkpoints as their authors store them, and their arithmetic on torch ops.

Read in allenai/molmo at 793fa387edfd (`olmo/model.py`, `olmo/image_vit.py`, `olmo/data/model_preprocessor.py`,
`olmo/data/data_formatter.py`, `olmo/tokenizer.py`) and in the code that the checkpoints bring along.
"""

from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from original_molmo_config import (
    CHECKPOINTS,
    IMAGE_TOKENS,
    generation_config,
    is_moe,
    preprocessor_config,
    published_config,
    tiny_config,
    tower,
    write_tokenizer,
)
from original_parts import (
    IMAGE,
    Shapes,
    Tensors,
    attention,
    causal,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    positions,
    random_tensors,
    read_checkpoint,
    read_config,
    rms_norm,
    rotate,
    swiglu,
    write_json,
    write_weights,
)
from original_tokenizers import read_byte_level
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

VIT = "model.vision_backbone.image_vit"
LAYERS = (-2, -9)  # of the tower's blocks; in MolmoE's config, in the code of the 7B


def llm_sizes(config: dict) -> dict:
    """One set of names for the two kinds of config; `inner` is the width of both halves of an MLP together."""
    if is_moe(config):
        inner = config["mlp_hidden_size"] or config["mlp_ratio"] * config["d_model"]
        hidden, heads, kv, layers = (config[key] for key in ("d_model", "n_heads", "n_kv_heads", "n_layers"))
    else:
        inner, hidden = config["intermediate_size"], config["hidden_size"]
        heads, kv, layers = (config[f"num_{key}"] for key in ("attention_heads", "key_value_heads", "hidden_layers"))
    return {"hidden": hidden, "inner": inner, "heads": heads, "kv_heads": kv or heads, "layers": layers}


def block_parts(config: dict, index: int) -> tuple[str, str]:
    """MolmoE keeps a block's attention and MLP apart; the 7B's names have no such level."""
    block = f"model.transformer.blocks.{index}"
    return (f"{block}.attn", f"{block}.mlp") if is_moe(config) else (block, block)


def head_name(config: dict) -> str:
    return "lm_head" if is_moe(config) else "model.transformer.ff_out"


def shapes(config: dict) -> Shapes:
    sizes, rows = llm_sizes(config), config["embedding_size"]
    hidden, inner = sizes["hidden"], sizes["inner"]
    named: Shapes = {
        "model.transformer.wte.embedding": (rows, hidden),
        "model.transformer.wte.new_embedding": (config.get("additional_vocab_size", 128), hidden),
    }
    fused = hidden + 2 * sizes["kv_heads"] * hidden // sizes["heads"]
    for index in range(sizes["layers"]):
        attn, mlp = block_parts(config, index)
        named |= linear_shapes(f"{attn}.att_proj", fused, hidden, bias=config["qkv_bias"])
        named |= linear_shapes(f"{attn}.attn_out", hidden, hidden, bias=False)
        named |= norm_shapes(f"{attn}.attn_norm", hidden, bias=False)
        named |= norm_shapes(f"{mlp}.ff_norm", hidden, bias=False)
        if config["attention_layer_norm"]:
            named |= norm_shapes(f"{attn}.q_norm", hidden, bias=False)
            named |= norm_shapes(f"{attn}.k_norm", sizes["kv_heads"] * hidden // sizes["heads"], bias=False)
        if is_moe(config):
            named |= linear_shapes(f"{mlp}.gate", config["moe_num_experts"], hidden, bias=False)
            for expert in range(config["moe_num_experts"]):
                named |= linear_shapes(f"{mlp}.experts.{expert}.gate_proj", inner // 2, hidden, bias=False)
                named |= linear_shapes(f"{mlp}.experts.{expert}.up_proj", inner // 2, hidden, bias=False)
                named |= linear_shapes(f"{mlp}.experts.{expert}.down_proj", hidden, inner // 2, bias=False)
        else:
            named |= linear_shapes(f"{mlp}.ff_proj", inner, hidden, bias=False)
            named |= linear_shapes(f"{mlp}.ff_out", hidden, inner // 2, bias=False)
    named |= norm_shapes("model.transformer.ln_f", hidden, bias=False)
    named |= linear_shapes(head_name(config), rows, hidden, bias=False)
    return named | vision_shapes(tower(config), hidden, inner // 2)


def vision_shapes(vision: dict, hidden: int, projected: int) -> Shapes:
    width, inner, patch = vision["image_emb_dim"], vision["image_mlp_dim"], vision["image_patch_size"]
    attended, read = vision["image_num_heads"] * vision["image_head_dim"], len(LAYERS) * width
    named: Shapes = {
        f"{VIT}.class_embedding": (width,),
        f"{VIT}.positional_embedding": (vision["image_num_pos"], width),
        f"{VIT}.patch_embedding.weight": (width, 3 * patch * patch),
        **norm_shapes(f"{VIT}.pre_ln", width, bias=True),
    }
    for index in range(vision["image_num_layers"]):
        block = f"{VIT}.transformer.resblocks.{index}"
        for projection in ("wq", "wk", "wv"):
            named |= linear_shapes(f"{block}.attention.{projection}", attended, width, bias=True)
        named |= linear_shapes(f"{block}.attention.wo", width, attended, bias=True)
        named |= linear_shapes(f"{block}.feed_forward.w1", inner, width, bias=True)
        named |= linear_shapes(f"{block}.feed_forward.w2", width, inner, bias=True)
        named |= norm_shapes(f"{block}.attention_norm", width, bias=True)
        named |= norm_shapes(f"{block}.ffn_norm", width, bias=True)
    backbone = "model.vision_backbone"
    for projection in ("wq", "wk", "wv"):
        named |= linear_shapes(f"{backbone}.image_pooling_2d.{projection}", attended, read, bias=True)
    named |= linear_shapes(f"{backbone}.image_pooling_2d.wo", width, attended, bias=True)
    named |= linear_shapes(f"{backbone}.image_projector.w1", projected, width, bias=False)
    named |= linear_shapes(f"{backbone}.image_projector.w2", hidden, projected, bias=False)
    named |= linear_shapes(f"{backbone}.image_projector.w3", projected, width, bias=False)
    return named | {f"{backbone}.pad_embed": (2, read)}


def write(
    name: str, folder: Path, *, seed: int = 0, shards: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """`shards` unless given: two of safetensors for the 7B, one pytorch_model.bin for MolmoE, which comes so."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", config)
    tensors = random_tensors(shapes(config), seed, dtype)
    if is_moe(config):
        write_pickles(folder, tensors, shards or 1)
    else:
        write_weights(folder, tensors, shards or 2)
    write_tokenizer(name, folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    processor = {
        "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"},
        "processor_class": "MolmoProcessor",
    }
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "generation_config.json", generation_config(name, config))
    return folder


def write_pickles(folder: Path, tensors: Tensors, shards: int) -> None:
    names = list(tensors)
    if shards == 1:
        return torch.save(tensors, folder / "pytorch_model.bin")
    each, where = ceil(len(names) / shards), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[number * each : (number + 1) * each]}
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def read(folder: Path) -> tuple[dict, Tensors]:
    config, tensors = read_checkpoint(folder)
    for file in sorted(Path(folder).glob("pytorch_model*.bin")):
        tensors |= {name: tensor.float() for name, tensor in torch.load(file, weights_only=True).items()}
    return config, tensors


# Pictures ------------------------------------------------------------------------------------------------------------


def padded(settings: dict, image: Image.Image, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture as large as fits, in the middle of black: normalised [height, width, 3] and where it is [h, w]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255  # [3, h, w]
    scale = min(np.float32(width) / np.float32(image.width), np.float32(height) / np.float32(image.height))
    size = [int(np.float32(image.height) * scale), int(np.float32(image.width) * scale)]
    if size != [image.height, image.width]:
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clip(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    square, inside = torch.zeros(height, width, 3), torch.zeros(height, width)
    square[top : top + size[0], left : left + size[1]] = pixels.permute(1, 2, 0)
    inside[top : top + size[0], left : left + size[1]] = 1
    return (square - torch.tensor(settings["image_mean"])) / torch.tensor(settings["image_std"]), inside


def patches(square: torch.Tensor, patch: int) -> torch.Tensor:
    """[H, W, 3] or [H, W] as patches row by row, the values of each in the order they stand: [N, values]."""
    rows, columns = square.shape[0] // patch, square.shape[1] // patch
    return square.reshape(rows, patch, columns, patch, -1).transpose(1, 2).reshape(rows * columns, -1)


def window(settings: dict) -> tuple[int, int]:
    """In patches: how far one crop stands from the next, and how much more than that a crop sees."""
    overlap = sum(settings["overlap_margins"])
    return settings["base_image_input_size"][0] // settings["image_patch_size"] - overlap, overlap


def tiling(settings: dict, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of crops: of those that need no shrinking the one that needs least enlarging."""
    (step, overlap), patch, most = window(settings), settings["image_patch_size"], settings["max_crops"]
    grids = [grid for grid in product(range(1, most + 1), repeat=2) if grid[0] * grid[1] <= most]
    grids = np.array(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])), dtype=np.int32)  # [G, 2]
    fills = np.array([image.height, image.width], dtype=np.float32) - overlap * patch
    with np.errstate(divide="ignore"):
        scales = ((grids * step * patch).astype(np.float32) / fills).min(-1)  # [G], below 0 for a picture too small
    best = scales.argmax() if (scales < 1).all() else np.where(scales < 1, 10e9, scales).argmin()
    return tuple(grids[best].tolist())


def crops(settings: dict, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole picture, then its crops row by row: [1 + C, N, 3 * p * p], and how much of each patch is picture.

    The second, [1 + C, N], is one place off as in the published models: the whole has the first crop's, each crop the
    next one's, and the last crop -1.
    """
    (step, overlap), patch, (rows, columns) = window(settings), settings["image_patch_size"], tiling(settings, image)
    side = settings["base_image_input_size"][0]
    whole, _ = padded(settings, image, side, side)
    large, inside = padded(settings, image, (rows * step + overlap) * patch, (columns * step + overlap) * patch)
    pixels, shares = [patches(whole, patch)], []
    for row, column in product(range(rows), range(columns)):
        y, x = row * step * patch, column * step * patch
        pixels.append(patches(large[y : y + side, x : x + side], patch))
        shares.append(patches(inside[y : y + side, x : x + side], patch).mean(-1))
    return torch.stack(pixels), torch.stack([*shares, torch.full_like(shares[0], -1)])


def stitched(settings: dict, image: Image.Image, features: torch.Tensor) -> torch.Tensor:
    """Features [1 + C, n, D] in the order of their tokens: the whole's, then one grid of the crops, row by row.

    Where crops overlap, the earlier one gives the first half of its right or bottom margin, the later one the rest.
    """
    (step, overlap), (rows, columns) = window(settings), tiling(settings, image)
    before = settings["overlap_margins"][0] // 2  # tokens
    step, side = step // 2, settings["image_token_length_h"]
    whole, parts = features[0], features[1:].view(rows, columns, side, side, -1)

    def owner(place: int, count: int) -> int:
        return min(max((place - before) // step, 0), count - 1)

    grid = []
    for y, x in product(range(rows * step + overlap // 2), range(columns * step + overlap // 2)):
        row, column = owner(y, rows), owner(x, columns)
        grid.append(parts[row, column, y - row * step, x - column * step])
    return torch.cat([whole, torch.stack(grid)])


# Text ----------------------------------------------------------------------------------------------------------------


def layout(rows: int, columns: int, ids: dict[str, int]) -> list[int]:
    row = [IMAGE] * columns + [ids["<im_col>"]]
    return [ids["<im_start>"], *row * rows, ids["<im_end>"]]


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    """Each message is tokenized alone; the end of a text stands before its beginning and after each answer."""
    tokenizer, settings = read_byte_level(folder), read_config(folder, "preprocessor_config.json")
    special = {token: tokenizer.token_to_id(token) for token in IMAGE_TOKENS}
    end = tokenizer.token_to_id(read_config(folder, "tokenizer_config.json")["eos_token"])
    ids = [end]
    for image in images:
        (step, overlap), (rows, columns) = window(settings), tiling(settings, image)
        ids += layout(settings["image_token_length_h"], settings["image_token_length_w"], special)
        ids += layout((rows * step + overlap) // 2, (columns * step + overlap) // 2, special)
    for role, words in turns:
        message = f" User: {words} Assistant:" if role == "user" else f" {words}"
        ids += tokenizer.encode(message, add_special_tokens=False).ids + ([] if role == "user" else [end])
    return ids


# Arithmetic ----------------------------------------------------------------------------------------------------------


def vit(vision: dict, tensors: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    """One crop's patches [N, 3 * p * p]: what two of the blocks make of them, side by side, [N, 2 * D]."""
    heads, eps = vision["image_num_heads"], vision["image_norm_eps"]
    x = torch.cat([tensors[f"{VIT}.class_embedding"][None], linear(pixels, tensors, f"{VIT}.patch_embedding")])
    x = layer_norm(x + tensors[f"{VIT}.positional_embedding"], tensors, f"{VIT}.pre_ln", eps)  # [1 + N, D]
    seen = []
    for index in range(vision["image_num_layers"]):
        block = f"{VIT}.transformer.resblocks.{index}"
        y = layer_norm(x, tensors, f"{block}.attention_norm", eps)
        q, k, v = (linear(y, tensors, f"{block}.attention.w{part}").unflatten(-1, (heads, -1)) for part in "qkv")
        x = x + linear(attention(q, k, v), tensors, f"{block}.attention.wo")
        y = linear(layer_norm(x, tensors, f"{block}.ffn_norm", eps), tensors, f"{block}.feed_forward.w1")
        x = x + linear(y * torch.sigmoid(1.702 * y), tensors, f"{block}.feed_forward.w2")
        seen.append(x[1:])
    return torch.cat([seen[layer] for layer in LAYERS], -1)


def crop_features(config: dict, tensors: Tensors, pixels: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """One crop's visual tokens, [N / 4, D]; `shares` [N] says how much of each patch is picture."""
    vision, backbone = tower(config), "model.vision_backbone"
    x, empty, partly = vit(vision, tensors, pixels), shares == 0, (shares < 1) & (shares != 0)
    pad = tensors[f"{backbone}.pad_embed"]
    x = x + pad[0] * empty[:, None] + pad[1] * partly[:, None]
    side = round(len(x) ** 0.5)
    x = x.view(side // 2, 2, side // 2, 2, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [N / 4, 4, 2 * D]
    pool, heads = f"{backbone}.image_pooling_2d", vision["image_num_heads"]
    q = linear(x.mean(1, keepdim=True), tensors, f"{pool}.wq").unflatten(-1, (heads, -1))  # [N / 4, 1, H, d]
    k, v = (linear(x, tensors, f"{pool}.w{part}").unflatten(-1, (heads, -1)) for part in "kv")  # [N / 4, 4, H, d]
    pooled = torch.stack([attention(*window_) for window_ in zip(q, k, v, strict=True)])[:, 0]  # [N / 4, D]
    pooled = linear(pooled, tensors, f"{pool}.wo")
    return swiglu(pooled, tensors, *(f"{backbone}.image_projector.{part}" for part in ("w1", "w3", "w2")))


def experts(config: dict, tensors: Tensors, mlp: str, x: torch.Tensor) -> torch.Tensor:
    """The best few experts of each token, each by its share among all: [S, D]."""
    shares = linear(x, tensors, f"{mlp}.gate").softmax(-1)  # [S, E]
    least = shares.topk(config["moe_top_k"]).values[:, -1:]
    shares = shares.masked_fill(shares < least, 0)
    y = torch.zeros_like(x)
    for expert in range(config["moe_num_experts"]):
        names = (f"{mlp}.experts.{expert}.{part}_proj" for part in ("gate", "up", "down"))
        y = y + shares[:, expert, None] * swiglu(x, tensors, *names)
    return y


def llm(config: dict, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """The blocks and last norm over embeddings x [S, D]; the 7B-O's norms stand after attention and MLP."""
    sizes, eps, after = llm_sizes(config), config["layer_norm_eps"], config["norm_after"]
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    size = sizes["hidden"] // heads
    angles, sees = positions(len(x), size, config["rope_theta"]), causal(len(x))
    for index in range(sizes["layers"]):
        attn, mlp = block_parts(config, index)
        y = x if after else rms_norm(x, tensors, f"{attn}.attn_norm", eps)
        y = linear(y, tensors, f"{attn}.att_proj")
        q, k, v = y.split([heads * size, kv_heads * size, kv_heads * size], -1)
        if config["attention_layer_norm"]:  # over all heads' channels together
            q, k = rms_norm(q, tensors, f"{attn}.q_norm", eps), rms_norm(k, tensors, f"{attn}.k_norm", eps)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))
        y = linear(attention(rotate(q, angles), rotate(k, angles), v, sees), tensors, f"{attn}.attn_out")
        x = x + (rms_norm(y, tensors, f"{attn}.attn_norm", eps) if after else y)
        y = x if after else rms_norm(x, tensors, f"{mlp}.ff_norm", eps)
        if is_moe(config):
            y = experts(config, tensors, mlp, y)
        else:
            up, gate = linear(y, tensors, f"{mlp}.ff_proj").chunk(2, -1)
            y = linear(F.silu(gate) * up, tensors, f"{mlp}.ff_out")
        x = x + (rms_norm(y, tensors, f"{mlp}.ff_norm", eps) if after else y)
    return rms_norm(x, tensors, "model.transformer.ln_f", eps)


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read(folder)
    settings, ids = read_config(folder, "preprocessor_config.json"), prompt_ids(folder, turns, images)
    patch_id = read_byte_level(folder).token_to_id("<im_patch>")
    table = torch.cat([tensors[f"model.transformer.wte.{part}"] for part in ("embedding", "new_embedding")])
    row = torch.tensor(ids)
    x = table[row.masked_fill(row == IMAGE, patch_id)]  # [S, D]
    visual = []
    for image in images:
        features = [crop_features(config, tensors, *crop) for crop in zip(*crops(settings, image), strict=True)]
        visual.append(stitched(settings, image, torch.stack(features)))
    if visual:  # on top of the token that holds its place
        x[row == IMAGE] += torch.cat(visual)
    return ids, linear(llm(config, tensors, x), tensors, head_name(config))  # [S, rows of the table]


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """The whole frame alone, with the shares of its own patches, as a picture of one crop gives them: [T, N, D]."""
    config, tensors = read(folder)
    settings = read_config(folder, "preprocessor_config.json")
    side, patch = settings["base_image_input_size"][0], settings["image_patch_size"]
    tokens = []
    for frame in frames:
        pixels, inside = padded(settings, frame, side, side)
        shares = patches(inside, patch).mean(-1)
        tokens.append(crop_features(config, tensors, patches(pixels, patch), shares))
    return torch.stack(tokens)
