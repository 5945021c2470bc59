"""What was trained, apart from its base: written, read, switched off, folded in."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from test_modeling import CLOSE, IMAGE, logits
from tiny_bases import NAMED, TINY_LINVT, UNNAMED
from tiny_models import base_folder, chat, encode, noise_video, wrapped
from torch import nn
from transformers import AutoModelForImageTextToText

from linvt_hf import LinVTForConditionalGeneration, wrap
from linvt_hf.cli import main
from linvt_hf.training import TrainingSettings, adapters_off, load_adapter, merge, save_adapter
from linvt_hf.training.adapter_files import ADAPTER_FILE, LORA_FILE, WEIGHTS_FILE, is_adapter
from linvt_hf.training.adapters import add_lora, add_projector, has_lora, projector_modules
from linvt_hf.training.preparation import load_model

# The linear layers of each language model's blocks, by the names its authors gave them.
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = {
    **dict.fromkeys([*NAMED, *UNNAMED], LLAMA),
    "blip3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "internvl_phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mipha": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}
every_base = pytest.mark.parametrize("name", NAMED)


def trained(name: str, projector: bool = True):
    """A model whose every part that can be trained is not as it was."""
    model, processor = copy.deepcopy(wrapped(name))
    if projector:
        add_projector(model)
    add_lora(model, rank=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key or key.startswith(("video_tokenizer", *model.trained_projector)):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, processor


@pytest.mark.parametrize("name", [*NAMED, *UNNAMED])
def test_lora_is_on_the_language_model_alone(name):
    model, _ = copy.deepcopy(wrapped(name))
    add_lora(model)
    adapted = [key for key, module in model.base.named_modules() if hasattr(module, "lora_A")]
    blocks = model.base.get_decoder().layers
    assert sorted(key.rpartition(".")[2] for key in adapted) == sorted(LAYERS[name] * len(blocks))
    inside = {id(module) for module in blocks.modules()}
    assert all(id(model.base.get_submodule(key)) in inside for key in adapted)
    plain = {id(module) for module in blocks.modules() if type(module) is nn.Linear}
    lora = {id(part) for module in blocks.modules() for key, part in module.named_modules() if "lora_" in key}
    bases = {id(model.base.get_submodule(key).base_layer) for key in adapted}
    assert plain <= lora | bases  # no linear layer was left out


def test_named_layers_only():
    model, _ = copy.deepcopy(wrapped("mipha"))
    with pytest.raises(ValueError, match="lora.targets names gate_proj.*it has dense, fc1, fc2, k_proj"):
        add_lora(model, targets=["q_proj", "gate_proj"])
    add_lora(model, targets=["q_proj", "fc1"])
    assert {key.split(".")[-4] for key, _ in model.named_parameters() if "lora_A" in key} == {"q_proj", "fc1"}
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model)


@every_base
def test_save_load_merge(name, tmp_path):
    model, processor = trained(name)
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    expected = logits(model, inputs)
    save_adapter(model, tmp_path / "adapter", processor)
    assert is_adapter(tmp_path / "adapter")
    kept = load_file(tmp_path / "adapter" / WEIGHTS_FILE).keys()
    assert all(key.startswith(("video_tokenizer.", *model.trained_projector)) for key in kept)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter" / LORA_FILE))

    loaded, its_processor = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded, inputs), expected)
    again = encode(its_processor, chat(noise_video(), "What moves?"))
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()

    assert type(merge(loaded)) is LinVTForConditionalGeneration
    torch.testing.assert_close(logits(loaded, inputs), expected, **CLOSE)
    assert loaded.state_dict().keys() == wrapped(name)[0].state_dict().keys()
    loaded.save_pretrained(tmp_path / "whole", processor=its_processor)
    whole = LinVTForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(whole, inputs), logits(loaded, inputs))


@every_base
def test_adapters_off(name):
    model, processor = trained(name)
    inputs = encode(processor, chat(IMAGE, "What is it?"))
    with_adapters = logits(model, inputs)
    base = AutoModelForImageTextToText.from_pretrained(base_folder(name)).eval()
    with adapters_off(model):
        assert torch.equal(logits(model, inputs), logits(base, inputs))
    assert torch.equal(logits(model, inputs), with_adapters)
    assert not torch.equal(with_adapters, logits(base, inputs))


def test_adapters_off_after_loading(tmp_path):
    model, processor = trained("internvl_qwen2")
    save_adapter(model, tmp_path)
    loaded, nothing = load_adapter(tmp_path)
    assert nothing is None
    inputs = encode(processor, chat(IMAGE, "What is it?"))
    with adapters_off(loaded):
        assert torch.equal(logits(loaded, inputs), logits(wrapped("internvl_qwen2")[0], inputs))


def test_the_base_may_be_given(tmp_path):
    model, processor = trained("qwen2_vl")
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    expected = logits(model, inputs)
    model.base.name_or_path = "gone/away"
    model.base.config._commit_hash = "abc123"
    save_adapter(model, tmp_path, processor)
    assert json.loads((tmp_path / ADAPTER_FILE).read_text())["base_model"] == "gone/away"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "abc123"
    with pytest.raises(OSError, match="gone/away, cannot be loaded; pass base= .*There is no model at gone/away"):
        load_adapter(tmp_path)
    whole = tmp_path / "whole"
    copy.deepcopy(wrapped("qwen2_vl")[0]).save_pretrained(whole)
    for base in (base_folder("qwen2_vl"), whole, AutoModelForImageTextToText.from_pretrained(base_folder("qwen2_vl"))):
        assert torch.equal(logits(load_adapter(tmp_path, base)[0], inputs), expected)


def test_a_local_base_is_named_as_seen_from_the_adapters(tmp_path):
    """So both can move together, and who gets the adapters alone learns nothing of the machine they were made on."""
    here, there = tmp_path / "here", tmp_path / "there"
    model, processor = copy.deepcopy(wrapped("qwen2_vl"))
    model.save_pretrained(here / "models" / "whole", processor=processor)
    model = LinVTForConditionalGeneration.from_pretrained(here / "models" / "whole")
    add_lora(model, rank=4)
    save_adapter(model, here / "runs" / "1", processor)
    content = json.loads((here / "runs" / "1" / ADAPTER_FILE).read_text())
    assert content["base_model"] is None and content["local_base"] == "../../models/whole"
    for file in (here / "runs" / "1").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
        assert os.environ["HF_HOME"].encode() not in file.read_bytes(), file.name
    here.rename(there)
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    assert torch.equal(logits(load_adapter(there / "runs" / "1")[0], inputs), logits(model, inputs))
    (there / "runs" / "1").rename(tmp_path / "alone")
    with pytest.raises(OSError, match="alone.* cannot be loaded; pass base= "):
        load_adapter(tmp_path / "alone")
    load_adapter(tmp_path / "alone", there / "models" / "whole")


def test_a_local_base_of_adapters_behind_a_link(tmp_path):
    copy.deepcopy(wrapped("mipha")[0]).save_pretrained(tmp_path / "whole")
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "large" / "disk")
    save_adapter(LinVTForConditionalGeneration.from_pretrained(tmp_path / "whole"), tmp_path / "runs" / "1")
    load_adapter(tmp_path / "runs" / "1")


def publish(folder, name, revision, commit):
    """As if it had been fetched from the Hub, that revision and no other."""
    repo = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text(commit)


def test_revisions_on_the_hub(tmp_path):
    """All of a base comes from one revision, which adapters name, those of a second stage too."""
    publish(base_folder("llava"), "owner/image-llm", "v1", "a" * 40)
    model, processor = wrap("owner/image-llm", model_kwargs={"revision": "v1"}, **TINY_LINVT)
    assert processor.base_processor == wrapped("llava")[1].base_processor
    model.save_pretrained(tmp_path / "whole", processor=processor)
    publish(tmp_path / "whole", "owner/linvt", "v2", "b" * 40)
    whole, _ = load_model(TrainingSettings(model="owner/linvt", revision="v2", output="o"), autocast=False)
    for first, commit in [(model, "a" * 40), (whole, "b" * 40)]:
        save_adapter(first, tmp_path / "1")
        save_adapter(load_adapter(tmp_path / "1")[0], tmp_path / "2")
        for stage in "12":
            assert json.loads((tmp_path / stage / ADAPTER_FILE).read_text())["revision"] == commit


def test_whether_there_is_a_lora_is_the_folders_word(tmp_path):
    plain = wrapped("internvl_qwen2")[0]
    save_adapter(trained("internvl_qwen2")[0], tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    save_adapter(plain, tmp_path / "2")
    assert not has_lora(load_adapter(tmp_path / "2")[0])  # that of an earlier save is gone
    for name in (LORA_FILE, "adapter_config.json"):
        (tmp_path / "1" / name).unlink()
        with pytest.raises(ValueError, match="with a LoRA, but not both of its files"):
            load_adapter(tmp_path / "1")
    content = json.loads((tmp_path / "2" / ADAPTER_FILE).read_text())
    assert content.pop("lora") is False
    (tmp_path / "2" / ADAPTER_FILE).write_text(json.dumps(content))  # as older folders are
    assert not has_lora(load_adapter(tmp_path / "2")[0])


def test_a_lora_without_peft(tmp_path, monkeypatch):
    save_adapter(trained("qwen2_vl")[0], tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (lambda: load_adapter(tmp_path), lambda: add_lora(copy.deepcopy(wrapped("qwen2_vl")[0]))):
        with pytest.raises(ImportError, match=r"A LoRA needs peft: pip install 'linvt_hf\[train\]'"):
            use()


def test_half_precision(tmp_path):
    model, processor = trained("internvl_llama")
    save_adapter(model, tmp_path, processor)
    half, _ = load_adapter(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert torch.isfinite(logits(half, encode(processor, chat(noise_video(), "What moves?")))).all()
    kept, _ = load_adapter(tmp_path, trainable=True, dtype=torch.bfloat16)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert all(torch.equal(kept.state_dict()[name], value) for name, value in saved.items())  # nothing was rounded
    assert {p.dtype for p in merge(kept).parameters()} == {torch.bfloat16}


def test_peft_reads_the_lora(tmp_path):
    from peft import PeftModel

    model, processor = trained("internvl_phi3", projector=False)
    save_adapter(model, tmp_path)
    inputs = encode(processor, chat(IMAGE, "What is it?"))
    base = AutoModelForImageTextToText.from_pretrained(base_folder("internvl_phi3"))
    alone = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(alone, inputs), logits(model, inputs))


@pytest.mark.parametrize("file", [WEIGHTS_FILE, LORA_FILE])
def test_tensors_that_do_not_fit(file, tmp_path):
    model, _ = trained("internvl_qwen2")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / file)
    name = sorted(tensors)[0]
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, f"1 missing: {name}"),
        ({**tensors, "extra": torch.zeros(1)}, "1 unexpected: extra"),
        ({**tensors, name: torch.zeros(3)}, f"1 of another shape: {name}"),
    ]:
        save_file(changed, tmp_path / file)
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            load_adapter(tmp_path)


@pytest.mark.parametrize("other", ["qwen2_vl", "llava", "internvl_llama"])
def test_another_base_is_refused(other, tmp_path):
    model, _ = trained("internvl_qwen2", projector=False)
    save_adapter(model, tmp_path)
    with pytest.raises(
        ValueError, match="were trained on a base of type internvl .*; give the base they were trained on"
    ):
        load_adapter(tmp_path, base_folder(other))


@pytest.mark.parametrize("held", ["{}", "[]", '{"base'])
@pytest.mark.parametrize("file", [ADAPTER_FILE, "adapter_config.json"])
def test_damaged_settings_are_named(file, held, tmp_path):
    model, _ = trained("internvl_qwen2")
    save_adapter(model, tmp_path)
    (tmp_path / file).write_text(held)
    with pytest.raises(ValueError, match=f"{file} is damaged.*; copy or download the whole folder again"):
        load_adapter(tmp_path)


def test_no_broken_folder(tmp_path):
    model, processor = trained("internvl_qwen2")
    with pytest.raises(ValueError, match=r"merge\(model\), or save it alone"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_adapter(model, tmp_path / "adapter", processor)
    with pytest.raises(ValueError, match="holds adapters without their base; load it with"):
        LinVTForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert not is_adapter(tmp_path) and not is_adapter("no/such-repo")
    with pytest.raises(ValueError, match="has no linvt_adapter.json"):
        load_adapter(tmp_path)


def test_the_names_of_projectors():
    for name in [*NAMED, *UNNAMED]:
        model, _ = wrapped(name)
        inside = {id(module) for module in model.base.get_decoder().modules()}
        (path,) = projector_modules(model.base)
        assert id(model.base.get_submodule(path)) not in inside
    model = copy.deepcopy(wrapped("mipha")[0])
    model.base.model.multi_modal_projector, model.base.model.bridge = None, model.base.model.multi_modal_projector
    with pytest.raises(ValueError, match="has no module called multi_modal_projector or .*; take train_projector out"):
        projector_modules(model.base)


def test_merged_weights_have_no_name(tmp_path):
    """Adapters trained on merged weights must not say that they fit the base those were made from."""
    model = merge(trained("internvl_qwen2")[0])
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="does not name its base; pass base= "):
        load_adapter(tmp_path)


def test_a_merged_models_card_says_how_it_was_trained(tmp_path):
    save_adapter(trained("mipha")[0], tmp_path / "adapter", training="By hand, in a test.")
    merge(load_adapter(tmp_path / "adapter")[0]).save_pretrained(tmp_path / "whole")
    assert "By hand, in a test." in (tmp_path / "whole" / "README.md").read_text()


def test_ask_and_merge_commands(tmp_path, capsys):
    from video_files import moving_square, write_video

    model, processor = trained("internvl_qwen2")
    save_adapter(model, tmp_path / "adapter", processor, training="By hand, in a test.")
    video = str(write_video(tmp_path / "v.mp4", moving_square(8)))
    ask = [video, "What moves?", "--max-new-tokens", "6", "--json"]
    assert main(["ask", str(tmp_path / "adapter"), *ask]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 0
    assert "By hand, in a test." in (tmp_path / "whole" / "README.md").read_text()
    capsys.readouterr()
    assert main(["ask", str(tmp_path / "whole"), *ask]) == 0
    assert json.loads(capsys.readouterr().out) == answer
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["merge", str(base_folder("mipha")), str(tmp_path / "new")]) == 2
    assert "holds no adapters of LinVT" in capsys.readouterr().err
    (tmp_path / "adapter" / "processor_config.json").unlink()
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "new")]) == 2
    assert "holds no processor" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_card(tmp_path):
    from huggingface_hub import ModelCard

    model, _ = trained("internvl_qwen2")
    model.base.name_or_path = "owner/an-image-llm"
    save_adapter(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/an-image-llm"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "video-text-to-text"
    assert {"linvt", "lora"} <= set(card.data.tags)
