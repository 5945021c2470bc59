"""MolmoProcessor and MolmoImageProcessor: prompts and images to the tensors a Molmo model takes."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, make_flat_list_of_images
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.processing_utils import ImagesKwargs

from .configuration_molmo import MolmoConfig
from .image_placeholders import check_placeholders

IMAGE_TOKEN = "<|image|>"  # one picture in a prompt, before it is laid out
START, END, PATCH, COLUMN = "<im_start>", "<im_end>", "<im_patch>", "<im_col>"

# As in training: pictures before the turn that brings them, " User: ... Assistant:", and an answer that ends with eos.
# A system message goes where training had its style tags. A text that begins with <im_start> is a picture laid out
# already. Neither Qwen2's nor OLMo's tokenizer has a BOS; eos serves as one.
MOLMO_CHAT_TEMPLATE = """\
{{- bos_token or eos_token -}}
{%- set turn = namespace(system='', pictures='', words='') -%}
{%- for message in messages -%}
{%- set turn.pictures = '' -%}
{%- set turn.words = '' -%}
{%- if message['content'] is string -%}{%- set turn.words = message['content'] -%}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}{%- set turn.pictures = turn.pictures + '<|image|>' -%}
{%- elif block['type'] == 'text' and block['text'].startswith('<im_start>') -%}
{%- set turn.pictures = turn.pictures + block['text'] -%}
{%- elif block['type'] == 'text' -%}{%- set turn.words = turn.words + block['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}{%- set turn.system = turn.words + ' ' -%}
{%- elif message['role'] == 'assistant' -%}{{ ' Assistant: ' + turn.words + eos_token }}
{%- else -%}{{ turn.pictures + ' User: ' + turn.system + turn.words }}{%- set turn.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}
"""


class MolmoImagesKwargs(ImagesKwargs, total=False):
    """
    patch_size: side of a patch, in pixels.
    pooling_size: so many by so many patches become one visual token.
    max_crops: most crops that an image is cut into, the global one not counted.
    overlap_margins: patches at the start and the end of a crop's sides that are there for context only.
    overlapping_crops: whether an image is cut into crops at all; otherwise it is the global crop alone.
    """

    patch_size: int
    pooling_size: int
    max_crops: int
    overlap_margins: list[int] | tuple[int, ...]
    overlapping_crops: bool


class MolmoImageProcessor(PilBackend):
    """
    Images to crops: the whole image first, then the same image larger, cut into overlapping squares. Each is resized
    in floating point, padded to its centre with black, and normalised (`olmo/data/model_preprocessor.py` of
    github.com/allenai/molmo, crop mode "overlap-and-resize-c2"; without overlapping crops, mode "resize").
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = MolmoImagesKwargs
    model_input_names = ["pixel_values", "image_masks", "image_token_order"]

    size = {"height": 336, "width": 336}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    patch_size = 14
    pooling_size = 2
    max_crops = 12
    overlap_margins = (4, 4)
    overlapping_crops = True

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """[3, H, W]; a photograph is turned the way its camera was held."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
        return super().process_image(image, *args, **kwargs)

    def _preprocess(self, images: list[np.ndarray], return_tensors=None, **settings) -> BatchFeature:
        """
        Returns, the crops of all images one after another:
            pixel_values: [crops, 3, 336, 336].
            image_masks: [crops, 576], the share of each patch that is no padding, or -1 (see below).
            image_token_order: [crops, 144], the place among its image's visual tokens that each token of a crop
                takes, -1 for those that a neighbouring crop shows, too.
            image_grids: [images, 2], rows and columns of the visual tokens after the global crop's; 0 without crops.
        """
        parts = [self._crops(image, **settings) for image in images]
        pixels, masks, orders, grids = zip(*parts, strict=True)
        data = {
            "pixel_values": np.concatenate(pixels),
            "image_masks": np.concatenate(masks),
            "image_token_order": np.concatenate(orders),
            "image_grids": np.array(grids),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _crops(
        self,
        image: np.ndarray,
        *,
        size,
        image_mean,
        image_std,
        patch_size: int,
        pooling_size: int,
        max_crops: int,
        overlap_margins,
        overlapping_crops: bool,
        **unused,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
        side = size["height"]
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (image_mean, image_std))
        pixels, inside = fit(image, side, side)
        pixels = ((pixels - mean) / std)[None]
        tokens = side // patch_size // pooling_size  # a crop's, a side
        order = np.arange(tokens * tokens)[None]
        if not overlapping_crops:
            return pixels, patch_shares(inside[None], patch_size), order, (0, 0)

        before, after = overlap_margins
        if before % pooling_size or after % pooling_size:
            raise ValueError(
                f"overlap_margins {list(overlap_margins)} must be multiples of pooling_size {pooling_size}, so that "
                "no visual token lies half in a margin."
            )
        margin = (before + after) * patch_size
        window = side - margin  # what a crop adds to the one before, in pixels
        height, width = image.shape[1:]
        rows, columns = select_tiling(height - margin, width - margin, window, max_crops)
        large, inside = fit(image, rows * window + margin, columns * window + margin)
        large = (large - mean) / std
        corners = [(i * window, j * window) for i in range(rows) for j in range(columns)]
        crops = np.stack([large[:, y : y + side, x : x + side] for y, x in corners])
        shares = patch_shares(np.stack([inside[y : y + side, x : x + side] for y, x in corners]), patch_size)
        # As released: the global crop, which comes first, has the mask of the crop after it, that of the next, and so
        # on; the last has -1. The weights were trained with this.
        masks = np.concatenate([shares, np.full_like(shares[:1], -1)])
        grid, places = token_places(rows, columns, tokens, before // pooling_size, after // pooling_size)
        order = np.concatenate([order, np.where(places < 0, -1, places + tokens * tokens)])
        return np.concatenate([pixels, crops]), masks, order, grid


def fit(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    An image [3, h, w] in the middle of black [3, height, width], as large as it fits, in [0, 1]; and where it is,
    [height, width].
    """
    canvas, inside = fit_all(torch.from_numpy(np.ascontiguousarray(image))[None], height, width)
    return canvas[0].numpy(), inside.numpy()


def fit_all(pixels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The same for images of one size, [T, 3, h, w]."""
    # Sizes in float32, as in training: rounding down may differ by a pixel otherwise.
    rows, columns = (np.float32(side) for side in pixels.shape[2:])
    scale = min(np.float32(height) / rows, np.float32(width) / columns)
    rows, columns = max(1, int(rows * scale)), max(1, int(columns * scale))
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    # What torchvision calls, with these arguments, to resize a tensor.
    pixels = F.interpolate(pixels, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = pixels.new_zeros(len(pixels), 3, height, width)
    canvas[:, :, top : top + rows, left : left + columns] = pixels.clamp(0, 1)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[top : top + rows, left : left + columns] = True
    return canvas, inside


def frame_crops(
    frames: Tensor, side: int, image_mean, image_std, patch_size: int, pooling_size: int
) -> dict[str, Tensor]:
    """What `MolmoImageProcessor` makes of images of one size, uint8 [T, 3, H, W], without overlapping crops."""
    pixels, inside = fit_all(frames, side, side)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (image_mean, image_std))
    tokens = side // patch_size // pooling_size
    return {
        "pixel_values": (pixels - mean) / std,
        "image_masks": torch.from_numpy(patch_shares(inside[None].numpy(), patch_size)).expand(len(frames), -1),
        "image_token_order": torch.arange(tokens * tokens).expand(len(frames), -1),
    }


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """
    Rows and columns of windows, at most `max_crops` of them, that enlarge an image least; if all of them make it
    smaller, those that do so least. Of several, the fewest windows, then the fewest rows.
    """
    tilings = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    sizes = (np.array(tilings) * window).astype(np.float32)
    with np.errstate(divide="ignore"):  # an image may be no larger than the margins
        scales = (sizes / np.array([height, width], dtype=np.float32)).min(axis=1)
    best = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.inf, scales).argmin()
    return tilings[best]


def patch_shares(inside: np.ndarray, patch_size: int) -> np.ndarray:
    """inside: [crops, H, W], True on the image -> [crops, patches], the share of each patch that is on it."""
    crops, height, width = inside.shape
    patches = inside.reshape(crops, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.mean(axis=(2, 4), dtype=np.float32).reshape(crops, -1)


def token_places(rows: int, columns: int, tokens: int, before: int, after: int) -> tuple[tuple[int, int], np.ndarray]:
    """
    Where the visual tokens of overlapping crops lie in the image they were cut from.

    Args:
        rows, columns: of crops.
        tokens: of a crop, a side.
        before, after: margins in tokens, which only crops at the image's edge keep.

    Returns the image's size in tokens, and each token's place in reading order, [crops, tokens * tokens], -1 in a
    margin that a neighbour covers.
    """
    step = tokens - before - after
    height, width = rows * step + before + after, columns * step + before + after
    places = np.full((rows, columns, tokens, tokens), -1)
    image = np.arange(height * width).reshape(height, width)
    for i in range(rows):
        top, bottom = before if i else 0, tokens if i == rows - 1 else tokens - after
        for j in range(columns):
            left, right = before if j else 0, tokens if j == columns - 1 else tokens - after
            shown = image[i * step : i * step + tokens, j * step : j * step + tokens]
            places[i, j, top:bottom, left:right] = shown[top:bottom, left:right]
    return (height, width), places.reshape(rows * columns, -1)


class MolmoProcessor(ProcessorMixin):
    """
    Texts and images to the inputs of a Molmo model. Each picture stands in a prompt as one `<|image|>`, which is laid
    out in rows of `<im_patch>`, each ended by `<im_col>`, between `<im_start>` and `<im_end>`: once for the whole
    picture and once for its crops, put together again.

    Args:
        image_processor, tokenizer, chat_template: see `MOLMO_CHAT_TEMPLATE` for the last. The tokenizer must have the
            five tokens above.
    """

    _auto_class = "AutoProcessor"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        known = tokenizer.get_vocab()
        missing = [token for token in (IMAGE_TOKEN, START, END, PATCH, COLUMN) if token not in known]
        if missing:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}; load the one that came with the model.")
        self.image_token = IMAGE_TOKEN
        self.image_token_id = known[PATCH]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image or several, in the order of their placeholders, or one list of images for each prompt.
            text: one prompt or several, with one `<|image|>` for each picture. A prompt that does not begin with BOS
                gets one; Molmo's other marks (`" User: ... Assistant:"`) are the chat template's to write.
            kwargs: for the image processor or the tokenizer, such as `overlapping_crops`, `padding` and
                `return_tensors`; also as `images_kwargs` and `text_kwargs`.

        Returns `input_ids` and `attention_mask` [B, S], and for images what `MolmoImageProcessor` gives.

        Raises `ValueError` when placeholders and images do not match.
        """
        if videos is not None or audio is not None:
            raise ValueError("Molmo reads images and text; leave videos and audio out.")
        if images is None and text is None:
            raise ValueError("Give text or images; both are missing.")
        image_kwargs, text_kwargs = self._sort(kwargs)
        texts = [text] if isinstance(text, str) else text
        pictures, data = [], {}
        if images is not None:
            images = self.image_processor.fetch_images(images)
            if texts is not None:
                check_placeholders(texts, images, IMAGE_TOKEN)
            flat = make_flat_list_of_images(images)
            if flat:
                data = dict(self.image_processor(flat, **image_kwargs))
                pictures = [self._layout(*map(int, grid)) for grid in data.pop("image_grids")]
        elif any(IMAGE_TOKEN in prompt for prompt in texts):
            raise ValueError(f"The text holds {IMAGE_TOKEN}, but no images were given; pass one for each.")
        if texts is not None:
            data = {**self.tokenizer(self._expand(texts, pictures), **text_kwargs), **data}
        return BatchFeature(data, tensor_type=text_kwargs["return_tensors"])

    def _sort(self, kwargs: dict) -> tuple[dict, dict]:
        """Keyword arguments of a call to those of the image processor and those of the tokenizer."""
        kwargs = dict(kwargs)
        of_images, of_text = kwargs.pop("images_kwargs", {}), kwargs.pop("text_kwargs", {})
        kwargs.update(kwargs.pop("common_kwargs", {}))
        names = set(MolmoImagesKwargs.__annotations__)
        tensors = of_text.get("return_tensors", kwargs.pop("return_tensors", None))
        images = {name: value for name, value in kwargs.items() if name in names}
        text = {name: value for name, value in kwargs.items() if name not in names}
        images = {**images, **of_images, "return_tensors": tensors}
        return images, {"add_special_tokens": False, **text, **of_text, "return_tensors": tensors}

    def _layout(self, rows: int, columns: int) -> str:
        """The tokens of one picture whose crops together show so many rows and columns of visual tokens."""
        processor = self.image_processor
        side = processor.size["height"] // processor.patch_size // processor.pooling_size
        whole = START + (PATCH * side + COLUMN) * side + END
        return whole + (START + (PATCH * columns + COLUMN) * rows + END if rows else "")

    def _expand(self, texts: list[str], pictures: list[str]) -> list[str]:
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        pictures = iter(pictures)
        prompts = []
        for text in texts:
            first, *others = text.split(IMAGE_TOKEN)
            prompt = first + "".join(next(pictures) + words for words in others)
            prompts.append(prompt if prompt.startswith(bos) else bos + prompt)
        return prompts


# The mapping itself: in older versions AutoImageProcessor may not be touched without torchvision.
IMAGE_PROCESSOR_MAPPING.register(MolmoConfig, {"pil": MolmoImageProcessor}, exist_ok=True)
AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)

__all__ = ["MOLMO_CHAT_TEMPLATE", "MolmoImageProcessor", "MolmoProcessor"]
