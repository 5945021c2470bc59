"""
A video's frames to the pixels that a base's vision encoder takes, many at a time and in torch.

Image processors without torchvision go through PIL, one picture after another. For those of the bases that LinVT
names this does the same with the same arithmetic: resized as bytes, as PIL does, to a level or two of its 255. Any
other image processor is left to do its own work.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio

from .processing_molmo import frame_crops

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class _Unknown(Exception):
    """A setting that only the image processor itself knows."""


def frames_to_pixels(frames: Tensor, image_processor: Any, frame_kwargs: dict) -> dict[str, Tensor] | None:
    """
    What `image_processor` makes of frames, each a picture of its own, with arguments `frame_kwargs`.

    Args:
        frames: uint8 [T, H, W, 3], on any device; what comes out is on the same.

    Returns `pixel_values`, of frames that are tiled the first tile, and what else the image processor gives beside
    them; None for an image processor that is not known here, or known otherwise.
    """
    kind = type(image_processor)
    make = _KINDS.get(kind.__name__.removesuffix("Pil").removesuffix("Fast"))
    if make is None or kind.__module__.split(".")[0] not in ("transformers", "transformers_modules", _OURS):
        return None
    try:
        return make(frames, _Settings(image_processor, frame_kwargs))
    except _Unknown:
        return None


class _Settings:
    """An image processor's settings, under those of a call."""

    def __init__(self, image_processor: Any, frame_kwargs: dict):
        self.image_processor, self.frame_kwargs = image_processor, frame_kwargs

    def __getattr__(self, name: str) -> Any:
        if name in self.frame_kwargs:
            return self.frame_kwargs[name]
        return getattr(self.image_processor, name, None)

    @property
    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Of bytes to normalised values, a channel each."""
        scale, shift = torch.ones(3), torch.zeros(3)
        if self.do_rescale is not False:
            scale = scale * (1 / 255 if self.rescale_factor is None else self.rescale_factor)
        if self.do_normalize is not False:
            mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
            scale, shift = scale / std, -mean / std
        return scale[:, None, None], shift[:, None, None]


# ---- how each image processor makes pixels of frames [T, H, W, 3] ----


def _picture(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """Resized and cropped: CLIP, SigLIP, InternVL; of LLaVA-OneVision and BLIP-3 the tile of the whole picture."""
    return {"pixel_values": _each(frames, lambda frame: _cut(_resized(frame, settings), settings), settings)}


def _padded_picture(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """LLaVA's, Mipha's: first padded to a square of the mean colour."""
    if not settings.do_pad:
        return _picture(frames, settings)
    _, height, width, _ = frames.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = frames.new_tensor([int(255 * mean) for mean in settings.image_mean])
    own = threading.local()  # each thread's square, of which only the middle changes

    def padded(frame: Tensor) -> Tensor:
        if not hasattr(own, "square"):
            own.square = colour.repeat(1, side, side, 1)
        own.square[:, top : top + height, left : left + width] = frame
        return _cut(_resized(own.square, settings), settings)

    return {"pixel_values": _each(frames, padded, settings)}


def _tile(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """BLIP-3's, of a picture that is squashed."""
    if settings.image_aspect_ratio not in (None, "squash"):
        raise _Unknown
    return _as_tile(_picture(frames, settings), frames)


def _first_tile(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """LLaVA-OneVision's, which comes before the tiles of the image cut to pieces."""
    if not settings.size["height"] or settings.do_center_crop:
        raise _Unknown
    return _as_tile(_picture(frames, settings), frames)


def _as_tile(output: dict[str, Tensor], frames: Tensor) -> dict[str, Tensor]:
    """[T, 3, H, W] -> [T, 1, 3, H, W]"""
    sizes = torch.tensor([list(frames.shape[1:3])]).expand(len(frames), -1)
    return {"pixel_values": output["pixel_values"][:, None], "image_sizes": sizes}


def _one_picture(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """InternVL's, uncut."""
    if settings.crop_to_patches:
        raise _Unknown
    return _picture(frames, settings)


def _patches(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """Qwen2-VL's: sizes by the picture's own, cut to patches that lie in the order they are merged in."""
    patch, merged, times = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    height, width = frames.shape[1:3]
    if settings.do_resize is not False:
        smart_resize = sys.modules[type(settings.image_processor).__module__].smart_resize
        least, most = settings.size["shortest_edge"], settings.size["longest_edge"]
        height, width = smart_resize(height, width, factor=patch * merged, min_pixels=least, max_pixels=most)
    rows, columns = height // patch, width // patch
    shape = (rows // merged, columns // merged, merged, merged, 3, times, patch, patch)

    def lay_out(pixels: Tensor, out: Tensor) -> None:
        parts = rearrange(pixels, "c (a m i) (b n j) -> a b m n c 1 i j", m=merged, n=merged, i=patch, j=patch)
        out.copy_(parts.expand(shape))  # a still picture stands for two moments

    pixels = _each(frames, lambda frame: _resized(frame, settings, (height, width)), settings, shape, lay_out)
    grid = torch.tensor([[1, rows, columns]]).expand(len(frames), -1)
    return {"pixel_values": pixels.flatten(5).flatten(0, 4), "image_grid_thw": grid}


def _crops(frames: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """Molmo's, which is resized in floating point."""
    if settings.overlapping_crops:
        raise _Unknown
    names = ("image_mean", "image_std", "patch_size", "pooling_size")
    values = {name: getattr(settings, name) for name in names}
    side = settings.size["height"]
    outputs = _in_threads(
        frames.permute(0, 3, 1, 2).split(1), partial(frame_crops, side=side, **values), frames.device
    )
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


_OURS = __name__.split(".")[0]
_KINDS: dict[str, Callable[[Tensor, _Settings], dict[str, Tensor]]] = {
    "CLIPImageProcessor": _picture,
    "SiglipImageProcessor": _picture,
    "LlavaImageProcessor": _padded_picture,
    "GotOcr2ImageProcessor": _one_picture,
    "LlavaOnevisionImageProcessor": _first_tile,
    "Blip3ImageProcessor": _tile,
    "Qwen2VLImageProcessor": _patches,
    "MolmoImageProcessor": _crops,
}


# ---- steps ----


def _in_threads(items: Sequence, work: Callable[[Any], Any], device: torch.device) -> list[Any]:
    """`work` of each frame: one at a time, which stays in the processor's caches, and several threads."""
    threads = min(torch.get_num_threads(), len(items))
    if threads == 1 or device.type != "cpu":
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:  # torch takes one thread to resize bytes
        return list(pool.map(work, items))


def _each(
    frames: Tensor,
    bytes_of: Callable[[Tensor], Tensor],
    settings: _Settings,
    shape: tuple[int, ...] | None = None,
    lay_out: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """
    Frames [T, H, W, 3] as float32 [T, *shape], by default as `bytes_of` makes them and normalised.

    Args:
        bytes_of: a frame [1, H, W, 3] to bytes [1, 3, h, w].
        lay_out: writes normalised pixels [3, h, w] into an array of `shape`.
    """
    scale, shift = (value.to(frames.device) for value in settings.scale_and_shift)
    shape = shape or bytes_of(frames[:1]).shape[1:]  # before there are threads
    out = torch.empty((len(frames), *shape), device=frames.device)

    def work(number: int) -> None:
        pixels = bytes_of(frames[number : number + 1])[0].contiguous()
        if lay_out is None:
            out[number].copy_(pixels).mul_(scale).add_(shift)
        else:
            lay_out(pixels.float().mul_(scale).add_(shift), out[number])

    _in_threads(range(len(frames)), work, frames.device)
    return out


def _target(frames: Tensor, size: Any) -> tuple[int, int]:
    """Height and width that frames [T, H, W, 3] are resized to."""
    shortest, longest = (size.get(name) for name in ("shortest_edge", "longest_edge"))
    if shortest and longest:
        return get_size_with_aspect_ratio(tuple(frames.shape[1:3]), shortest, longest)
    if shortest:
        return get_resize_output_image_size(
            np.empty(frames.shape[1:], np.uint8),
            size=shortest,
            default_to_square=False,
            input_data_format="channels_last",
        )
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise _Unknown


def _resized(frames: Tensor, settings: _Settings, target: tuple[int, int] | None = None) -> Tensor:
    """uint8 [T, H, W, 3] to values of bytes [T, 3, h, w], the colours still side by side in memory."""
    pixels = frames.permute(0, 3, 1, 2)
    if settings.do_resize is False:
        return pixels
    mode = _MODES.get(None if settings.resample is None else int(settings.resample))
    target = target or _target(frames, settings.size)
    if mode is None:
        raise _Unknown
    if tuple(pixels.shape[2:]) == tuple(target):
        return pixels
    if not pixels.is_cuda:
        return F.interpolate(pixels, target, mode=mode, antialias=True)
    pixels = pixels.float()
    for size in ((pixels.shape[2], target[1]), target):  # widths first, and whole levels between, as on the CPU
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True).round().clamp(0, 255)
    return pixels


def _cut(pixels: Tensor, settings: _Settings) -> Tensor:
    """The middle, where the settings ask for it."""
    if not settings.do_center_crop:
        return pixels
    height, width = settings.crop_size["height"], settings.crop_size["width"]
    if height > pixels.shape[2] or width > pixels.shape[3]:
        raise _Unknown
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]


__all__ = ["frames_to_pixels"]
