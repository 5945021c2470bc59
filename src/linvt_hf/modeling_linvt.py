"""LinVTForConditionalGeneration: an image-LLM that reads videos as a few linear combinations of its own tokens."""

import inspect
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_linvt import LinVTConfig
from .encoded_video import EncodedVideo
from .hub_folder import HubFolderMixin
from .image_llm import build_image_llm, image_llm_of
from .image_llm_parts import CACHE, named_cache
from .model_card import UNTRAINED
from .modeling_videos import FRAME_PREFIX, VideoFeatures, VideoMixin
from .video_tokenizer import LinearVideoTokenizer, LinVTPreTrainedModel

if TYPE_CHECKING:
    # Not used here: transformers copies the files it finds in relative imports, and these travel with a model too.
    from .pipeline_linvt import VideoQuestionAnsweringPipeline  # noqa: F401
    from .processing_linvt import LinVTProcessor  # noqa: F401

logger = logging.get_logger(__name__)
_PROGRAMS = 64  # ours, that torch may compile of one function


class LinVTForConditionalGeneration(VideoMixin, HubFolderMixin, LinVTPreTrainedModel, GenerationMixin):
    """
    An image-LLM wrapped with LinVT: texts, images and videos in any mix, text out.

    Videos go through the base's vision encoder and projector frame by frame, then through `video_tokenizer`; its
    tokens take their places among the prompt's embeddings. Without a video it is the base's own call.

    Args:
        config: `LinVTConfig` with a `base_config`.
        base: the image-LLM itself, if it is already there; by default it is built from `config.base_config`.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    # Names of the base's modules that are trained beside the tokenizer; `linvt_hf.training` sets them.
    trained_projector: tuple[str, ...] = ()
    # How it was trained, in Markdown, for the model card; None where nobody knows.
    training_text: str | None = None

    def __init__(self, config: LinVTConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        if config.base_config is None:
            raise ValueError("LinVTConfig has no base_config, so there is no image-LLM to build; give base_config.")
        # First, so that device_map="auto" puts it beside the vision encoder; what comes last is what it offloads.
        self.video_tokenizer = LinearVideoTokenizer(config)
        self.base = build_image_llm(config.base_config) if base is None else base
        self.image_llm = image_llm_of(config.base_config, config.pool_frames)
        self.post_init()

    @classmethod
    def from_image_llm(cls, base: PreTrainedModel, video_token_id: int, **settings) -> "LinVTForConditionalGeneration":
        """
        Wraps an image-LLM, whose weights stay as and where they are, with a fresh video tokenizer.

        Args:
            base: the image-LLM, a transformers image-text-to-text model.
            video_token_id: an id of its vocabulary that prompts do not otherwise use.
            settings: any field of `LinVTConfig`.
        """
        unknown = sorted(settings.keys() - LinVTConfig.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"LinVTConfig has no field {', '.join(unknown)}; see its docstring for those it has.")
        model = cls(LinVTConfig(base_config=base.config, video_token_id=video_token_id, **settings), base=base)
        model.training_text = UNTRAINED
        model.video_tokenizer.to(device=base.device, dtype=base.dtype)
        model.config.dtype = base.dtype
        model.generation_config = deepcopy(base.generation_config)
        model.generation_config._from_model_config = False  # it is our own now; transformers may not make it anew
        # A sampled placeholder would ask for a video that is not there.
        model.generation_config.suppress_tokens = [*(base.generation_config.suppress_tokens or []), video_token_id]
        if lost := model.image_llm.lost(base.config):
            logger.warning(lost)
        return model

    def compile(self, *args, **settings) -> None:
        """
        Compiles the parts that videos and words go through, each by itself, for good. Answers are the same; the first
        take longer, up to minutes, and so do those of the first batch of another size.

        Args:
            args, settings: of `torch.compile`; "dynamic" is True by default, so that a new length compiles nothing
                anew.
        """
        # Of all parts whose forward transformers wraps alike: one question and a few sizes of batches use up torch's
        # own limit of 8, and the rest would silently not be compiled.
        settings = {"dynamic": True, **settings}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            settings.setdefault("recompile_limit", _PROGRAMS)
        else:  # an older torch has one for all, and only in the thread that sets it
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _PROGRAMS)
        tokenizer = self.video_tokenizer
        parts = [self.base.get_encoder("image"), tokenizer.question, *tokenizer.scorer.layers, tokenizer.scorer]
        for part in (*parts, tokenizer.aggregator, self.base.get_decoder()):
            part.compile(*args, **settings)

    # ---- the base's parts ----

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.base.set_output_embeddings(value)

    @can_return_tuple
    def get_image_features(self, *args, **kwargs):
        """The base's visual tokens for still images; its own arguments and output."""
        return self.base.get_image_features(*args, **kwargs)

    # ---- videos among the words ----

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where the videos' tokens go, [B, S]; without ids, as in transformers, a placeholder's embedding tells."""
        if input_ids is not None:
            return input_ids == self.config.video_token_id
        token = torch.tensor(self.config.video_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def _embed(
        self, input_ids, inputs_embeds, video_embeds: Tensor, places: Tensor, found: int | None, cached: int
    ) -> Tensor:
        """The prompt's embeddings, [B, S, D], with the videos' tokens in their `found` places."""
        embeds = inputs_embeds if input_ids is None else self.get_input_embeddings()(input_ids)
        places, tokens = places.to(embeds.device), video_embeds.flatten(0, 1).to(embeds)
        if found is not None and found != len(tokens):
            if cached and found < len(tokens) and len(places) == 1:
                tokens = tokens[len(tokens) - found :]  # the videos before are in the cache already
            else:
                raise ValueError(
                    f"The prompts hold {found} video tokens, but {len(video_embeds)} videos of "
                    f"{video_embeds.shape[1]} tokens make {len(tokens)}; pass the processor's output unchanged, one "
                    "video a placeholder."
                )
        return embeds.masked_scatter(places[..., None], tokens)

    # ---- one path for training, scoring and generation ----

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        num_frames: Tensor | None = None,
        frame_times: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        video_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        # What processors give for images and frames. `transformers.Trainer` drops what is not named here.
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_token_order: Tensor | None = None,
        frames_pixel_attention_mask: Tensor | None = None,
        frames_image_grid_thw: Tensor | None = None,
        frames_image_sizes: Tensor | None = None,
        frames_image_masks: Tensor | None = None,
        frame_features: Tensor | None = None,
        encoded_videos: list[EncodedVideo] | None = None,
        frames_num_tokens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """
        Logits, and the loss if `labels` are given, as the base returns them.

        Args:
            input_ids: [B, S]; each video holds M places of `config.video_token_id`, in the order of the videos.
            pixel_values_videos (or frame_features, or encoded_videos), num_frames, frame_times, question_ids,
                question_mask: see `get_video_features`.
            video_embeds: [V, M, D], the videos' tokens, if they are already there.
            frames_*: what the base's vision encoder needs beside the pixels of a video's frames.
            cache (or past_key_values, its name before transformers 5.24): keys and values of what came before.
            pixel_values and the others, kwargs: the base's own inputs for images, and any other it takes.

        Raises `ValueError` when videos and places for them do not match.
        """
        named = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "image_grid_thw": image_grid_thw,
            "image_sizes": image_sizes,
            "batch_num_images": batch_num_images,
            "token_type_ids": token_type_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "image_masks": image_masks,
            "image_token_order": image_token_order,
            "frames_pixel_attention_mask": frames_pixel_attention_mask,
            "frames_image_grid_thw": frames_image_grid_thw,
            "frames_image_sizes": frames_image_sizes,
            "frames_image_masks": frames_image_masks,
            "frames_num_tokens": frames_num_tokens,
        }
        kwargs.update({name: value for name, value in named.items() if value is not None})
        kept = named_cache(cache, past_key_values)
        frame_inputs = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(FRAME_PREFIX)}
        forms = (pixel_values_videos, frame_features, encoded_videos)
        if video_embeds is not None or any(form is not None for form in forms):
            # First what is read from the device, which would wait for the frames: with them on their way, the language
            # model's kernels are started while they are encoded.
            places = self._placeholders(input_ids, inputs_embeds)
            found = None if torch.compiler.is_compiling() else int(places.sum())
            if position_ids is None and input_ids is not None:
                position_ids = self._positions(input_ids, attention_mask, {**kept, **kwargs})
            if video_embeds is None:
                video_embeds = self.get_video_features(
                    pixel_values_videos=pixel_values_videos,
                    num_frames=num_frames,
                    frame_times=frame_times,
                    question_ids=question_ids,
                    question_mask=question_mask,
                    frame_features=frame_features,
                    encoded_videos=encoded_videos,
                    **frame_inputs,
                ).pooler_output
            cached = 0 if kept[CACHE] is None else kept[CACHE].get_seq_length()
            inputs_embeds = self._embed(input_ids, inputs_embeds, video_embeds, places, found, cached)
            input_ids = None
        output = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kept,
            **self._known_to_base(kwargs),
        )
        if self.training and torch.is_grad_enabled() and (zero := self._zero_of_trained()) is not None:
            name = "logits" if output.loss is None else "loss"
            output[name] = output[name] + zero.to(output[name])
        return output

    def _zero_of_trained(self) -> Tensor | None:
        """
        0, made of everything that is trained before the language model; None if nothing is.

        A batch of texts alone, or videos without a question, leave parts of the tokenizer out. Several processes that
        average gradients need one for each parameter from every process: otherwise those with videos wait for ever
        for those without. With this term what was left out has a gradient of zeros, in one process as in many.
        """
        modules = (self.video_tokenizer, *map(self.get_submodule, self.trained_projector))
        trained = [p for module in modules for p in module.parameters() if p.requires_grad and p.numel()]
        # One element of each: its gradient is a whole tensor of zeros all the same.
        return 0.0 * torch.stack([p.flatten()[0].float() for p in trained]).sum() if trained else None

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict) -> Tensor:
        """The base's own positions for a prompt; its video tokens count as text (one dimension of M-RoPE)."""
        known = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        positions = self.base._prepare_position_ids_for_generation(input_ids, known)
        return positions[..., -input_ids.shape[1] :]

    def _known_to_base(self, kwargs: dict) -> dict:
        """Drops what only other bases' processors are asked for, such as token type ids."""
        named = inspect.signature(self.base.forward).parameters
        optional = ("token_type_ids", "mm_token_type_ids")
        return {name: value for name, value in kwargs.items() if name in named or name not in optional}

    # ---- generation: the base prepares its own steps, LinVT adds the videos to the first ----

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """`GenerationMixin.generate` with videos: they are encoded once, if possible in the first forward."""
        videos = self.take_video_inputs(kwargs)
        if videos and kwargs.get("video_embeds") is None:
            if self._forward_may_encode(args, kwargs):
                kwargs["waiting_videos"] = videos
            else:
                kwargs["video_embeds"] = self.get_video_features(**videos).pooler_output
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        given = any(kwargs.get(name) is not None for name in ("waiting_videos", "video_embeds"))
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if given and self._chosen("prefill_chunk_size", args, kwargs) is not None:
            raise ValueError("prefill_chunk_size does not work with videos; leave it out.")
        embeds = kwargs.get("inputs_embeds")
        ids = input_ids if embeds is None else None  # which go before ids
        if not (given or cached or (ids is None and embeds is None)) and self._placeholders(ids, embeds).any():
            raise ValueError("The prompts hold video tokens, but no video was given; pass the processor's output.")
        return super().generate(inputs, *args, **kwargs)

    def _forward_may_encode(self, args: tuple, kwargs: dict) -> bool:
        """
        Whether `generate` leaves encoding to the first forward: then nothing it asks the device for waits for the
        frames. Not where every forward needs the videos' tokens, where others decide what a forward gets, or where
        forward is compiled or wrapped as a whole, as accelerate does, which would take all pixels to the device.
        """
        cached = self._chosen("use_cache", args, kwargs) in (None, True)
        others = any(kwargs.get(name) is not None for name in ("assistant_model", "custom_generate"))
        own = "forward" not in vars(self) and self._compiled_call_impl is None
        return cached and own and not others

    def _chosen(self, setting: str, args: tuple, kwargs: dict):
        """A setting of a call of `generate`, wherever it is given; None where it is nowhere."""
        configs = (kwargs.get("generation_config"), args[0] if args else None, self.generation_config)
        chosen = [kwargs.get(setting), *(getattr(config, setting, None) for config in configs)]
        return next((choice for choice in chosen if choice is not None), None)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        waiting_videos=None,
        video_embeds=None,
        is_first_iteration=False,
        use_cache=True,
        **kwargs,
    ):
        model_inputs = self.base.prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or not use_cache:
            given = {**(waiting_videos or {}), "video_embeds": video_embeds}
            model_inputs.update({name: value for name, value in given.items() if value is not None})
        return model_inputs

    def _supports_mm_encoder_outputs(self):  # still images are encoded as the base does it, before beams
        return self.base._supports_mm_encoder_outputs()

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs):
        return self.base._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return self.base._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _update_model_kwargs_for_generation(self, *args, **kwargs):
        return self.base._update_model_kwargs_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        videos, video_embeds = (model_kwargs.pop(name, None) for name in ("waiting_videos", "video_embeds"))
        if videos is not None and expand_size > 1:  # once, before beams or samples are spread
            videos, video_embeds = None, self.get_video_features(**videos).pooler_output
        if video_embeds is not None and expand_size > 1:
            ids = input_ids if input_ids is not None and input_ids.shape[1] else None
            places = self._placeholders(ids, model_kwargs.get("inputs_embeds"))
            per_sample = (places.sum(dim=1) // self.config.num_video_tokens).tolist()
            if sum(per_sample) != len(video_embeds):
                raise ValueError(
                    f"The prompts hold places for {sum(per_sample)} videos, and {len(video_embeds)} were given; pass "
                    "the processor's output unchanged, one video a placeholder."
                )
            samples = video_embeds.split(per_sample)
            video_embeds = torch.cat([sample for sample in samples for _ in range(expand_size)])
        input_ids, model_kwargs = self.base._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        given = {"waiting_videos": videos, "video_embeds": video_embeds}
        model_kwargs.update({name: value for name, value in given.items() if value is not None})
        return input_ids, model_kwargs

    def _validate_model_kwargs(self, model_kwargs):
        # PEFT may put a preparation of its own before ours, whose arguments nobody can read.
        known = {"waiting_videos", *inspect.signature(self.base.forward).parameters}
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in known})


__all__ = ["LinVTForConditionalGeneration", "VideoFeatures"]
