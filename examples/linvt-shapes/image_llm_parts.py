"""
What the models of bases that transformers lacks have in common: places for visual tokens, a head, generation; and what
the cache is called.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# What transformers calls a cache of keys and values, as an argument and in outputs: the first from 5.24 on.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def named_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """Whichever was given, under the name of this transformers."""
    return {CACHE: past_key_values if cache is None else cache}


class ImageLLMModelMixin:
    """Of a model with a `language_model` and `config.image_token_id`; stands before `PreTrainedModel`."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where visual tokens go, [B, S]; without ids, as in transformers, a placeholder's embedding tells."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def embed_prompt(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, S] or [B, S, D] -> [B, S, D]. Raises `ValueError` unless exactly one is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds; both or neither were given.")
        return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds

    def in_places(self, inputs_embeds: Tensor, image_tokens: Tensor, places: Tensor) -> Tensor:
        """
        Visual tokens [n, D] where `places` [B, S] are True in `inputs_embeds` [B, S, D].

        Raises `ValueError` when they do not match in number.
        """
        if not torch.compiler.is_compiling() and (found := int(places.sum())) != len(image_tokens):
            raise ValueError(
                f"The prompts hold {found} places for visual tokens, but the images make {len(image_tokens)}; pass "
                "the processor's output unchanged."
            )
        return inputs_embeds.masked_scatter(places[..., None], image_tokens)


class ImageLLMHeadMixin:
    """Of a `model` as above with an `lm_head`; stands before `PreTrainedModel` and `GenerationMixin`."""

    image_inputs: tuple[str, ...]  # inputs with a row for each row of `pixel_values`

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, *args, **kwargs):
        """See the method of `self.model`."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    def say(
        self, output: BaseModelOutputWithPast, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs
    ) -> CausalLMOutputWithPast:
        """The head's logits of what `model` gave, and the loss if there are labels [B, S]."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE: getattr(output, CACHE)},
        )

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, use_cache=True, **kwargs
    ):
        images = {name: kwargs.pop(name, None) for name in self.image_inputs}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or not use_cache:  # later the images are in the cache
            model_inputs.update(images)
        return model_inputs

    def num_places(self, images: dict[str, Tensor]) -> Tensor:
        """Of the image inputs that are given, how many places of a prompt each row takes, [rows]."""
        raise NotImplementedError

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and samples: each prompt's images stay together, instead of each row being repeated alone."""
        images = {name: model_kwargs.pop(name) for name in self.image_inputs if model_kwargs.get(name) is not None}
        if images and expand_size > 1:
            ids = input_ids if input_ids is not None and input_ids.shape[1] else None
            places = self.model.image_places(ids, model_kwargs.get("inputs_embeds"))
            ends = places.sum(dim=1).cumsum(0).cpu()  # [B]
            prompt = torch.searchsorted(ends, self.num_places(images).cpu().cumsum(0))  # [rows]
            rows = [(prompt == index).nonzero()[:, 0] for index in range(len(ends))]
            rows = torch.cat([row for row in rows for _ in range(expand_size)])
            images = {name: value[rows.to(value.device)] for name, value in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}


__all__ = ["CACHE", "ImageLLMHeadMixin", "ImageLLMModelMixin", "named_cache"]
