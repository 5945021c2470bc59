"""On a GPU: the CPU's numbers, half precision, training, and frames that go to the device a few at a time."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from test_frames_to_pixels import PUBLISHED, frames_of
from test_frames_to_pixels import published as published_processor
from test_originals import published
from tiny_bases import NAMED
from tiny_models import TINY_LINVT, between_frames_and_words, chat, encode, noise_video, wrapped
from training_data import losses, recipe
from transformers import TrainerCallback

from linvt_hf import EncodedVideo, LinVTForConditionalGeneration, VideoQuestionAnsweringPipeline, wrap
from linvt_hf.frames_to_pixels import frames_to_pixels
from linvt_hf.training import LoraSettings, load_adapter, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
CHATS = [chat(noise_video(3, seed=1), "Who?"), chat(noise_video(9, seed=2), "What is the colour of what moves?")]


def on_gpu(name, folder, **kwargs):
    model, _ = wrapped(name)
    model.save_pretrained(folder)
    return LinVTForConditionalGeneration.from_pretrained(folder, device_map="cuda", **kwargs).eval()


def assert_near(logits, expected, batch, share):
    """The mean difference is below that share of the logits' own spread."""
    real = batch["attention_mask"].bool()[..., None] & (expected > -1e30)  # Molmo's image tokens are never an answer
    assert (logits - expected)[real].abs().mean() < share * expected[real].std()


@pytest.mark.parametrize("name", NAMED)
def test_the_cpus_numbers(name, tmp_path):
    model, processor = wrapped(name)
    batch = encode(processor, *CHATS)
    gpu = on_gpu(name, tmp_path)
    assert {parameter.device.type for parameter in gpu.parameters()} == {"cuda"}
    pixels = batch["pixel_values_videos"]
    moved = {key: value.cuda() for key, value in batch.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        for inputs in (moved, {**moved, "pixel_values_videos": pixels}):  # pixels may stay behind
            torch.testing.assert_close(gpu(**inputs).logits.cpu(), expected, atol=2e-3, rtol=2e-3)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(gpu.generate(**moved, **settings).cpu(), model.generate(**batch, **settings))


@pytest.mark.parametrize("name", NAMED)
def test_compiled_generation(name, tmp_path):
    """With a static cache transformers compiles the decoding steps."""
    gpu = on_gpu(name, tmp_path)
    _, processor = wrapped(name)
    inputs = {key: value.cuda() for key, value in encode(processor, *CHATS).items()}
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        gpu.generate(**inputs, cache_implementation="static", **settings), gpu.generate(**inputs, **settings)
    )


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMED)
def test_nothing_waits_for_the_frames(name, tmp_path):
    gpu = on_gpu(name, tmp_path)
    _, processor = wrapped(name)
    inputs = {key: value.cuda() for key, value in encode(processor, *CHATS).items()}
    with between_frames_and_words(gpu, no_waiting()):
        gpu.generate(**inputs, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMED)
def test_half_precision(name, dtype, tmp_path):
    model, processor = wrapped(name)
    gpu = on_gpu(name, tmp_path, dtype=dtype)
    batch = encode(processor, *CHATS)
    with torch.no_grad():
        expected = model(**batch).logits
        logits = gpu(**{key: value.cuda() for key, value in batch.items()}).logits.float().cpu()
    assert torch.isfinite(logits).all()
    assert_near(logits, expected, batch, 0.05)


def test_no_synchronisation_in_the_tokenizer():
    model, _ = copy.deepcopy(wrapped("internvl_qwen2"))
    tokenizer = model.video_tokenizer.cuda()
    tokens = torch.randn(2, 6, 16, model.config.hidden_size, device="cuda")
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device="cuda", dtype=torch.bool)
    text = torch.randn(2, 5, model.config.hidden_size, device="cuda")
    tokenizer(tokens, mask, text_embeds=text)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokenizer(tokens, mask, text_embeds=text)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_follows_the_chunk_not_the_video():
    """With pixels on the CPU, a video ten times as long takes hardly more memory while its frames are encoded."""
    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    model = model.cuda()

    def peak(frames):
        inputs = dict(encode(processor, chat(noise_video(frames), "Who?"), num_frames=frames))
        pixels = torch.nn.functional.interpolate(inputs["pixel_values_videos"], 28)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model.image_llm.encode_frames(model.base, pixels, {}, frames, 4)
        return torch.cuda.max_memory_allocated() - before

    peak(20)
    assert peak(200) < 3 * peak(20)


@pytest.mark.parametrize("name", PUBLISHED)
def test_frames_to_pixels(name):
    """To a level of 255 on average, and two at most, as on the CPU."""
    image_processor, frame_kwargs = published_processor(name)
    frames = frames_of(360, 640)
    cpu = frames_to_pixels(frames, image_processor, frame_kwargs)["pixel_values"]
    gpu = frames_to_pixels(frames.cuda(), image_processor, frame_kwargs)["pixel_values"]
    levels = (gpu.cpu() - cpu).abs() * 255 * min(image_processor.image_std)
    assert gpu.is_cuda and levels.mean() < 1 and levels.max() < 2.01


@pytest.mark.parametrize("stored", [40, 65_536])
def test_encoded_videos(stored, tmp_path):
    """Frames become pixels on the GPU, tokens are stored there, and the CPU's answer comes from what was saved."""
    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    for part in (model, model.video_tokenizer, model.video_tokenizer.scorer):
        part.config.num_stored_tokens, part.config.score_window = stored, 32
    gpu = copy.deepcopy(model).cuda()
    videos = [noise_video(30, seed=1), noise_video(5, seed=2)]
    expected, found = (one.encode_videos([processor.stream(video) for video in videos]) for one in (model, gpu))
    for one, other in zip(expected, found, strict=True):
        assert other.tokens.values.is_cuda and torch.equal(one.tokens.index, other.tokens.index.cpu())
        difference = (other.tokens.values.cpu() - one.tokens.values).abs().mean()  # of a level of 255 here and there
        assert difference < 0.01 * one.tokens.values.std()
    found[0].save(tmp_path / "video.safetensors")
    settings = {"max_new_tokens": 5, "do_sample": False}
    inputs = encode(processor, chat(EncodedVideo.load(tmp_path / "video.safetensors"), "Who?"))
    moved = {key: value.cuda() if key != "encoded_videos" else value for key, value in inputs.items()}
    assert torch.equal(gpu.generate(**moved, **settings).cpu(), model.generate(**inputs, **settings))


def test_pipeline(tmp_path):
    model, processor = wrapped("qwen2_vl")
    cpu = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    gpu = VideoQuestionAnsweringPipeline(model=on_gpu("qwen2_vl", tmp_path), processor=processor, device="cuda")
    inputs = [{"video": noise_video(frames, seed=frames), "question": "What moves?"} for frames in (2, 5, 3)]
    settings = {"batch_size": 2, "max_new_tokens": 5, "do_sample": False}
    assert gpu(inputs, **settings) == cpu(inputs, **settings)
    ours, theirs = (pipe({**inputs[0], "choices": ["red", "blue"]}) for pipe in (gpu, cpu))
    assert [answer["answer"] for answer in ours] == [answer["answer"] for answer in theirs]


@pytest.mark.parametrize("name", ["blip3_v1_5", "molmo_7b_d"])
def test_a_published_checkpoint_goes_straight_to_the_gpu(name):
    cpu, processor = wrap(published(name), **TINY_LINVT)
    gpu, _ = wrap(published(name), model_kwargs={"device_map": "cuda"}, **TINY_LINVT)
    assert {parameter.device.type for parameter in gpu.base.parameters()} == {"cuda"}
    gpu.cuda().load_state_dict(cpu.state_dict())
    batch = encode(processor, *CHATS)
    with torch.no_grad():
        logits = gpu(**{key: value.cuda() for key, value in batch.items()}).logits.cpu()
        torch.testing.assert_close(logits, cpu(**batch).logits, atol=2e-3, rtol=2e-3)


# ---- training ----


@pytest.mark.parametrize("name", NAMED)
def test_both_stages_lower_the_loss_in_bfloat16(name, tmp_path):
    fast = {"max_steps": 10, "batch_size": 8}
    first = train(recipe(name, tmp_path / "1", learning_rate=3e-2, **fast))
    second = recipe(name, tmp_path / "2", model=str(tmp_path / "1"), lora=LoraSettings(rank=4), **fast)
    run = train(replace(second, lora_learning_rate=3e-2))
    assert losses(run)[-1] < min(losses(run)[0], losses(first)[0]) - 0.1
    frozen = [p for p in run.model.base.parameters() if not p.requires_grad and p.is_floating_point()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.device.type for p in run.model.parameters()} == {"cuda"}
    loaded, processor = load_adapter(tmp_path / "2")  # on the CPU, in float32
    batch = encode(processor, *CHATS)
    with torch.no_grad():
        logits = run.model(**{key: value.cuda() for key, value in batch.items()}).logits.float().cpu()
        expected = loaded(**batch).logits.float()
    assert_near(logits, expected, batch, 0.1)


@pytest.mark.parametrize("cache", [False, True])
def test_the_cpus_losses(cache, tmp_path):
    """In float32, with frames and with the features of a cache."""
    values = {"bf16": False, "max_steps": 4, "lora": LoraSettings(rank=4, dropout=0.0), "feature_memory": cache}
    gpu = losses(train(recipe("internvl_qwen2", tmp_path / "gpu", **values)))
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(recipe("internvl_qwen2", tmp_path / "cpu", **values).to_dict()))
    command = [sys.executable, "-m", "linvt_hf.cli", "train", str(tmp_path / "cpu.yaml")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a process that has used a GPU keeps to it
    lines = subprocess.run(command, env=hidden, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    cpu = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert len(cpu) == 4 and gpu == pytest.approx(cpu, abs=1e-3)


def test_a_run_goes_on_where_it_was(tmp_path):
    """On another GPU process, with the optimizer's state and the dropout's random numbers where they were."""
    values = {"max_steps": 6, "lora": LoraSettings(rank=4), "bf16": False}
    whole = train(recipe("mipha", tmp_path / "whole", **values))

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    parts = recipe("mipha", tmp_path / "parts", save_every=2, **values)
    with pytest.raises(KeyboardInterrupt):
        train(parts, callbacks=[Kill()])
    assert losses(train(parts))[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)


def test_gradient_checkpointing_saves_memory(tmp_path):
    def peak(checkpointing):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        name = f"{checkpointing}"
        settings = recipe("qwen2_vl", tmp_path / name, max_steps=2, batch_size=8, gradient_checkpointing=checkpointing)
        train(settings)
        return torch.cuda.max_memory_allocated() - before

    peak(True)
    assert peak(True) < peak(False)
