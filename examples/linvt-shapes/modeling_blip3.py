"""BLIP-3 as an image-LLM of transformers: SigLIP or CLIP, a perceiver resampler and Phi-3."""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip3 import Blip3Config, select_grid
from .image_llm_parts import ImageLLMHeadMixin, ImageLLMModelMixin, named_cache
from .resampler_blip3 import Blip3PerceiverResampler


class Blip3PreTrainedModel(PreTrainedModel):
    config_class = Blip3Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _no_split_modules = ["Blip3PerceiverResampler"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Blip3PerceiverResampler):
            init.normal_(module.latents)


class Blip3Model(ImageLLMModelMixin, Blip3PreTrainedModel):
    """BLIP-3 (github.com/salesforce/LAVIS, branch xgen-mm, arXiv 2408.08872) without its output head."""

    def __init__(self, config: Blip3Config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Blip3PerceiverResampler(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        image_texts: list[Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        The visual tokens of images.

        Args:
            pixel_values: [images, 3, H, W], one tile each, as for a video's frames; or [images, tiles, 3, H, W], of
                each image the whole and, with more tiles than one, its crops. Tiles beyond those of an image's grid
                are padding of a batch.
            image_sizes: [images, 2], height and width of each image before it was cut; crops need it.
            image_texts: for each image [T, D], embeddings of what a resampler that reads text is to read. Without,
                it reads the image alone, as for a video's frames, which is not how it was trained.

        Returns the tower's output for all tiles, with the visual tokens as `pooler_output`: [images, 128, D] for one
        tile each, otherwise one [128 * (1 + crops), D] an image.

        Raises `ValueError` for crops without `image_sizes`, or fewer tiles than an image's grid has.
        """
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        grids = self._grids(pixel_values, image_sizes)
        if grids is None:
            output = self.vision_tower(pixel_values.flatten(0, -4), return_dict=True, **kwargs)
            patches = self._patches(output.last_hidden_state)  # [images, P, C]
            if image_texts is None:
                output.pooler_output = self.multi_modal_projector(patches)
            else:
                each = zip(patches.split(1), image_texts, strict=True)
                output.pooler_output = torch.cat([self.multi_modal_projector(p, text=text) for p, text in each])
            return output
        tiles = [1 + columns * rows for columns, rows in grids]
        real = torch.cat([image[:count] for image, count in zip(pixel_values, tiles, strict=True)])
        output = self.vision_tower(real, return_dict=True, **kwargs)  # [all tiles, P, C]
        patches, masks = [], []
        images = self._patches(output.last_hidden_state).split(tiles)
        for image, grid, size in zip(images, grids, image_sizes.tolist(), strict=True):
            patches.append(regroup_crops(image, grid))
            masks.append(real_patches(size, grid, image.shape[1]))
        if image_texts is None:
            mask = None if self.config.resampler_reads_text else torch.cat(masks).to(real.device)
            tokens = self.multi_modal_projector(torch.cat(patches), mask).split(tiles)  # [1 + crops, 128, D] each
        else:  # the instructed model was trained without the mask of padding
            tokens = [self.multi_modal_projector(p, text=text) for p, text in zip(patches, image_texts, strict=True)]
        output.pooler_output = tuple(image.flatten(0, 1) for image in tokens)
        return output

    def _grids(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[tuple[int, int]] | None:
        """Each image's columns and rows of crops; None if there is one tile an image and so no crops."""
        if pixel_values.ndim == 4 or pixel_values.shape[1] == 1:
            return None
        images, tiles = pixel_values.shape[:2]
        if image_sizes is None or len(image_sizes) != images:
            given = "none" if image_sizes is None else len(image_sizes)
            raise ValueError(
                f"pixel_values has crops of {images} images, but there are {given} image_sizes; pass the processor's "
                "output unchanged."
            )
        side, allowed = self.config.vision_config.image_size, self.config.anyres_grids
        grids = [select_grid(height, width, side, allowed) for height, width in image_sizes.tolist()]
        most = max(1 + columns * rows for columns, rows in grids)
        if most > tiles:
            raise ValueError(
                f"pixel_values has {tiles} tiles an image, but image_sizes and config.anyres_grids ask for {most}; "
                "pass the processor's output unchanged, and give both the same anyres_grids."
            )
        return grids

    def num_tiles(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[int]:
        """How many tiles of each image are no padding."""
        grids = self._grids(pixel_values, image_sizes)
        return [1] * len(pixel_values) if grids is None else [1 + columns * rows for columns, rows in grids]

    def _patches(self, hidden_state: Tensor) -> Tensor:
        """What the resampler reads of the tower's last hidden state: every patch, normalised, without CLS."""
        if self.config.vision_config.model_type == "clip_vision_model":  # which normalises its CLS alone
            return self.vision_tower.post_layernorm(hidden_state[:, 1:])
        return hidden_state

    def _image_texts(self, embeds: Tensor, places: Tensor, words: Tensor, counts: list[int]) -> list[Tensor]:
        """
        The prompt of each image, as a resampler that reads it was shown it: its first tokens, a picture as one.

        Args:
            embeds: [B, S, D]; places: [B, S], of visual tokens; words: [B, S], what may be read.
            counts: how many places each image takes.
        """
        following = iter(counts)
        texts = []
        for row, (taken, real) in enumerate(zip(places, words, strict=True)):
            read = real & ~taken
            indices = taken.nonzero()[:, 0].tolist()
            firsts, n = [], 0
            while n < len(indices):
                firsts.append(indices[n])
                n += next(following, len(indices))
            read[firsts] = True
            texts += [embeds[row][read][: self.config.resampler_text_length]] * len(firsts)
        return texts

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        answers: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, S], with `config.image_token_id` at each visual token's place.
            pixel_values, image_sizes: see `get_image_features`; the images of all prompts one after another.
            answers: [B, S], True for what is to be learned, and so not to be read by a resampler that reads text.

        Raises `ValueError` when visual tokens and places for them do not match in number.
        """
        inputs_embeds = self.embed_prompt(input_ids, inputs_embeds)
        if pixel_values is not None:
            places = self.image_places(input_ids, inputs_embeds)
            texts = None
            if self.config.resampler_reads_text:
                words = torch.ones_like(places) if answers is None else ~answers
                if attention_mask is not None and attention_mask.ndim == 2:
                    words = words & attention_mask[:, -places.shape[1] :].bool()
                counts = [n * self.config.num_image_tokens for n in self.num_tiles(pixel_values, image_sizes)]
                texts = self._image_texts(inputs_embeds, places, words, counts)
            features = self.get_image_features(pixel_values, image_sizes, texts, return_dict=True).pooler_output
            image_tokens = torch.cat(tuple(features)).to(inputs_embeds)  # [places, D]
            inputs_embeds = self.in_places(inputs_embeds, image_tokens, places)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class Blip3ForConditionalGeneration(ImageLLMHeadMixin, Blip3PreTrainedModel, GenerationMixin):
    """BLIP-3 with its output head, which has a bias, unlike Phi-3's own."""

    _auto_class = "AutoModelForImageTextToText"
    image_inputs = ("pixel_values", "image_sizes")

    def __init__(self, config: Blip3Config):
        super().__init__(config)
        self.model = Blip3Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Logits, and the loss if `labels` [B, S] are given (-100 where nothing is learned). For the other arguments see
        `Blip3Model.forward`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            answers=None if labels is None else labels != -100,
            use_cache=use_cache,
            return_dict=True,
            **named_cache(cache, past_key_values),
            **kwargs,
        )
        return self.say(output, labels, logits_to_keep, **kwargs)

    def num_places(self, images):
        tiles = self.model.num_tiles(images["pixel_values"], images.get("image_sizes"))
        return torch.tensor(tiles) * self.config.num_image_tokens


def regroup_crops(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    The patches of one image's tiles, grouped as they are resampled: [1 + crops, P, C] -> the same.

    As released, the crops are laid side by side and their patches counted off row by row. Where a grid has two
    columns or more, a group so is a band across all of them, and no crop. The weights were trained with this.
    """
    columns, rows = grid
    side = round(image.shape[1] ** 0.5)
    laid_out = rearrange(image[1:], "(r c) (h w) d -> (r h c w) d", r=rows, c=columns, h=side)
    return torch.cat([image[:1], laid_out.unflatten(0, (columns * rows, -1))])


def real_patches(size: tuple[int, int], grid: tuple[int, int], patches: int) -> Tensor:
    """
    Which patches, grouped as by `regroup_crops`, are no padding: [1 + crops, P].

    Args:
        size: height and width of the image before it was cut.
        grid: columns and rows of crops.
        patches: of a tile, P.
    """
    (height, width), (columns, rows) = size, grid
    side = round(patches**0.5)
    whole = torch.ones(1, patches, dtype=torch.bool)
    inside = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    # Rounded as in training; it may differ from the pixels' own padding by a patch.
    if width / height > columns / rows:
        padding = (rows * side - int(height * (columns * side / width))) // 2
        inside[padding : rows * side - padding] = True
    else:
        padding = (columns * side - int(width * (rows * side / height))) // 2
        inside[:, padding : columns * side - padding] = True
    return torch.cat([whole, inside.reshape(columns * rows, patches)])


AutoConfig.register("blip3", Blip3Config, exist_ok=True)
AutoModelForImageTextToText.register(Blip3Config, Blip3ForConditionalGeneration, exist_ok=True)

__all__ = ["Blip3ForConditionalGeneration", "Blip3Model", "Blip3PreTrainedModel"]
