"""LinVTConfig: which image-LLM is wrapped, and every setting of the Linear Video Tokenizer."""

from pathlib import Path

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_blip3 import Blip3Config
from .configuration_mipha import MiphaConfig
from .configuration_molmo import MolmoConfig

# Configs of bases that transformers lacks.
OWN_CONFIGS = {config.model_type: config for config in (Blip3Config, MiphaConfig, MolmoConfig)}

_LEAST = {
    "bottleneck_size": 1,
    "num_heads": 1,
    "num_scoring_layers": 0,
    "num_aggregation_layers": 0,
    "score_window": 1,
    "num_stored_tokens": 1,
    "mlp_ratio": 1,
    "num_selected_tokens": 1,
    "num_remainder_tokens": 0,
    "pooling_scales": 1,
    "queries_per_scale": 1,
    "frames_per_chunk": 1,
}


@strict
class LinVTConfig(PreTrainedConfig):
    """
    Settings of an image-LLM wrapped with LinVT (arXiv 2412.05185). Each default names its source: "paper" (its text
    and figure), "authors' code" (development runs, may differ from the paper), or "ours".

    Args:
        base_config: config of the wrapped image-LLM, as a config object or a dict with its `model_type`.
        hidden_size: D, the width of the LLM's embeddings. Read from `base_config`; give it only to build a
            `LinearVideoTokenizer` on its own.
        video_token_id: the id that stands for one video token in `input_ids`. Set when a model is wrapped.
        bottleneck_size: d, the width in which LinVT scores and attends. Values never pass through it.
        num_heads: attention heads inside LinVT. The final aggregation has one head, hence one weight a token.
        num_scoring_layers: layers of spatial and temporal attention in SSS.
        score_window: tokens, of as many frames as they make, that SSS compares with each other; a longer video takes
            several windows, each with a quarter of the one before.
        num_stored_tokens: the most tokens of an encoded video that are stored for later questions. Of a longer one the
            most significant of all and of each stretch of time are, and averages of the others.
        num_aggregation_layers: layers of self-, visual and text attention in TTA.
        mlp_ratio: width of each feed-forward block, in multiples of `bottleneck_size`.
        num_selected_tokens: k of the top-k over all frames and places together.
        num_remainder_tokens: what top-k leaves out is averaged over so many stretches of time (ours); 0 drops it.
        novelty_gain: how much of a token's score is, at first, how new it is at its place (ours, see `novelty`);
            learned from there. 0 starts with scores that are all alike.
        pooling_scales: kernels of the average pooling in MTP.
        queries_per_scale: learnable queries of each scale; their sum is the number of tokens the LLM sees.
        text_conditioning: whether the question is read. Off, a video's tokens are the same for every question.
        text_in_scores: whether the scores of SSS read it, too, and not TTA alone.
        pool_frames: whether a base that pools the frames of its own videos does so here. LLaVA-OneVision and Aquila-VL
            do, to 196 tokens a frame of 729.
        frames_per_chunk: frames that go through the vision encoder at once; bounds memory, changes no result.
        initializer_range: standard deviation of LinVT's freshly made weights.

    Raises `ValueError` for a base that transformers does not know and for settings that contradict each other.
    """

    model_type = "linvt"
    sub_configs = {"base_config": AutoConfig}

    base_config: dict | PreTrainedConfig | None = None
    hidden_size: int | None = None
    video_token_id: int | None = None

    bottleneck_size: int = 512  # ours: the authors' code works at full width, 2.1 B parameters at D = 3584
    num_heads: int = 8  # ours; authors' code: 4 at full width
    num_scoring_layers: int = 2  # ours; paper: "L"; authors' code: 8
    score_window: int = 16_384  # ours, 64 frames of 256: a longer video costs in proportion to its length
    num_stored_tokens: int = 65_536  # ours: 256 frames of 256 tokens, 470 MB in bfloat16 at D = 3584
    num_aggregation_layers: int = 2  # ours; paper: "L"; authors' code: 8
    mlp_ratio: int = 4  # ours
    num_selected_tokens: int = 1024  # authors' code
    # Paper: what is not selected is dropped. Ours; on `shapes`, one seed, 1,000 steps: 86.1 %, and 83.3 % without.
    num_remainder_tokens: int = 8
    # Paper: scores are learned from nothing. Ours, tried on `shapes` alone, one seed: without it an untrained LinVT
    # answers 22.8 % of the questions instead of 33.0 %. Alone it does not make top-k free: after 1,000 steps 83.9 %
    # with a quarter of the tokens kept, 87.2 % with all.
    novelty_gain: float | int = 12.0
    pooling_scales: list[int] | tuple[int, ...] = (1, 2, 4)  # paper
    queries_per_scale: list[int] | tuple[int, ...] = (32, 16, 16)  # ours; authors' code: 16 to 64 in all
    text_conditioning: bool = True  # paper
    # Ours: what is kept of a video depends on what is asked. On `shapes` alone, one seed, in brackets without it:
    # after 500 steps 78.2 % (75.6 %), after 1,000 steps 83.3 % (83.9 %) at a loss of 0.195 (0.216).
    text_in_scores: bool = True
    pool_frames: bool = True  # the base's own way
    frames_per_chunk: int = 32  # ours
    initializer_range: float | int = 0.02  # ours

    def __post_init__(self, **kwargs):
        if isinstance(self.base_config, dict):
            self.base_config = read_base_config(self.base_config)
        if self.base_config is not None:
            width = self.base_config.get_text_config().hidden_size
            if self.hidden_size not in (None, width):
                raise ValueError(
                    f"hidden_size is {self.hidden_size}, and the base's language model is {width} wide; leave "
                    "hidden_size out, it is read from base_config."
                )
            self.hidden_size = width
            # Otherwise the parent would reset the base's choice of attention to none.
            kwargs.setdefault("attn_implementation", self.base_config._attn_implementation)
        self.pooling_scales = list(self.pooling_scales)
        self.queries_per_scale = list(self.queries_per_scale)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        if len(self.pooling_scales) != len(self.queries_per_scale):
            raise ValueError(
                f"pooling_scales {self.pooling_scales} and queries_per_scale {self.queries_per_scale} must have one "
                "entry a scale each."
            )
        if not self.pooling_scales:
            raise ValueError("pooling_scales [] and queries_per_scale [] are empty; give them an entry a scale.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value]) < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if self.bottleneck_size % self.num_heads:
            raise ValueError(
                f"bottleneck_size ({self.bottleneck_size}) must be a multiple of num_heads ({self.num_heads})."
            )

    @property
    def num_video_tokens(self) -> int:
        """M: the tokens that one video becomes, whatever its length."""
        return sum(self.queries_per_scale)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The wrapped LLM's config, which generation and caches read."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict:
        values = super().to_dict()
        # A Hub id tells where the base came from; a folder's path only tells about somebody's machine.
        if values.get("base_config") and not is_hub_id(values["base_config"].get("_name_or_path", "")):
            values["base_config"]["_name_or_path"] = ""
        return values

    def query_cells(self) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
        """
        Where each query starts (ours): its centre and width in time, height and width, as fractions of the video.

        A scale's queries divide the video into equal stretches of time and, where their number allows, each stretch
        into the four quarters of the picture. Kernels above 2 average over whole rows of selected tokens, so their
        queries divide time only. An axis that is not divided gets a width that weighs it evenly.
        """
        cells = []
        for kernel, count in zip(self.pooling_scales, self.queries_per_scale, strict=True):
            side = 2 if kernel <= 2 and count % 4 == 0 and count >= 8 else 1
            steps = count // side**2
            widths = tuple(0.5 / n if n > 1 else 2.0 for n in (steps, side, side))
            for index in range(count):
                time, place = divmod(index, side**2)
                row, column = divmod(place, side)
                cells.append((((time + 0.5) / steps, (row + 0.5) / side, (column + 0.5) / side), widths))
        return cells

    def token_order(self) -> list[int]:
        """
        Which query each of the M tokens comes from: the LLM, which tells early from late by position, reads them in
        the order of their cells' times, whatever their scale (ours).
        """
        times = [time for (time, _, _), _ in self.query_cells()]
        return sorted(range(len(times)), key=times.__getitem__)


def check_fields(fields: dict) -> None:
    """Raises `ValueError`, in one sentence, for values that `LinVTConfig` does not take."""
    try:
        LinVTConfig(**fields)
    except StrictDataclassError as error:  # of two lines, and no ValueError
        raise ValueError(" ".join(str(error).split())) from error


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the Hub ("owner/name") rather than a folder."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def square_grid(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of a frame's tokens where the base does not say: a square, or one row if none fits."""
    side = round(num_tokens**0.5)
    return (side, side) if side * side == num_tokens else (1, num_tokens)


def read_base_config(values: dict) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if not model_type:
        raise ValueError(
            "base_config has no model_type, so the wrapped image-LLM is unknown; add it, e.g. 'qwen2_vl'."
        )
    if model_type in OWN_CONFIGS:  # by name: remote code may be imported twice, then classes of one name differ
        return OWN_CONFIGS[model_type].from_dict(values)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"base_config has model_type '{model_type}', which neither LinVT nor this version of transformers knows; "
            "check the name, or upgrade transformers."
        )
    return CONFIG_MAPPING[model_type].from_dict(values)


__all__ = ["LinVTConfig"]
