"""Molmo: its model against plain loops, its processor against what the released one writes, and both as a folder."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import LLM, TinyBase, tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from linvt_hf.configuration_molmo import MolmoConfig
from linvt_hf.modeling_molmo import MolmoForConditionalGeneration, stitch
from linvt_hf.processing_molmo import (
    MOLMO_CHAT_TEMPLATE,
    MolmoImageProcessor,
    MolmoProcessor,
    select_tiling,
    token_places,
)

TEXT_MODELS = {
    "qwen2": {},
    "olmo2": {"num_key_value_heads": 4},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
}
TINY = TinyBase(
    config="MolmoConfig",
    fields={},
    image_processor={},
    processor={},
    image_token="<|image|>",
    special={"im_start": "<im_start>", "im_end": "<im_end>", "im_patch": "<im_patch>", "im_col": "<im_col>"},
)


def tiny_processor(**settings) -> MolmoProcessor:
    """Crops of 8 x 8 patches, 4 x 4 visual tokens, with margins of one token."""
    settings = {"size": {"height": 56, "width": 56}, "patch_size": 7, "overlap_margins": [2, 2], **settings}
    tokenizer = tiny_tokenizer(TINY)
    tokenizer.padding_side = "left"
    return MolmoProcessor(MolmoImageProcessor(**settings), tokenizer, chat_template=MOLMO_CHAT_TEMPLATE)


def tiny_model(text: str = "qwen2") -> MolmoForConditionalGeneration:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = MolmoConfig(
        vision_config={**vision, "image_size": 56, "patch_size": 7},
        text_config={**LLM, **TEXT_MODELS[text], "model_type": text},
        image_token_id=tiny_tokenizer(TINY).convert_tokens_to_ids("<im_patch>"),
        vision_feature_layers=(-2, -3),
        projector_hidden_size=24,
        output_vocab_size=LLM["vocab_size"] - 8,
    )
    torch.manual_seed(0)
    model = MolmoForConditionalGeneration(config).eval()
    with torch.no_grad():  # freshly made models answer everything with nearly the same logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 256, 258
    return model


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(words: str, *pictures: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": one} for one in pictures] + [{"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def encode(processor: MolmoProcessor, *chats, **kwargs):
    return processor.apply_chat_template(
        list(chats),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, **kwargs},
    )


def stitched_by_hand(features: torch.Tensor, tilings: list[tuple[int, int]], margin: int = 1) -> torch.Tensor:
    """The tokens of images of so many rows and columns of crops, each walked through place by place."""
    side, tokens, crop = round(features.shape[1] ** 0.5), [], 0
    for rows, columns in tilings:
        tokens.extend(features[crop])
        step = side - 2 * margin
        for y in range(rows * step + 2 * margin):
            for x in range(columns * step + 2 * margin):
                i = min(max((y - margin) // step, 0), rows - 1)
                j = min(max((x - margin) // step, 0), columns - 1)
                tokens.append(features[crop + 1 + i * columns + j, (y - i * step) * side + x - j * step])
        crop += 1 + rows * columns
    return torch.stack(tokens)


# ---- config ----


def test_the_defaults_are_those_of_the_7b_d():
    config = MolmoConfig()
    assert (config.vision_config.num_hidden_layers, config.text_config.vocab_size) == (23, 152192)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.tokens_per_crop == 144
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config)
    assert model.lm_head.weight.shape == (152064, 3584)
    assert model.model.multi_modal_projector.pad_embed.shape == (2, 2048)
    assert model.model.multi_modal_projector.pooling.k_proj.weight.shape == (1024, 2048)
    # As many as the released checkpoint has.
    assert sum(p.numel() for p in model.parameters()) == 8_021_025_280


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="24 patches a side do not divide by pooling_size 5"):
        MolmoConfig(pooling_size=5)
    with pytest.raises(ValueError, match=r"output_vocab_size \(152064\) is above the 300 rows"):
        MolmoConfig(text_config={"model_type": "qwen2", "vocab_size": 300})


# ---- vision ----


def test_crops_to_tokens_window_by_window():
    model = tiny_model()
    projector = model.model.multi_modal_projector
    pixels = torch.randn(3, 3, 56, 56)
    masks = torch.rand(3, 64).where(torch.rand(3, 64) < 0.7, torch.tensor(0.0))
    masks[0, ::3], masks[2] = 1.0, -1.0
    with torch.no_grad():
        tokens = model.get_image_features(pixels, masks, return_dict=True).pooler_output
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        patches = torch.cat([states[-2][:, 1:], states[-3][:, 1:]], dim=-1)
        for crop in range(3):
            for place in range(64):
                if masks[crop, place] == 0:
                    patches[crop, place] += projector.pad_embed[0]
                elif masks[crop, place] < 1:
                    patches[crop, place] += projector.pad_embed[1]
        pool = projector.pooling
        for crop, row, column in [(0, 0, 0), (1, 1, 3), (2, 3, 2)]:
            corner = 2 * row * 8 + 2 * column
            window = patches[crop, [corner, corner + 1, corner + 8, corner + 9]]  # [4, C]
            query = pool.q_proj(window.mean(dim=0)).unflatten(0, (4, 8))
            keys, values = (part(window).unflatten(1, (4, 8)) for part in (pool.k_proj, pool.v_proj))
            weights = torch.einsum("hd,phd->hp", query / 8**0.5, keys).softmax(dim=-1)
            pooled = pool.o_proj(torch.einsum("hp,phd->hd", weights, values).flatten())
            gate = torch.nn.functional.silu(projector.gate_proj(pooled))
            expected = projector.down_proj(gate * projector.up_proj(pooled))
            torch.testing.assert_close(tokens[crop, row * 4 + column], expected, rtol=1e-4, atol=1e-5)


def test_a_crop_of_padding_alone_has_no_features():
    model = tiny_model()
    pixels = torch.cat([torch.randn(1, 3, 56, 56), torch.full((1, 3, 56, 56), -1.0)])
    tokens = model.get_image_features(pixels, return_dict=True).pooler_output
    assert tokens.shape == (2, 16, 32)
    torch.testing.assert_close(tokens[1], tokens[1, :1].expand(16, -1))  # the projector's biases, everywhere alike
    alone = model.get_image_features(pixels[:1], return_dict=True).pooler_output
    torch.testing.assert_close(tokens[:1], alone)


def test_places_of_overlapping_crops():
    tilings = [(1, 1), (2, 3), (3, 1)]
    features = torch.randn(sum(1 + i * j for i, j in tilings), 16, 5)
    order = []
    for rows, columns in tilings:
        grid, places = token_places(rows, columns, 4, 1, 1)
        assert grid == (2 * rows + 2, 2 * columns + 2)
        assert sorted(places[places >= 0]) == list(range(grid[0] * grid[1]))
        order += [np.arange(16)[None], np.where(places < 0, -1, places + 16)]
    found = stitch(features, torch.from_numpy(np.concatenate(order)))
    assert torch.equal(found, stitched_by_hand(features, tilings))
    assert torch.equal(stitch(features, None), features.flatten(0, 1))


def test_tokens_are_added_at_their_places():
    model, processor = tiny_model(), tiny_processor()
    inputs = encode(processor, chat("Who?", picture(60, 90), picture(30, 30)), chat("Where?", picture(120, 40)))
    tilings = [(2, 3), (1, 1), (4, 1)]
    assert len(inputs["pixel_values"]) == sum(1 + i * j for i, j in tilings)
    with torch.no_grad():
        found = model(**inputs).logits
        features = model.get_image_features(inputs["pixel_values"], inputs["image_masks"]).pooler_output
        tokens = iter(stitched_by_hand(features, tilings))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        for row, column in (inputs["input_ids"] == model.config.image_token_id).nonzero().tolist():
            embeds[row, column] += next(tokens)
        assert next(tokens, None) is None
        expected = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), **_without_ids(inputs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_embeds.logits, found)


def _without_ids(inputs) -> dict:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def test_places_and_tokens_must_match():
    model, processor = tiny_model(), tiny_processor()
    inputs = encode(processor, chat("Who?", picture(60, 90)))
    inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = 65
    with pytest.raises(ValueError, match="hold 0 places for visual tokens, but the images make 64"):
        model(**inputs)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])


# ---- language ----


@pytest.mark.parametrize("text", TEXT_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(text, side):
    model, processor = tiny_model(text), tiny_processor()
    processor.tokenizer.padding_side = side
    chats = [chat("Who?"), chat("What is it?", picture(60, 90)), chat("A longer question", picture(20, 99, 1))]
    together = encode(processor, *chats)
    with torch.no_grad():
        logits = model(**together).logits
        assert logits.shape == (*together["input_ids"].shape, 320)
        for row, one in enumerate(chats):
            alone = encode(processor, one)
            real = together["attention_mask"][row].bool()
            assert torch.equal(together["input_ids"][row][real], alone["input_ids"][0])
            torch.testing.assert_close(logits[row][real], model(**alone).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_generation(text):
    model, processor = tiny_model(text), tiny_processor()
    chats = [chat("What is it?", picture(60, 90)), chat("Who?"), chat("Where?", picture(70, 20), picture(20, 70))]
    together = encode(processor, *chats)
    length = together["input_ids"].shape[1]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers = model.generate(**together, **settings)[:, length:]
    assert torch.equal(model.generate(**together, **settings, use_cache=False)[:, length:], answers)
    assert torch.equal(model.generate(**together, **settings, cache_implementation="static")[:, length:], answers)
    beams = model.generate(**together, **settings, num_beams=2, num_return_sequences=2)[:, length:]
    for row, one in enumerate(chats):
        alone = encode(processor, one)
        start = alone["input_ids"].shape[1]
        assert torch.equal(model.generate(**alone, **settings)[0, start:], answers[row])
        wide = model.generate(**alone, **settings, num_beams=2, num_return_sequences=2)[:, start:]
        assert torch.equal(wide, beams[2 * row : 2 * row + 2])
    assert int(answers.max()) < model.config.output_vocab_size
    penalised = model.generate(**together, **settings, repetition_penalty=1.5)  # looks up the ids of images, too
    assert penalised.shape == (3, length + 6)
    embeds = model.get_input_embeddings()(together["input_ids"])
    assert torch.equal(model.generate(inputs_embeds=embeds, **_without_ids(together), **settings), answers)


def test_the_head_has_fewer_rows_than_the_table():
    model, processor = tiny_model(), tiny_processor()
    assert model.lm_head.weight.shape[0] == 312 and model.get_input_embeddings().weight.shape[0] == 320
    inputs = encode(processor, chat("What is it?", picture(60, 90)))
    labels = inputs["input_ids"].where(inputs["input_ids"] < 256, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=2)
    assert (output.logits[..., 312:] == torch.finfo(torch.float32).min).all()
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1, :312], labels[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(last.logits, output.logits[:, -2:])
    model.resize_token_embeddings(330)
    assert model.lm_head.weight.shape[0] == model.config.output_vocab_size == 330
    assert model(**inputs).logits.shape[-1] == 330


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_everything_learns(text):
    model, processor = tiny_model(text).train(), tiny_processor()
    inputs = encode(processor, chat("What is it?", picture(60, 90)))
    labels = inputs["input_ids"].where(inputs["input_ids"] < 256, -100)
    model(**inputs, labels=labels).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    unused = ("encoder.layers.3.", "experts")  # an expert that no token chose
    silent = [name for name, grad in plain.items() if grad is None or not grad.any()]
    assert not [name for name in silent if not any(part in name for part in unused)]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if plain[name] is not None:
            torch.testing.assert_close(parameter.grad, plain[name])


def test_in_bfloat16():
    model, processor = tiny_model().to(torch.bfloat16), tiny_processor()
    inputs = encode(processor, chat("What is it?", picture(60, 90)))
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits[..., :312].isfinite().all()


# ---- images ----


def test_tilings():
    assert select_tiling(-20, -20, 224, 12) == (1, 1)
    assert select_tiling(0, 300, 224, 12) == (1, 2)
    assert select_tiling(224, 224, 224, 12) == (1, 1)
    assert select_tiling(225, 224, 224, 12) == (2, 1)
    assert select_tiling(968, 1808, 224, 12) == (3, 4)
    assert select_tiling(2888, 2888, 224, 12) == (3, 3)
    assert select_tiling(3888, 88, 224, 12) == (12, 1)


def test_an_image_as_crops():
    processor = MolmoImageProcessor()
    output = processor(picture(400, 700), return_tensors="pt")
    assert output["image_grids"].tolist() == [[8 * 2 + 4, 8 * 3 + 4]]  # 2 x 3 crops
    assert output["pixel_values"].shape == (7, 3, 336, 336)
    assert output["image_masks"].shape == (7, 576) and output["image_token_order"].shape == (7, 144)
    # The crops' 560 x 784 pixels hold the image in 448 rows: above and below, 4 patches of padding.
    black = (0 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    torch.testing.assert_close(output["pixel_values"][1, :, 55, 0], black)
    assert not torch.allclose(output["pixel_values"][1, :, 56, 0], black)
    masks = output["image_masks"].unflatten(1, (24, 24))  # as released: each crop has the mask of the one after it
    assert (masks[:3, :4] == 0).all() and (masks[:3, 4:] == 1).all()
    assert (masks[3:6, :20] == 1).all() and (masks[3:6, 20:] == 0).all()
    assert (masks[6] == -1).all()


def test_a_frame_is_the_global_crop_with_its_own_mask():
    processor = MolmoImageProcessor(overlapping_crops=False)
    frames = [[picture(120, 240)], [picture(120, 240, 1)]]
    output = processor(frames, return_tensors="pt")
    assert output["pixel_values"].shape == (2, 3, 336, 336) and output["image_grids"].tolist() == [[0, 0]] * 2
    assert torch.equal(output["image_token_order"], torch.arange(144).repeat(2, 1))
    masks = output["image_masks"].unflatten(1, (24, 24))
    assert (masks[:, :6] == 0).all() and (masks[:, 6:18] == 1).all() and (masks[:, 18:] == 0).all()
    again = MolmoImageProcessor()(frames, return_tensors="pt", overlapping_crops=False)
    assert all(torch.equal(again[name], output[name]) for name in output)
    whole = MolmoImageProcessor()(frames[0], return_tensors="pt")
    assert torch.equal(whole["pixel_values"][0], output["pixel_values"][0])


def test_images_of_any_kind_are_the_same_image():
    processor = MolmoImageProcessor()
    image = picture(90, 140)
    pixels = np.array(image)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for same in (pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels), pixels.astype(np.float32) / 255):
        torch.testing.assert_close(processor(same, return_tensors="pt")["pixel_values"], expected)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "turn me clockwise"
    assert torch.equal(processor(turned, return_tensors="pt")["pixel_values"], expected)
    grey = processor(image.convert("L"), return_tensors="pt")["pixel_values"]
    assert grey.shape == expected.shape
    with pytest.raises(ValueError, match=r"overlap_margins \[3, 4\] must be multiples of pooling_size 2"):
        processor(image, overlap_margins=(3, 4))


# ---- prompts ----


def test_the_layout_of_a_picture():
    processor = tiny_processor()
    inputs = processor(images=picture(60, 90), text="<|image|> User: Who? Assistant:", return_tensors="pt")
    whole = "<im_start>" + ("<im_patch>" * 4 + "<im_col>") * 4 + "<im_end>"
    crops = "<im_start>" + ("<im_patch>" * 8 + "<im_col>") * 6 + "<im_end>"
    assert processor.decode(inputs["input_ids"][0]) == f"<s>{whole}{crops} User: Who? Assistant:"
    assert int((inputs["image_token_order"] >= 0).sum()) == 4 * 4 + 6 * 8
    frame = processor(images=picture(60, 90), text="<|image|>", overlapping_crops=False)
    assert processor.decode(frame["input_ids"][0]) == f"<s>{whole}"
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_masks", "image_token_order"}
    assert set(processor.model_input_names) == set(inputs)
    only = processor(images=[picture(60, 90)], return_tensors="pt")
    assert torch.equal(only["pixel_values"], inputs["pixel_values"]) and "input_ids" not in only


def test_one_bos_which_eos_may_be():
    processor = tiny_processor()
    assert processor.decode(processor(text=" User: Who? Assistant:")["input_ids"][0]) == "<s> User: Who? Assistant:"
    assert processor(text="<s>Hi")["input_ids"] == processor(text="Hi")["input_ids"]
    processor.tokenizer.bos_token = None  # as Qwen2's and OLMo's
    assert processor.decode(processor(text="Hi")["input_ids"][0]) == "</s>Hi"
    assert processor.apply_chat_template(chat("Hi")) == "</s> User: Hi"


def test_the_chat_template():
    processor = tiny_processor()
    conversation = [
        {"role": "system", "content": "long_caption:"},
        *chat("What?", picture(9, 9)),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        *chat("<im_start>laid out<im_end>"),
        {"role": "user", "content": "And this?"},
    ]
    conversation[3]["content"].append({"type": "text", "text": "Sure?"})
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<s><|image|> User: long_caption: What? Assistant: A cat.</s><im_start>laid out<im_end> User: Sure? User: "
        "And this? Assistant:"
    )
    assert processor.apply_chat_template(conversation[:3]).endswith(" What? Assistant: A cat.</s>")


def test_images_by_prompt_or_in_one_list():
    processor = tiny_processor()
    images, texts = [picture(60, 90), picture(30, 30), picture(90, 20)], ["<|image|>a", "b", "c<|image|>d<|image|>"]
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[images[:1], [], images[1:]], text=texts, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    sorted_out = processor(
        images=images, text=texts, text_kwargs={"padding": True}, images_kwargs={"max_crops": 1}, return_tensors="pt"
    )
    assert len(sorted_out["pixel_values"]) == 2 * 3
    with pytest.raises(ValueError, match=r"hold \[1, 0, 2\] image placeholders .* but \[1, 1, 1\] images"):
        processor(images=[[image] for image in images], text=texts)
    with pytest.raises(ValueError, match="holds 3 image placeholders .* but 1 images"):
        processor(images=images[0], text=texts)
    with pytest.raises(ValueError, match="no images were given"):
        processor(text=texts)
    with pytest.raises(ValueError, match="both are missing"):
        processor()
    with pytest.raises(ValueError, match="leave videos and audio out"):
        processor(text="a", videos=["v.mp4"])


def test_a_tokenizer_without_the_tokens():
    plain = tiny_tokenizer(TinyBase(config="", fields={}, image_processor={}, processor={}))
    with pytest.raises(ValueError, match=r"lacks <\|image\|>, <im_start>"):
        MolmoProcessor(MolmoImageProcessor(), plain)


# ---- folders ----

FRESH = """
import sys
sys.modules["linvt_hf"] = None  # importing the package fails from here on
import numpy as np, torch, transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
torch.set_num_threads(1)  # as in the tests: another number of threads sums in another order
folder, remote = sys.argv[1], {"trust_remote_code": True}
expected = torch.load(folder + "/expected.pt", weights_only=True)
image = Image.fromarray(expected.pop("image").numpy())
logits = expected.pop("logits")
processor = transformers.AutoProcessor.from_pretrained(folder, **remote)
images = AutoImageProcessor.from_pretrained(folder, **remote)
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **remote)
for part in (processor, images, model):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Who?"}]}]
inputs = processor.apply_chat_template(
    chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in inputs)
assert torch.equal(images(image, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, logits)
print("all well")
"""


def test_a_folder_here_and_in_a_process_without_the_package(tmp_path):
    model, processor = tiny_model(), tiny_processor(max_crops=5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = picture(60, 90)
    inputs = encode(processor, chat("Who?", image))
    with torch.no_grad():
        logits = model(**inputs).logits

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MolmoForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MolmoProcessor and again.chat_template == MOLMO_CHAT_TEMPLATE
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MolmoImageProcessor
    for name in ("max_crops", "overlap_margins", "patch_size"):
        assert getattr(again.image_processor, name) == getattr(processor.image_processor, name)
    assert torch.equal(encode(again, chat("Who?", image))["pixel_values"], inputs["pixel_values"])

    torch.save({**inputs, "logits": logits, "image": torch.from_numpy(np.array(image))}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all well")
