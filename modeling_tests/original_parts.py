"""What the plain forwards of published image-LLMs share: names, files, arithmetic.

The arithmetic is in float32, one sequence at a time, on torch ops alone.
"""

import json
import zlib
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

IMAGE = -200  # stands at each visual token's place in a row of ids

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """What is known of a checkpoint on the Hub; `tolerance` 0 says that `parameters` is exact."""

    repo: str
    parameters: int
    licence: str
    source: str
    tolerance: int = 0


# Names and shapes ----------------------------------------------------------------------------------------------------


def linear_shapes(name: str, out_features: int, in_features: int, *, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out_features, in_features)}
    return {**weight, f"{name}.bias": (out_features,)} if bias else weight


def norm_shapes(name: str, size: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)} if bias else {f"{name}.weight": (size,)}


def siglip_shapes(prefix: str, vision: dict, *, head: bool) -> Shapes:
    """A SiglipVisionTransformer as transformers 4 stores it, with the attention-pooling head where it was kept."""
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    named: Shapes = {
        f"{prefix}.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{prefix}.embeddings.patch_embedding.bias": (hidden,),
        f"{prefix}.embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, hidden),
    }
    for index in range(vision["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            named |= linear_shapes(f"{layer}.self_attn.{projection}", hidden, hidden, bias=True)
        named |= norm_shapes(f"{layer}.layer_norm1", hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc1", inner, hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc2", hidden, inner, bias=True)
        named |= norm_shapes(f"{layer}.layer_norm2", hidden, bias=True)
    named |= norm_shapes(f"{prefix}.post_layernorm", hidden, bias=True)
    if head:
        named[f"{prefix}.head.probe"] = (1, 1, hidden)
        named[f"{prefix}.head.attention.in_proj_weight"] = (3 * hidden, hidden)
        named[f"{prefix}.head.attention.in_proj_bias"] = (3 * hidden,)
        named |= linear_shapes(f"{prefix}.head.attention.out_proj", hidden, hidden, bias=True)
        named |= norm_shapes(f"{prefix}.head.layernorm", hidden, bias=True)
        named |= linear_shapes(f"{prefix}.head.mlp.fc1", inner, hidden, bias=True)
        named |= linear_shapes(f"{prefix}.head.mlp.fc2", hidden, inner, bias=True)
    return named


def qwen2_shapes(prefix: str, llm: dict, *, tied: bool, head: str = "lm_head.weight") -> Shapes:
    """Llama's layout under `prefix`, with Qwen2's biases unless `attention_bias` says no, and the head beside it."""
    hidden, inner, bias = llm["hidden_size"], llm["intermediate_size"], llm.get("attention_bias", True)
    size = hidden // llm["num_attention_heads"]
    named: Shapes = {f"{prefix}.embed_tokens.weight": (llm["vocab_size"], hidden)}
    for index in range(llm["num_hidden_layers"]):
        layer = f"{prefix}.layers.{index}"
        named |= linear_shapes(f"{layer}.self_attn.q_proj", hidden, hidden, bias=bias)
        named |= linear_shapes(f"{layer}.self_attn.k_proj", llm["num_key_value_heads"] * size, hidden, bias=bias)
        named |= linear_shapes(f"{layer}.self_attn.v_proj", llm["num_key_value_heads"] * size, hidden, bias=bias)
        named |= linear_shapes(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.gate_proj", inner, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.up_proj", inner, hidden, bias=False)
        named |= linear_shapes(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
        named |= norm_shapes(f"{layer}.input_layernorm", hidden, bias=False)
        named |= norm_shapes(f"{layer}.post_attention_layernorm", hidden, bias=False)
    named |= norm_shapes(f"{prefix}.norm", hidden, bias=False)
    return named if tied else {**named, head: (llm["vocab_size"], hidden)}


# Files ---------------------------------------------------------------------------------------------------------------


def random_tensors(named: Shapes, seed: int, dtype: torch.dtype) -> Tensors:
    """Weights that tell inputs apart: matrices of std 0.15, norms and layer scales near one, biases away from zero.

    Each tensor has a seed of its own, so that a tensor is the same whatever else its checkpoint holds.
    """
    tensors = {}
    for name, shape in named.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        values = torch.randn(shape, generator=generator)
        near_one = len(shape) == 1 and name.rsplit(".", 1)[-1] in ("weight", "ls1", "ls2")
        tensors[name] = (1 + 0.1 * values if near_one else 0.15 * values).to(dtype)
    return tensors


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: Tensors, shards: int) -> None:
    """safetensors in `shards` files of about the same number of tensors, with the index that names each one's file."""
    names = list(tensors)
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    each = ceil(len(names) / shards)
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number * each : (number + 1) * each]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def read_config(folder: Path, file: str = "config.json") -> dict:
    return json.loads((Path(folder) / file).read_text(encoding="utf-8"))


def read_checkpoint(folder: Path) -> tuple[dict, Tensors]:
    """The config and every tensor in float32."""
    tensors: Tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return read_config(folder), tensors


# Arithmetic ----------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def layer_norm(x: torch.Tensor, tensors: Tensors, name: str, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return (
        x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
    )


def rms_norm(x: torch.Tensor, tensors: Tensors, name: str, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor | None = None) -> torch.Tensor:
    """q [S, H, d] over k, v [S, K, d], each of the K shared by H / K queries; `sees` [S, S]; returns [S, H * d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [S, H, d]
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5  # [H, S, S]
    if sees is not None:
        scores = scores.masked_fill(~sees, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)  # [S, H * d]


def causal(length: int, reach: int | None = None) -> torch.Tensor:
    """[S, S]: a token sees itself and what stands before it, at most `reach` places back."""
    back = torch.arange(length)[:, None] - torch.arange(length)  # [S, S]
    return (back >= 0) & (back <= (length if reach is None else reach))


def inverse_frequencies(size: int, base: float) -> torch.Tensor:
    return base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)  # [size / 2]


def rotate(x: torch.Tensor, angles: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Turns x [S, H, d] by `angles` [S, r / 2]: of the first r channels, channel i with channel i + r / 2."""
    half = angles.shape[-1]
    cos, sin = angles.cos()[:, None] * scale, angles.sin()[:, None] * scale  # [S, 1, r / 2]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def positions(length: int, size: int, base: float) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequencies(size, base)  # [S, size / 2]


def siglip(tensors: Tensors, prefix: str, vision: dict, pixels: torch.Tensor, layers: int) -> torch.Tensor:
    """What the first `layers` layers make of one picture [3, H, W], before the last norm: [N, D]."""
    heads, eps, patch = vision["num_attention_heads"], vision["layer_norm_eps"], vision["patch_size"]
    kernel, bias = (tensors[f"{prefix}.embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(pixels[None], kernel, bias, stride=patch)[0].flatten(1).T  # [N, D]
    x = x + tensors[f"{prefix}.embeddings.position_embedding.weight"]
    for index in range(layers):
        layer = f"{prefix}.encoder.layers.{index}"
        y = layer_norm(x, tensors, f"{layer}.layer_norm1", eps)
        q, k, v = (linear(y, tensors, f"{layer}.self_attn.{p}_proj").unflatten(-1, (heads, -1)) for p in "qkv")
        x = x + linear(attention(q, k, v), tensors, f"{layer}.self_attn.out_proj")
        y = layer_norm(x, tensors, f"{layer}.layer_norm2", eps)
        x = x + linear(gelu_tanh(linear(y, tensors, f"{layer}.mlp.fc1")), tensors, f"{layer}.mlp.fc2")
    return x


def swiglu(x: torch.Tensor, tensors: Tensors, gate: str, up: str, down: str) -> torch.Tensor:
    return linear(F.silu(linear(x, tensors, gate)) * linear(x, tensors, up), tensors, down)


def qwen2(tensors: Tensors, prefix: str, llm: dict, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The layers and last norm of Llama's layout (see `qwen2_shapes`) over embeddings x [S, D]."""
    heads, kv_heads, eps = llm["num_attention_heads"], llm["num_key_value_heads"], llm["rms_norm_eps"]
    for index in range(llm["num_hidden_layers"]):
        layer = f"{prefix}.layers.{index}"
        y = rms_norm(x, tensors, f"{layer}.input_layernorm", eps)
        q = rotate(linear(y, tensors, f"{layer}.self_attn.q_proj").unflatten(-1, (heads, -1)), angles)
        k = rotate(linear(y, tensors, f"{layer}.self_attn.k_proj").unflatten(-1, (kv_heads, -1)), angles)
        v = linear(y, tensors, f"{layer}.self_attn.v_proj").unflatten(-1, (kv_heads, -1))
        x = x + linear(attention(q, k, v, causal(len(x))), tensors, f"{layer}.self_attn.o_proj")
        y = rms_norm(x, tensors, f"{layer}.post_attention_layernorm", eps)
        x = x + swiglu(y, tensors, *(f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")))
    return rms_norm(x, tensors, f"{prefix}.norm", eps)


def embed(ids: list[int], table: torch.Tensor, visual: list[torch.Tensor]) -> torch.Tensor:
    """The rows of `table` for `ids`, with the visual tokens in order where IMAGE stands: [S, D]."""
    row = torch.tensor(ids)
    x = table[row.clamp(min=0)]  # [S, D]
    if visual:
        x[row == IMAGE] = torch.cat(visual)
    return x


# Pictures ------------------------------------------------------------------------------------------------------------


def normalised(image: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # [H, W, 3]
    return torch.from_numpy((values - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)  # [3, H, W]


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
