"""
Upstream's tests that cannot apply to LinVT, with what each assumes: `{module: {test or Class.test: reason}}`, where
names may hold wildcards.

Upstream skips more by itself (no GPU, no flash attention, ...); pytest's summary shows those reasons too. A name that
a version of upstream does not have matches nothing.
"""

_ENCODER_OUTPUT = (
    "expects the output of one run of a vision encoder (last_hidden_state, hidden_states, attentions) beside the "
    "tokens; LinVT encodes frames in chunks, keeps none of that, and gives tokens, weights and scores"
)
_HIDDEN_STATES = "expects hidden states of layers over one sequence; LinVT's module gives tokens and weights"
_SAMPLING = (
    "wants num_frames, fps and do_sample_frames in a video processor, which needs torchvision; LinVT reads videos "
    "itself, so its processor holds the defaults and a call may override them"
)
_CONTAINER_INIT = (
    "starts all weights anew through LinVT, where transformers, for code outside it, does not call _init_weights on "
    "modules without weights of their own, and CLIP and SigLIP need it there; LinVT refuses missing weights anyway"
)

SKIPS: dict[str, dict[str, str]] = {
    "modeling": {
        "test_model_base_model_prefix": (
            "expects a headless base model inside; LinVT wraps a whole image-LLM, head and all"
        ),
        "LlavaTest.test_can_init_all_missing_weights": _CONTAINER_INIT,
        "LlavaOnevisionTest.test_can_init_all_missing_weights": _CONTAINER_INIT,
        "MiphaTest.test_can_init_all_missing_weights": _CONTAINER_INIT,
        "test_bc_cache_name_forward": (
            "wants a warning where a cache is called past_key_values; LinVT, which runs with versions that know no "
            "other name, takes both"
        ),
        "test_get_video_features_output_*": _ENCODER_OUTPUT,
        "test_get_video_features_hidden_states": _ENCODER_OUTPUT,
        "test_get_video_features_attentions": _ENCODER_OUTPUT,
    },
    "tokenizer": {
        "test_model_get_set_embeddings": "expects a table of embeddings; LinVT's module reads the base's tokens",
        "test_hidden_states_output": _HIDDEN_STATES,
        "test_model_outputs_equivalence": _HIDDEN_STATES,
        "test_retain_grad_hidden_states_attentions": _HIDDEN_STATES,
    },
    "processing": {
        "test_init_arguments_not_in_processor_kwargs": _SAMPLING,
        "test_call_arguments_not_in_processor_kwargs": _SAMPLING,
        "test_call_arguments_not_in_attributes": _SAMPLING,
        "test_call_arguments_default_none": _SAMPLING,
    },
}
