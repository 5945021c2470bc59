"""`examples/linvt-shapes`, the small model that comes with the repository, and the demo that asks it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from linvt_hf import hub_folder
from linvt_hf.shapes import image_llm
from linvt_hf.shapes.__main__ import main as shapes_command
from linvt_hf.shapes.evaluate import QuestionSet, Score
from linvt_hf.shapes.videos import write_split
from linvt_hf.shapes.world import make_scene

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "linvt-shapes"
IMAGE_LLM = ROOT / "examples" / "shapes-image-llm"


def test_it_brings_the_code_as_it_is_now(tmp_path):
    hub_folder.copy_code(tmp_path)
    now, there = ({file.name: file.read_text() for file in folder.glob("*.py")} for folder in (tmp_path, FOLDER))
    assert there == now, "the model's code has changed: run `make ship`"


def test_it_is_small_and_complete():
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir() if file.is_file()}
    assert sum(sizes.values()) <= 10e6
    assert {"model.safetensors", "config.json", "chat_template.jinja", "README.md", "example.mp4"} <= set(sizes)
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        assert "/" not in json.dumps(json.loads((FOLDER / name).read_text()).get("_name_or_path", "")), name


def test_the_demo_is_answered_rightly():
    run = subprocess.run([sys.executable, ROOT / "examples" / "demo.py"], capture_output=True, text=True, check=True)
    lines = [line.split(":", 1)[1].strip() for line in run.stdout.splitlines() if line.startswith("answer:")]
    things = {thing.shape: thing for thing in make_scene("video", "test", 28).things}
    (brief,) = (thing for thing in things.values() if thing.is_brief)
    assert lines == [things["cross"].direction, things["star"].later, brief.shape] == ["down", "red", "circle"]
    first = [line for line in run.stdout.splitlines() if "%" in line]
    assert [line.split()[1] for line in first if float(line.split()[0].rstrip("%")) > 50] == lines


@pytest.mark.parametrize(("kind", "frames", "least"), [("video", 16, 0.8), ("long", 256, 0.7), ("image", None, 0.85)])
def test_it_answers_what_no_training_saw(kind, frames, least, tmp_path):
    """A few scenes; the README has the numbers over whole splits."""
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    write_split(tmp_path, kind, "test", {"video": 20, "long": 6, "image": 20}[kind])
    questions = QuestionSet(tmp_path / f"{kind}-test.jsonl", processor, num_frames=frames)
    with torch.inference_mode():
        assert Score.mean(questions.score(model).exact) >= least


def test_what_the_evaluation_prints(tmp_path, monkeypatch, capsys):
    """Of a LinVT model, and of an image-LLM, whose answers about pictures are its own."""
    for kind in ("video", "long", "image"):
        write_split(tmp_path, kind, "test", 2)
    printed = {}
    for folder in (FOLDER, IMAGE_LLM):
        monkeypatch.setattr("sys.argv", ["shapes", "evaluate", str(folder), "--data", str(tmp_path)])
        shapes_command()
        printed[folder] = capsys.readouterr().out.splitlines()
        assert [line.split(",")[0] for line in printed[folder]] == ["video", "long", "image"]
    video = QuestionSet(tmp_path / "video-test.jsonl", AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True))
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    right = Score.mean(video.score(model).exact)
    assert printed[FOLDER][0].startswith(f"video, {len(video.records)} questions: {right:.1%} (")
    assert printed[FOLDER][0] != printed[IMAGE_LLM][0]


def test_the_image_llm_under_it_is_one_of_transformers_own():
    model = AutoModelForImageTextToText.from_pretrained(IMAGE_LLM).eval()
    right = image_llm.evaluate(model, AutoTokenizer.from_pretrained(IMAGE_LLM), scenes=20)
    assert min(right.values()) > 0.5 and min(right["colour"], right["motion"], right["direction"]) > 0.8
