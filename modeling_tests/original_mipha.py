"""Mipha's checkpoints as their authors store them, and their arithmetic on torch ops.

Read in zhuyiche/llava-phi at 21dafbf55719: `mipha/model/**`, `mipha/mm_utils.py`, `mipha/conversation.py`.
"""

from pathlib import Path

import torch
from original_parts import (
    Published,
    Shapes,
    Tensors,
    attention,
    causal,
    embed,
    gelu,
    gelu_tanh,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    normalised,
    positions,
    random_tensors,
    read_checkpoint,
    read_config,
    resized,
    rotate,
    siglip,
    siglip_shapes,
    write_json,
    write_weights,
)
from original_tokenizers import byte_level_ids, in_chunks, read_byte_level, write_byte_level
from PIL import Image
from tokenizers import AddedToken

CHECKPOINTS = {
    "mipha_3b": Published(
        repo="zhumj34/Mipha-3B",
        parameters=3_217_417_280,
        licence="apache-2.0",
        source="Phi-2's 2,779,683,840 and the SigLIP tower's 428,225,600, both published, and the projector",
    ),
    "mipha_1_6b": Published(
        repo="zhumj34/Mipha-phi1_5-1.6B",
        parameters=1_853_054_016,
        licence="mit",
        source="the Hub's 1.85 B parameters and 3.71 GB agree with this count",
    ),
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "<|endoftext|>"
# Phi-2's additions to GPT-2's vocabulary: runs of 31 down to 2 spaces, then of 9 down to 2 tabs.
ADDED = [END, *(" " * count for count in range(31, 1, -1)), *("\t" * count for count in range(9, 1, -1))]

TRAINED = {
    "freeze_vision_tower": False,
    "mm_projector_lr": None,
    "non_lora_lr": None,
    "pretraining_tp": 1,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": True,
}


def published_config(name: str) -> dict:
    """Not seen in the files: `mm_vision_select_layer` (-2 in the scripts), SigLIP's fields, all of the 1.6B's."""
    phi2 = name == "mipha_3b"
    config = {
        "architectures": ["MiphaPhiForCausalLM" if phi2 else "MiphaPhi15ForCausalLM"],
        "model_type": "mipha_phi" if phi2 else "mipha-phi",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu_new",
        "hidden_size": 2560 if phi2 else 2048,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 10240 if phi2 else 8192,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32 if phi2 else 24,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4 if phi2 else 0.5,
        "qk_layernorm": False,
        "resid_pdrop": 0.1 if phi2 else 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.1" if phi2 else "4.38.2",
        "use_cache": True,
        "vision_config": {
            "mm_projector": {
                "mm_hidden_size": 1152,
                "mm_projector_type": "mlp2x_gelu",
                "hidden_size": 2560 if phi2 else 2048,
                "model_type": "mipha_projector",
            },
            "vision_tower": {
                "attention_dropout": 0.0,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "layer_norm_eps": 1e-06,
                "mm_vision_select_feature": "patch",
                "mm_vision_select_layer": -2,
                "model_type": "mipha_vision_model",
                "num_attention_heads": 16,
                "num_channels": 3,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
            },
        },
        "vocab_size": 51200,
    }
    for part in config["vision_config"].values():  # written as configs of their own, with every default
        part |= {"_name_or_path": "", "architectures": None, "bos_token_id": None, "eos_token_id": None}
    if not phi2:
        del config["num_key_value_heads"]
    return config | (TRAINED if phi2 else {})


def tiny_config(name: str) -> dict:
    config = published_config(name)
    hidden = 40 if name == "mipha_3b" else 48  # a head's share that turns is a whole, even number of channels
    config |= {"hidden_size": hidden, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": 2}
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 4
    config["vocab_size"] = 352  # above the tokenizer's own, as 51,200 is above 50,295
    config["vision_config"]["mm_projector"] |= {"mm_hidden_size": 32, "hidden_size": hidden}
    config["vision_config"]["vision_tower"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "image_size": 30,  # four patches and a rest, as 384 is twenty-seven patches and a rest
        "patch_size": 7,
    }
    return config


def shapes(config: dict) -> Shapes:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    # The 1.6B comes from an older Phi, whose query, key and value are one matrix.
    fused = "num_key_value_heads" not in config
    named: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        if fused:
            named |= linear_shapes(f"{layer}.self_attn.query_key_value", 3 * hidden, hidden, bias=True)
        else:
            for projection in ("q_proj", "k_proj", "v_proj"):
                named |= linear_shapes(f"{layer}.self_attn.{projection}", hidden, hidden, bias=True)
        named |= linear_shapes(f"{layer}.self_attn.dense", hidden, hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc1", inner, hidden, bias=True)
        named |= linear_shapes(f"{layer}.mlp.fc2", hidden, inner, bias=True)
        named |= norm_shapes(f"{layer}.input_layernorm", hidden, bias=True)
    named |= norm_shapes("model.final_layernorm", hidden, bias=True)
    tower = config["vision_config"]["vision_tower"]
    named |= siglip_shapes("model.vision_tower.vision_model", tower, head=True)
    named |= linear_shapes("model.mm_projector.0", hidden, tower["hidden_size"], bias=True)
    named |= linear_shapes("model.mm_projector.2", hidden, hidden, bias=True)
    return named | linear_shapes("lm_head", vocabulary, hidden, bias=True)


def write(name: str, folder: Path, *, seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name)
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(shapes(config), seed, dtype), shards)
    added = [AddedToken(token, normalized=token != END, special=token == END) for token in ADDED]
    settings = {
        "add_prefix_space": False,
        "bos_token": END,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "model_max_length": 2048,
        "pad_token": END,
        "padding_side": "right",
        "tokenizer_class": "CodeGenTokenizer",
        "unk_token": END,
    }
    phi2 = name == "mipha_3b"
    write_byte_level(folder, "gpt2", added, settings, fast=phi2, in_vocabulary=1)
    size = config["vision_config"]["vision_tower"]["image_size"]
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    # These ids are the defaults of Phi's config class; it is the tokenizer's `<|endoftext|>` that ends a turn.
    ends = {} if phi2 else {"bos_token_id": 1, "eos_token_id": 2}
    version = config["transformers_version"]
    write_json(
        folder / "generation_config.json", {"_from_model_config": True, **ends, "transformers_version": version}
    )
    assert max(byte_level_ids(ADDED).values()) < config["vocab_size"]
    return folder


def prompt(turns: list[tuple[str, str]], images: int) -> str:
    text = SYSTEM + " "
    for number, (role, words) in enumerate(turns):
        pictures = "<image>\n" * images if number == 0 else ""
        text += f"USER: {pictures}{words} " if role == "user" else f"ASSISTANT: {words}{END}"
    return text + "ASSISTANT:"


def prompt_ids(folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()) -> list[int]:
    tower = read_config(folder)["vision_config"]["vision_tower"]
    count = (tower["image_size"] // tower["patch_size"]) ** 2
    return in_chunks(read_byte_level(folder), prompt(turns, len(images)), [count] * len(images))


def pixels(image: Image.Image, size: int) -> torch.Tensor:
    """The picture in the middle of a grey square, then the square at the tower's size: [3, size, size]."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return normalised(resized(square, size, size), [0.5] * 3, [0.5] * 3)


def visual_tokens(config: dict, tensors: Tensors, image: Image.Image) -> torch.Tensor:
    tower = config["vision_config"]["vision_tower"]
    # hidden_states[0] is what enters the first layer; -1 is the last layer's output.
    layers = tower["num_hidden_layers"] + 1 + tower["mm_vision_select_layer"]
    x = siglip(tensors, "model.vision_tower.vision_model", tower, pixels(image, tower["image_size"]), layers)
    return linear(gelu(linear(x, tensors, "model.mm_projector.0")), tensors, "model.mm_projector.2")  # [N, D]


def phi(config: dict, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Attention and MLP side by side on one norm; part of each head's channels turn with the position."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    size = config["hidden_size"] // heads
    angles = positions(len(x), int(config["partial_rotary_factor"] * size), config["rope_theta"])
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        y = layer_norm(x, tensors, f"{layer}.input_layernorm", eps)
        if f"{layer}.self_attn.query_key_value.weight" in tensors:
            q, k, v = linear(y, tensors, f"{layer}.self_attn.query_key_value").view(-1, heads, 3, size).unbind(2)
        else:
            q, k, v = (linear(y, tensors, f"{layer}.self_attn.{p}_proj").view(-1, heads, size) for p in "qkv")
        attended = attention(rotate(q, angles), rotate(k, angles), v, causal(len(x)))
        mixed = linear(gelu_tanh(linear(y, tensors, f"{layer}.mlp.fc1")), tensors, f"{layer}.mlp.fc2")
        x = x + linear(attended, tensors, f"{layer}.self_attn.dense") + mixed
    return layer_norm(x, tensors, "model.final_layernorm", eps)


def logits(
    folder: Path, turns: list[tuple[str, str]], images: list[Image.Image] = ()
) -> tuple[list[int], torch.Tensor]:
    config, tensors = read_checkpoint(folder)
    ids = prompt_ids(folder, turns, images)
    visual = [visual_tokens(config, tensors, image) for image in images]
    x = phi(config, tensors, embed(ids, tensors["model.embed_tokens.weight"], visual))
    return ids, linear(x, tensors, "lm_head")  # [S, V]


def frame_tokens(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    config, tensors = read_checkpoint(folder)
    return torch.stack([visual_tokens(config, tensors, frame) for frame in frames])  # [T, N, D]
