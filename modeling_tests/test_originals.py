"""
Published checkpoints of the image-LLMs, tiny, in their makers' layout: converted, each gives what a plain forward of
the makers' arithmetic gives. Writers and forwards know nothing of this package.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import original_aquila
import original_blip3
import original_internvl2
import original_mipha
import original_molmo
import original_qwen2_vl
import pytest
import torch
from PIL import Image
from tiny_models import TINY_LINVT, chat, encode, noise_video

from linvt_hf import wrap
from linvt_hf.conversion import convert
from linvt_hf.conversion.convert import find_original
from linvt_hf.image_llm import OWN_MODELS

IMAGE = -200
MODULES = (original_blip3, original_molmo, original_mipha, original_internvl2, original_aquila, original_qwen2_vl)
CASES = {name: module for module in MODULES for name in module.CHECKPOINTS}
every_checkpoint = pytest.mark.parametrize("name", CASES)
QUESTION = "Where is the red ball?"
CONVERSATIONS = {
    "one turn": [("user", QUESTION)],
    "three turns": [("user", QUESTION), ("assistant", "Left of the box,\n\nI'd say: 12 cm."), ("user", " And now?")],
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough that a pixel more or less in a resize is no other picture."""
    (noise,) = noise_video(1, seed=seed, height=7, width=9)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def published(name: str) -> Path:
    folder = Path(os.environ["HF_HOME"]) / "originals" / name
    return CASES[name].write(name, folder)


@functools.cache
def converted(name: str):
    """The converted model and its processor, through a LinVT model: texts and images take the base's own path."""
    out = published(name).with_name(f"{name}-converted")
    convert(published(name), out, dtype="float32")
    frame_kwargs = None
    if name.startswith("qwen2_vl"):  # whose frames may be of any size; here, of the checkpoint's own for images
        settings = json.loads((published(name) / "preprocessor_config.json").read_text())
        frame_kwargs = {"size": {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}}
    model, processor = wrap(out, num_frames=3, frame_kwargs=frame_kwargs, **TINY_LINVT)
    return model.eval(), processor


def messages(turns, images=()):
    first, *others = turns
    start = chat(*images, first[1])
    return [*start, *({"role": role, "content": [{"type": "text", "text": words}]} for role, words in others)]


def check(name, turns, images=()):
    model, processor = converted(name)
    ids, expected = CASES[name].logits(published(name), turns, list(images))
    inputs = encode(processor, messages(turns, images))
    (ours,) = inputs["input_ids"]
    ids = torch.tensor(ids)
    assert len(ours) == len(ids), processor.tokenizer.decode(ours)
    seen = ids == IMAGE
    assert torch.equal(ours[~seen], ids[~seen])
    assert len(set(ours[seen].tolist())) == (1 if images else 0)
    with torch.no_grad():
        logits = model(**inputs).logits[0, :, : expected.shape[1]]
    assert expected.std() > 0.1 and (expected[-1] - expected[0]).abs().max() > 0.1  # else anything would be close
    torch.testing.assert_close(logits, expected, **CLOSE)


@every_checkpoint
def test_every_tensor_of_the_full_size_finds_its_place(name, tmp_path):
    """Names and shapes as published, onto the model that the published config describes, without any weights."""
    config, facts = CASES[name].published_config(name), CASES[name].CHECKPOINTS[name]
    if name == "internvl2_4b":  # what nobody here has seen of the published file, and changes no shape
        config["llm_config"]["rope_scaling"] |= {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    conversion = find_original(tmp_path)
    shapes = conversion.checkpoint.shapes = CASES[name].shapes(config)
    conversion.tokenizer = None
    plan = conversion.plan
    assert {source for step in plan.steps for source in step.sources} | set(plan.dropped) == set(shapes)
    assert abs(sum(map(math.prod, shapes.values())) - facts.parameters) <= facts.tolerance


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@every_checkpoint
def test_texts(name, turns):
    check(name, turns)


@pytest.mark.parametrize("size", [(56, 40), (97, 31), (33, 120), (20, 20)])
@every_checkpoint
def test_an_image_of_any_shape(name, size):
    check(name, CONVERSATIONS["one turn"], [picture(*size)])


@every_checkpoint
def test_an_image_and_three_turns(name):
    check(name, CONVERSATIONS["three turns"], [picture(90, 60)])


@every_checkpoint
def test_frames(name, monkeypatch):
    """With pixels as PIL makes them; how near torch comes to these is in test_frames_to_pixels.py."""
    monkeypatch.setattr("linvt_hf.processing_videos.frames_to_pixels", lambda *_: None)
    model, processor = converted(name)
    frames = [picture(64, 48, seed) for seed in range(3)]
    expected = CASES[name].frame_tokens(published(name), frames)  # [T, N, D]
    inputs = encode(processor, chat(frames, QUESTION))
    videos = model.take_video_inputs(dict(inputs))
    others = {key.removeprefix("frames_"): value for key, value in videos.items() if key.startswith("frames_")}
    with torch.no_grad():
        tokens = model.image_llm.encode_frames(model.base, videos["pixel_values_videos"], others, 3, 2)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    if name.startswith("molmo"):  # whose language model finds visual tokens on top of their placeholder's embedding
        expected = expected + model.get_input_embeddings().weight[model.base.config.image_token_id].detach()
    torch.testing.assert_close(torch.stack(list(tokens)), expected, **CLOSE)


FRESH = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoTokenizer

assert "linvt_hf" not in sys.modules
folder, own = sys.argv[1], sys.argv[2] == "True"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=own)
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=own)("Where is the red ball?", return_tensors="pt")
logits = model(input_ids=ids["input_ids"]).logits
print(json.dumps([ids["input_ids"][0].tolist(), logits[0, -1].tolist()]))
"""


@pytest.mark.parametrize("name", ["blip3_v1_5", "molmo_e_1b", "mipha_3b", "internvl2_2b", "aquila_2b"])
def test_in_a_process_without_this_package(name, tmp_path):
    """The converted folder alone is an image-LLM of transformers; where that lacks it, the folder brings the code."""
    model, processor = converted(name)
    folder = published(name).with_name(f"{name}-converted")
    own = model.base.config.model_type in OWN_MODELS
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, folder, str(own)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids, last = json.loads(done.stdout)
    assert ids == processor.tokenizer(QUESTION)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(last), expected, **CLOSE)
