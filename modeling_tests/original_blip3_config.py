"""What BLIP-3's (xGen-MM's) checkpoints say of themselves: config.json, preprocessor_config.json, tokenizer files."""

from pathlib import Path

import sentencepiece
from original_parts import Published, write_json
from original_tokenizers import PIECES, special, train_sentencepiece, write_settings
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SIZES = "the Hub's sizes of the {} and of their index come of these names and shapes"
CHECKPOINTS = {
    "blip3_v1_5": Published(
        "Salesforce/xgen-mm-phi3-mini-instruct-interleave-r-v1.5",
        4_359_257_219,
        "apache-2.0",
        SIZES.format("four files in float32 (4.96, 4.98, 4.98, 2.51 GB; 4.90 the first without SigLIP's head)"),
    ),
    "blip3_base_r_v1": Published(
        "Salesforce/xgen-mm-phi3-mini-base-r-v1",
        4_583_789_123,
        "apache-2.0",
        SIZES.format("four files (4.95, 4.98, 4.98, 3.41 GB)"),
    ),
    "blip3_instruct_r_v1": Published(
        "Salesforce/xgen-mm-phi3-mini-instruct-r-v1",
        4_589_362_243,
        "cc-by-nc-4.0",
        "the number and the 18,357,535,724 bytes of its four files are published; names and shapes give both",
    ),
}
ADDED = ["<image>", "<image placeholder>", "<|endofchunk|>"]  # by the code, after the tokenizer's own
PHI3 = ["<|assistant|>", *(f"<|placeholder{n}|>" for n in range(1, 5)), "<|system|>", "<|end|>"]
PHI3 += ["<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
WORDS = PIECES + 1 + len(PHI3) + 1  # pieces, <|endoftext|>, the marks, <pad>
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
HEADS = 16  # of the towers and the resampler, in the code
# What the code and its defaults say and config.json does not.
FULL = {"hidden": 3072, "inner": 8192, "layers": 32, "rows": 32064, "latents": 128, "depth": 6, "head": 96}
TINY = {"hidden": 64, "inner": 96, "layers": 2, "rows": WORDS + 9, "latents": 4, "depth": 2, "head": 3}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384, "patch_size": 14}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "image_size": 378, "patch_size": 14}
TOY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}


def published_config(name: str) -> dict:
    """But for versions, dtype and `auto_map` the files are one text: only the weights tell tower and resampler.

    `_name_or_path`, which is in no file, tells them to `shapes`. Instruct-r-v1's file was another until 24 May 2024:
    `model_type` "blip_3", and classes and files so named. Base-r-v1's is not seen; its 695 bytes are not these.
    """
    v1_5 = name == "blip3_v1_5"
    return {
        "_name_or_path": name,
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": ("modeling" if v1_5 else "configuration") + "_xgenmm.XGenMMConfig",
            "AutoModelForVision2Seq": "modeling_xgenmm.XGenMMModelForConditionalGeneration",
        },
        "model_type": "xgenmm",
        "text_config": {
            "initial_tokenizer_len": 32012,
            "model_type": "phi3",
            "sliding_window": 2047,
            "torch_dtype": "bfloat16",
        },
        "torch_dtype": "bfloat16" if v1_5 else "float32",
        "transformers_version": version(name),
        "vision_encoder_config": {
            "anyres_patch_sampling": True,
            "image_aspect_ratio": "anyres",
            "model_type": "xgenmm_vision_encoder",
        },
        "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
    }


def version(name: str) -> str:
    return {"blip3_v1_5": "4.44.2", "blip3_base_r_v1": "4.41.0.dev0", "blip3_instruct_r_v1": "4.41.1"}[name]


def tiny_config(name: str) -> dict:
    """A window that the prompts of the tests are longer than; Phi-3's 32 heads stay, two channels each."""
    config = published_config(name)
    config["text_config"] |= {"initial_tokenizer_len": WORDS, "sliding_window": 48}
    return config


def sizes(config: dict) -> dict:
    return FULL if config["text_config"]["initial_tokenizer_len"] == 32012 else TINY


def is_open_clip(config: dict) -> bool:
    return config["_name_or_path"] != "blip3_v1_5"


def reads_text(config: dict) -> bool:
    return config["_name_or_path"] == "blip3_instruct_r_v1"


def vision_of(config: dict) -> dict:
    full = VIT_H if is_open_clip(config) else SIGLIP
    return {**(full if sizes(config) is FULL else TOY), "num_attention_heads": HEADS, "layer_norm_eps": 1e-6}


def generation_config(name: str) -> dict:
    """Phi-3's ids, here at their toy places: `<|endoftext|>` twice, but that v1.5 ends with `<|end|>`."""
    end = PIECES + 1 + PHI3.index("<|end|>") if name == "blip3_v1_5" else PIECES
    ids = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": PIECES}
    return {"_from_model_config": True, **ids, "transformers_version": version(name)}


def preprocessor_config(config: dict) -> dict:
    """Interleave-v1.5's is not seen: `grids` is null for base-v1.5, the code's five for singleimg-v1.5."""
    base = config["_name_or_path"] == "blip3_base_r_v1"
    file, kind = ("xgenmm", "XGenMMImageProcessor") if base else ("blip_3", "Blip3ImageProcessor")
    return {
        "auto_map": {"AutoImageProcessor": f"image_processing_{file}.{kind}"},
        "do_resize": True,
        **({} if is_open_clip(config) else {"grids": None}),
        **(CLIP if is_open_clip(config) else HALF),
        "image_processor_type": kind,
        "interpolation_mode": "bicubic",
        "resize_mode": "squash",
        "size": [vision_of(config)["image_size"]] * 2,
    }


# Tokens --------------------------------------------------------------------------------------------------------------


def write_tokenizer(config: dict, folder: Path) -> None:
    """The files of the slow class, which the authors read them with, and tokenizer.json, which gives other ids.

    `<image>` and the two others are in none of them.
    """
    marks = special("<|endoftext|>") + special(*PHI3, rstrip=True) + special("<pad>")
    added = {**dict(enumerate(special("<unk>", "<s>", "</s>"))), **dict(enumerate(marks, PIECES))}
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {
        "add_bos_token": is_open_clip(config),
        "add_eos_token": False,
        **named,
        "legacy": False,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(dummy_prefix=True))
    write_settings(folder, added, settings, later=PIECES)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(folder / "special_tokens_map.json", {key: {"content": token, **flags} for key, token in named.items()})
    write_fast(folder, list(added.values()), bos=is_open_clip(config))


def write_fast(folder: Path, added: list[AddedToken], *, bos: bool) -> None:
    """Phi-3's tokenizer.json: a space goes before every piece of text between two added tokens."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {model.id_to_piece(index): index for index in range(len(model))}
    merges = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-model.get_score(index), vocabulary[left], vocabulary[right], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens(added)
    opening = "<s> " if bos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening}$A", pair=f"{opening}$A {opening and '<s>:1 '}$B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
