"""`linvt publish`: what is fit to be published passes, and what is not is named."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import wrapped

from linvt_hf.cli import main
from linvt_hf.publishing import publish as publish_module
from linvt_hf.publishing.publish import check_folder, publish
from linvt_hf.training import save_adapter

SHAPES = Path(__file__).parent.parent / "examples/linvt-shapes"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(SHAPES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_the_model_that_ships_is_fit(capsys):
    assert main(["publish", str(SHAPES), "someone/linvt-shapes", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "files for someone/linvt-shapes" in said
    assert "Asked about a video, it answers: 'a yellow square" in said and "Nothing was uploaded" in said


def broken(change):
    """Of a folder and what its problem is called; loading it is left out, since other problems come first."""
    return pytest.param(*change, id=change[1][:30])


def card(text):
    return lambda folder: (folder / "README.md").write_text(text)


def pipeline_without_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "custom_pipelines": {"x": {}}}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        broken(((lambda f: (f / "optimizer.pt").write_bytes(b"x")), "optimizer.pt may hold a pickle")),
        broken(((lambda f: (f / "README.md").unlink()), "There is no README.md")),
        broken((card("# A model\n"), "README.md has no license in its metadata")),
        broken((card("---\nlicense: mit\n library_name: x\n---\n"), "metadata of README.md cannot be read")),
        broken(
            (
                card("---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"),
                "README.md has pipeline_tag text-generation, and a LinVT model's is video-text-to-text",
            )
        ),
        broken(((lambda f: (f / "token_scorer.py").unlink()), "imports token_scorer.py, which is not there")),
        broken(((lambda f: (f / "modeling_linvt.py").unlink()), "config.json names modeling_linvt.py")),
        broken(((lambda f: (f / "token_scorer.py").write_text("def")), "token_scorer.py is no Python")),
        broken(((lambda f: (f / "model.safetensors").write_bytes(b"half")), "model.safetensors cannot be read")),
        broken(((lambda f: (f / "model.safetensors").unlink()), "There are no weights")),
        broken(
            (
                (lambda f: (f / "x.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')),
                "x.safetensors.index.json needs b.safetensors",
            )
        ),
        broken(
            ((lambda f: (f / "a.json").write_text('{"from": "/home/me/run"}')), "a path of a machine: /home/me/run")
        ),
        broken(((lambda f: (f / "a.txt").write_text("x\nhf_" + "a" * 34)), "line 2, holds a Hugging Face token")),
        broken(((lambda f: (f / "a.md").write_text("sk-" + "b" * 24)), "holds an OpenAI key")),
        broken(((lambda f: (f / "run.sh").write_text("x=hf_" + "a" * 34)), "run.sh, line 1, holds a Hugging Face")),
        broken(((lambda f: (f / "vocab.json").write_text(f'"hf_{"a" * 34}"')), "vocab.json, line 1, holds a Hugging")),
        broken(((lambda f: (f / "config.json").write_text('{"a')), "config.json is no whole JSON file: ")),
        broken(((lambda f: (f / "config.json").write_text("[]")), "config.json must hold an object with fields")),
        broken(((lambda f: (f / "a.index.json").write_text("{")), "a.index.json is no whole JSON file: ")),
        broken(((lambda f: (f / "a.index.json").write_text("{}")), "a.index.json has no weight_map")),
        broken(((lambda f: (f / "linvt_adapter.json").write_text('{"a')), "linvt_adapter.json is no whole JSON")),
        broken(((lambda f: (f / "linvt_adapter.json").write_text("[]")), "linvt_adapter.json must hold an object")),
        broken((pipeline_without_code, "custom_pipelines that names no code: KeyError('impl')")),
        broken(((lambda f: (f / "token_scorer.py").write_bytes(b"# \xff")), "token_scorer.py is no Python: ")),
    ],
)
def test_what_is_not(folder, change, problem, capsys):
    change(folder)
    assert main(["publish", str(folder), "someone/model", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert problem in said.out, said.out
    assert "is not fit to be published: " in said.err


def test_results_that_the_hub_reads(folder):
    results = folder / ".eval_results"
    results.mkdir()
    (results / "a.yaml").write_text("- dataset: {id: a/b, task_id: t}\n  value: 3\n")
    (results / "b.yaml").write_text("- dataset: {id: a/b}\n  value: 3\n")
    problems = check_folder(folder).problems
    assert len(problems) == 1 and problems[0].startswith(".eval_results/b.yaml is no result that the Hub reads")


def test_one_that_does_not_load(folder):
    config = json.loads((folder / "config.json").read_text())
    config["bottleneck_size"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    report = check_folder(folder)
    assert report.answer is None
    assert report.problems[0].startswith("It cannot be loaded and asked in a fresh process: ")


def test_code_is_needed(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert check_folder(folder).problems == [
        "config.json has no auto_map: a whole model brings its code; save it with save_pretrained."
    ]


def test_adapters(tmp_path):
    model, processor = wrapped("internvl_qwen2")
    base = tmp_path / "base"
    model.save_pretrained(base, processor=processor)
    model.name_or_path = str(base)
    save_adapter(model, tmp_path / "adapter", processor=processor)
    readme = tmp_path / "adapter/README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: apache-2.0\n", 1))
    (problem,) = check_folder(tmp_path / "adapter").problems
    assert "names no base on the Hub, and nobody else has ../base" in problem


def test_what_is_no_model(tmp_path, capsys):
    assert main(["publish", str(tmp_path), "someone/model", "--dry-run"]) == 2
    assert "it has no config.json" in capsys.readouterr().err
    assert main(["publish", str(SHAPES), "model", "--dry-run"]) == 2
    assert "on the Hub it is owner/name" in capsys.readouterr().err


def test_what_goes_up(folder, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **kwargs):
            calls.append(("create", repo, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs))
            return type("Info", (), {"commit_url": "https://huggingface.co/someone/model/commit/1"})

    monkeypatch.setattr(publish_module, "HfApi", Api)
    assert publish(folder, "someone/model", private=True).endswith("/commit/1")
    (_, repo, created), (_, uploaded) = calls
    assert repo == "someone/model" and created == {"private": True, "exist_ok": True}
    assert uploaded["folder_path"] == folder and "__pycache__/*" in uploaded["ignore_patterns"]
