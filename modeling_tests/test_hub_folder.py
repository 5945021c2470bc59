"""A saved folder is all there is: a fresh process without this package loads it, asks it, and saves it again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_bases import NAMED
from tiny_models import chat, encode, wrapped
from video_files import moving_square, write_video

from linvt_hf import LinVTForConditionalGeneration

FRESH = """
import sys
sys.modules["linvt_hf"] = None  # importing the package fails from here on
import torch, transformers
torch.set_num_threads(1)  # as in the tests: another number of threads sums in another order
from pathlib import Path

folder = Path(sys.argv[1])
expected = torch.load(folder / "expected.pt", weights_only=True)
remote = {"trust_remote_code": True}


def check(model, processor):
    messages = [{"role": "user", "content": [{"type": "video", "video": str(folder / "v.mp4")},
                                             {"type": "text", "text": "What moves?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert set(inputs) == set(expected["inputs"])
    assert all(torch.equal(inputs[key], expected["inputs"][key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"])


source = folder / "model"
for round in ("model", "again"):
    source = folder / round
    config = transformers.AutoConfig.from_pretrained(source, **remote)
    assert config.model_type == "linvt" and type(config).__module__.startswith("transformers_modules")
    processor = transformers.AutoProcessor.from_pretrained(source, **remote)
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        model = getattr(transformers, name).from_pretrained(source, **remote)
        assert type(model).__name__ == "LinVTForConditionalGeneration" and model.can_generate()
        check(model, processor)
    pipe = transformers.pipeline("video-question-answering", model=str(source), **remote)
    answers = [pipe(video=str(folder / "v.mp4"), question="What moves?", max_new_tokens=5, do_sample=False)]
    answers += pipe([{"video": str(folder / "v.mp4"), "question": q} for q in ("Who?", "What moves?")],
                    batch_size=2, max_new_tokens=5, do_sample=False)
    assert answers[0] == answers[2] == expected["answer"], answers
    found = pipe.explain(str(folder / "v.mp4"), "What moves?", max_new_tokens=3, do_sample=False)
    assert found.weights.shape[0] == model.config.num_video_tokens and abs(float(found.frames().sum()) - 1) < 1e-4
    if round == "model":
        model.save_pretrained(folder / "again", processor=processor)
question = {"type": "text", "text": "Who?"}
chat = [{"role": "user", "content": [{"type": "video", "url": str(folder / "v.mp4")}, question]}]
general = transformers.pipeline("image-text-to-text", model=str(source), **remote)
assert general(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"] is not None
pipe.save_pretrained(folder / "third")
transformers.pipeline("video-question-answering", model=str(folder / "third"), **remote)
print("all well")
"""


def run_fresh(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_fresh_process_without_the_package(name, tmp_path):
    from linvt_hf import VideoQuestionAnsweringPipeline

    model, processor = wrapped(name)
    model.save_pretrained(tmp_path / "model", processor=processor)
    video = write_video(tmp_path / "v.mp4", moving_square(24))
    inputs = encode(processor, chat(video, "What moves?"))
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    with torch.no_grad():
        expected = {
            "inputs": dict(inputs),
            "logits": model(**inputs).logits,
            "answer": pipe(video=video, question="What moves?", max_new_tokens=5, do_sample=False),
        }
    torch.save(expected, tmp_path / "expected.pt")
    done = run_fresh(FRESH, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all well")


def test_what_lies_in_the_folder(tmp_path):
    model, processor = wrapped("mipha")
    model.save_pretrained(tmp_path, processor=processor)
    package = Path(__file__).parent.parent / "src" / "linvt_hf"
    travelling = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == travelling
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt")) + list(tmp_path.glob("*.pkl"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_linvt.LinVTForConditionalGeneration"
    assert config["custom_pipelines"]["video-question-answering"]["pt"] == ["AutoModelForImageTextToText"]
    assert config["base_config"]["model_type"] == "mipha"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "video-text-to-text"
    for path in tmp_path.iterdir():  # nobody's folders in what is published
        if path.suffix in (".json", ".md", ".py", ".jinja"):
            assert not re.search(r"/(tmp|home|root|Users)/", path.read_text()), path.name


def test_travelling_files_stand_alone():
    """They import each other, torch, transformers, their own dependencies and the standard library, nothing else."""
    import ast

    allowed = {
        "torch",
        "transformers",
        "einops",
        "av",
        "numpy",
        "PIL",
        "huggingface_hub",
        "safetensors",
        *sys.stdlib_module_names,
    }
    package = Path(__file__).parent.parent / "src" / "linvt_hf"
    flat = {path.stem for path in package.glob("*.py")} - {"__init__", "cli"}
    for name in flat:
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert node.module in flat, (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, (name, node.module)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), name


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_what_is_uploaded(how, tmp_path, monkeypatch):
    """The whole folder, to where and as private as was asked, with our card."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls.append(("private", private))
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, kwargs))
            assert "LinVT on" in (Path(folder_path) / "README.md").read_text()

    model, processor = wrapped("mipha")
    monkeypatch.setattr(sys.modules[type(model).push_to_hub.__module__], "HfApi", Api)
    settings = {"processor": processor, "private": True, "token": "secret", "commit_message": "first"}
    if how == "push_to_hub":
        model.push_to_hub("me/model", **settings)
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model", **settings)
    token, private, (repo_id, names, rest) = calls
    assert token == ("token", "secret")
    assert private == ("private", True)
    assert repo_id == "me/model"
    assert {"model.safetensors", "processor_config.json", "tokenizer.json", "pipeline_linvt.py", "README.md"} <= names
    assert rest == {"commit_message": "first"}


def test_what_the_card_says_of_training(tmp_path):
    """That there was none, only where that is known."""
    wrapped("mipha")[0].save_pretrained(tmp_path / "fresh")
    assert "None yet: the video tokenizer" in (tmp_path / "fresh" / "README.md").read_text()
    LinVTForConditionalGeneration.from_pretrained(tmp_path / "fresh").save_pretrained(tmp_path / "loaded")
    assert "## Training\n\nNot recorded.\n" in (tmp_path / "loaded" / "README.md").read_text()


def test_a_card_that_is_there_stays(tmp_path):
    model, _ = wrapped("mipha")
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
