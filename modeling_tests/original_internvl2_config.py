"""InternVL2's checkpoints as their authors store them: their config.json and tokenizers.

The 8B's and 26B's config.json were seen whole, in a vendored copy. Of the other sizes, the language model's part is
taken from the checkpoint that it began with, and agrees with the size of the files.
"""

from pathlib import Path

from original_parts import Published
from original_tokenizers import (
    PIECES,
    byte_level_ids,
    special,
    train_sentencepiece,
    write_byte_level,
    write_settings,
)
from tokenizers import AddedToken

SIZES = "the published sizes of its parts; the Hub shows {}"
CHECKPOINTS = {
    "internvl2_1b": Published("OpenGVLab/InternVL2-1B", 938_158_976, "mit", SIZES.format("1.88 GB"), 1_000_000),
    "internvl2_2b": Published("OpenGVLab/InternVL2-2B", 2_205_754_368, "mit", SIZES.format("4.41 GB"), 5_000_000),
    "internvl2_4b": Published("OpenGVLab/InternVL2-4B", 4_150_000_000, "mit", SIZES.format("4.15 B"), 5_000_000),
    "internvl2_8b": Published("OpenGVLab/InternVL2-8B", 8_080_000_000, "mit", SIZES.format("8.08 B"), 5_000_000),
    "internvl2_26b": Published("OpenGVLab/InternVL2-26B", 25_500_000_000, "mit", SIZES.format("25.5 B"), 50_000_000),
    "internvl2_40b": Published("OpenGVLab/InternVL2-40B", 40_100_000_000, "mit", SIZES.format("40.1 B"), 50_000_000),
    "internvl2_76b": Published(
        "OpenGVLab/InternVL2-Llama3-76B", 76_300_000_000, "llama3", SIZES.format("76.3 B"), 50_000_000
    ),
}
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _internlm2(name: str, hidden: int, inner: int, layers: int, heads: int, factor: float) -> dict:
    return {
        "_name_or_path": name,
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": factor, "type": "dynamic"},
        "rope_theta": 1000000,
        "vocab_size": 92553,
    }


def _llm(name: str, architecture: str, sizes: tuple[int, int, int, int, int], vocabulary: int, **more) -> dict:
    hidden, inner, layers, heads, kv_heads = sizes
    return {
        "_name_or_path": name,
        "architectures": [f"{architecture}ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "model_type": architecture.lower(),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


# Not seen in the files: the 76B's vocabulary (here its tokenizer's length and nine image tokens), the 2B's
# rope_scaling, and the 4B's `short_factor` and `long_factor`, 48 numbers each, which are left out.
LLMS = {
    "internvl2_1b": _llm(
        "Qwen/Qwen2-0.5B-Instruct",
        "Qwen2",
        (896, 4864, 24, 14, 2),
        151655,
        bos_token_id=151643,
        eos_token_id=151645,
        max_position_embeddings=32768,
        max_window_layers=24,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
    ),
    "internvl2_2b": _internlm2("internlm/internlm2-chat-1_8b", 2048, 8192, 24, 16, 2.0),
    "internvl2_4b": _llm(
        "microsoft/Phi-3-mini-128k-instruct",
        "Phi3",
        (3072, 8192, 32, 32, 32),
        32020,
        bos_token_id=1,
        eos_token_id=32000,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        pad_token_id=32000,
        rms_norm_eps=1e-05,
        rope_scaling={"type": "su"},
        rope_theta=10000.0,
        sliding_window=262144,
    ),
    "internvl2_8b": _internlm2("internlm/internlm2_5-7b-chat", 4096, 14336, 32, 32, 2.0),
    "internvl2_26b": _internlm2("internlm/internlm2-chat-20b", 6144, 16384, 48, 48, 3.0),
    "internvl2_40b": _llm(
        "NousResearch/Nous-Hermes-2-Yi-34B",
        "Llama",
        (7168, 20480, 60, 56, 8),
        64007,
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=7,
        max_position_embeddings=4096,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=5000000.0,
    ),
    "internvl2_76b": _llm(
        "NousResearch/Hermes-2-Theta-Llama-3-70B",
        "Llama",
        (8192, 28672, 80, 64, 8),
        128265,
        attention_bias=False,
        bos_token_id=128000,
        eos_token_id=128003,
        max_position_embeddings=8192,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=500000.0,
    ),
}
INTERNLM2 = ("internvl2_2b", "internvl2_8b", "internvl2_26b")
LARGE = ("internvl2_26b", "internvl2_40b", "internvl2_76b")  # with InternViT-6B for InternViT-300M


def published_config(name: str) -> dict:
    template = "phi3-chat" if name == "internvl2_4b" else "internlm2-chat" if is_internlm2(LLMS[name]) else "Hermes-2"
    large = name in LARGE
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": {
            **LLMS[name],
            "attn_implementation": "flash_attention_2",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 3200 if large else 1024,
            "image_size": 448,
            "initializer_factor": 0.1 if large else 1.0,
            "initializer_range": 1e-10 if large else 0.02,
            "intermediate_size": 12800 if large else 4096,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm" if large else "layer_norm",
            "num_attention_heads": 25 if large else 16,
            "num_channels": 3,
            "num_hidden_layers": 45 if large else 24,
            "patch_size": 14,
            "qk_normalization": large,
            "qkv_bias": not large,
            "torch_dtype": "bfloat16",
            "use_bfloat16": True,
            "use_flash_attn": True,
        },
    }


def is_internlm2(llm: dict) -> bool:
    return llm["architectures"] == ["InternLM2ForCausalLM"]


def is_phi3(llm: dict) -> bool:
    return llm["architectures"] == ["Phi3ForCausalLM"]


def tiny_config(name: str) -> dict:
    config = published_config(name)
    config["force_image_size"] = 28
    config["vision_config"] |= {
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 7,
    }
    llm = config["llm_config"]
    llm |= {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 6, "num_hidden_layers": 2}
    llm["num_key_value_heads"] = 6 if is_phi3(llm) else 2
    if is_phi3(llm):
        # A short text is within the first length and a long one beyond it; either way 32 times the length is promised.
        llm |= {"original_max_position_embeddings": 240, "max_position_embeddings": 7680}
        llm["rope_scaling"] |= {"short_factor": [1.05, 1.1, 1.2, 1.3], "long_factor": [1.1, 1.5, 4.0, 12.0]}
    added = added_tokens(name)
    llm["vocab_size"] = max(added) + 1
    ids = {token.content: id_ for id_, token in added.items()}
    if name == "internvl2_1b":
        llm |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    if name == "internvl2_4b":
        llm |= {"eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    if name == "internvl2_40b":
        llm |= {"eos_token_id": ids["<|im_end|>"]}
    if name == "internvl2_76b":
        llm |= {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": ids["<|im_end|>"]}
    return config


# Tokenizers ----------------------------------------------------------------------------------------------------------

PHI3_TOKENS = ["<|assistant|>", *(f"<|placeholder{index}|>" for index in (1, 2, 3, 4)), "<|system|>", "<|end|>"]
PHI3_TOKENS += ["<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
INTERNLM2_TOKENS = [
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
]
YI_SYMBOLS = [
    "<|Human|>",
    "<|Assistant|>",
    "<|System|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<img>",
    "</img>",
]


def added_tokens(name: str) -> dict[int, AddedToken]:
    """What tokenizer_config.json lists, by its id among the toy ids; the nine image tokens end the vocabulary."""
    if name in ("internvl2_1b", "internvl2_76b"):
        qwen2, llama3 = ["<|endoftext|>"], ["<|begin_of_text|>", "<|end_of_text|>"]
        own = [*(qwen2 if name == "internvl2_1b" else llama3), "<|im_start|>", "<|im_end|>"]
        tokens = special(*own, *IMAGE_TOKENS)
        return dict(zip(byte_level_ids([token.content for token in tokens]).values(), tokens, strict=True))
    if name == "internvl2_40b":  # Yi's own vocabulary has the first two image tokens, at 68 and 70
        listed = special("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS)
        listed[3].special = False
        return dict(zip([0, 1, 2, 6, 7, 9, 10, *range(PIECES, PIECES + 7)], listed, strict=True))
    controls = dict(enumerate(special("<unk>", "<s>", "</s>")))
    if name == "internvl2_4b":
        own = special("<|endoftext|>") + special(*PHI3_TOKENS, rstrip=True)
    else:
        own = special(*INTERNLM2_TOKENS)  # in the place of pieces that were kept free for them
    return {**controls, **_numbered(own + special(*IMAGE_TOKENS))}


def _numbered(tokens: list[AddedToken]) -> dict[int, AddedToken]:
    return dict(enumerate(tokens, PIECES))


def generation_config(name: str) -> dict:
    """The ends of a turn as the files list them; those of the 4B and the 40B were not seen."""
    ids = {token.content: id_ for id_, token in added_tokens(name).items()}
    ends = {"internvl2_1b": ["<|im_start|>", "<|im_end|>"]}
    ends["internvl2_76b"] = ["<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    ends |= dict.fromkeys(INTERNLM2, ["<|im_end|>", "<|im_start|>"])
    config = {"_from_model_config": True, "transformers_version": "4.37.2"}
    return config | ({"eos_token_id": [ids[end] for end in ends[name]]} if name in ends else {})


def write_tokenizer(name: str, folder: Path) -> None:
    added = added_tokens(name)
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": 8192}
    if name == "internvl2_1b":
        settings |= {"add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "errors": "replace"}
        settings |= {"pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
        settings |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *IMAGE_TOKENS]}
        return write_byte_level(folder, "qwen2", list(added.values()), settings, fast=False)
    if name == "internvl2_76b":
        settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": "<|end_of_text|>"}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": IMAGE_TOKENS}
        opening = "<|begin_of_text|>"
        return write_byte_level(folder, "llama3", list(added.values()), settings, slow=False, bos=opening)
    settings |= {"add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "sp_model_kwargs": {}}
    if name == "internvl2_40b":
        settings |= {"add_bos_token": False, "bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}
        settings |= {"legacy": True, "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
        settings |= {"additional_special_tokens": IMAGE_TOKENS}
        opening = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}
        model = train_sentencepiece(dummy_prefix=False, symbols=YI_SYMBOLS, **opening)
    elif name == "internvl2_4b":
        settings |= {"add_bos_token": True, "eos_token": "<|endoftext|>", "legacy": False, "padding_side": "left"}
        settings |= {"pad_token": "<|endoftext|>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
        settings |= {"additional_special_tokens": IMAGE_TOKENS}
        model = train_sentencepiece(dummy_prefix=True)
    else:
        settings |= {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
        settings |= {"pad_token": "</s>", "tokenizer_class": "InternLM2Tokenizer", "unk_token": "<unk>"}
        settings |= {"additional_special_tokens": INTERNLM2_TOKENS[::-1] + IMAGE_TOKENS}
        model = train_sentencepiece(dummy_prefix=False, last=[f"[UNUSED_TOKEN_{index}]" for index in range(141, 147)])
    (folder / "tokenizer.model").write_bytes(model)
    write_settings(folder, added, settings, later=PIECES + (len(INTERNLM2_TOKENS) if name in INTERNLM2 else 0))
