"""BLIP-3: its model against plain loops, its processor against what was trained, and both as a folder."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_bases import LLM, SIGLIP, TinyBase, tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from linvt_hf.configuration_blip3 import ANYRES_GRIDS, Blip3Config, select_grid
from linvt_hf.modeling_blip3 import Blip3ForConditionalGeneration, real_patches, regroup_crops
from linvt_hf.processing_blip3 import CHAT_TEMPLATE, Blip3ImageProcessor, Blip3Processor

TOWERS = {
    "siglip": SIGLIP,
    "clip": {key: value for key, value in SIGLIP.items() if key != "vision_use_head"}
    | {"model_type": "clip_vision_model"},
}
TINY = TinyBase(config="Blip3Config", fields={}, image_processor={}, processor={})
LATENTS, TILE, SIDE = 4, 28, 4  # visual tokens of a tile, its pixels a side, its patches a side
SYSTEM = (
    "<|system|>\nA chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.<|end|>\n"
)


def tiny_processor(**settings) -> Blip3Processor:
    tokenizer = tiny_tokenizer(TINY)
    tokenizer.padding_side = "left"
    images = Blip3ImageProcessor(size={"height": TILE, "width": TILE}, **settings)
    return Blip3Processor(images, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=LATENTS)


def tiny_model(tower: str = "siglip", **settings) -> Blip3ForConditionalGeneration:
    config = Blip3Config(
        vision_config=TOWERS[tower],
        text_config={**LLM, "model_type": "phi3", "num_key_value_heads": 4},
        image_token_id=tiny_tokenizer(TINY).convert_tokens_to_ids("<image>"),
        num_image_tokens=LATENTS,
        resampler_depth=2,
        resampler_heads=2,
        resampler_head_dim=8,
        **settings,
    )
    torch.manual_seed(0)
    model = Blip3ForConditionalGeneration(config).eval()
    with torch.no_grad():  # freshly made models answer everything with nearly the same logits
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 256, 258
    return model


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(words: str, *pictures: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": one} for one in pictures] + [{"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def encode(processor: Blip3Processor, *chats, **kwargs):
    return processor.apply_chat_template(
        list(chats),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, **kwargs},
    )


def resampled_by_hand(resampler, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One tile's patches [P, C] and which of them count [P], layer by layer and head by head -> [L, D]."""
    latents = resampler.latents
    for layer in resampler.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        normed = attention.norm_latents(latents)
        seen = torch.cat([attention.norm_media(patches[mask]), normed])
        width = attention.to_q.out_features // attention.heads
        heads = []
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            keys, values = attention.to_kv.weight.chunk(2)
            scores = (normed @ attention.to_q.weight[part].T) @ (seen @ keys[part].T).T / width**0.5
            heads.append(scores.softmax(dim=-1) @ (seen @ values[part].T))
        latents = latents + attention.to_out(torch.cat(heads, dim=-1))
        hidden = feed_forward.up_proj(feed_forward.norm(latents))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        latents = latents + feed_forward.down_proj(hidden)
    return resampler.projection(resampler.norm(latents))


# ---- config ----


def test_the_defaults_are_those_of_the_interleave_model():
    config = Blip3Config()
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (1152, 384)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (3072, 32015)
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert count["multi_modal_projector"] == 109_901_568
    head = model.lm_head
    # The released language model has 52 rows more in each of its tables, which are never read, and that many biases.
    assert count["language_model"] + head.weight.numel() + head.bias.numel() == 3_821_130_051 - 52 * (2 * 3072 + 1)


def test_a_config_as_a_dict_and_back():
    config = tiny_model("clip").config
    again = Blip3Config(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.model_type == "clip_vision_model"


def test_a_tower_or_an_aspect_ratio_it_does_not_know():
    with pytest.raises(ValueError, match="'dinov2'.*'siglip_vision_model' or a 'clip_vision_model'"):
        Blip3Config(vision_config={"model_type": "dinov2"})
    with pytest.raises(ValueError, match="'stretch'; it must be 'anyres', 'squash' or 'pad'"):
        Blip3Config(image_aspect_ratio="stretch")


# ---- a resampler that reads the prompt, as instruct-r-v1's ----


def test_the_prompt_is_read_with_a_picture_as_one_token():
    model, processor = tiny_model("clip", resampler_reads_text=True, resampler_text_length=40), tiny_processor()
    pictures = (picture(30, 60), picture(60, 30, seed=1))
    inputs = encode(processor, chat("Where?", *pictures))
    given = {}
    resampler = model.model.multi_modal_projector
    resampler.register_forward_hook(
        lambda module, args, kwargs, out: given.setdefault("all", []).append(kwargs["text"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    once = processor.tokenizer(" " + SYSTEM + "<|user|>\n<image>\n<image>\nWhere?<|end|>\n<|assistant|>\n")[
        "input_ids"
    ]
    expected = model.get_input_embeddings()(torch.tensor(once))[:40]
    assert len(given["all"]) == 2 and all(torch.equal(text, expected) for text in given["all"])


def test_its_tokens_are_the_latents_after_reading():
    """Against one sequence of latents and words, of which the words are left out at the end; padding is not masked."""
    model, processor = tiny_model("clip", resampler_reads_text=True), tiny_processor()
    resampler = model.model.multi_modal_projector
    inputs = encode(processor, chat("Where?", picture(30, 60)))
    text = torch.randn(5, LLM["hidden_size"])
    with torch.no_grad():
        (ours,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], [text]).pooler_output
        tiles = inputs["pixel_values"][0]
        patches = model.model._patches(model.model.vision_tower(tiles).last_hidden_state)
        grid = model.model._grids(inputs["pixel_values"], inputs["image_sizes"])[0]
        plain = resampler.latents
        resampler.latents = torch.nn.Parameter(torch.cat([plain, resampler.text_projection(text)]))
        everything = torch.ones(SIDE * SIDE, dtype=torch.bool)
        by_hand = [resampled_by_hand(resampler, tile, everything)[:LATENTS] for tile in regroup_crops(patches, grid)]
        resampler.latents = plain
    torch.testing.assert_close(ours, torch.cat(by_hand), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_image_reads_its_own_prompt(side):
    model, processor = tiny_model("clip", resampler_reads_text=True), tiny_processor()
    processor.tokenizer.padding_side = side
    chats = [
        chat("Where?", picture(30, 60)),
        chat("Nothing to see."),
        chat("What is it, and why is it there?", picture(60, 30)),
    ]
    batch = encode(processor, *chats)
    with torch.no_grad():
        together = model(**batch).logits
        for row, one in enumerate(chats):
            alone = model(**encode(processor, one)).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], alone, atol=1e-4, rtol=1e-4)
        other = model(**encode(processor, chat("Where not?", picture(30, 60)))).logits[0, 0]
        assert not torch.allclose(other, together[0][batch["attention_mask"][0].bool()][-1])


def test_an_answer_is_not_read():
    model, processor = tiny_model("clip", resampler_reads_text=True), tiny_processor()
    inputs = encode(processor, chat("Where?", picture(30, 60)))
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[40, 41]])], dim=1)
    labels = ids.clone()
    labels[:, :length] = -100
    answered = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        asked = model(**inputs).logits
        torch.testing.assert_close(model(**answered, labels=labels).logits[:, :length], asked)
        assert not torch.allclose(model(**answered).logits[:, :length], asked)  # read, where nothing says what it is


def test_generation_reads_the_prompt_once():
    model, processor = tiny_model("clip", resampler_reads_text=True), tiny_processor()
    inputs = encode(processor, chat("Where?", picture(30, 60)), chat("What?", picture(60, 30)))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, cache_implementation="static"))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model(**inputs, labels=labels).loss.backward()
    assert model.model.multi_modal_projector.text_projection[0].weight.grad.abs().max() > 0


# ---- vision tower, masks, resampler ----


def test_crops_are_regrouped_as_released():
    """Patches of crops side by side are counted off row by row: a group is half of each of two crops' rows."""
    rows, columns = 2, 2
    image = torch.arange(1 + rows * columns)[:, None, None] * 100 + torch.arange(SIDE * SIDE)[None, :, None]
    groups = regroup_crops(image, (columns, rows))[..., 0]
    assert torch.equal(groups[0], image[0, :, 0])
    expected = []
    for y in range(rows * SIDE):
        for x in range(columns * SIDE):
            crop = 1 + y // SIDE * columns + x // SIDE
            expected.append(100 * crop + y % SIDE * SIDE + x % SIDE)
    assert groups[1:].flatten().tolist() == expected
    one_column = image[:3]
    assert torch.equal(regroup_crops(one_column, (1, 2)), one_column)


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (60, 60), (30, 57), (100, 30), (3, 90), (28, 56)])
def test_masks_walked_through_patch_by_patch(size):
    columns, rows = select_grid(*size, TILE, ANYRES_GRIDS)
    mask = real_patches(size, (columns, rows), SIDE * SIDE)
    assert mask.shape == (1 + rows * columns, SIDE * SIDE) and mask[0].all()
    height, width = rows * SIDE, columns * SIDE
    wide = size[1] / size[0] > width / height
    taken = int(size[0] * (width / size[1])) if wide else int(size[1] * (height / size[0]))
    margin = ((height if wide else width) - taken) // 2
    real = [
        margin <= (y if wide else x) < (height if wide else width) - margin
        for y in range(height)
        for x in range(width)
    ]
    assert mask[1:].flatten().tolist() == real


@pytest.mark.parametrize("tower", TOWERS)
def test_images_to_tokens_tile_by_tile(tower):
    model = tiny_model(tower).model
    sizes = [(20, 50), (60, 60), (90, 30)]
    inputs = tiny_processor().image_processor([picture(*size) for size in sizes], return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(**inputs, return_dict=True).pooler_output
        for size, tiles, tokens in zip(sizes, inputs["pixel_values"], output, strict=True):
            columns, rows = select_grid(*size, TILE, ANYRES_GRIDS)
            hidden = model.vision_tower(tiles[: 1 + rows * columns]).last_hidden_state
            if tower == "clip":
                norm = model.vision_tower.post_layernorm
                hidden = F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[:, 1:]
            groups = regroup_crops(hidden, (columns, rows))
            masks = real_patches(size, (columns, rows), SIDE * SIDE)
            pairs = zip(groups, masks, strict=True)
            expected = torch.cat([resampled_by_hand(model.multi_modal_projector, *pair) for pair in pairs])
            torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-4)


def test_siglip_features_are_those_after_its_last_norm():
    model = tiny_model().model
    pixels = torch.randn(2, 3, TILE, TILE)
    with torch.no_grad():
        before = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        patches = model.vision_tower.post_layernorm(before)
        expected = model.multi_modal_projector(patches)
        output = model.get_image_features(pixels, return_dict=True)
    torch.testing.assert_close(output.pooler_output, expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_frames_are_one_tile_each(tower):
    model, processor = tiny_model(tower), tiny_processor()
    frames = [picture(40, 60, seed) for seed in range(3)]
    inputs = processor.image_processor(frames, image_aspect_ratio="squash", return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 1, 3, TILE, TILE)
    with torch.no_grad():
        tokens = model.get_image_features(**inputs, return_dict=True).pooler_output
        flat = model.get_image_features(inputs["pixel_values"][:, 0], return_dict=True).pooler_output
        anyres = processor.image_processor(frames, return_tensors="pt")
        whole = model.get_image_features(anyres["pixel_values"][:, :1], return_dict=True).pooler_output
        every = model.get_image_features(**anyres, return_dict=True).pooler_output
    assert tokens.shape == (3, LATENTS, LLM["hidden_size"])
    assert torch.equal(tokens, flat) and torch.equal(tokens, whole)
    # The whole comes first among an image's tiles, and no crop changes its tokens.
    for frame, image in zip(tokens, every, strict=True):
        torch.testing.assert_close(frame, image[:LATENTS], atol=1e-5, rtol=1e-5)


def test_tiles_of_padding_change_nothing():
    model, images = tiny_model(), tiny_processor().image_processor
    small, large = picture(20, 50), picture(60, 60)
    both = images([small, large], return_tensors="pt")
    alone = images(small, return_tensors="pt")
    assert both["pixel_values"].shape[1] == 5 and alone["pixel_values"].shape[1] == 3
    assert not both["pixel_values"][0, 3:].any()
    noisy = both["pixel_values"].clone()
    noisy[0, 3:] = 7
    with torch.no_grad():
        (expected,) = model.get_image_features(**alone, return_dict=True).pooler_output
        for pixels in (both["pixel_values"], noisy):
            tokens = model.get_image_features(pixels, both["image_sizes"], return_dict=True).pooler_output
            assert [len(image) for image in tokens] == [3 * LATENTS, 5 * LATENTS]
            torch.testing.assert_close(tokens[0], expected, atol=1e-5, rtol=1e-5)


def test_tiles_and_sizes_must_match():
    model, images = tiny_model(), tiny_processor().image_processor
    inputs = images(picture(60, 60), return_tensors="pt")
    with pytest.raises(ValueError, match="crops of 1 images, but there are none image_sizes"):
        model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="3 tiles an image.*ask for 5"):
        model.get_image_features(inputs["pixel_values"][:, :3], inputs["image_sizes"])


# ---- the whole model ----


def test_tokens_replace_their_places():
    model, processor = tiny_model(), tiny_processor()
    inputs = encode(processor, chat("Which is which?", picture(20, 50), picture(60, 60)))
    places = inputs["input_ids"] == processor.image_token_id
    assert int(places.sum()) == 8 * LATENTS
    with torch.no_grad():
        features = torch.cat(
            model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
        )
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[places] = features
        by_hand = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        logits = model(**inputs).logits
        from_embeds = model(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            **{name: value for name, value in inputs.items() if name != "input_ids"},
        )
    torch.testing.assert_close(logits, by_hand)
    torch.testing.assert_close(from_embeds.logits, by_hand)


def test_places_and_tokens_must_match():
    model, processor = tiny_model(), tiny_processor()
    inputs = encode(processor, chat("Which?", picture(20, 50)))
    with pytest.raises(ValueError, match="13 places.*make 12"):
        extra = torch.tensor([[processor.image_token_id]])
        model(
            input_ids=torch.cat([inputs["input_ids"], extra], dim=1),
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
        )
    with pytest.raises(ValueError, match="both or neither"):
        model(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_row_does_not_depend_on_its_batch(tower, side):
    model, processor = tiny_model(tower), tiny_processor()
    processor.tokenizer.padding_side = side
    chats = [
        chat("What is this?", picture(20, 50)),
        chat("And these two, one by one?", picture(60, 60, 1), picture(90, 30, 2)),
        chat("No picture."),
    ]
    batch = encode(processor, *chats)
    with torch.no_grad():
        together = model(**batch).logits
        for row, one in enumerate(chats):
            alone = model(**encode(processor, one)).logits[0]
            torch.testing.assert_close(together[row][batch["attention_mask"][row] == 1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
def test_generation(tower):
    model, processor = tiny_model(tower), tiny_processor()
    chats = [
        chat("What is this?", picture(20, 50)),
        chat("And these?", picture(60, 60, 1), picture(20, 50, 2)),
        chat("No picture."),
    ]
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    batch = encode(processor, *chats)
    answers = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for one, answer in zip(chats, answers, strict=True):
        alone = encode(processor, one)
        single = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(single, answer)
    uncached = model.generate(**batch, use_cache=False, **settings)[:, batch["input_ids"].shape[1] :]
    static = model.generate(**batch, cache_implementation="static", **settings)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(uncached, answers) and torch.equal(static, answers)
    other = encode(processor, chat("What is this?", picture(20, 50, 9)), *chats[1:])
    with torch.no_grad():
        assert not torch.allclose(model(**other).logits[0], model(**batch).logits[0])


def test_each_beam_keeps_its_prompts_images():
    model, processor = tiny_model(), tiny_processor()
    chats = [chat("What?", picture(20, 50)), chat("And these?", picture(60, 60, 1), picture(20, 50, 2))]
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 3,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    batch = encode(processor, *chats)
    answers = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **rest, **settings), answers)
    for one, answer in zip(chats, answers, strict=True):
        alone = encode(processor, one)
        assert torch.equal(model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :], answer)
    frames = encode(processor, chats[1], image_aspect_ratio="squash")
    assert model.generate(**frames, **settings).shape[0] == 1


def test_logits_to_keep_and_loss():
    model, processor = tiny_model(), tiny_processor()
    inputs = encode(processor, chat("What?", picture(20, 50)))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(last, output.logits[:, -2:])
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[0, :-1], labels[0, 1:]))
    assert model.lm_head.bias is not None
    with torch.no_grad():
        model.lm_head.bias[5] += 1
        torch.testing.assert_close(model(**inputs).logits[..., 5], output.logits[..., 5] + 1)


@pytest.mark.parametrize("tower", TOWERS)
def test_everything_learns(tower):
    model, processor = tiny_model(tower).train(), tiny_processor()
    inputs = encode(processor, chat("What?", picture(20, 50)))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert all(gradients[name].any() for name in gradients if "projector" in name)
    model.zero_grad()
    # Its name in newer transformers, or in older.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert model.model.multi_modal_projector.layers[0].gradient_checkpointing
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_in_bfloat16_and_with_more_words():
    model, processor = tiny_model().to(torch.bfloat16), tiny_processor()
    inputs = encode(processor, chat("What?", picture(20, 50)))
    model.resize_token_embeddings(LLM["vocab_size"] + 3)
    assert model.config.text_config.vocab_size == LLM["vocab_size"] + 3
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.shape[-1] == LLM["vocab_size"] + 3
    assert len(model.lm_head.bias) == LLM["vocab_size"] + 3


# ---- processor ----


def test_grids_of_384_pixels():
    chosen = {
        size: select_grid(*size, 384, ANYRES_GRIDS) for size in [(480, 640), (640, 480), (300, 1200), (1200, 300)]
    }
    assert chosen == {(480, 640): (2, 2), (640, 480): (2, 2), (300, 1200): (3, 1), (1200, 300): (1, 3)}
    assert select_grid(100, 100, 384, ANYRES_GRIDS) == (
        1,
        2,
    )  # small enough for all: the least padding, then the first
    assert select_grid(100, 200, 384, ANYRES_GRIDS) == (1, 2)


def test_an_image_as_tiles():
    """The whole squashed, then the crops of the image in the middle of black."""
    image, images = picture(30, 56), tiny_processor().image_processor
    inputs = images(image, return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[30, 56]]
    pixels = (inputs["pixel_values"][0] * 0.5 + 0.5) * 255
    whole = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), whole, atol=1e-3)
    columns, rows = select_grid(30, 56, TILE, ANYRES_GRIDS)
    assert (columns, rows) == (2, 2)
    canvas = torch.cat([torch.cat([*pixels[1 + row * columns :][:columns]], dim=-1) for row in range(rows)], dim=-2)
    np.testing.assert_allclose(canvas[:, 13:43].permute(1, 2, 0), np.asarray(image), atol=1e-3)
    assert canvas[:, :13].abs().max() < 1e-3 and canvas[:, 43:].abs().max() < 1e-3


def test_other_aspect_ratios():
    image, images = picture(30, 50), tiny_processor().image_processor
    square = Image.new("RGB", (50, 50), (127, 127, 127))
    square.paste(image, (0, 10))
    padded = images(image, image_aspect_ratio="pad", return_tensors="pt")["pixel_values"]
    assert padded.shape == (1, 1, 3, TILE, TILE)
    assert torch.equal(padded, images(square, image_aspect_ratio="squash", return_tensors="pt")["pixel_values"])
    with pytest.raises(ValueError, match="'stretch'; it must be"):
        images(image, image_aspect_ratio="stretch")
    squashing = Blip3ImageProcessor(size={"height": TILE, "width": TILE}, image_aspect_ratio="squash")
    assert squashing(image)["pixel_values"].shape == (1, 1, 3, TILE, TILE)
    assert squashing.num_tiles(30, 50) == 1 and squashing.num_tiles(30, 50, image_aspect_ratio="anyres") == 5


def test_images_of_any_kind_are_the_same_image():
    image, images = picture(30, 50), tiny_processor().image_processor
    pixels = np.asarray(image)
    kinds = [image, image.convert("RGBA"), pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), pixels / 255]
    first, *others = [images(kind, return_tensors="pt")["pixel_values"] for kind in kinds]
    assert all(torch.equal(first, other) for other in others)
    grey = images(image.convert("L"), return_tensors="pt")["pixel_values"][0, 0]
    assert torch.equal(grey[0], grey[1])


def test_the_chat_template():
    processor = tiny_processor()

    def render(messages, **kwargs):
        return processor.apply_chat_template(messages, tokenize=False, **kwargs)

    image, said = {"type": "image"}, [{"type": "text", "text": "A cat."}]
    user = {"role": "user", "content": [image, {"type": "text", "text": "Who?"}]}
    talk = [user, {"role": "assistant", "content": said}, {"role": "user", "content": "Sure?"}]
    expected = f" {SYSTEM}<|user|>\n<image>\nWho?<|end|>\n"
    assert render([user]) == expected
    assert render([user], add_generation_prompt=True) == expected + "<|assistant|>\n"
    whole = expected + "<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\n"
    assert render(talk, add_generation_prompt=True) == whole
    assert render([{"role": "system", "content": "Be brief."}, user]) == (
        " <|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWho?<|end|>\n"
    )
    words = [{"type": "text", "text": text} for text in ("Look at this image ", " and this image ", ". Which?")]
    among = {"role": "user", "content": [words[0], image, words[1], image, words[2]]}
    assert render([among]).endswith("<|user|>\nLook at this image <image> and this image <image>. Which?<|end|>\n")


def test_placeholders_become_as_many_as_the_tokens():
    processor = tiny_processor()
    prompts = ["a <image> b <image>", "c", "<image>"]
    images = [picture(20, 50), picture(60, 60), picture(90, 30)]
    flat = processor(images, prompts, padding=True, return_tensors="pt")
    nested = processor([images[:2], [], images[2:]], prompts, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    assert set(flat) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    counts = (flat["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [(3 + 5) * LATENTS, 0, 4 * LATENTS]
    one = processor(images[0], "a <image> b", images_kwargs={"image_aspect_ratio": "squash"})
    assert one["input_ids"][0].count(processor.image_token_id) == LATENTS
    text = "a " + "<image>" * LATENTS + " b"
    assert one["input_ids"][0] == processor.tokenizer(text)["input_ids"]
    assert processor(text="words")["input_ids"] == processor.tokenizer(["words"])["input_ids"]
    assert set(processor(images)) == {"pixel_values", "image_sizes"}


def test_what_a_call_refuses():
    processor, image = tiny_processor(), picture(20, 50)
    with pytest.raises(ValueError, match="2 image placeholders.*but 1 images"):
        processor(image, "<image> <image>")
    with pytest.raises(ValueError, match=r"\[1, 1\] image placeholders.*but \[2, 0\] images"):
        processor([[image, image], []], ["<image>", "<image>"])
    with pytest.raises(ValueError, match="no images were given"):
        processor(text="<image>")
    with pytest.raises(ValueError, match="both are missing"):
        processor()
    with pytest.raises(ValueError, match="leave videos and audio out"):
        processor(text="a", videos=[image])
    with pytest.raises(ValueError, match="lacks <image>"):
        tokenizer = tiny_tokenizer(TinyBase(config="", fields={}, image_processor={}, processor={}, image_token="<x>"))
        Blip3Processor(Blip3ImageProcessor(), tokenizer)


# ---- as a folder ----

FRESH = """
import sys
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

sys.modules["linvt_hf"] = None  # as if it were not installed
torch.set_num_threads(1)  # sums are in another order with more
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


@pytest.mark.parametrize("tower", TOWERS)
def test_a_folder_here_and_in_a_process_without_the_package(tower, tmp_path):
    model, processor = tiny_model(tower), tiny_processor(image_mean=[0.4, 0.5, 0.6], anyres_grids=[(1, 2), (2, 1)])
    model.config.anyres_grids = [[1, 2], [2, 1]]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = picture(60, 90)
    inputs = encode(processor, chat("Who?", image))
    with torch.no_grad():
        logits = model(**inputs).logits

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Blip3ForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is Blip3Processor and again.chat_template == CHAT_TEMPLATE
    assert again.num_image_tokens == LATENTS
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Blip3ImageProcessor
    assert [list(grid) for grid in again.image_processor.anyres_grids] == [[1, 2], [2, 1]]
    assert torch.equal(encode(again, chat("Who?", image))["pixel_values"], inputs["pixel_values"])

    torch.save({**inputs, "logits": logits, "image": torch.from_numpy(np.array(image))}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all well")


def test_fresh_weights_are_set():
    """The latents are spread like noise, as at the start of training; a bare parameter left alone would be zeros."""
    model = Blip3ForConditionalGeneration(tiny_model().config)
    assert 0.5 < model.model.multi_modal_projector.latents.std() < 1.5
