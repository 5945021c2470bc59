"""Where memory is short: weights in 4 bits, weights that wait on disk. LinVT itself stays whole, and at hand."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from test_modeling import CLOSE, every_base, greedy, logits
from tiny_models import chat, encode, noise_video, wrapped
from transformers import BitsAndBytesConfig

from linvt_hf import LinVTForConditionalGeneration, LinVTProcessor, VideoQuestionAnsweringPipeline, wrap
from linvt_hf.cli import main

SHAPES = Path(__file__).parent.parent / "examples"
VIDEO = str(SHAPES / "linvt-shapes" / "example.mp4")
QUESTION = "Which way does the cross move?"
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def ask(model) -> str:
    pipeline = VideoQuestionAnsweringPipeline(model, processor=LinVTProcessor.from_pretrained(SHAPES / "linvt-shapes"))
    (answer,) = pipeline(video=VIDEO, question=QUESTION)
    return answer["answer"]


def is_whole(tokenizer) -> bool:
    modules = [module for module in tokenizer.modules() if hasattr(module, "weight")]
    return len(modules) > 20 and all(module.weight.dtype == torch.float32 for module in modules)


@every_base
def test_weights_of_the_base_may_wait_on_disk(name, tmp_path):
    model, processor = wrapped(name)
    model.save_pretrained(tmp_path / "model")
    size = {part: sum(p.nbytes for p in getattr(model, part).parameters()) for part in ("video_tokenizer", "base")}
    offloaded = LinVTForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(size["video_tokenizer"] + 0.5 * size["base"])},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert {p.device.type for p in offloaded.video_tokenizer.parameters()} == {"cpu"}
    assert {p.device.type for p in offloaded.get_decoder().parameters()} >= {"meta"}
    inputs = encode(processor, chat(noise_video(3), "What moves?"), chat(noise_video(5, seed=1), "Who?"))
    torch.testing.assert_close(logits(offloaded, inputs), logits(model, inputs), **CLOSE)
    video = processor.stream(noise_video(3))
    asked = encode(processor, chat(offloaded.encode_video(video), "What moves?"))
    again = encode(processor, chat(model.encode_video(processor.stream(noise_video(3))), "What moves?"))
    assert torch.equal(greedy(offloaded, asked), greedy(model, again))


def test_linvt_is_put_first_where_memory_is_short(tmp_path):
    loaded = LinVTForConditionalGeneration.from_pretrained(
        SHAPES / "linvt-shapes", device_map="auto", max_memory={"cpu": "2MB"}, offload_folder=tmp_path
    )
    assert loaded.hf_device_map["video_tokenizer"] == "cpu" and "disk" in loaded.hf_device_map.values()
    assert ask(loaded) == "down"


@pytest.mark.parametrize("quantization", [FOUR_BITS, FOUR_BITS.to_dict()], ids=["config", "dict"])
def test_the_image_llm_in_four_bits(quantization, tmp_path):
    folder = SHAPES / "linvt-shapes"
    whole = LinVTForConditionalGeneration.from_pretrained(folder)
    model = LinVTForConditionalGeneration.from_pretrained(folder, quantization_config=quantization)
    assert is_whole(model.video_tokenizer) and isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert not isinstance(model.get_output_embeddings(), Linear4bit)
    assert sum(isinstance(module, Linear4bit) for module in model.base.modules()) == 54
    assert model.get_memory_footprint() < 0.5 * whole.get_memory_footprint()
    assert ask(model) == "down"
    model.save_pretrained(tmp_path, processor=LinVTProcessor.from_pretrained(folder))
    again = LinVTForConditionalGeneration.from_pretrained(tmp_path)
    assert is_whole(again.video_tokenizer) and isinstance(again.base.model.multi_modal_projector.linear_1, Linear4bit)
    assert ask(again) == "down"


def test_other_modules_can_be_spared_too():
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["base.model.vision_tower"])
    model = LinVTForConditionalGeneration.from_pretrained(SHAPES / "linvt-shapes", quantization_config=quantization)
    assert is_whole(model.video_tokenizer) and is_whole(model.base.model.vision_tower)
    assert isinstance(model.base.model.multi_modal_projector.linear_1, Linear4bit)
    assert quantization.llm_int8_skip_modules == ["base.model.vision_tower"]


def test_a_base_in_four_bits_can_be_wrapped_and_asked_but_not_saved(tmp_path):
    model, processor = wrap(SHAPES / "shapes-image-llm", model_kwargs={"quantization_config": FOUR_BITS})
    assert is_whole(model.video_tokenizer) and isinstance(model.base.model.multi_modal_projector.linear_1, Linear4bit)
    assert logits(model, encode(processor, chat(noise_video(3), "Who?"))).isfinite().all()
    with pytest.raises(ValueError, match="quantized before it was wrapped, .*: wrap it whole, save that"):
        model.save_pretrained(tmp_path, processor=processor)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [["--quantize", "4bit"], ["--device", "auto"], ["--quantize", "4bit", "--device", "auto"]]
)
def test_linvt_ask(options, capsys):
    assert main(["ask", str(SHAPES / "linvt-shapes"), VIDEO, QUESTION, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "down"


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are refused only where there is no GPU")
def test_eight_bits_are_for_gpus(capsys):
    assert main(["ask", str(SHAPES / "linvt-shapes"), VIDEO, QUESTION, "--quantize", "8bit"]) == 2
    assert "quantize 8bit needs a GPU" in capsys.readouterr().err
