"""Blip3Processor and Blip3ImageProcessor: prompts and images to the tensors a BLIP-3 model takes."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, make_flat_list_of_images
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, Unpack

from .configuration_blip3 import ANYRES_GRIDS, Blip3Config, check_image_aspect_ratio, select_grid
from .image_placeholders import check_placeholders

IMAGE_TOKEN = "<image>"

# As in training: Phi-3's marks, a system message where none is given, pictures that open a turn each on a line of its
# own, and a picture after words among them. The blank in front stands for a token that Phi-3's tokenizer used to put
# before the first mark by itself. Whether <s> comes before that is the tokenizer's to decide; r-v1.5's has none.
CHAT_TEMPLATE = """\
{{- ' ' -}}
{%- if messages[0]['role'] != 'system' -%}
{{- '<|system|>\\nA chat between a curious user and an artificial intelligence assistant. ' -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions.<|end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- set turn = namespace(words=false) -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}{{- '<image>' if turn.words else '<image>\\n' -}}
{%- elif block['type'] == 'text' -%}{{- block['text'] -}}{%- set turn.words = true -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


class Blip3ImagesKwargs(ImagesKwargs, total=False):
    """
    image_aspect_ratio: "anyres" for a tile of the whole image, squashed, and the crops of a grid; "squash" for that
        tile alone; "pad" for one tile of the image padded to a square. A video's frame is one squashed tile.
    anyres_grids: columns and rows of crops to choose from.
    """

    image_aspect_ratio: str
    anyres_grids: list | tuple


class Blip3ProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: Blip3ImagesKwargs
    _defaults = {}  # older transformers ask for it


class Blip3ImageProcessor(PilBackend):
    """
    Images to square tiles (`open_flamingo/train/any_res_data_utils.py` of github.com/salesforce/LAVIS, branch xgen-mm,
    and the released checkpoints' image processor). r-v1 has tiles of 378 pixels and CLIP's mean and deviation.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = Blip3ImagesKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    size = {"height": 384, "width": 384}
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    image_aspect_ratio = "anyres"
    anyres_grids = ANYRES_GRIDS

    def _preprocess(self, images: list[np.ndarray], return_tensors=None, **settings) -> BatchFeature:
        """
        Returns:
            pixel_values: [images, tiles, 3, 384, 384]; an image with fewer tiles than another has zeros at its end.
            image_sizes: [images, 2], height and width of the images as they were given.
        """
        tiles = [self._tiles(image, **settings) for image in images]
        pixel_values = np.zeros((len(tiles), max(map(len, tiles)), *tiles[0].shape[1:]), dtype=np.float32)
        for padded, image in zip(pixel_values, tiles, strict=True):
            padded[: len(image)] = image
        sizes = np.array([image.shape[1:] for image in images])
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": sizes}, tensor_type=return_tensors)

    def _tiles(
        self,
        image: np.ndarray,
        *,
        size,
        resample,
        image_mean,
        image_std,
        image_aspect_ratio: str,
        anyres_grids: Sequence[Sequence[int]],
        **unused,
    ) -> np.ndarray:
        """[3, H, W] -> [tiles, 3, side, side]"""
        check_image_aspect_ratio(image_aspect_ratio)
        side = size["height"]
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (image_mean, image_std))
        image = to_pil_image(image, input_data_format=ChannelDimension.FIRST)
        if image_aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(255 * value) for value in image_mean))
        tiles = [image.resize((side, side), resample)]
        if image_aspect_ratio == "anyres":
            columns, rows = select_grid(image.height, image.width, side, anyres_grids)
            tiles += crops(image, columns, rows, side, resample)
        pixels = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255)
        return (pixels.transpose(0, 3, 1, 2) - mean) / std

    def num_tiles(self, height: int, width: int, **images_kwargs) -> int:
        """How many tiles an image of this size becomes, given the arguments of a call."""
        if images_kwargs.get("image_aspect_ratio", self.image_aspect_ratio) != "anyres":
            return 1
        side = (images_kwargs.get("size") or self.size)["height"]
        columns, rows = select_grid(height, width, side, images_kwargs.get("anyres_grids") or self.anyres_grids)
        return 1 + columns * rows


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crops(image: Image.Image, columns: int, rows: int, side: int, resample) -> list[Image.Image]:
    """The image in the middle of black, as large as a grid of tiles allows, cut into these, row by row."""
    width, height = columns * side, rows * side
    across, down = width / image.width, height / image.height
    if across < down:
        resized = image.resize((width, min(math.ceil(image.height * across), height)), resample)
    else:
        resized = image.resize((min(math.ceil(image.width * down), width), height), resample)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


class Blip3Processor(ProcessorMixin):
    """
    Texts and images to the inputs of a BLIP-3 model. Each picture stands in a prompt as one `<image>`, of which it
    gets as many as it has visual tokens; nothing stands around them.

    Args:
        image_processor, tokenizer, chat_template: see `CHAT_TEMPLATE` for the last.
        num_image_tokens: visual tokens of one tile; the model's `config.num_image_tokens`.
    """

    _auto_class = "AutoProcessor"
    valid_processor_kwargs = Blip3ProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_image_tokens: int = 128):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"The tokenizer lacks {IMAGE_TOKEN}; load the one that came with the model.")
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs: Unpack[Blip3ProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one image or several, in the order of their placeholders, or one list of images for each prompt.
            text: one prompt or several, with one `<image>` for each picture.
            kwargs: for the image processor or the tokenizer, such as `image_aspect_ratio`, `padding` and
                `return_tensors`; also as `images_kwargs` and `text_kwargs`.

        Returns `input_ids` and `attention_mask` [B, S], and for images what `Blip3ImageProcessor` gives.

        Raises `ValueError` when placeholders and images do not match.
        """
        if videos is not None or audio is not None:
            raise ValueError("BLIP-3 reads images and text; leave videos and audio out.")
        if images is None and text is None:
            raise ValueError("Give text or images; both are missing.")
        merged = self._merge_kwargs(Blip3ProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        images_kwargs, text_kwargs = merged["images_kwargs"], merged["text_kwargs"]
        texts = [text] if isinstance(text, str) else text
        data, lengths = {}, []
        if images is not None:
            images = self.image_processor.fetch_images(images)
            if texts is not None:
                check_placeholders(texts, images, IMAGE_TOKEN)
            flat = make_flat_list_of_images(images)
            if flat:
                data = dict(self.image_processor(flat, **images_kwargs))
                sizes = [(int(height), int(width)) for height, width in data["image_sizes"]]
                tiles = [self.image_processor.num_tiles(height, width, **images_kwargs) for height, width in sizes]
                lengths = [self.num_image_tokens * count for count in tiles]
        elif any(IMAGE_TOKEN in prompt for prompt in texts):
            raise ValueError(f"The text holds {IMAGE_TOKEN}, but no images were given; pass one for each.")
        tensors = text_kwargs.pop("return_tensors", None)
        if texts is not None:
            data = {**self.tokenizer(_expand(texts, lengths), **text_kwargs), **data}
        return BatchFeature(data, tensor_type=tensors)


def _expand(texts: list[str], lengths: list[int]) -> list[str]:
    """Each prompt with as many placeholders for each picture as that has visual tokens."""
    following = iter(lengths)
    prompts = []
    for text in texts:
        first, *others = text.split(IMAGE_TOKEN)
        prompts.append(first + "".join(IMAGE_TOKEN * next(following) + words for words in others))
    return prompts


# The mapping itself: in older versions AutoImageProcessor may not be touched without torchvision.
IMAGE_PROCESSOR_MAPPING.register(Blip3Config, {"pil": Blip3ImageProcessor}, exist_ok=True)
AutoProcessor.register(Blip3Config, Blip3Processor, exist_ok=True)

__all__ = ["CHAT_TEMPLATE", "Blip3ImageProcessor", "Blip3Processor"]
