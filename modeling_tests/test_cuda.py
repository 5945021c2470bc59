"""On a GPU: the CPU's numbers, half precision, and frames that go to the device a few at a time."""

import copy

import pytest
import torch
from tiny_bases import NAMED
from tiny_models import chat, encode, noise_video, wrapped

from linvt_hf import LinVTForConditionalGeneration, VideoQuestionAnsweringPipeline

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
CHATS = [chat(noise_video(3, seed=1), "Who?"), chat(noise_video(9, seed=2), "What is the colour of what moves?")]


def on_gpu(name, folder, **kwargs):
    model, _ = wrapped(name)
    model.save_pretrained(folder)
    return LinVTForConditionalGeneration.from_pretrained(folder, device_map="cuda", **kwargs).eval()


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
    real = batch["attention_mask"].bool()
    assert (logits - expected)[real].abs().mean() < 0.05 * expected[real].std()


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


def test_pipeline(tmp_path):
    model, processor = wrapped("qwen2_vl")
    cpu = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    gpu = VideoQuestionAnsweringPipeline(model=on_gpu("qwen2_vl", tmp_path), processor=processor, device="cuda")
    inputs = [{"video": noise_video(frames, seed=frames), "question": "What moves?"} for frames in (2, 5, 3)]
    settings = {"batch_size": 2, "max_new_tokens": 5, "do_sample": False}
    assert gpu(inputs, **settings) == cpu(inputs, **settings)
    ours, theirs = (pipe({**inputs[0], "choices": ["red", "blue"]}) for pipe in (gpu, cpu))
    assert [answer["answer"] for answer in ours] == [answer["answer"] for answer in theirs]
