"""Two processes on CPUs give what one gives, whatever each one's part of a batch holds."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import wrapped
from training_data import data_file, recipe

import linvt_hf.training
from linvt_hf.training import LoraSettings, train
from linvt_hf.training.adapter_files import trained_tensors
from linvt_hf.training.adapters import add_lora, add_projector
from linvt_hf.training.sources import DataSource
from linvt_hf.training.trainer import LinVTTrainer

CONFIGS = Path(linvt_hf.training.__file__).parent / "accelerate"
SCRIPT = Path(__file__).parent / "distributed_run.py"
# Texts without a video are among the samples so that in some steps one of the two processes has no video at all.
# Half of them are used in each epoch of two steps, another half in each; checkpoints are taken in the middle of one.
# Of what is for evaluation the last batch is not full. No dropout, whose random numbers each process draws for itself.
STAGE1 = {
    "max_steps": 5,
    "save_every": 3,
    "eval_every": 3,
    "data": DataSource(str(data_file(texts=(0, 2, 3, 5, 7, 8, 10, 13), videos=16)), weight=0.5),
    "eval_data": [DataSource(str(data_file(videos=5)))],
}
STAGE2 = {**STAGE1, "lora": LoraSettings(rank=4, dropout=0.0), "train_projector": True}


def launch(kind: str, *parts) -> str:
    """Runs two processes, and fails rather than wait for ever if they wait for each other."""
    arguments = []
    for settings in parts:
        if not isinstance(settings, str):
            path = Path(f"{settings.output}.yaml")
            path.write_text(yaml.safe_dump(settings.to_dict()))
            settings = str(path)
        arguments.append(settings)
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            SCRIPT,
            kind,
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_CONFIG": str(CONFIGS / f"{kind}.yaml")},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout


def history(folder: Path, name: str, last: int = 5) -> list[float]:
    entries = json.loads((folder / f"checkpoint-{last}" / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries if name in entry]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = (folder / name for name in ("linvt.safetensors", "adapter_model.safetensors"))
    return {name: tensor for file in files if file.exists() for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, the same batches: the folder of each stage's run."""
    folders = {}
    for stage, values in [("stage1", STAGE1), ("stage2", STAGE2)]:
        folder = tmp_path_factory.mktemp(stage)
        train(recipe("internvl_qwen2", folder, batch_size=4, **values))
        folders[stage] = folder
    return folders


def check(folder: Path, expected: Path) -> None:
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(history(folder, name), history(expected, name), rtol=1e-5, atol=1e-5)
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        # A tenth of AdamW's step, which divides by the gradient's size: where that is nearly zero, rounding counts.
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-3)


def two(folder: Path, values: dict):
    return recipe("internvl_qwen2", folder, batch_size=2, **values)


def test_ddp(alone, tmp_path):
    launch("ddp", two(tmp_path / "1", STAGE1), two(tmp_path / "2", STAGE2))
    check(tmp_path / "1", alone["stage1"])
    check(tmp_path / "2", alone["stage2"])


def test_fsdp2(alone, tmp_path):
    """
    Blocks in shards, whether or not something in them learns; and a run taken up from a sharded checkpoint ends where
    it would have ended. Then float32 LinVT and LoRA on a base in bfloat16.
    """
    first, second = two(tmp_path / "1", STAGE1), two(tmp_path / "2", STAGE2)
    half = two(tmp_path / "3", {**STAGE2, "bf16": True, "max_steps": 1})
    said = launch("fsdp2", first, second, f"aside:{tmp_path / '2' / 'checkpoint-5'}", second, half)
    assert said.count("sharded: ['FSDPLinVTForConditionalGeneration', 'FSDPQwen2DecoderLayer']") == 4
    check(tmp_path / "1", alone["stage1"])
    check(tmp_path / "2", alone["stage2"])
    assert list((tmp_path / "2" / "checkpoint-3" / "optimizer_0").glob("*.distcp"))
    whole, resumed = tensors(tmp_path / "2" / "aside-checkpoint-5"), tensors(tmp_path / "2")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert {tensor.dtype for tensor in tensors(tmp_path / "3").values()} == {torch.float32}
    (loss,) = history(tmp_path / "3", "loss", last=1)
    assert loss == pytest.approx(history(alone["stage2"], "loss")[0], rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which builds with g++")
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed(kind, tmp_path, monkeypatch):
    """A video in every batch: it cannot do without."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    values = {**STAGE2, "data": DataSource(str(data_file(videos=16)), weight=0.5), "bf16": False}
    train(recipe("internvl_qwen2", tmp_path / "alone", batch_size=4, **values))
    launch(kind, two(tmp_path / "two", values))
    check(tmp_path / "two", tmp_path / "alone")


def test_deepspeed_takes_no_batch_without_a_video(tmp_path, monkeypatch):
    monkeypatch.setattr(LinVTTrainer, "is_deepspeed_enabled", True, raising=False)
    trainer = object.__new__(LinVTTrainer)
    with pytest.raises(ValueError, match="holds no video with a question, and DeepSpeed needs one"):
        trainer.training_step(None, {"input_ids": torch.zeros(1, 3)})


def test_zero3_gathers_what_is_saved(monkeypatch):
    """Whether or not it learns."""
    gathered = []
    zero = SimpleNamespace(GatheredParameters=lambda parameters: nullcontext(gathered.extend(parameters)))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    model = copy.deepcopy(wrapped("mipha")[0])
    add_projector(model)
    add_lora(model)
    model.requires_grad_(False)
    trainer = object.__new__(LinVTTrainer)
    trainer.model, trainer.is_deepspeed_enabled = model, True
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    trainer.accelerator = SimpleNamespace(state=state, unwrap_model=lambda model: model)
    with trainer._gathered():
        linvt, lora = trained_tensors(model)
    expected = {id(value) for name, value in model.named_parameters() if name in linvt or ".lora_" in name}
    assert {id(value) for value in gathered} == expected and len(expected) == len(linvt) + len(lora)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations(path):
    """accelerate reads them, and finds in them what their names say."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert config.mixed_precision == "no"  # the recipe's affair
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if config.distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
