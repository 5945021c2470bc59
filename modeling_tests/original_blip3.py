"""BLIP-3's (xGen-MM's) checkpoints as their authors store them, and their arithmetic on torch ops.

Read in salesforce/LAVIS, branch xgen-mm, at d699f7e54fbe: `open_flamingo/src/{xgenmm,vlm,helpers}.py` and
`open_flamingo/train/any_res_data_utils.py`; of instruct-r-v1 in a vendored copy of the code it brings along, `vlm.py`.
"""

from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from original_blip3_config import (
    ADDED,
    CHECKPOINTS,
    HEADS,
    WORDS,
    generation_config,
    is_open_clip,
    preprocessor_config,
    published_config,
    reads_text,
    sizes,
    tiny_config,
    vision_of,
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
    random_tensors,
    read_checkpoint,
    resized,
    rms_norm,
    rotate,
    siglip,
    siglip_shapes,
    write_json,
    write_weights,
)
from original_tokenizers import SlowTokenizer
from PIL import Image
from tokenizers import AddedToken

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

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # columns and rows of tiles, in the code's order
VISION, RESAMPLER, LLM = "vlm.vision_encoder", "vlm.vision_tokenizer", "vlm.lang_model"


def shapes(config: dict) -> Shapes:
    size, vision = sizes(config), vision_of(config)
    width, hidden, rows = vision["hidden_size"], size["hidden"], size["rows"]
    named = open_clip_shapes(vision) if is_open_clip(config) else siglip_shapes(VISION, vision, head=True)
    named[f"{RESAMPLER}.latents"] = (size["latents"], width)
    for index in range(size["depth"]):
        layer = f"{RESAMPLER}.layers.{index}"
        named |= norm_shapes(f"{layer}.0.norm_media", width, bias=True)
        named |= norm_shapes(f"{layer}.0.norm_latents", width, bias=True)
        named |= linear_shapes(f"{layer}.0.to_q", HEADS * size["head"], width, bias=False)
        named |= linear_shapes(f"{layer}.0.to_kv", 2 * HEADS * size["head"], width, bias=False)
        named |= linear_shapes(f"{layer}.0.to_out", width, HEADS * size["head"], bias=False)
        named |= norm_shapes(f"{layer}.1.0", width, bias=True)
        named |= linear_shapes(f"{layer}.1.1", 4 * width, width, bias=False)
        named |= linear_shapes(f"{layer}.1.3", width, 4 * width, bias=False)
    named |= norm_shapes(f"{RESAMPLER}.norm", width, bias=True)
    named |= linear_shapes(f"{RESAMPLER}.projection", hidden, width, bias=True)
    if reads_text(config):
        named |= linear_shapes(f"{RESAMPLER}.text_projection.0", width, hidden, bias=True)
        named |= linear_shapes(f"{RESAMPLER}.text_projection.2", width, width, bias=True)
    named[f"{LLM}.model.embed_tokens.weight"] = (rows, hidden)
    named[f"{LLM}.model.embed_tokens.additional_embedding.weight"] = (len(ADDED), hidden)
    for index in range(size["layers"]):
        layer = f"{LLM}.model.layers.{index}"
        named |= linear_shapes(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        named |= linear_shapes(f"{layer}.self_attn.qkv_proj", 3 * hidden, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.gate_up_proj", 2 * size["inner"], hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.down_proj", hidden, size["inner"], bias=False)
        named |= norm_shapes(f"{layer}.input_layernorm", hidden, bias=False)
        named |= norm_shapes(f"{layer}.post_attention_layernorm", hidden, bias=False)
    named |= norm_shapes(f"{LLM}.model.norm", hidden, bias=False)
    named |= linear_shapes(f"{LLM}.lm_head", rows, hidden, bias=True)
    return named | linear_shapes(f"{LLM}.lm_head.additional_fc", len(ADDED), hidden, bias=True)


def open_clip_shapes(vision: dict) -> Shapes:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    named: Shapes = {
        f"{VISION}.class_embedding": (width,),
        f"{VISION}.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
        f"{VISION}.proj": (width, 1024),
        f"{VISION}.conv1.weight": (width, 3, patch, patch),
    }
    named |= norm_shapes(f"{VISION}.ln_pre", width, bias=True)
    for index in range(vision["num_hidden_layers"]):
        layer = f"{VISION}.transformer.resblocks.{index}"
        named |= norm_shapes(f"{layer}.ln_1", width, bias=True)
        named[f"{layer}.attn.in_proj_weight"] = (3 * width, width)
        named[f"{layer}.attn.in_proj_bias"] = (3 * width,)
        named |= linear_shapes(f"{layer}.attn.out_proj", width, width, bias=True)
        named |= norm_shapes(f"{layer}.ln_2", width, bias=True)
        named |= linear_shapes(f"{layer}.mlp.c_fc", inner, width, bias=True)
        named |= linear_shapes(f"{layer}.mlp.c_proj", width, inner, bias=True)
    return named | norm_shapes(f"{VISION}.ln_post", width, bias=True)


def write(name: str, folder: Path, *, seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
    write_weights(folder, random_tensors(shapes(config), seed, dtype), shards)
    write_tokenizer(config, folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    write_json(folder / "generation_config.json", generation_config(name))
    return folder


def read(folder: Path) -> tuple[dict, Tensors]:
    """The config, by the checkpoint's name that its tensors tell, and every tensor in float32."""
    config, tensors = read_checkpoint(folder)
    name = "blip3_base_r_v1" if f"{VISION}.conv1.weight" in tensors else "blip3_v1_5"
    if f"{RESAMPLER}.text_projection.0.weight" in tensors:
        name = "blip3_instruct_r_v1"
    return {"_name_or_path": name, **config}, tensors


def prompt(turns: list[tuple[str, str]], images: int) -> str:
    text = f"<|system|>\n{SYSTEM}<|end|>\n"
    for number, (role, words) in enumerate(turns):
        text += f"<|{role}|>\n" + ("<image>\n" * images if number == 0 else "") + f"{words}<|end|>\n"
    return text + "<|assistant|>\n"


def unexpanded_ids(folder: Path, turns: list[tuple[str, str]], images: int) -> list[int]:
    """A picture is one `<image>`."""
    tokenizer = SlowTokenizer.read(folder)
    for index, token in enumerate(ADDED):
        tokenizer.added[WORDS + index] = AddedToken(token, special=True, normalized=False)
    return tokenizer.encode(prompt(turns, images))


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    config, _ = read(folder)
    counts = iter([sizes(config)["latents"] * len(tiles(config, image)) for image in images])
    ids: list[int] = []
    for token in unexpanded_ids(folder, turns, len(images)):
        ids += [IMAGE] * next(counts) if token == WORDS else [token]
    return ids


# Pictures ------------------------------------------------------------------------------------------------------------


def grid_of(config: dict, image: Image.Image) -> tuple[int, int]:
    """Columns and rows: the most of the picture's own pixels, then the fewest wasted, then the first."""
    side, (width, height) = vision_of(config)["image_size"], image.size

    def shown_and_wasted(grid: tuple[int, int]) -> tuple[int, int]:
        wide, high = grid[0] * side, grid[1] * side
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - wide * high

    return max(GRIDS, key=shown_and_wasted)


def tiles(config: dict, image: Image.Image) -> list[Image.Image]:
    """The whole picture squashed, then the tiles of its grid, in black where it does not reach."""
    side, (columns, rows) = vision_of(config)["image_size"], grid_of(config, image)
    image = image.convert("RGB")
    across, down = columns * side / image.width, rows * side / image.height
    if across < down:
        inside = (columns * side, min(ceil(image.height * across), rows * side))
    else:
        inside = (min(ceil(image.width * down), columns * side), rows * side)
    canvas = Image.new("RGB", (columns * side, rows * side), (0, 0, 0))
    canvas.paste(resized(image, *inside), ((canvas.width - inside[0]) // 2, (canvas.height - inside[1]) // 2))
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    cut = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [resized(image, side, side), *cut]


def pixels(config: dict, tile: Image.Image) -> torch.Tensor:
    settings = preprocessor_config(config)
    return normalised(tile, settings["image_mean"], settings["image_std"])  # [3, H, W]


def patches(config: dict, tensors: Tensors, tile: Image.Image) -> torch.Tensor:
    """What the tower makes of a tile, after its last norm: [N, C]."""
    vision, seen = vision_of(config), pixels(config, tile)
    if not is_open_clip(config):
        x = siglip(tensors, VISION, vision, seen, vision["num_hidden_layers"])
        return layer_norm(x, tensors, f"{VISION}.post_layernorm", 1e-6)
    x = F.conv2d(seen[None], tensors[f"{VISION}.conv1.weight"], stride=vision["patch_size"])[0].flatten(1).T
    x = torch.cat([tensors[f"{VISION}.class_embedding"][None], x]) + tensors[f"{VISION}.positional_embedding"]
    x = layer_norm(x, tensors, f"{VISION}.ln_pre", 1e-5)  # [1 + N, C]
    for index in range(vision["num_hidden_layers"]):
        layer = f"{VISION}.transformer.resblocks.{index}"
        y = layer_norm(x, tensors, f"{layer}.ln_1", 1e-5)
        fused = y @ tensors[f"{layer}.attn.in_proj_weight"].T + tensors[f"{layer}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in fused.chunk(3, -1))
        x = x + linear(attention(q, k, v), tensors, f"{layer}.attn.out_proj")
        y = linear(layer_norm(x, tensors, f"{layer}.ln_2", 1e-5), tensors, f"{layer}.mlp.c_fc")
        x = x + linear(y * torch.sigmoid(1.702 * y), tensors, f"{layer}.mlp.c_proj")  # quick GELU
    return layer_norm(x[1:], tensors, f"{VISION}.ln_post", 1e-5)


def resample(
    tensors: Tensors, x: torch.Tensor, real: torch.Tensor | None = None, text: torch.Tensor | None = None
) -> torch.Tensor:
    """Patches x [N, C], of which `real` [N] are no padding, and text [T, D] if it is read: [latents, D]."""
    z = tensors[f"{RESAMPLER}.latents"]
    count = len(z)
    if text is not None:
        hidden = gelu(linear(text, tensors, f"{RESAMPLER}.text_projection.0"))
        z = torch.cat([z, linear(hidden, tensors, f"{RESAMPLER}.text_projection.2")])
    depth = len({name.split(".")[3] for name in tensors if name.startswith(f"{RESAMPLER}.layers.")})
    for index in range(depth):
        layer = f"{RESAMPLER}.layers.{index}"
        y = layer_norm(z, tensors, f"{layer}.0.norm_latents", 1e-5)
        media = layer_norm(x, tensors, f"{layer}.0.norm_media", 1e-5)
        k, v = linear(torch.cat([media, y]), tensors, f"{layer}.0.to_kv").chunk(2, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (linear(y, tensors, f"{layer}.0.to_q"), k, v))
        sees = None if real is None else torch.cat([real, torch.ones(len(y), dtype=torch.bool)])[None]
        z = z + linear(attention(q, k, v, sees), tensors, f"{layer}.0.to_out")
        y = gelu(linear(layer_norm(z, tensors, f"{layer}.1.0", 1e-5), tensors, f"{layer}.1.1"))
        z = z + linear(y, tensors, f"{layer}.1.3")
    z = layer_norm(z[:count], tensors, f"{RESAMPLER}.norm", 1e-5)
    return linear(z, tensors, f"{RESAMPLER}.projection")


def visual_tokens(config: dict, tensors: Tensors, image: Image.Image, text: torch.Tensor | None) -> torch.Tensor:
    """[latents * tiles, D]. The grid's patches are laid out as one picture, and counted off row by row."""
    whole, *cut = (patches(config, tensors, tile) for tile in tiles(config, image))
    columns, rows = grid_of(config, image)
    side = vision_of(config)["image_size"] // vision_of(config)["patch_size"]
    laid = torch.zeros(rows * side, columns * side, whole.shape[-1])
    for number, tile in enumerate(cut):
        top, left = number // columns * side, number % columns * side
        laid[top : top + side, left : left + side] = tile.view(side, side, -1)
    real = torch.ones(rows * side, columns * side, dtype=torch.bool)
    if image.width / image.height > columns / rows:
        empty = (rows * side - int(image.height * (columns * side / image.width))) // 2
        real[:empty] = real[rows * side - empty :] = False
    else:
        empty = (columns * side - int(image.width * (rows * side / image.height))) // 2
        real[:, :empty] = real[:, columns * side - empty :] = False
    groups = zip(laid.view(columns * rows, side * side, -1), real.view(columns * rows, -1), strict=True)
    if reads_text(config):  # whose code computes the masks and drops them
        return torch.cat([resample(tensors, x, None, text) for x in (whole, *(group for group, _ in groups))])
    return torch.cat([resample(tensors, whole), *(resample(tensors, group, seen) for group, seen in groups)])


# Language model ------------------------------------------------------------------------------------------------------


def table(tensors: Tensors, name: str, added: str, words: int) -> torch.Tensor:
    return torch.cat([tensors[name][:words], tensors[added]])


def phi3(config: dict, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    heads = 32  # Phi3Config's default; so are the base of the positions and the norms' epsilon
    size = x.shape[-1] // heads
    angles, sees = positions(len(x), size, 10000.0), causal(len(x), config["text_config"]["sliding_window"])
    for index in range(sizes(config)["layers"]):
        layer = f"{LLM}.model.layers.{index}"
        y = linear(rms_norm(x, tensors, f"{layer}.input_layernorm", 1e-5), tensors, f"{layer}.self_attn.qkv_proj")
        q, k, v = (part.unflatten(-1, (heads, size)) for part in y.chunk(3, -1))
        attended = attention(rotate(q, angles), rotate(k, angles), v, sees)
        x = x + linear(attended, tensors, f"{layer}.self_attn.o_proj")
        y = rms_norm(x, tensors, f"{layer}.post_attention_layernorm", 1e-5)
        gate, up = linear(y, tensors, f"{layer}.mlp.gate_up_proj").chunk(2, -1)
        x = x + linear(F.silu(gate) * up, tensors, f"{layer}.mlp.down_proj")
    return rms_norm(x, tensors, f"{LLM}.model.norm", 1e-5)


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read(folder)
    embeddings = f"{LLM}.model.embed_tokens"
    rows = table(tensors, f"{embeddings}.weight", f"{embeddings}.additional_embedding.weight", WORDS)
    text = rows[torch.tensor(unexpanded_ids(folder, turns, len(images)))][:256] if reads_text(config) else None
    visual = [visual_tokens(config, tensors, image, text) for image in images]
    ids = prompt_ids(folder, turns, images)
    x = phi3(config, tensors, embed(ids, rows, visual))
    head = f"{LLM}.lm_head"
    weight = table(tensors, f"{head}.weight", f"{head}.additional_fc.weight", WORDS)
    return ids, x @ weight.T + table(tensors, f"{head}.bias", f"{head}.additional_fc.bias", WORDS)


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """One squashed tile each, without mask or text: [T, N, D]."""
    config, tensors = read(folder)
    side = vision_of(config)["image_size"]
    return torch.stack([resample(tensors, patches(config, tensors, resized(frame, side, side))) for frame in frames])
