"""`convert` as a tool: what it writes, what it leaves when it fails, how it goes on, and how much memory it takes."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import original_blip3
import original_mipha
import original_molmo
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from linvt_hf import wrap
from linvt_hf.cli import main
from linvt_hf.conversion import convert
from linvt_hf.conversion import convert as convert_function

convert_module = sys.modules[convert_function.__module__]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return original_mipha.write("mipha_3b", tmp_path_factory.mktemp("published") / "mipha")


@pytest.fixture
def copied(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def small_shards(monkeypatch, size: int = 100_000) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", size)


def test_a_folder_that_transformers_loads(published, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    out = tmp_path / "out"
    plan = convert(published, out)
    assert len(shards(out)) > 2
    stored = {}
    for shard in shards(out):
        stored.update(load_file(shard))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == plan.shapes
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    with safe_open(shards(out)[0], framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.unfinished")) and not list(out.glob("conversion.json"))
    assert ModelCard.load(out / "README.md").data.pipeline_tag == "image-text-to-text"


def test_a_dry_run_says_what_becomes_of_each_tensor(published, tmp_path, capsys):
    assert main(["convert", str(published), str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "model.mm_projector.0.weight -> model.multi_modal_projector.linear_1.weight" in said
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(published), str(tmp_path / "out")]) == 0
    assert "0 dropped" in capsys.readouterr().out and (tmp_path / "out" / "config.json").exists()
    assert main(["convert", str(published), str(tmp_path / "out")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_killed_run_goes_on(published, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    convert(published, tmp_path / "whole", dtype="float32")
    write = convert_module._write_shard

    class Killed(BaseException):
        pass

    def killed(conversion, steps, dtype, file):
        if file.name.startswith("model-00003"):
            raise Killed
        write(conversion, steps, dtype, file)

    monkeypatch.setattr(convert_module, "_write_shard", killed)
    with pytest.raises(Killed):
        convert(published, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in shards(tmp_path / "out.unfinished")}
    assert sorted(name[:11] for name in kept) == ["model-00001", "model-00002"]

    monkeypatch.setattr(convert_module, "_write_shard", write)
    convert(published, tmp_path / "out", dtype="float32")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert [file.read_bytes() for file in shards(tmp_path / "out")] == [
        file.read_bytes() for file in shards(tmp_path / "whole")
    ]


def test_what_was_begun_otherwise_is_not_gone_on_with(published, tmp_path):
    begun = tmp_path / "out.unfinished"
    begun.mkdir()
    (begun / "conversion.json").write_text("{}")
    (begun / "model-00001-of-00001.safetensors").write_text("of another checkpoint")
    convert(published, tmp_path / "out")
    assert load_file(shards(tmp_path / "out")[0])


def test_what_has_changed_since_is_not_gone_on_with(copied, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    whole = tmp_path / "whole"
    convert(copied, whole, dtype="float32")
    interrupted = convert_module._write_rest
    monkeypatch.setattr(convert_module, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(copied, tmp_path / "out", dtype="float32")
    shard = shards(copied)[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    monkeypatch.setattr(convert_module, "_write_rest", interrupted)
    convert(copied, tmp_path / "out", dtype="float32")
    changed = [a.read_bytes() != b.read_bytes() for a, b in zip(shards(whole), shards(tmp_path / "out"), strict=True)]
    assert any(changed)


def test_a_dtype_that_is_none(copied, tmp_path, capsys):
    assert main(["convert", str(copied), str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert "dtype is 'int8'; it must be one of bfloat16, float16, float32, auto." in capsys.readouterr().err


def failing(copied, tmp_path, capsys) -> str:
    """What the command says; nothing may be left."""
    assert main(["convert", str(copied), str(tmp_path / "out")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.unfinished"))
    return said


def test_a_shard_that_is_cut_short(copied, tmp_path, capsys):
    shard = shards(copied)[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    said = failing(copied, tmp_path, capsys)
    assert f"{shard} is cut short" in said and said.endswith("fetch it again.")


def test_a_pickle_that_is_cut_short_or_holds_more_than_tensors(tmp_path, capsys):
    folder = original_molmo.write("molmo_e_1b", tmp_path / "published")
    (file,) = folder.glob("*.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file} is cut short or no file of tensors" in failing(folder, tmp_path, capsys)

    class Mischief:
        def __reduce__(self):
            return (exit, ("run",))

    torch.save({"weight": Mischief()}, file)
    assert f"{file} is cut short or no file of tensors" in failing(folder, tmp_path, capsys)


def test_a_shard_that_is_missing(copied, tmp_path, capsys):
    shards(copied)[-1].unlink()
    assert f"lacks {shards(copied)[0].name.replace('00001-', '00002-')}" in failing(copied, tmp_path, capsys)


def test_another_model_under_a_known_name(copied, tmp_path, capsys):
    shard = shards(copied)[0]
    tensors = {f"module.{name}": tensor for name, tensor in load_file(shard).items()}
    save_file(tensors, copied / "model.safetensors")
    for file in copied.glob("model*00*"):
        file.unlink()
    (copied / "model.safetensors.index.json").unlink()
    assert "for which this base has no rule" in failing(copied, tmp_path, capsys)


def test_a_tensor_of_another_shape(copied, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["intermediate_size"] += 8
    (copied / "config.json").write_text(json.dumps(config))
    said = failing(copied, tmp_path, capsys)
    assert "mlp.fc1" in said and str(config["intermediate_size"]) in said


def test_a_config_that_lacks_a_field(copied, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    del config["vision_config"]
    (copied / "config.json").write_text(json.dumps(config))
    assert "says it is Mipha, but its config.json or its tensors lack vision_config" in failing(
        copied, tmp_path, capsys
    )


def test_no_room(published, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    said = failing(published, tmp_path, capsys)
    assert "could not be written: it takes 0.0 GB, and the disk has 0.0 GB free" in said


def test_no_room_after_all(published, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "save_file", full)
    assert "No space left on device" in failing(published, tmp_path, capsys)


def test_what_is_not_known(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert "is no image-LLM as its makers published it; those known are BLIP-3, " in failing(
        tmp_path / "other", tmp_path, capsys
    )
    assert "There is no model at" in failing(tmp_path / "nothing", tmp_path, capsys)


def test_without_tokenizer_files_the_weights_are_converted(copied, tmp_path, caplog):
    for file in copied.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            file.unlink()
    with caplog.at_level("WARNING"):
        convert(copied, tmp_path / "out")
    assert "has no tokenizer files" in caplog.text
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.image_token_id
    with pytest.raises(ValueError, match="holds no tokenizer"):
        wrap(copied)


@pytest.mark.parametrize(
    ("vision", "cut", "doubt"),
    [
        ({"image_aspect_ratio": "anyres", "anyres_patch_sampling": True}, "anyres", ""),
        ({"image_aspect_ratio": "pad", "anyres_patch_sampling": False}, "squash", ""),
        ({"image_aspect_ratio": "anyres"}, "squash", "does not set anyres_patch_sampling, so"),
        ({}, "squash", "does not set image_aspect_ratio, so"),
    ],
)
def test_how_blip3_cuts_images_is_what_its_config_says(vision, cut, doubt, tmp_path, caplog):
    folder = original_blip3.write("blip3_base_r_v1", tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_encoder_config": vision}))
    convert(folder, tmp_path / "out")
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["image_aspect_ratio"] == cut
    assert ("does not set" in caplog.text) == bool(doubt) and doubt in caplog.text


def test_wrap_takes_what_was_published(published, tmp_path):
    direct, processor = wrap(published)
    convert(published, tmp_path / "out", dtype="float32")
    through, its_processor = wrap(tmp_path / "out")
    for (name, one), (other_name, other) in zip(
        direct.base.state_dict().items(), through.base.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other), name
    assert processor.chat_template == its_processor.chat_template
    assert processor.to_dict()["base_processor"] == its_processor.to_dict()["base_processor"]
    assert direct.generation_config.eos_token_id == through.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--fps", "nan"], "fps must be a positive number of frames per second or None, not nan."),
        (["--fps", "inf"], "fps must be a positive number of frames per second or None, not inf."),
        (["--video-token", ""], "video_token is empty; name a token that prompts never use"),
        (["--dtype", "nonsense"], "dtype is 'nonsense'; it must be one of bfloat16, float16, float32, auto."),
    ],
)
def test_wrap_names_what_it_cannot_take(argument, message, tmp_path, capsys):
    assert main(["wrap", "no/such", str(tmp_path / "out"), *argument]) == 2  # before anything is loaded
    assert message in capsys.readouterr().err


MEMORY = """
import resource, sys
from linvt_hf.conversion import convert

module = sys.modules["linvt_hf.conversion.convert"]
module.SHARD_BYTES = 20_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, monkeypatch):
    """At most the largest file that is read, twice a file that is written, and what loading libraries takes."""
    config = original_mipha.tiny_config("mipha_3b") | {
        "hidden_size": 640,
        "intermediate_size": 2560,
        "vocab_size": 4000,
    }
    config["vision_config"]["mm_projector"]["hidden_size"] = 640
    config["num_hidden_layers"] = 24
    monkeypatch.setattr(original_mipha, "tiny_config", lambda name: config)
    original_mipha.write("mipha_3b", tmp_path / "published", shards=6)
    sizes = [file.stat().st_size for file in shards(tmp_path / "published")]
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "published", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sum(sizes) > 450_000_000
    assert int(out.split()[-1]) < max(sizes) + 2 * 20_000_000 + 60_000_000 < 0.5 * sum(sizes)
