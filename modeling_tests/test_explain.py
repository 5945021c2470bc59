"""What an answer was read from: the numbers, against the model itself, and the pictures of them."""

import copy
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import noise_video, wrapped
from transformers import GenerationConfig
from video_files import moving_square, write_video

from linvt_hf import VideoQuestionAnsweringPipeline
from linvt_hf.asking.loading import load_pipeline
from linvt_hf.choice_scores import log_likelihoods
from linvt_hf.cli import main
from linvt_hf.evaluation.layouts import SHAPES_SCENES
from linvt_hf.explain.faithfulness import figure, hits, measure, questions
from linvt_hf.explain.pictures import Pictures, heat_on_frames, overlay, seen_box
from linvt_hf.shapes.world import Thing
from linvt_hf.video_reading import read_video

matplotlib.use("Agg")
SHAPES = Path(__file__).parent.parent / "examples/linvt-shapes"
VIDEO = str(SHAPES / "example.mp4")
FLASH = "What shape flashes up?"


def pipe_of(name="internvl_qwen2"):
    model, processor = wrapped(name)
    return VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def shapes():
    return load_pipeline(SHAPES, device="cpu")


@pytest.mark.parametrize("name", ["internvl_qwen2", "qwen2_vl", "molmo"])
def test_weights_are_those_that_made_the_tokens(name):
    pipe, video = pipe_of(name), noise_video(4, seed=1)
    found = pipe.explain(video, "Who?", max_new_tokens=3, do_sample=False)
    assert found.answer == pipe(video=video, question="Who?", max_new_tokens=3, do_sample=False)[0]["answer"]
    encoded = pipe.model.encode_video(pipe.processor.stream(video))
    messages = [{"role": "user", "content": [{"type": "video", "video": encoded}, {"type": "text", "text": "Who?"}]}]
    inputs = pipe.model.take_video_inputs(dict(pipe._features(messages)))
    with torch.no_grad():
        tokens = pipe.model.get_video_features(**inputs).pooler_output[0]
    torch.testing.assert_close(found.weights.flatten(1) @ encoded.tokens.values[0], tokens, atol=1e-4, rtol=1e-4)
    assert found.weights.min() >= 0 and torch.allclose(found.heat().sum(), torch.tensor(1.0))
    assert found.frames().shape == (4,) and found.heat().shape == (4, *encoded.grid)
    torch.testing.assert_close(found.heat(token=2).flatten(1), found.weights[2])
    by_scale = [found.heat(scale=scale) for scale in pipe.model.config.pooling_scales]
    share = [float((found.scales == scale).float().mean()) for scale in pipe.model.config.pooling_scales]
    torch.testing.assert_close(sum(a * b for a, b in zip(share, by_scale, strict=True)), found.heat())
    assert found.heaviest(2) == found.frames().argsort(descending=True)[:2].tolist()


def test_importance_is_how_much_the_answer_changes_with_a_token():
    """Against differences: each token a little longer, and what that does to the answer's likelihood."""
    pipe, video = pipe_of(), noise_video(4, seed=2)
    found = pipe.explain(video, "Who?", answer="a red ball", importance="gradient")
    assert found.importance_by == "gradient" and found.answer == "a red ball"
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Who?"}]}]
    features = dict(pipe._features(messages))
    inputs = pipe.model.take_video_inputs(features)
    changes = []
    with torch.no_grad():
        tokens = pipe.model.get_video_features(**inputs).pooler_output
        for token in range(tokens.shape[1]):
            pair = []
            for factor in (0.98, 1.02):
                longer = tokens.clone()
                longer[0, token] *= factor
                asked = {**features, "video_embeds": longer}
                pair.append(log_likelihoods(pipe.model, pipe.tokenizer, asked, ["a red ball"])[0])
            changes.append(abs(float(pair[1] - pair[0])))
    expected = torch.tensor(changes) / sum(changes)
    torch.testing.assert_close(found.importance, expected, atol=0.01, rtol=0.1)


def test_the_flash_is_where_it_is(shapes):
    for importance in ("uniform", "gradient"):
        found = shapes.explain(VIDEO, FLASH, importance=importance)
        assert found.answer == "circle" and found.times[1] == pytest.approx(0.125) and found.duration == 2.0
        flash = found.heat()[12]  # 1.5 s, below the middle on the left
        assert int(flash.argmax()) in (8, 9, 10, 5)
    assert found.heaviest(1) == [12] and found.frames()[12] > 0.4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"importance": "attention"}, "importance is 'attention'"),
        ({"importance": "gradient", "answer": " "}, "The answer has no words"),
    ],
)
def test_one_sentence(shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shapes.explain(VIDEO, FLASH, **kwargs)


def test_what_is_not_there(shapes):
    found = shapes.explain(VIDEO, FLASH)
    with pytest.raises(ValueError, match="A question has no words, so there is no answer to explain"):
        shapes.explain(VIDEO, " ")
    with pytest.raises(ValueError, match="Give token or scale, not both"):
        found.heat(token=1, scale=1)
    with pytest.raises(ValueError, match="token is 32, and the tokens are 0 to 31"):
        found.heat(token=32)
    with pytest.raises(ValueError, match=r"scale is 3, and the scales are \[1, 2, 4\]"):
        found.heat(scale=3)
    with pytest.raises(ValueError, match="The clip has 5 frames and the explanation 16"):
        Pictures(found, read_video(VIDEO, num_frames=5))


# ---- pictures ----


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("internvl_qwen2", (0, 1, 0, 1)),  # squashed
        ("molmo", (0.25, 0.75, 0, 1)),  # padded
        ("qwen2_vl", (0, 1, 0, 1)),  # in its own shape
    ],
)
def test_where_a_frame_lies_in_what_is_seen(name, box):
    _, processor = wrapped(name)
    assert seen_box(processor, 40, 80) == pytest.approx(box, abs=0.03)


def test_a_frame_may_be_cropped():
    class Cropping:
        @staticmethod
        def _pixels(frames):
            pictures = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(28, 56), mode="bilinear")
            return {"pixel_values": pictures[..., 14:42] / 255 - 0.5}

    assert seen_box(Cropping(), 40, 80) == pytest.approx((0, 1, -0.5, 1.5), abs=0.03)


def test_heat_lies_where_its_place_is():
    heat = torch.zeros(2, 4, 4)
    heat[1, 1, 2] = 0.5
    drawn = heat_on_frames(heat, (0, 1, 0, 1), 40, 40)
    assert drawn[0].max() == 0 and drawn[1].max() > 0.9
    row, column = divmod(int(drawn[1].argmax()), 40)
    assert 10 <= row < 20 and 20 <= column < 30
    # Of a picture that is padded above and below, the two rows in the middle are the frame's.
    drawn = heat_on_frames(heat, (0.25, 0.75, 0, 1), 20, 40)
    row, column = divmod(int(drawn[1].argmax()), 40)
    assert 0 <= row < 10 and 20 <= column < 30
    frames = torch.full((2, 20, 40, 3), 200, dtype=torch.uint8)
    shown = overlay(frames, drawn)
    assert shown.shape == (2, 20, 40, 3) and shown.dtype == np.uint8
    assert shown[1, row, column].mean() > shown[0, row, column].mean() + 40


def test_a_folder_of_pictures(tmp_path, capsys):
    questions = [FLASH, "Which way does the yellow cross move?"]
    assert main(["explain", str(SHAPES), VIDEO, *questions, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "What shape flashes up? circle (5" in said and "% from 1.5 s)" in said and "down" in said
    assert (tmp_path / "side_by_side.png").stat().st_size > 10_000
    for number in "12":
        content = json.loads((tmp_path / number / "explanation.json").read_text())
        assert sum(frame["share"] for frame in content["frames"]) == pytest.approx(1, abs=1e-5)
        assert content["frames"][12]["time"] == 1.5 and len(content["tokens"]) == 32
        tensors = load_file(tmp_path / number / "explanation.safetensors")
        assert tensors["weights"].shape == (32, 16, 16) and tensors["heat"].shape == (16, 4, 4)
        assert {file.name for file in (tmp_path / number).iterdir()} >= {"timeline.png", "heat.png", "heat.mp4"}
        film = read_video(tmp_path / number / "heat.mp4", num_frames=None)
        assert film.num_frames == 16 and film.duration == pytest.approx(8, abs=0.6)
    part = ["--start", "1.2", "--end", "1.9"]
    assert main(["explain", str(SHAPES), VIDEO, FLASH, *part, "--out", str(tmp_path / "part")]) == 0
    frames = json.loads((tmp_path / "part" / "1" / "explanation.json").read_text())["frames"]
    assert [frame["time"] for frame in frames] == [1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875]  # shown in between
    capsys.readouterr()
    pipe = load_pipeline(SHAPES)
    pipe.model.encode_video(pipe.processor.stream(VIDEO)).save(tmp_path / "v.safetensors")
    assert main(["explain", str(SHAPES), str(tmp_path / "v.safetensors"), FLASH, "--out", str(tmp_path)]) == 2
    assert "An encoded video holds no pictures to explain; give the video itself" in capsys.readouterr().err
    assert main(["explain", str(SHAPES), "nowhere.mp4", FLASH, "--out", str(tmp_path)]) == 2
    assert "There is no video at nowhere.mp4" in capsys.readouterr().err


def test_the_answer_is_the_one_that_is_given():
    """Within the length that the model or the call sets, in whatever way it is said."""
    pipe, video = copy.deepcopy(pipe_of()), noise_video(4, seed=2)
    shorter = {"generation_config": GenerationConfig(max_new_tokens=2, do_sample=False)}
    assert pipe.explain(video, "Who?", **shorter).answer == pipe(video=video, question="Who?", **shorter)[0]["answer"]
    pipe.model.generation_config.max_new_tokens = 3
    answer = pipe(video=video, question="Who?", do_sample=False)[0]["answer"]
    assert pipe.explain(video, "Who?", do_sample=False, return_dict_in_generate=True).answer == answer


def test_without_times(shapes, tmp_path):
    """Of an array nobody knows the times; frames have numbers then."""
    path = write_video(tmp_path / "v.mp4", moving_square(6, height=64, width=64))
    clip = read_video(path, num_frames=None)
    found = shapes.explain(clip.frames, FLASH, num_frames=6)
    assert found.times is None
    pictures = Pictures(found, clip)
    assert pictures.moment(3) == "frame 3"
    assert pictures.timeline().axes[-1].get_xlabel() == "frame"


# ---- whether they are true ----


def test_where_a_thing_is():
    thing = Thing("circle", "red", 7.0, (8.0, 8.0), (56.0, 8.0), appears=1, leaves=4)
    there = hits(thing, 5, (4, 4))
    assert not there[0].any() and not there[4].any()
    assert there[1].nonzero().tolist() == [[0, 0]] and there[3].nonzero().tolist() == [[0, 3]]
    assert there[2].nonzero().tolist() == [[0, 1], [0, 2]]  # between two


def test_explanations_of_the_small_model_are_true(shapes, tmp_path, monkeypatch):
    """A few questions; `python -m linvt_hf.explain.faithfulness` asks hundreds."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES_SCENES, "video", 4)
    asked = [one for one in questions(30) if one.kind in ("flash", "flash colour", "motion", "direction")]
    result = measure(shapes, asked)
    assert result["questions"] == len(asked) >= 8
    by_gradient = result["deletion"]["gradient"]
    assert by_gradient["heaviest"]["0"] == by_gradient["lightest"]["0"] >= 0.8
    assert by_gradient["heaviest"]["4"] < by_gradient["lightest"]["4"]
    flash = result["pointing"]["gradient, a flash"]
    assert flash["frame"] > 0.9 > flash["frame by chance"] * 5 and flash["place"] > 0.9
    figure(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
