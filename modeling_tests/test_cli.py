"""The `linvt` command as a user meets it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny_models import base_folder
from video_files import moving_square, write_video

from linvt_hf import LinVTForConditionalGeneration
from linvt_hf.cli import main

SMALL = [
    f"--set={pair}"
    for pair in ("bottleneck_size=16", "num_heads=2", "num_selected_tokens=12", "queries_per_scale=[4,2,2]")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "model"
    assert main(["wrap", str(base_folder("internvl_qwen2")), str(out), "--num-frames", "4", *SMALL]) == 0
    return str(out)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("cli") / "v.mp4", moving_square(16)))


def test_wrap(model):
    config = LinVTForConditionalGeneration.from_pretrained(model).config
    assert config.queries_per_scale == [4, 2, 2]
    assert config.num_selected_tokens == 12


def test_ask(model, video, capsys):
    assert main(["ask", model, video, "What moves?", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr()
    assert main(["ask", model, video, "What moves?", "--max-new-tokens", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["question"] == "What moves?"
    assert printed.out.strip() == result["answer"]
    assert "reading" in printed.err  # progress goes beside the answer, not into it


def test_choices(model, video, capsys):
    assert main(["ask", model, video, "What moves?", "--choices", "red", "blue", "--num-frames", "2", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {answer["answer"] for answer in answers} == {"red", "blue"}
    assert main(["ask", model, video, "What moves?", "Who?", "--max-new-tokens", "5", "--json"]) == 0
    several = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in several] == ["What moves?", "Who?"]
    assert main(["ask", model, video, "What moves?", "Who?", "--max-new-tokens", "5"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in ("What moves?", "Who?")] == [
        "What moves?",
        "Who?",
    ]
    assert main(["ask", model, video, "What moves?", "--choices", "red", "blue"]) == 0
    assert capsys.readouterr().out.count("%") == 2


def test_what_is_left_of_a_damaged_file(model, video, tmp_path, capsys):
    whole = write_video(tmp_path / "whole.mp4", moving_square(16), faststart=True).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    asked = ["ask", model, str(tmp_path / "cut.mp4"), "What moves?", "--max-new-tokens", "2"]
    assert main(asked) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main([*asked, "--on-error", "keep"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{model}", "nosuch.mp4", "Who?"], "no video at nosuch.mp4"),
        (["ask", "{model}", "{video}", " "], "A question has no words"),
        (["ask", "{base}", "{video}", "Who?"], "is a internvl model, not a LinVT one"),
        (["ask", "{model}", "{model}/config.json", "Who?"], "config.json"),
        (["wrap", "{base}", "{model}"], "not an empty folder"),
        (["wrap", "{base}", "{new}", "--set", "no_such=1"], "a field of LinVTConfig"),
        (["wrap", "{base}", "{new}", "--set", "num_heads=x"], "not JSON"),
        (["wrap", "{base}", "{new}", "--set", "num_heads=7"], "must be a multiple of num_heads"),
        (["wrap", "{base}", "{new}", "--set", 'num_heads="x"'], "'num_heads' expected int, got str (value: 'x')"),
        (["wrap", "no/such", "{new}"], "no model at no/such that can be loaded: "),
        (["wrap", "{model}", "{new}"], "is a LinVT model or processor already"),
        (["wrap", "{base}", "{new}", "--num-frames", "0"], "num_frames must be at least 1"),
        (["ask", "no/such", "{video}", "Who?"], "no model at no/such"),
        (["ask", "{empty}", "{video}", "Who?"], "that can be loaded: it holds no config.json"),
        (["convert", "{empty}", "{new}"], "that can be loaded: it holds no config.json"),
        (["ask", "{damaged}", "{video}", "Who?"], "are cut short or damaged"),
        (["wrap", "{damaged_base}", "{new}"], "are cut short or damaged"),
        (["ask", "{model}", "{video}", "Who?", "--base", "b"], "is a whole model and needs no base; leave b out"),
        (["serve", "{model}", "--port", "99999"], "--port is 99999; ports are 0 to 65535"),
        (["ask", "{model}", "{video}", "Who?", "--start", "1", "--end", "0.5"], "start must be before end"),
        (["ask", "{model}", "{video}", "Who?", "--device", "nosuch"], "nosuch"),
    ],
)
def test_one_sentence_and_exit_status_2(arguments, message, model, video, tmp_path, capsys):
    places = {"model": model, "video": video, "base": str(base_folder("internvl_qwen2"))}
    places |= {name: str(tmp_path / name) for name in ("new", "empty", "damaged", "damaged_base")}
    (tmp_path / "empty").mkdir()
    for name, whole in (("damaged", model), ("damaged_base", places["base"])):
        shutil.copytree(whole, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert main([argument.format(**places) for argument in arguments]) == 2
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("linvt: ") and not line.endswith("...")
    ]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "m", "v", "Who?", "--num-frames", "0"],
        ["ask", "m", "v", "Who?", "--fps", "0"],
        ["batch", "m", "v", "--output", "o", "--batch-size", "-1"],
        ["batch", "m", "v", "--output", "o", "--chunk", "0"],
        ["eval", "m", "--tasks", "t", "--output", "o", "--batch-size", "0"],
        ["serve", "m", "--batch-size", "two"],
        ["explain", "m", "v", "Who?", "--out", "o", "--end", "-1"],
    ],
)
def test_numbers_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    name, value = arguments[-2:]
    assert re.search(
        f"argument {name}: {value} is no ((whole )?number above 0|number of seconds)", capsys.readouterr().err
    )


def test_nobody_is_asked_to_trust_code(video, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for command in (["wrap", str(tmp_path), str(tmp_path / "new")], ["ask", str(tmp_path), video, "Who?"]):
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path} runs only with code of its own, which is not run here" in said


def test_as_a_program(model, video):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "linvt_hf.cli", *arguments], capture_output=True, text=True, check=False
        )

    assert "ask" in run("--help").stdout
    assert run("ask", model, video, "Who?", "--max-new-tokens", "2").returncode == 0
    assert run("ask", model).returncode == 2
