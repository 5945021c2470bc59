"""What Molmo's checkpoints say of themselves: config.json, preprocessor_config.json and tokenizer files."""

from pathlib import Path

from original_parts import Published, write_json
from original_tokenizers import byte_level_vocabulary, qwen_tokens, read_byte_level, special, write_byte_level
from tokenizers import AddedToken, normalizers

CHECKPOINTS = {
    "molmo_7b_d": Published(
        repo="allenai/Molmo-7B-D-0924",
        parameters=8_021_025_280,
        licence="apache-2.0",
        source="the Hub's 8.02 B parameters, the 585 tensors of its index and its files' sizes agree with this count",
    ),
    "molmo_7b_o": Published(
        repo="allenai/Molmo-7B-O-0924",
        parameters=7_665_032_192,
        licence="apache-2.0",
        source="counted from the code's names and sizes; the Hub's files (4.95, 4.86, ... 4.99 GB) agree",
    ),
    "molmo_e_1b": Published(
        repo="allenai/MolmoE-1B-0924",
        parameters=7_225_000_000,
        licence="apache-2.0",
        source="a pytorch_model.bin of 28.9 GB in float32",
        tolerance=12_500_000,
    ),
}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Of the tower the 7B's config.json says nothing; its sizes stand in their code, which has them from this.
TOWER = {
    "attention_dropout": 0.0,
    "fsdp_wrap": False,
    "image_default_input_size": [336, 336],
    "image_dropout_rate": 0.0,
    "image_emb_dim": 1024,
    "image_head_dim": 64,
    "image_mlp_activations": "quick_gelu",
    "image_mlp_dim": 4096,
    "image_model_type": "openai",
    "image_norm_eps": 1e-05,
    "image_num_heads": 16,
    "image_num_key_value_heads": 16,
    "image_num_layers": 23,
    "image_num_pos": 577,
    "image_patch_size": 14,
    "image_pos_patch_size": 14,
    "initializer_range": 0.02,
    "residual_dropout": 0.0,
    "resize_mode": "default",
}
# Twelve patches a side, as many heads and the margins of the published models; one block more than their ninth last.
TINY_TOWER = TOWER | {
    "image_default_input_size": [48, 48],
    "image_emb_dim": 32,
    "image_head_dim": 2,
    "image_mlp_dim": 48,
    "image_num_layers": 10,
    "image_num_pos": 145,
    "image_patch_size": 4,
    "image_pos_patch_size": 4,
}
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def is_moe(config: dict) -> bool:
    return "moe_num_experts" in config


def tower(config: dict) -> dict:
    """The image tower's sizes: MolmoE's own, or those in the code of the 7B."""
    if is_moe(config):
        return config["vision_backbone"]
    return TOWER if config["hidden_size"] > 1024 else TINY_TOWER


def published_config(name: str) -> dict:
    """The 7B's are as seen; MolmoE's is seen up to `loss_token_weighting`, of 3.52 kB as the one written here.

    What follows there are its config class's names, with OLMoE's training values.
    """
    if name == "molmo_e_1b":
        return published_moe()
    qwen2 = name == "molmo_7b_d"
    return {
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": not qwen2,
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "clip_qkv": None,
        "embedding_size": 152064 if qwen2 else 100352,
        "hidden_size": 3584 if qwen2 else 4096,
        "initializer_range": 0.02,
        "intermediate_size": 37888 if qwen2 else 22016,
        "layer_norm_eps": 1e-06,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "model_type": "molmo",
        "norm_after": not qwen2,
        "num_attention_heads": 28 if qwen2 else 32,
        "num_hidden_layers": 28 if qwen2 else 32,
        "num_key_value_heads": 4 if qwen2 else None,
        "qkv_bias": qwen2,
        "rope_theta": 1000000.0 if qwen2 else 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "use_cache": True,
        "use_position_ids": True,
        "vocab_size": 152064 if qwen2 else 100278,
        "weight_tying": False,
    }


def published_moe() -> dict:
    return {
        "auto_map": {
            "AutoConfig": "config_molmoe.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmoe.MolmoForCausalLM",
        },
        "activation_type": "swiglu",
        "additional_vocab_size": 128,
        "alibi": False,
        "alibi_bias_max": 8.0,
        "always_start_with_space": True,
        "architectures": ["OLMoForCausalLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": True,
        "attention_layer_norm_with_affine": True,
        "attention_type": "sdpa",
        "attn_logit_softcapping": None,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "moe",
        "clip_qkv": None,
        "crop_mode": "overlap-and-resize-c2",
        "d_model": 2048,
        "default_inference_len": 65,
        "do_random_scale": False,
        "embedding_dropout": 0.0,
        "embedding_size": 50304,
        "final_logit_softcapping": None,
        "fix_image_input_idx": 2,
        "float32_attention": True,
        "gin_bindings": None,
        "head_dim": None,
        "image_feature_dropout": 0.0,
        "image_padding_embed": "pad_and_partial_pad",
        "image_pooling_2d": "attention-meanq",
        "image_pooling_h": 2,
        "image_pooling_w": 2,
        "image_projector": "mlp",
        "include_bias": False,
        "init_cutoff_factor": 3.0,
        "init_device": "meta",
        "init_fn": "normal",
        "init_std": 0.02,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "llm_load_path": None,
        "loss_token_weighting": "root_subsegments",
        "low_cpu_fsdp": True,
        "max_crops": 12,
        "max_position_embeddings": 32768,
        "max_sequence_length": 4096,
        "message_formatting": "role",
        "mlp_hidden_size": None,
        "mlp_ratio": 1,
        "model_type": "molmo",
        "moe_capacity_factor": 1.25,
        "moe_dropless": True,
        "moe_interleave": False,
        "moe_lbl_in_fp32": False,
        "moe_log_expert_assignment": False,
        "moe_loss_weight": 0.0,
        "moe_mlp_impl": "sparse",
        "moe_num_experts": 64,
        "moe_shared_expert": False,
        "moe_top_k": 8,
        "moe_zloss_weight": 0.0,
        "multi_query_attention": None,
        "n_heads": 16,
        "n_kv_heads": None,
        "n_layers": 16,
        "new_embedding_init_range": 0.02,
        "norm_after": False,
        "normalize_input_embeds": False,
        "overlap_margins": [4, 4],
        "pad_to": None,
        "pad_token_id": -1,
        "pad_tokenizer": False,
        "precision": "amp_bf16",
        "prompt_override": None,
        "prompt_type": "uber_model",
        "qkv_bias": False,
        "query_pre_attn_scalar": 224,
        "residual_dropout": 0.1,
        "response_attention_dropout": 0.0,
        "response_residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "rope_impl": "llama",
        "rope_theta": 10000.0,
        "scale_logits": False,
        "system_prompt_kind": "demo_or_style",
        "transformers_version": "4.45.0.dev0",
        "unconditioned": False,
        "use_cache": True,
        "use_cls_feature": False,
        "use_col_tokens": True,
        "use_position_ids": True,
        "vision_backbone": TOWER,
        "vit_layers": [-2, -9],
        "vit_load_path": None,
        "vocab_size": 50280,
        "weight_tying": False,
    }


def tiny_config(name: str) -> dict:
    config = published_config(name)
    if is_moe(config):
        sizes = {"d_model": 48, "n_heads": 4, "n_layers": 2, "moe_num_experts": 8, "moe_top_k": 3}
        config |= sizes | {"vision_backbone": TINY_TOWER}
    else:
        sizes = {"hidden_size": 40, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
        config |= sizes | ({"num_key_value_heads": 2} if name == "molmo_7b_d" else {})
    # The table ends at a multiple; only for the 7B-D do the tokens fill it, and those for images follow it.
    config["embedding_size"] = 320
    config["vocab_size"] = len(byte_level_vocabulary()[0]) + len(own_tokens(name))
    return config


# Tokens --------------------------------------------------------------------------------------------------------------

IMAGE_TOKENS = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"]
END = "<|endoftext|>"


def own_tokens(name: str) -> list[AddedToken]:
    """What the language model's tokenizer adds to its vocabulary, up to the row where the images' tokens start."""
    if name == "molmo_7b_d":
        first = qwen_tokens()[:3]
        fillers = 320 - len(byte_level_vocabulary()[0]) - len(first)
        return first + special(*(f"|<EXTRA_TOKENS_{number}>|" for number in range(fillers)))
    masked = ["|||IP_ADDRESS|||", "|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||"]
    if name == "molmo_7b_o":
        marks = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|im_start|>", "<|im_end|>", "<|endofprompt|>"]
        plain = [AddedToken(token, normalized=False, special=False) for token in [*masked, *marks]]
        return plain + special(END, "<|pad|>")
    runs = [" " * count for count in range(24, 1, -1)]
    plain = [AddedToken(token, normalized=True, special=False) for token in [*runs, *masked]]
    return special("<|padding|>") + plain + special(END)


def write_tokenizer(name: str, folder: Path) -> None:
    added = own_tokens(name) + special(*IMAGE_TOKENS)
    fillers = [token.content for token in added if token.content.startswith("|<EXTRA")]
    molmo = {
        "add_prefix_space": False,
        "additional_special_tokens": [*fillers, *IMAGE_TOKENS],
        "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"},
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "processor_class": "MolmoProcessor",
    }
    qwen2 = {
        "bos_token": None,
        "chat_template": TEMPLATE,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    dolma2 = {
        "bos_token": END,
        "model_max_length": 8192,
        "pad_token": "<|pad|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END,
    }
    olmoe = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "model_max_length": int(1e30),
        "pad_token": "<|padding|>",
        "tokenizer_class": "GPTNeoXTokenizer",
        "unk_token": None,
    }
    if name == "molmo_7b_d":
        write_byte_level(folder, "qwen2", added, molmo | qwen2)
    elif name == "molmo_7b_o":
        write_byte_level(folder, "llama3", added, molmo | dolma2)
    else:
        write_byte_level(folder, "gpt2", added, olmoe, slow=False)
        tokenizer = read_byte_level(folder)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.save(str(folder / "tokenizer.json"))
        # Beside it the published folder has two files of the 7B-O's tokenizer, of which nothing holds here.
        write_json(folder / "added_tokens.json", {token: 100278 + index for index, token in enumerate(IMAGE_TOKENS)})
        named = {key: dolma2[key] for key in ("bos_token", "pad_token", "unk_token")} | {"eos_token": END}
        write_json(folder / "special_tokens_map.json", {"additional_special_tokens": IMAGE_TOKENS, **named})


def generation_config(name: str, config: dict) -> dict:
    """Only MolmoE's names an end, with ids of its tokenizer."""
    ends = {}
    if name == "molmo_e_1b":
        first, contents = len(byte_level_vocabulary()[0]), [token.content for token in own_tokens(name)]
        ends = {"eos_token_id": first + contents.index(END), "pad_token_id": first + contents.index("<|padding|>")}
    return {"_from_model_config": True, **ends, "transformers_version": config["transformers_version"]}


def preprocessor_config(config: dict) -> dict:
    vision = tower(config)
    size, patch = vision["image_default_input_size"], vision["image_patch_size"]
    return {
        "auto_map": {
            "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
            "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
        },
        "base_image_input_size": size,
        "do_normalize": True,
        **CLIP,
        "image_padding_mask": True,
        "image_patch_size": patch,
        "image_processor_type": "MolmoImageProcessor",
        "image_token_length_h": size[0] // patch // 2,
        "image_token_length_w": size[1] // patch // 2,
        "max_crops": 12 if vision is TOWER else 6,
        "overlap_margins": [4, 4],
        "processor_class": "MolmoProcessor",
    }
