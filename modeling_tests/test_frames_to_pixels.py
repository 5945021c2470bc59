"""Frames to pixels in torch: what the bases' own image processors make with PIL, to a level or two of 255."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import noise_video
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from linvt_hf.frames_to_pixels import frames_to_pixels
from linvt_hf.image_llm import BASES
from linvt_hf.processing_blip3 import Blip3ImageProcessor
from linvt_hf.processing_molmo import MolmoImageProcessor

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SQUARE = {"height": 384, "width": 384}
# Image processors as the published checkpoints have them, and what LinVT calls them with for frames.
PUBLISHED = {
    "qwen2_vl": ("Qwen2VLImageProcessor", {}, {"size": {"shortest_edge": 128 * 784, "longest_edge": 768 * 784}}),
    "internvl": ("GotOcr2ImageProcessor", {"size": {"height": 448, "width": 448}, "crop_to_patches": True}, None),
    "mipha": ("LlavaImageProcessor", {**HALF, "size": SQUARE, "do_center_crop": False, "do_pad": True}, {}),
    "llava": ("CLIPImageProcessor", {**CLIP, "size": {"shortest_edge": 336}, "crop_size": 336}, {}),
    "siglip": ("SiglipImageProcessor", {**HALF, "size": SQUARE, "resample": 3}, {}),
    "siglip, bilinear": ("SiglipImageProcessor", {**HALF, "size": SQUARE, "resample": 2}, {}),
    "aquila": ("LlavaOnevisionImageProcessor", {**HALF, "size": SQUARE, "image_grid_pinpoints": [[384, 384]]}, {}),
    "blip3": (Blip3ImageProcessor, {}, None),
    "molmo": (MolmoImageProcessor, {}, None),
}
SIZES = [(720, 1280), (1280, 720), (90, 160), (384, 384), (1080, 1917)]


def frames_of(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Smooth shapes with grain: what a resize must neither shift nor ring on."""
    coarse = noise_video(count, height=9, width=16)
    grain = np.random.default_rng(0).integers(-20, 20, (count, height, width, 3))
    large = [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in coarse]
    return torch.from_numpy((np.stack(large) + grain).clip(0, 255).astype(np.uint8))


def published(name):
    kind, settings, frame_kwargs = PUBLISHED[name]
    kind = get_image_processor_class_from_name(kind) if isinstance(kind, str) else kind
    return kind(**settings), BASES[
        {"molmo": "molmo_v1"}.get(name, name)
    ].frame_kwargs if frame_kwargs is None else frame_kwargs


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_bases_own_image_processor_makes(name, size):
    image_processor, frame_kwargs = published(name)
    frames = frames_of(*size)
    ours = frames_to_pixels(frames, image_processor, frame_kwargs)
    pictures = [[Image.fromarray(frame.numpy())] for frame in frames]
    theirs = image_processor(pictures, return_tensors="pt", **frame_kwargs)
    expected = theirs["pixel_values"]
    expected = expected[:, :1] if expected.ndim == 5 else expected
    assert ours["pixel_values"].shape == expected.shape and ours["pixel_values"].dtype == torch.float32
    levels = (ours["pixel_values"] - expected).abs() * 255
    if image_processor.do_normalize is not False:
        levels = levels * min(image_processor.image_std)  # before they were normalised, or less
    assert levels.max() <= 2.01 and levels.mean() <= 1
    for key in set(ours) - {"pixel_values"}:
        assert torch.equal(ours[key], torch.as_tensor(theirs[key])), key


def test_several_threads():
    image_processor, frame_kwargs = published("siglip")
    frames = frames_of(60, 80, count=21)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        whole = frames_to_pixels(frames, image_processor, frame_kwargs)["pixel_values"]
    finally:
        torch.set_num_threads(before)
    each = [frames_to_pixels(frame[None], image_processor, frame_kwargs)["pixel_values"] for frame in frames]
    assert torch.equal(whole, torch.cat(each))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("siglip", {"resample": 1}),  # Lanczos, which torch does not have
        ("internvl", {"crop_to_patches": True}),
        ("molmo", {"overlapping_crops": True}),
        ("blip3", {"image_aspect_ratio": "anyres"}),
        ("llava", {"crop_size": {"height": 999, "width": 999}}),
    ],
)
def test_what_it_does_not_do_is_left_to_the_image_processor(name, settings):
    image_processor, frame_kwargs = published(name)
    assert frames_to_pixels(frames_of(60, 80), image_processor, {**frame_kwargs, **settings}) is None


def test_image_processors_it_does_not_know():
    class SiglipImageProcessor:  # somebody else's
        pass

    assert frames_to_pixels(frames_of(60, 80), SiglipImageProcessor(), {}) is None
    unknown = get_image_processor_class_from_name("PixtralImageProcessor")()
    assert frames_to_pixels(frames_of(60, 80), unknown, {}) is None
