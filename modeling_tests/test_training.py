"""Recipes and runs: what they say, what they change, and that a killed run goes on as if nothing had happened."""

import copy
import dataclasses
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from test_modeling import IMAGE, logits
from tiny_bases import TINY_LINVT
from tiny_models import base_folder, chat, encode, noise_video, wrapped
from torch.overrides import TorchFunctionMode
from training_data import data_file, linvt_folder, losses, recipe, weights
from transformers import TrainerCallback

from linvt_hf import LinVTConfig, LinVTForConditionalGeneration, LinVTProcessor
from linvt_hf.cli import main
from linvt_hf.training import (
    ChatDataset,
    DataSource,
    LoraSettings,
    TrainingSettings,
    load_adapter,
    merge,
    read_settings,
    save_adapter,
    train,
)
from linvt_hf.training import recipe as recipe_module
from linvt_hf.training import trainer as trainer_module
from linvt_hf.training.adapters import adapters_off, add_lora
from linvt_hf.training.feature_cache import FeatureCache
from linvt_hf.training.preparation import load_model, prepare
from linvt_hf.training.run_folder import begin, copy_adapter
from linvt_hf.training.settings import PRESETS, SettingsError
from linvt_hf.training.trainer import last_checkpoint, parameter_groups

LORA = LoraSettings(rank=4)

# ---- recipes ----


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PRESETS.rglob("*.yaml")) if path.parent.name != "shapes"],
    ids=lambda path: path.relative_to(PRESETS).as_posix(),
)
def test_presets(path):
    name = path.relative_to(PRESETS).with_suffix("").as_posix()
    settings = read_settings(name, ["model=a/model", "output=out", "data=x.jsonl"])
    assert (settings.lora is not None) == name.endswith("stage2")
    assert settings.model == "a/model" and [source.path for source in settings.data] == ["x.jsonl"]
    assert (settings.weight_decay, settings.warmup, settings.schedule, settings.epochs) == (0.01, 0.03, "cosine", 1)
    assert settings.batch_size * settings.accumulation == 8  # what differs is how a step is divided
    if settings.lora:
        assert settings.lora == LoraSettings(16, 32, 0.05, None)


def test_recipes_of_the_small_model():
    one, two = read_settings("shapes/stage1"), read_settings("shapes/stage2")
    assert two.model == one.output and one.lora is None and two.lora == LoraSettings(16, 32, 0.0, None)
    assert LinVTConfig(hidden_size=8, **one.linvt).num_video_tokens == 32


def test_every_base_of_the_paper_has_recipes():
    folders = {path.name for path in PRESETS.iterdir() if path.is_dir()}
    assert folders == {"blip3", "molmo", "mipha", "internvl2", "qwen2_vl", "aquila", "shapes"}


def test_extends_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "extends: stage2\nmodel: m\noutput: o\nlora:\n  rank: 8\n"
        "data:\n  - x.jsonl\n  - {path: y.jsonl, weight: 0.5, num_frames: 4}\neval_data: z.jsonl\n"
    )
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nlora: {dropout: 0}\nlearning_rate: 3e-4\n")
    settings = read_settings(tmp_path / "b.yaml", ["lora.alpha=4", "bf16=true", "linvt.num_heads=4", "max_steps=null"])
    assert settings.lora == LoraSettings(8, 4, 0.0)
    assert settings.learning_rate == 3e-4  # YAML 1.1 reads it as text
    assert [(s.path, s.weight, s.num_frames) for s in settings.data] == [("x.jsonl", 1.0, None), ("y.jsonl", 0.5, 4)]
    assert settings.bf16 is True and settings.linvt == {"num_heads": 4} and settings.max_steps is None
    assert read_settings(tmp_path / "b.yaml", ["lora=null"]).lora is None
    assert settings.eval_data == [DataSource("z.jsonl")]
    assert read_settings(tmp_path / "b.yaml", ["eval_data=null"]).eval_data == []
    (tmp_path / "stage1.yaml").write_text("extends: stage1\nmodel: m\noutput: o\n")  # the shipped one, not itself
    assert read_settings(tmp_path / "stage1.yaml").model == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: m\nlearning_rat: 1e-4\n",
            "r.yaml, line 2: there is no setting learning_rat; did you mean learning_rate",
        ),
        ("lora:\n  rank: 4\n  rnak: 8\n", "r.yaml, line 3: there is no setting lora.rnak; did you mean lora.rank?"),
        (
            "data:\n  - path: x\n    wait: 2\n",
            "line 3: there is no setting data[0].wait; did you mean data[0].weight",
        ),
        ("data:\n  - weight: 2\n", "r.yaml, line 2: data[0].path is missing."),
        ("data:\n  - path: x\n    weight: -2\n", "r.yaml, line 2: x: weight is -2.0; it must be above 0"),
        ("\nbatch_size: many\n", "r.yaml, line 2: batch_size must be a whole number, not 'many'."),
        ("batch_size: 2.5\n", "line 1: batch_size must be a whole number, not 2.5."),
        ("batch_size: true\n", "line 1: batch_size must be a whole number, not True."),
        ("epochs: [1]\n", "line 1: epochs must be a number, not a list."),
        ("bf16: 1\n", "line 1: bf16 must be true or false, not 1."),
        ("lora: 16\n", "line 1: lora must be a mapping of keys to values, not 16."),
        (
            "schedule: cosin\n",
            "line 1: schedule is one of cosine, linear, constant, constant_with_warmup; got 'cosin'.",
        ),
        ("dtype: bf16\n", "line 1: dtype is one of auto, bfloat16, float16, float32; got 'bf16'."),
        ("model: m\noutput: o\nnum_frames: 0\n", "line 3: num_frames must be at least 1; got 0."),
        ("model: m\noutput: o\nlora:\n  dropout: 1.5\n", "line 4: lora.dropout is a share of the inputs, below 1"),
        (
            "model: m\noutput: o\nlinvt:\n  num_heads: 4\n  num_seleted_tokens: 9\n",
            "line 5: linvt.num_seleted_tokens is no field of LinVTConfig; did you mean num_selected_tokens?",
        ),
        (
            "model: m\noutput: o\nlinvt:\n  bottleneck_size: 8\n  num_heads: x\n",
            "line 5: linvt.num_heads does not fit: Validation error for field 'num_heads': TypeError: ",
        ),
        ("model: m\noutput: o\nlinvt:\n  num_heads: 7\n", "line 4: linvt.num_heads does not fit: bottleneck_size"),
        ("turns: both\n", "line 1: turns is one of each, all; got 'both'."),
        ("model: m\noutput: o\nbatch_size: 0\n", "r.yaml, line 3: batch_size must be at least 1; got 0."),
        ("model: m\noutput: o\nlora: {rank: 0}\n", "r.yaml, line 3: lora.rank must be at least 1; got 0."),
        ("model: m\noutput: o\nwarmup: 100\n", "line 3: warmup is a share of all steps, below 1; got 100.0."),
        ("model: m\noutput: o\nfreeze_linvt: true\n", "line 3: freeze_linvt leaves nothing to learn"),
        ("output: o\n", "model is missing; say model=... or set it in the recipe."),
        ("a: [1\nb: 2\n", "r.yaml, line 2: this is not YAML"),
        ("a: 1\na: 2\n", "r.yaml, line 2: a stands here twice; keep one."),
        ("- 1\n", "line 1: a recipe is a mapping of keys to values, not a list."),
        (
            "extends: nosuch\n",
            "r.yaml, line 1: There is no recipe nosuch, neither as a file nor among the shipped",
        ),
        ("extends: r.yaml\n", "r.yaml: extends itself"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(text, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SettingsError) as error:
        read_settings(tmp_path / "r.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert capsys.readouterr().err.strip() == f"linvt: {error.value}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("lora.rnk=3", "lora.rnk=3: there is no setting lora.rnk; did you mean lora.rank?"),
        ("epochs=none", "epochs=none: epochs must be a number, not 'none'."),
        ("data=[a", "data=[a: this is not YAML"),
        ("weight_decay=.nan", "weight_decay=.nan: weight_decay must be a finite number; got nan."),
        ("epochs=.inf", "epochs=.inf: epochs must be a finite number; got inf."),
        ("lora={dropout: .nan}", "lora.dropout must be a finite number; got nan."),
        ("data={path: x, weight: .inf}", "x: weight is inf; it must be above 0 and finite"),
        (
            "data={path: x, fps: .nan}",
            "x: num_frames must be at least 1 and fps above 0 and finite; got None and nan.",
        ),
        ("accumulation=0", "accumulation=0: accumulation must be at least 1; got 0."),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(SettingsError) as error:
        read_settings("stage1", ["model=m", "output=o", override])
    assert message in str(error.value)


def test_no_such_recipe():
    with pytest.raises(SettingsError, match="There is no recipe qwen/stage1, .*qwen2_vl/stage1"):
        read_settings("qwen/stage1")


def test_targets_as_python_has_them():
    assert LoraSettings(targets=("q_proj", "v_proj")) == LoraSettings(targets=["q_proj", "v_proj"])


def test_paths_as_python_has_them():
    settings = TrainingSettings(
        model=Path("m"), output=Path("o"), base=Path("b"), feature_cache=Path("c"),
        data=["x.jsonl", Path("y.jsonl"), DataSource(Path("z.jsonl"), media=Path("v"))], eval_data="e.jsonl",
    )  # fmt: skip
    assert [source.path for source in settings.data + settings.eval_data] == [f"{name}.jsonl" for name in "xyze"]
    yaml.safe_dump(settings.to_dict())  # which takes texts alone


# ---- what a run changes ----


def test_ten_steps_lower_the_loss(tmp_path):
    run = train(recipe("internvl_qwen2", tmp_path / "1", max_steps=10, batch_size=8, learning_rate=3e-2))
    second = recipe(
        "internvl_qwen2", tmp_path / "2", model=str(tmp_path / "1"), lora=LORA, lora_learning_rate=3e-2, max_steps=10
    )
    assert losses(run)[-1] < losses(run)[0] - 0.05
    after = train(second)
    assert losses(after)[-1] < losses(run)[-1] - 0.3


@pytest.mark.parametrize(
    ("name", "values", "changed"),
    [
        ("qwen2_vl", {}, ["video_tokenizer."]),
        ("internvl_phi3", {"lora": LORA}, ["video_tokenizer.", "lora_"]),
        ("internvl_phi3", {"lora": LORA, "freeze_linvt": True}, ["lora_"]),
        ("mipha", {"lora": LORA, "train_projector": True}, ["video_tokenizer.", "lora_", "multi_modal_projector"]),
        ("qwen2_vl", {"freeze_linvt": True, "train_projector": True}, ["base.model.visual.merger"]),
    ],
)
def test_only_what_learns_changes(name, values, changed, tmp_path):
    before = weights(LinVTForConditionalGeneration.from_pretrained(linvt_folder(name)))
    run = train(recipe(name, tmp_path, max_steps=3, **values))
    after = weights(run.model)
    learned = {key for key in after if any(part in key for part in changed)}
    assert {key for key in before if key not in learned and not torch.equal(before[key], after[key])} == set()
    assert after.keys() - before.keys() == {key for key in after if "lora_" in key}
    same = {key for key in learned & before.keys() if torch.equal(before[key], after[key])}
    assert same == set()
    assert all(after[key].any() for key in after if "lora_B" in key)
    # The folder holds exactly that.
    loaded = weights(load_adapter(tmp_path)[0])
    assert loaded.keys() == after.keys() and all(torch.equal(loaded[key], after[key]) for key in after)


def test_rates_and_decay():
    model, _ = copy.deepcopy(wrapped("internvl_qwen2"))
    settings = TrainingSettings(
        model="m", output="o", lora=LORA, train_projector=True, gradient_checkpointing=False,
        learning_rate=1.0, lora_learning_rate=2.0, projector_learning_rate=3.0,
    )  # fmt: skip
    prepare(model, settings)
    groups = {group["name"]: group for group in parameter_groups(model, settings)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {key: {names[parameter] for parameter in group["params"]} for key, group in groups.items()}
    assert {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()} == {
        "linvt": (1.0, 0.01),
        "linvt/no_decay": (1.0, 0.0),
        "lora": (2.0, 0.01),
        "projector": (3.0, 0.01),
        "projector/no_decay": (3.0, 0.0),
    }
    assert set().union(*found.values()) == {name for name, p in model.named_parameters() if p.requires_grad}
    free = found["linvt/no_decay"]
    for name in ("aggregator.queries", "aggregator.centers", "aggregator.log_widths", "scorer.novelty_gain"):
        assert f"video_tokenizer.{name}" in free
    assert all(len(model.get_parameter(name).shape) > 1 for name in found["linvt"])
    assert any("norm" in name and name.endswith("weight") for name in free)


def test_half_precision(tmp_path):
    """LinVT and LoRA learn in float32, since steps this small vanish in bfloat16; the base stays as it is."""
    name = "internvl_qwen2"
    half = tmp_path / "half"
    model = LinVTForConditionalGeneration.from_pretrained(linvt_folder(name), dtype=torch.bfloat16)
    model.save_pretrained(half, processor=LinVTProcessor.from_pretrained(linvt_folder(name)))
    before = weights(model)
    weighing = [[], []]  # what the last softmax gets and gives

    class Listen(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            plain = model.video_tokenizer.aggregator._weigh

            def weigh(queries, *rest):
                weighing[0].append(queries)
                weighing[1].append(plain(queries, *rest))
                return weighing[1][-1]

            model.video_tokenizer.aggregator._weigh = weigh

    values = {"model": str(half), "bf16": True, "lora": LORA, "learning_rate": 6e-5, "max_steps": 2}
    run = train(recipe(name, tmp_path / "run", **values), callbacks=[Listen()])
    saved = load_file(tmp_path / "run" / "linvt.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    centers = "video_tokenizer.aggregator.centers"
    assert not torch.equal(saved[centers], before[centers].float())
    assert all(
        torch.equal(before[k], v) for k, v in weights(run.model).items() if k.startswith("base.") and k in before
    )
    assert {tensor.dtype for tensor in weighing[0]} == {torch.float32} == {tensor.dtype for tensor in weighing[1]}
    # Afterwards it answers in the base's dtype, as a loaded one does.
    assert {p.dtype for n, p in run.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    inputs = encode(run.processor, chat(noise_video(), "What moves?"))
    assert torch.equal(logits(run.model, inputs), logits(load_adapter(tmp_path / "run")[0], inputs))
    with pytest.raises(SettingsError, match="dtype bfloat16 needs bf16: true"):
        train(recipe(name, tmp_path / "other", **{**values, "bf16": False, "dtype": "bfloat16"}))


def test_the_base_drops_nothing_out():
    model, processor = copy.deepcopy(wrapped("mipha"))
    for module in model.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for rate in ("attention_dropout", "dropout"):  # mipha's SigLIP calls it dropout
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.5)
    prepare(model, TrainingSettings(model="m", output="o", lora=LoraSettings(dropout=0.3)))
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    model.train()
    with adapters_off(model):
        torch.testing.assert_close(model(**inputs).logits, logits(wrapped("mipha")[0], inputs))
    assert any(module.p == 0.3 for name, module in model.named_modules() if "lora_dropout.default" in name)
    prepare(model, TrainingSettings(model="m", output="o"))  # nor does a LoRA that learns nothing
    assert not any(module.p for module in model.base.modules() if isinstance(module, torch.nn.Dropout))


def test_checkpointing_leaves_the_vision_tower_alone():
    model, processor = copy.deepcopy(wrapped("qwen2_vl"))
    prepare(model, TrainingSettings(model="m", output="o", gradient_checkpointing=True))
    asked = []
    model.base.model.visual.register_forward_hook(lambda *args: asked.append(args[2].pooler_output.requires_grad))
    model.train()(**encode(processor, chat(noise_video(), "What moves?"))).logits.sum().backward()
    assert asked and not any(asked)
    assert model.video_tokenizer.scorer.project.weight.grad.any()


def test_accumulation_is_one_large_batch(tmp_path):
    values = {"max_steps": 2, "eval_data": [DataSource(str(data_file(videos=7)))]}
    large = train(recipe("llava_onevision", tmp_path / "large", batch_size=8, **values))
    small = train(recipe("llava_onevision", tmp_path / "small", batch_size=2, accumulation=4, **values))
    torch.testing.assert_close(losses(small), losses(large), rtol=1e-5, atol=1e-5)
    # Nor does the evaluation loss depend on it: answers of several lengths, and a last batch that is not full.
    evaluations = [[e["eval_loss"] for e in run.history if "eval_loss" in e] for run in (large, small)]
    torch.testing.assert_close(*evaluations, rtol=1e-5, atol=1e-5)
    inputs = small.processor.collate([*ChatDataset(values["eval_data"], small.processor)][:7])
    with torch.no_grad():
        assert evaluations[1] == pytest.approx([float(small.model(**inputs).loss)], rel=1e-5)


# ---- parameters that a batch leaves out ----


@pytest.mark.parametrize("content", [("Who are you?",), (IMAGE, "What is it?")], ids=["text", "image"])
def test_parameters_that_a_batch_leaves_out(content):
    model, processor = copy.deepcopy(wrapped("qwen2_vl"))
    inputs = encode(processor, chat(*content, answer="A."), add_generation_prompt=False)
    expected = model(**inputs, labels=inputs["input_ids"])
    prepare(model, TrainingSettings(model="m", output="o", train_projector=True, gradient_checkpointing=False))
    output = model.train()(**inputs, labels=inputs["input_ids"])
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    output.loss.backward()
    grads = [parameter.grad for parameter in model.video_tokenizer.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    assert all(p.grad is not None for p in model.base.model.visual.merger.parameters())
    model.zero_grad()
    model(**inputs).logits.sum().backward()  # who makes a loss of their own gets the same
    assert all(parameter.grad is not None for parameter in model.video_tokenizer.parameters())


def test_a_video_without_a_question_has_gradients_for_all():
    model, processor = copy.deepcopy(wrapped("mipha"))
    prepare(model, TrainingSettings(model="m", output="o", gradient_checkpointing=False))
    inputs = encode(processor, chat(noise_video(), "What moves?"), questions=False)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    text = model.video_tokenizer.question.project
    assert not text.weight.grad.any() and model.video_tokenizer.scorer.project.weight.grad.any()


def test_nothing_is_added_in_inference_or_when_nothing_learns():
    model, processor = copy.deepcopy(wrapped("mipha"))
    inputs = encode(processor, chat("Who are you?"))
    assert model.train().requires_grad_(False)(**inputs).logits.requires_grad is False
    asked = []
    model._zero_of_trained = lambda: asked.append(1)
    model.requires_grad_(True).eval()(**inputs)
    with torch.no_grad():
        model.train()(**inputs)
    assert not asked


# ---- runs that stop and go on ----

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from linvt_hf.training import trainer, train, read_settings
plain = trainer.Report.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    plain(self, args, state, control, **kwargs)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Report.on_step_end = on_step_end
train(read_settings(sys.argv[1]))
"""


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    """
    With dropout, accumulation, evaluation and a part of the data that changes with the epoch; killed in the middle of
    the second, between two checkpoints, with one of them half written.
    """
    values = {
        "data": DataSource(str(data_file(videos=20)), weight=0.5),
        "lora": LoraSettings(rank=4, dropout=0.2),
        "max_steps": 7,
        "batch_size": 2,
        "accumulation": 2,
        "save_every": 2,
        "eval_every": 3,
        "eval_data": [DataSource(str(data_file(videos=3)))],
    }
    whole = train(recipe("internvl_qwen2", tmp_path / "whole", **values))
    settings = recipe("internvl_qwen2", tmp_path / "killed", **values)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml")], capture_output=True, text=True, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    torn = tmp_path / "killed" / "checkpoint-6"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_')
    said = []
    resumed = train(settings, say=said.append)
    assert "going on from checkpoint-4" in said[-1]
    assert resumed.history[-1]["step"] == 7
    expected, got = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert losses(resumed) == losses(whole)
    states = [torch.load(run.folder / "checkpoint-7" / "optimizer.pt", weights_only=True) for run in (whole, resumed)]
    for key, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in state.items())
    assert resumed.best is not None and (resumed.best / "linvt.safetensors").is_file()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in resumed.history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.get)
    where = [path for path in (resumed.folder / f"checkpoint-{best}", resumed.folder) if path.is_dir()][0]
    for name, tensor in load_file(where / "linvt.safetensors").items():
        assert torch.equal(tensor, load_file(resumed.best / "linvt.safetensors")[name])


def test_other_data_do_not_go_on(tmp_path):
    rows = data_file().read_text().replace('"path": "', f'"path": "{data_file().parent}/').splitlines()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(rows))
    train(recipe("mipha", tmp_path / "out", data=data, max_steps=2))
    data.write_text("\n".join(reversed(rows)))
    with pytest.raises(SettingsError, match="holds a run on other data: .*data.jsonl changed since it began"):
        train(recipe("mipha", tmp_path / "out", data=data, max_steps=2))
    (tmp_path / "out" / "data.json").unlink()  # one that began before there were digests
    assert len(losses(train(recipe("mipha", tmp_path / "out", data=data, max_steps=2)))) == 2


def test_other_settings_do_not_go_on(tmp_path):
    train(recipe("mipha", tmp_path, max_steps=2))
    with pytest.raises(SettingsError, match=r"other settings: learning_rate \(0.01 there, 0.02 here\)"):
        train(recipe("mipha", tmp_path, max_steps=2, learning_rate=0.02))
    with pytest.raises(SettingsError, match="holds a run already and resume is off"):
        train(recipe("mipha", tmp_path, max_steps=2, resume=False))
    assert len(losses(train(recipe("mipha", tmp_path, max_steps=2, log_every=7)))) == 2  # it is done already
    with pytest.raises(SettingsError, match="is the model's own folder; choose another output"):
        train(recipe("mipha", tmp_path, model=str(tmp_path), lora=LORA))


@pytest.mark.parametrize("held", ["finished adapters", "a whole model"])
def test_what_would_be_overwritten_stays(held, tmp_path):
    model, _ = copy.deepcopy(wrapped("mipha"))
    if held == "a whole model":
        model.save_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match=f"holds {held}; choose another output"):
        train(recipe("mipha", tmp_path))
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("held", ["best", "README.md", "settings.yaml", "skipped.jsonl", "checkpoint-2"])
def test_what_a_user_keeps_there_stays(held, tmp_path):
    (tmp_path / held).write_text("mine: 1\n")
    with pytest.raises(SettingsError, match=f"holds {held}, which no run of this wrote; .*nothing was written"):
        train(recipe("mipha", tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine: 1\n"]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path):
    settings = recipe("mipha", tmp_path, max_steps=1, feature_cache=tmp_path / "features")
    begin(settings, tmp_path, {})
    for name in ("tensorboard", "checkpoint-1", "features"):
        (tmp_path / name).mkdir()
    (tmp_path / "skipped.jsonl").write_text("")
    (tmp_path / "train.log").write_text("of whoever started it")
    assert len(losses(train(settings))) == 1


def test_only_adapters_are_taken_out_of_best(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "linvt_adapter.json").write_text("{}")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("mine")
    copy_adapter(tmp_path / "checkpoint-1", tmp_path / "best")
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"mine.txt", "linvt_adapter.json"}
    copy_adapter(tmp_path / "checkpoint-1", tmp_path / "best")  # now it holds adapters
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"linvt_adapter.json"}


# ---- where models come from, and what is reported ----


def test_an_image_llm_is_wrapped_on_the_way(tmp_path):
    settings = recipe("mipha", tmp_path, model=str(base_folder("mipha")), linvt=TINY_LINVT, num_frames=4, max_steps=1)
    run = train(settings)
    assert run.model.config.num_video_tokens == 8 and run.processor.num_frames == 4
    content = json.loads((tmp_path / "linvt_adapter.json").read_text())
    assert (tmp_path / content["local_base"]).resolve() == base_folder("mipha").resolve()
    for model, message in [(linvt_folder("mipha"), "a LinVT model"), (tmp_path, "adapters")]:
        with pytest.raises(SettingsError, match=f"holds {message}, which have their settings; take linvt: out"):
            train(recipe("mipha", tmp_path / "x", model=str(model), linvt=TINY_LINVT))
    with pytest.raises(SettingsError, match="There is no model at no/such that can be loaded: .+"):
        train(recipe("mipha", tmp_path / "x", model="no/such"))


def test_a_base_that_is_elsewhere(tmp_path):
    model, processor = wrapped("mipha")
    model.save_pretrained(tmp_path / "whole", processor=processor)
    save_adapter(LinVTForConditionalGeneration.from_pretrained(tmp_path / "whole"), tmp_path / "adapter", processor)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    model, _ = load_model(TrainingSettings(model=tmp_path / "adapter", base=moved, output="o"), autocast=False)
    assert model.name_or_path == str(moved)
    with pytest.raises(SettingsError, match="moved holds no adapters, so there is no base to name; take base out"):
        load_model(TrainingSettings(model=moved, base=moved, output="o"), autocast=False)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (4, 1.0)),
        ({"fps": 2.0}, (4, 2.0)),
        ({"num_frames": 3}, (3, None)),
        ({"num_frames": 3, "fps": 2.0}, (3, 2.0)),
    ],
)
def test_sampling_as_in_training(asked, expected, tmp_path):
    """A rate alone leaves the limit of frames; a number alone is read without a rate, also where there was one."""
    model, processor = copy.deepcopy(wrapped("mipha"))
    processor.fps = 1.0
    model.save_pretrained(tmp_path, processor=processor)
    _, processor = load_model(TrainingSettings(model=tmp_path, output="o", **asked), autocast=False)
    assert (processor.num_frames, processor.fps) == expected


def test_a_lora_that_is_there_already():
    model, _ = copy.deepcopy(wrapped("mipha"))
    add_lora(model, rank=4, alpha=32, dropout=0.05)
    prepare(model, TrainingSettings(model="m", output="o", lora=LORA))
    for other, message in [
        (LoraSettings(8), "a LoRA with rank 4, and lora: asks for 8"),
        (LoraSettings(4, dropout=0.0), "with dropout 0.05, and lora: asks for 0.0"),
        (LoraSettings(4, targets=["fc1"]), "with targets .*; merge it first"),
    ]:
        with pytest.raises(SettingsError, match=message):
            prepare(model, TrainingSettings(model="m", output="o", lora=other))


def test_folders_without_the_token_type_of_answers(tmp_path):
    model, processor = wrapped("paligemma")
    model.save_pretrained(tmp_path, processor=processor)
    assert LinVTProcessor.from_pretrained(tmp_path).answer_token_type == 1
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    del saved["answer_token_type"]
    file.write_text(json.dumps(saved))
    settings = TrainingSettings(model=str(tmp_path), output="o")
    assert load_model(settings, autocast=False)[1].answer_token_type == 1


def test_a_model_and_samples_in_memory(tmp_path):
    model, processor = copy.deepcopy(wrapped("internvl_llama"))
    rows = []
    for index in range(4):
        sample = encode(processor, chat(noise_video(seed=index), "What?", answer="B"), add_generation_prompt=False)
        sample["labels"] = sample["input_ids"].clone()
        rows.append(sample)
    settings = TrainingSettings(output=tmp_path / "run", max_steps=2, batch_size=2, workers=0, log_every=1)
    with pytest.raises(SettingsError, match="without its processor; pass"):
        train(settings, model=model, data=rows)
    settings = dataclasses.replace(settings, num_frames=2)
    run = train(settings, model=model, processor=processor, data=rows)
    assert run.model is model and len(losses(run)) == 2
    assert LinVTProcessor.from_pretrained(tmp_path / "run").num_frames == 2
    merge(run.model).save_pretrained(tmp_path / "whole")
    assert "| steps | 2 of 2 |" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize("folder", ["cache", None])
def test_cached_features_give_the_same_run(folder, tmp_path, monkeypatch):
    plain = train(recipe("internvl_qwen2", tmp_path / "a", max_steps=2))
    done, wait, fill = [], Accelerator.wait_for_everyone, FeatureCache.fill
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: done.append("waited") or wait(self))
    monkeypatch.setattr(FeatureCache, "fill", lambda *args, **kwargs: done.append(fill(*args, **kwargs)))
    values = {"feature_memory": True} if folder is None else {"feature_cache": tmp_path / folder}
    cached = train(recipe("internvl_qwen2", tmp_path / "b", max_steps=2, **values))
    torch.testing.assert_close(losses(cached), losses(plain), rtol=1e-5, atol=1e-5)
    # A process that began to read earlier could report what another is about to forget.
    assert done[:2] == ["waited", 8]
    assert len(list(tmp_path.rglob("cache/*/*.safetensors"))) == (8 if folder else 0)


def test_the_first_rate_counts_training_alone(tmp_path, monkeypatch):
    def days(trainer, datasets):
        trainer.since -= 1e6

    monkeypatch.setattr(recipe_module, "_fill_features", days)
    data = ChatDataset([DataSource(data_file())], wrapped("mipha")[1])
    settings = recipe("mipha", tmp_path, max_steps=1, feature_memory=True, feature_cache=tmp_path)
    assert train(settings, data=data).history[0]["samples_per_second"] > 1e-3


def test_no_float64_on_the_device(tmp_path):
    """Apple's has none."""

    class Refuse(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert getattr(result, "dtype", None) != torch.float64, function
            return result

    with Refuse():
        run = train(recipe("mipha", tmp_path, max_steps=1, eval_data=data_file(videos=3)))
    assert {"samples_per_second", "eval_loss"} <= {name for entry in run.history for name in entry}


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_the_gpu_has_it(native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    args = SimpleNamespace(device=torch.device("cuda"))
    assert recipe_module._autocast(TrainingSettings(), args) is native


def test_what_a_user_sees(tmp_path):
    """From the command: readable, nothing that one cannot act on, and everything in its place."""
    from huggingface_hub import ModelCard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It."}]
    broken = {"video": "broken.mp4", "conversations": turns}
    rows = data_file().read_text().replace('"path": "', f'"path": "{data_file().parent}/')
    data.write_text(rows + "\n" + json.dumps(broken))
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    command = [
        "train", "qwen2_vl/stage2", f"model={linvt_folder('qwen2_vl')}",
        f"data={{path: {data}, media: {tmp_path}}}", f"eval_data={data_file()}",
        f"output={tmp_path / 'out'}", "max_steps=5", "batch_size=9", "accumulation=1", "log_every=1", "workers=0",
    ]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "linvt_hf.cli", *command], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step") and "samples/s" in line]
    assert steps == [f"{n}/5" for n in range(1, 6)]
    assert f"  {tmp_path / 'broken.mp4'}: " in process.stdout and "skipped, 1 in all" in process.stdout
    assert "the adapters after the last step, loss" in process.stdout
    said = [line for line in process.stderr.splitlines() if line.startswith("linvt: ")]
    assert said[0] == f"linvt: loading {linvt_folder('qwen2_vl')}"
    assert said[2].startswith("linvt: parameters that learn: LinVT ") and ", LoRA " in said[2]
    assert said[3].startswith("linvt: 9 samples, 9 a step, 8 for evaluation")
    noise = [line for line in process.stderr.splitlines() if "warn" in line.lower() or "deprecat" in line.lower()]
    assert noise == []

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/samples_per_second",
        "train/tokens_per_second",
        "learning_rate/linvt",
        "learning_rate/lora",
        "eval_loss",
    } <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    rates = [events.Scalars(f"learning_rate/{part}")[1].value for part in ("linvt", "lora")]
    assert rates == pytest.approx([2e-5, 6e-5])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| steps | 5 of 5 |" in card.text and "lora_learning_rate: 6.0e-05" in card.text
    for file in (tmp_path / "out" / "best").iterdir():  # a machine's paths are nobody's business
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    files = {path.name for path in (tmp_path / "out" / "best").iterdir()}
    assert {"linvt.safetensors", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not {name for name in files if name.startswith(("optimizer", "rng"))}
    assert not list(Path(tmp_path / "out").rglob("*.bin"))


def test_mistakes_from_the_command(tmp_path, capsys):
    out = f"output={tmp_path / 'out'}"
    model = f"model={linvt_folder('mipha')}"
    for arguments, message in [
        (["stage1", model, out], "data is missing"),
        (["stage1", model, out, "data=no.jsonl"], "no.jsonl"),
        (["stage1", "model=no/such", out, f"data={data_file()}"], "There is no model at no/such"),
        (["nosuch", model, out], "There is no recipe nosuch"),
        (["stage2", model, out, f"data={data_file()}", "lora.targets=[gate_proj]"], "lora.targets names gate_proj"),
    ]:
        assert main(["train", *arguments]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if message in line]
        assert len(errors) == 1 and errors[0].startswith("linvt: ")
    assert not (tmp_path / "out").exists()


def train_command(tmp_path, **values):
    defaults = {"model": linvt_folder("mipha"), "output": tmp_path / "out", "data": data_file(), "max_steps": 2}
    return ["train", "stage1", *(f"{key}={value}" for key, value in {**defaults, "workers": 0, **values}.items())]


def test_show(tmp_path, capsys):
    assert main([*train_command(tmp_path, seed=7), "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_fails_says_where(workers, tmp_path, capfd, monkeypatch):
    def broken(*args):
        raise ValueError("x.jsonl:3: is no good.")

    monkeypatch.setattr(ChatDataset, "_encode", broken)
    assert main(train_command(tmp_path, workers=workers)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("linvt: ") and lines[-1].endswith("x.jsonl:3: is no good.")
    assert any("in broken" in line for line in lines)


def test_interrupted(tmp_path, capsys, monkeypatch, request):
    # Shells let what they start in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    closed = []
    plain = trainer_module.Report.close
    monkeypatch.setattr(trainer_module.Report, "close", lambda self: closed.append(1) or plain(self))
    monkeypatch.setattr(trainer_module.Report, "on_step_end", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    assert main(train_command(tmp_path)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "linvt: interrupted; the same command goes on from the last checkpoint."
    assert closed


def test_packages_that_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(train_command(tmp_path)) == 2
    assert capsys.readouterr().err == "linvt: Training needs tensorboard: pip install 'linvt_hf[train]'.\n"
