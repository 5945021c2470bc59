"""LinVTConfig: what it holds, how it travels as JSON, and the sentence each mistake gets."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlavaConfig, Qwen2VLConfig

from linvt_hf.configuration_linvt import LinVTConfig, square_grid
from linvt_hf.configuration_mipha import MiphaConfig

TEXT = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llava(**fields) -> LlavaConfig:
    return LlavaConfig(text_config={**TEXT, **fields})


def test_defaults():
    config = LinVTConfig(hidden_size=64)
    assert (config.bottleneck_size, config.num_heads, config.num_selected_tokens) == (512, 8, 1024)
    assert config.pooling_scales == [1, 2, 4]
    assert config.queries_per_scale == [32, 16, 16]
    assert config.num_video_tokens == 64
    assert config.text_conditioning is True and config.text_in_scores is True
    assert config.base_config is None and config.video_token_id is None
    assert config.model_type == "linvt"


def test_lists_are_not_shared():
    first, second = LinVTConfig(), LinVTConfig()
    first.queries_per_scale.append(3)
    assert second.queries_per_scale == [32, 16, 16]
    given = [8, 8, 8]
    assert LinVTConfig(queries_per_scale=given).queries_per_scale is not given


# ---- JSON ----


def test_round_trip_on_its_own(tmp_path):
    config = LinVTConfig(
        hidden_size=64, pooling_scales=(1, 3), queries_per_scale=(5, 7), text_conditioning=False, initializer_range=0.1
    )
    config.save_pretrained(tmp_path)
    loaded = LinVTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.pooling_scales == [1, 3] and loaded.queries_per_scale == [5, 7]
    assert loaded.num_video_tokens == 12
    assert loaded.hidden_size == 64


@pytest.mark.parametrize(
    "base",
    [llava(), Qwen2VLConfig(text_config={"hidden_size": 24}), MiphaConfig(text_config=TEXT)],
    ids=lambda base: base.model_type,
)
def test_round_trip_with_a_base(tmp_path, base):
    config = LinVTConfig(base_config=base, video_token_id=7)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "linvt"
    assert stored["base_config"]["model_type"] == base.model_type
    loaded = LinVTConfig.from_pretrained(tmp_path)
    assert type(loaded.base_config) is type(base)
    assert loaded.base_config.to_dict() == base.to_dict()
    assert loaded.to_dict() == config.to_dict()
    assert loaded.video_token_id == 7
    assert loaded.hidden_size == 24


def test_from_and_to_dict():
    config = LinVTConfig(base_config=llava(), bottleneck_size=32, num_heads=4)
    again = LinVTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.base_config, LlavaConfig)


# ---- the base ----


def test_base_as_dict_or_object():
    from_object = LinVTConfig(base_config=llava())
    from_dict = LinVTConfig(base_config=llava().to_dict())
    assert isinstance(from_dict.base_config, LlavaConfig)
    assert from_dict.to_dict() == from_object.to_dict()
    base = llava()
    assert LinVTConfig(base_config=base).base_config is base


def test_hidden_size_is_the_bases():
    assert LinVTConfig(base_config=llava()).hidden_size == 24
    assert LinVTConfig(base_config=llava(hidden_size=48), hidden_size=48).hidden_size == 48
    assert LinVTConfig().hidden_size is None
    with pytest.raises(ValueError, match="hidden_size is 5, and the base's language model is 24 wide; leave"):
        LinVTConfig(base_config=llava(), hidden_size=5)


def test_text_config_is_the_bases():
    config = LinVTConfig(base_config=llava())
    assert config.get_text_config() is config.base_config.text_config
    assert config.get_text_config(decoder=True) is config.base_config.text_config
    alone = LinVTConfig(hidden_size=8)
    assert alone.get_text_config() is alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_base_object_keeps_its_attention(attention):
    base = llava()
    base._attn_implementation = attention
    config = LinVTConfig(base_config=base)
    assert config.base_config._attn_implementation == attention
    assert config._attn_implementation == attention
    assert config.get_text_config()._attn_implementation == attention


def test_attention_can_be_chosen():
    base = llava()
    base._attn_implementation = "sdpa"
    config = LinVTConfig(base_config=base, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert LinVTConfig(hidden_size=8, attn_implementation="eager")._attn_implementation == "eager"


def test_own_bases_are_known_to_auto_config():
    assert isinstance(AutoConfig.for_model("mipha"), MiphaConfig)


# ---- mistakes ----


def test_scales_and_queries_must_match():
    with pytest.raises(ValueError, match=r"pooling_scales \[1, 2, 4\] and queries_per_scale \[4, 4\] must have one"):
        LinVTConfig(queries_per_scale=(4, 4))


@pytest.mark.parametrize(
    "setting",
    [
        {"num_selected_tokens": 0},
        {"frames_per_chunk": 0},
        {"pooling_scales": (1, 0, 4)},
        {"queries_per_scale": (4, 4, -1)},
        {"num_heads": 0},
        {"num_heads": -8},
        {"bottleneck_size": 0},
        {"mlp_ratio": 0},
        {"num_aggregation_layers": -1},
        {"num_scoring_layers": -1},
        {"pooling_scales": [], "queries_per_scale": []},
    ],
    ids=str,
)
def test_counts_must_be_positive(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=name) as raised:
        LinVTConfig(hidden_size=64, **setting)
    # The sentence says which value it got, too.
    assert str(list(value) if isinstance(value, tuple) else value) in str(raised.value)


def test_bottleneck_must_divide_into_heads():
    with pytest.raises(ValueError, match=r"bottleneck_size \(100\) must be a multiple of num_heads \(8\)"):
        LinVTConfig(bottleneck_size=100)


def test_unknown_base():
    with pytest.raises(ValueError, match="model_type 'no_such_model', which neither LinVT nor this version"):
        LinVTConfig(base_config={"model_type": "no_such_model"})


@pytest.mark.parametrize("base", [{}, {"hidden_size": 8}, {"model_type": ""}])
def test_base_without_model_type(base):
    with pytest.raises(ValueError, match="base_config has no model_type"):
        LinVTConfig(base_config=base)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_heads": "8"},
        {"hidden_size": "64"},
        {"pooling_scales": 4},
        {"queries_per_scale": (1.5, 2, 4)},
        {"text_conditioning": "no"},
        {"base_config": "llava"},
    ],
    ids=str,
)
def test_wrong_type(setting):
    (name,) = setting
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        LinVTConfig(**setting)


# ---- where queries start ----


@pytest.mark.parametrize("counts", [(32, 16, 16), (8, 4, 1), (1, 2, 3), (7, 12, 64)])
def test_query_cells_are_in_order_and_inside(counts):
    config = LinVTConfig(queries_per_scale=counts)
    cells = config.query_cells()
    assert len(cells) == config.num_video_tokens == sum(counts)
    assert all(0 < place < 1 for center, _ in cells for place in center)
    assert all(width > 0 for _, widths in cells for width in widths)
    start = 0
    for count in counts:
        centers = [center for center, _ in cells[start : start + count]]
        assert centers == sorted(centers)  # by time, then row, then column
        assert len(set(centers)) == count  # no two queries of a scale start alike
        mean = [sum(axis) / count for axis in zip(*centers, strict=True)]
        assert mean == pytest.approx([0.5, 0.5, 0.5])  # nothing of the video is favoured
        start += count


def test_query_cells_divide_time_and_the_picture():
    cells = LinVTConfig(queries_per_scale=(32, 4, 1)).query_cells()
    assert cells[:4] == [
        ((1 / 16, row, column), (1 / 16, 0.25, 0.25)) for row in (0.25, 0.75) for column in (0.25, 0.75)
    ]
    assert cells[4][0] == (3 / 16, 0.25, 0.25)
    # An axis that is not divided is weighed evenly: its width is far more than the whole video.
    assert cells[32] == ((1 / 8, 0.5, 0.5), (1 / 8, 2.0, 2.0))
    assert cells[36] == ((0.5, 0.5, 0.5), (2.0, 2.0, 2.0))


def test_square_grid():
    assert square_grid(1) == (1, 1)
    assert square_grid(729) == (27, 27)
    assert square_grid(12) == (1, 12)
