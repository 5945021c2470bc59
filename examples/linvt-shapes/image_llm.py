"""
What LinVT needs of an image-LLM, and what differs between them.

`ImageLLM` works on any image-text-to-text model of transformers through three doors: `get_image_features` (frames to
visual tokens), `get_input_embeddings` (words), and `forward(inputs_embeds=...)` (the language model). A base that
differs has a subclass here that says only the difference; `BASES` finds it by model type. A base that transformers
lacks has its own modeling file, listed in `OWN_MODELS`.
"""

import math

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .configuration_linvt import square_grid
from .modeling_blip3 import Blip3ForConditionalGeneration
from .modeling_mipha import MiphaForConditionalGeneration
from .modeling_molmo import MolmoForConditionalGeneration

OWN_MODELS = {
    model.config_class.model_type: model
    for model in (Blip3ForConditionalGeneration, MiphaForConditionalGeneration, MolmoForConditionalGeneration)
}


class ImageLLM:
    """
    Any image-LLM whose `get_image_features` gives each frame the same number of tokens.

    Class attributes are read once, when a base is wrapped, and saved with the processor.
    """

    # What `frame_settings` says, where that is the same for every image processor of this base.
    frame_kwargs: dict = {}
    # What stands around a video in the prompt.
    video_prompt = "{video}\n"
    # How a prompt says, after a video, how long it is and when its frames are (ours, where the base has no way).
    time_forms = {
        "duration": {"sentence": "The video lasts {duration:.1f} seconds.\n", "time": "", "between": ""},
        "frames": {
            "sentence": "The video lasts {duration:.1f} seconds; {count} frames were seen, at {times} seconds.\n",
            "time": "{:.1f}",
            "between": ", ",
        },
    }
    # Tokens of the base's vocabulary that its prompts never use, for bases whose embedding table has no free row.
    spare_tokens: tuple[str, ...] = ()
    # The token type of an answer, for bases whose attention depends on token types.
    answer_token_type: int = 0
    # What its module between vision encoder and language model may be called, for training it.
    projectors: tuple[str, ...] = ("multi_modal_projector", "merger", "connector", "resampler")
    # For a base that pools a video's frames: how it is without.
    unpooled: type["ImageLLM"] | None = None

    def frame_settings(self, image_processor) -> dict:
        """Arguments of the base's image processor that make one still frame one picture, without tiles."""
        return dict(self.frame_kwargs)

    def lost(self, config: PreTrainedConfig) -> str | None:
        """What of the base's own way with images a video has to do without, as a sentence for a warning."""
        return None

    def rows_per_frame(self, frame_inputs: dict[str, Tensor], num_frames: int) -> list[int]:
        """Rows of `pixel_values` that each frame takes; one, unless the base flattens its patches."""
        return [1] * num_frames

    def grid(self, num_tokens: int, frame_inputs: dict[str, Tensor], frame: int) -> tuple[int, int]:
        """Rows and columns of a frame's tokens: by its size in pixels, where the base keeps that, else a square."""
        if "image_sizes" not in frame_inputs:
            return square_grid(num_tokens)
        height, width = frame_inputs["image_sizes"][frame].tolist()
        rows = round(math.sqrt(num_tokens * height / width))
        return (rows, num_tokens // rows) if rows and num_tokens % rows == 0 else square_grid(num_tokens)

    def features(self, base: PreTrainedModel, pixel_values: Tensor, **frame_inputs: Tensor):
        """The visual tokens of some frames: a tensor [T, N, D] or a sequence of T tensors [N, D]."""
        return base.get_image_features(pixel_values=pixel_values, **frame_inputs, return_dict=True).pooler_output

    def encode_frames(
        self, base: PreTrainedModel, pixel_values: Tensor, frame_inputs: dict[str, Tensor], num_frames: int, chunk: int
    ) -> list[Tensor]:
        """
        All frames of a batch through the vision encoder and projector, `chunk` at a time.

        Args:
            pixel_values: the frames as the base's image processor gave them, on any device.
            frame_inputs: what that processor gave beside them, one entry a frame, under the base's own names.
        Returns one tensor [N, D] a frame.
        """
        rows = self.rows_per_frame(frame_inputs, num_frames)
        if sum(rows) != len(pixel_values):
            raise ValueError(
                f"pixel_values_videos has {len(pixel_values)} rows, but num_frames asks for {sum(rows)}; pass both as "
                "the processor gave them."
            )
        # A vision encoder that a device_map has offloaded takes its inputs from anywhere.
        device = pixel_values.device if base.device.type == "meta" else base.device
        inputs = {name: value.to(device) for name, value in frame_inputs.items()}  # at once, since each copy waits
        tokens: list[Tensor] = []
        parts = pixel_values.split([sum(rows[start : start + chunk]) for start in range(0, num_frames, chunk)])
        for index, pixels in enumerate(parts):
            beside = {name: value[index * chunk : (index + 1) * chunk] for name, value in inputs.items()}
            tokens.extend(self.features(base, pixels.to(device, base.dtype, non_blocking=True), **beside))
        return tokens


class Qwen2VL(ImageLLM):
    video_prompt = "<|vision_start|>{video}<|vision_end|>"
    merge = 2

    def frame_settings(self, image_processor):
        # Qwen2-VL's own bounds for a frame of a video; its bounds for an image would allow 16384 tokens. A model that
        # was made for smaller images gets no larger frames.
        most = image_processor.size["longest_edge"]
        bounds = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
        return {"size": {name: min(bound, most) for name, bound in bounds.items()}}

    def rows_per_frame(self, frame_inputs, num_frames):
        return frame_inputs["image_grid_thw"].prod(dim=-1).tolist()

    def grid(self, num_tokens, frame_inputs, frame):
        rows, columns = (frame_inputs["image_grid_thw"][frame, 1:] // self.merge).tolist()
        return rows, columns


class Qwen3VL(Qwen2VL):
    time_forms = {
        **ImageLLM.time_forms,
        "frames": {"sentence": "{times}\n", "time": "<{:.1f} seconds>", "between": ""},  # its own marks of time
    }

    def lost(self, config):
        return (
            "Qwen3-VL adds features of intermediate vision layers inside its language model (deepstack); LinVT "
            "condenses the final visual tokens only, so videos do without them. Still images keep them."
        )


class InternVL(ImageLLM):
    frame_kwargs = {"crop_to_patches": False}
    video_prompt = "<img>{video}</img>\n"
    spare_tokens = ("<quad>",)  # InternVL2's tables are exactly as long as their vocabularies


class LlavaOnevisionWhole(ImageLLM):
    """Aquila-VL too, with all tokens of each frame, as those of a still image without any-resolution tiles."""

    def features(self, base, pixel_values):
        pixel_values = pixel_values[:, 0] if pixel_values.ndim == 5 else pixel_values  # the whole frame, no tiles
        frames = len(pixel_values)
        sizes = torch.tensor([pixel_values.shape[-2:]] * frames)
        together = torch.tensor([frames if frames > 1 else 2])  # several images of one prompt are not tiled
        images = base.get_image_features(
            pixel_values=pixel_values, image_sizes=sizes, batch_num_images=together, return_dict=True
        ).pooler_output
        return [tokens[:-1] for tokens in images]  # without the newline that ends an image


class LlavaOnevision(ImageLLM):
    """Aquila-VL too. Frames take the base's video path: each pooled 2 x 2, without any-resolution tiles."""

    unpooled = LlavaOnevisionWhole
    time_forms = {
        **ImageLLM.time_forms,
        "frames": {  # as LLaVA-Video, which grew out of it, was trained with
            "sentence": "The video lasts for {duration:.2f} seconds, and {count} frames are uniformly sampled from "
            "it. These frames are located at {times}.\n",
            "time": "{:.2f}s",
            "between": ",",
        },
    }

    def features(self, base, pixel_values):
        pixel_values = pixel_values[:, 0] if pixel_values.ndim == 5 else pixel_values  # the whole frame, no tiles
        tokens = base.get_video_features(pixel_values[None], return_dict=True).pooler_output[0]
        side = base.config.vision_config.image_size // base.config.vision_config.patch_size
        places = math.ceil(side / 2) ** 2
        # The newline that ends a video comes last in newer transformers, and separately in older ones.
        return tokens[: len(pixel_values) * places].unflatten(0, (-1, places))


class Blip3(ImageLLM):
    """A frame is one tile, squashed."""

    frame_kwargs = {"image_aspect_ratio": "squash"}

    def lost(self, config):
        if config.resampler_reads_text:
            return (
                "This BLIP-3's resampler reads the prompt with still images; frames of videos go through it without."
            )
        return None

    def features(self, base, pixel_values):
        return super().features(base, pixel_values[:, 0])


class Molmo(ImageLLM):
    """A frame is its global crop. The language model is used to visual tokens on top of their placeholder."""

    frame_kwargs = {"overlapping_crops": False}
    video_prompt = "<im_start>{video}<im_end>"

    def features(self, base, pixel_values, image_masks):
        tokens = super().features(base, pixel_values, image_masks=image_masks)
        placeholder = torch.tensor(base.config.image_token_id, device=tokens.device)
        return tokens + base.get_input_embeddings()(placeholder)


class Gemma3(ImageLLM):
    frame_kwargs = {"do_pan_and_scan": False}


class PaliGemma(ImageLLM):
    answer_token_type = 1  # type 0 is the prompt, which reads itself in both directions


class Idefics3(ImageLLM):
    """SmolVLM too."""

    frame_kwargs = {"do_image_splitting": False}


BASES: dict[str, ImageLLM] = {
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen2VL(),
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "llava_onevision": LlavaOnevision(),
    "blip3": Blip3(),
    "molmo_v1": Molmo(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(),
}
_ANY_BASE = ImageLLM()
_LISTED = 8  # names of tensors in a message


def image_llm_of(config: PreTrainedConfig, pool_frames: bool = True) -> ImageLLM:
    """What is special about a base; for one without an entry, nothing. Raises `ValueError` if it pools no frames."""
    image_llm = BASES.get(config.model_type, _ANY_BASE)
    if pool_frames:
        return image_llm
    if image_llm.unpooled is None:
        raise ValueError(f"A {config.model_type} model does not pool its frames, so pool_frames must stay True.")
    return image_llm.unpooled()


def build_image_llm(config: PreTrainedConfig) -> PreTrainedModel:
    """The base a config describes, with fresh weights. Raises `ValueError` if it is no image-text-to-text model."""
    if config.model_type in OWN_MODELS:
        return OWN_MODELS[config.model_type]._from_config(config)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"base_config has model_type '{config.model_type}', which transformers does not list as an "
            "image-text-to-text model; LinVT needs a base that takes images and text."
        )
    return AutoModelForImageTextToText.from_config(config)


def check_loaded(info: dict, source) -> None:
    """Raises `ValueError` naming tensors that `from_pretrained` found missing or unexpected, the first of many."""
    problems = {kind: sorted(info.get(f"{kind}_keys") or ()) for kind in ("missing", "unexpected")}
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"The tensors in {source} do not fit its config ({listed}).")


def features_per_frame(tokens: list[Tensor], num_frames: list[int]) -> list[Tensor]:
    """Per-frame tokens [N, D] as one tensor [T, N, D] a video. Raises `ValueError` if a video's frames differ in N."""
    videos, start = [], 0
    for count in num_frames:
        frames = tokens[start : start + count]
        sizes = {len(frame) for frame in frames}
        if len(sizes) > 1:
            raise ValueError(
                f"Frames of one video have {min(sizes)} to {max(sizes)} visual tokens; they must all have the same "
                "size in pixels."
            )
        videos.append(torch.stack(frames))
        start += count
    return videos
