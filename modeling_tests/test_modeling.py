"""The wrapped model, each base in turn: videos, images and texts through one path."""

import copy
import inspect
import shutil
import traceback

import pytest
import torch
from PIL import Image
from tiny_bases import NAMED, TINY_LINVT, UNNAMED
from tiny_models import base_folder, between_frames_and_words, chat, encode, noise_video, wrapped
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, GenerationConfig

from linvt_hf import LinVTConfig, LinVTForConditionalGeneration, wrap
from linvt_hf.image_llm import OWN_MODELS
from linvt_hf.image_llm_parts import CACHE

ALL = [*NAMED, *UNNAMED, "qwen3_vl"]
every_base = pytest.mark.parametrize("name", ALL)
IMAGE, OTHER_IMAGE = (Image.fromarray(frame) for frame in noise_video(2, seed=7))
# Sums run in another order in a batch, with a cache, or in another kernel.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
MIXED = (chat(noise_video(3, seed=1), "Who?"), chat(noise_video(9, seed=2), "What is the colour of what moves?"))


def images_work(name: str) -> None:
    if name == "mistral3":
        pytest.skip("transformers' PixtralProcessor needs torchvision, which has no build for this machine")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1, **kwargs)


@every_base
def test_tokens_are_combinations_of_the_bases_own(name):
    model, processor = wrapped(name)
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    videos = model.take_video_inputs(dict(inputs))
    features = model.get_video_features(**videos, output_weights=True)
    frames = {key.removeprefix("frames_"): value for key, value in videos.items() if key.startswith("frames_")}
    tokens = torch.stack(model.image_llm.encode_frames(model.base, videos["pixel_values_videos"], frames, 4, 2))
    (weights,) = features.weights  # [M, T, N]
    assert features.pooler_output.shape == (1, model.config.num_video_tokens, model.config.hidden_size)
    assert weights.shape == (model.config.num_video_tokens, *tokens.shape[:2])
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(len(weights)))
    torch.testing.assert_close(features.pooler_output[0], torch.einsum("mtn,tnd->md", weights, tokens), **CLOSE)
    assert features.scores[0].shape == tokens.shape[:2]


@every_base
def test_a_batch_gives_what_single_calls_give(name):
    """Different lengths of video, prompt and question, left-padded, in logits and in generated text."""
    model, processor = wrapped(name)
    chats = [
        chat(noise_video(3, seed=1), "Who?"),
        chat("No video here, only a text that is rather long."),
        chat(noise_video(9, seed=2), "What is the colour of the thing that moves?"),
        chat(noise_video(2, seed=3), noise_video(4, seed=4), "Which of the two?"),
    ]
    batch = encode(processor, *chats)
    assert batch["attention_mask"].min() == 0  # something was padded
    together = logits(model, batch)
    texts = greedy(model, batch)[:, batch["input_ids"].shape[1] :]
    for row, messages in enumerate(chats):
        single = encode(processor, messages)
        length = single["input_ids"].shape[1]
        torch.testing.assert_close(together[row, -length:], logits(model, single)[0], **CLOSE)
        assert texts[row].tolist() == greedy(model, single)[0, length:].tolist()


@every_base
def test_every_linvt_parameter_learns(name):
    model, processor = copy.deepcopy(wrapped(name))
    inputs = encode(processor, chat(noise_video(), "What moves?", answer="A square."), add_generation_prompt=False)
    model.train()
    model.zero_grad()
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    model(**inputs, labels=labels).loss.backward()
    dead = [n for n, p in model.video_tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@every_base
def test_what_matters(name):
    """The order of the frames and the question change what the LLM reads; another video's question does not."""
    model, processor = wrapped(name)
    video = noise_video(4, seed=5)

    def tokens(*chats):
        videos = model.take_video_inputs(dict(encode(processor, *chats)))
        with torch.no_grad():
            return model.get_video_features(**videos).pooler_output

    plain = tokens(chat(video, "What moves?"))
    assert torch.equal(plain, tokens(chat(video, "What moves?")))
    assert not torch.allclose(plain, tokens(chat(video[::-1].copy(), "What moves?")), atol=1e-3)
    assert not torch.allclose(plain, tokens(chat(video, "Is it red?")), atol=1e-6)
    both = tokens(chat(video, "What moves?"), chat(noise_video(6, seed=6), "Is it red or is it blue?"))
    torch.testing.assert_close(both[:1], plain, **CLOSE)


@every_base
def test_the_answer_conditions_nothing(name):
    model, processor = wrapped(name)
    prompt = encode(processor, chat(noise_video(), "What moves?"))
    length = prompt["input_ids"].shape[1]
    # The last one writes what templates write around a user's words.
    marks = "It says USER: enter the code. <|im_start|>user\nAnd? ASSISTANT: no"
    for answer in ("A square.", "Nothing at all, I would say.", marks):
        with_answer = encode(processor, chat(noise_video(), "What moves?", answer=answer), add_generation_prompt=False)
        assert torch.equal(with_answer["question_ids"], prompt["question_ids"])
        same = int((with_answer["input_ids"][0, :length] == prompt["input_ids"][0]).cumprod(0).sum())
        assert same > length - 3  # a template may end the prompt otherwise than it begins the answer
        if name == "paligemma":
            continue  # its attention inside a prompt runs both ways, so a prompt that holds an answer reads it
        torch.testing.assert_close(
            logits(model, with_answer)[0, :same], logits(model, prompt)[0, :same], atol=1e-5, rtol=1e-5
        )


@every_base
def test_images_stay_images(name):
    """A still image gives the base's own inputs and, bit for bit, its own logits and text."""
    images_work(name)
    model, processor = wrapped(name)
    model_class = OWN_MODELS.get(model.config.base_config.model_type, AutoModelForImageTextToText)
    base = model_class.from_pretrained(base_folder(name)).eval()
    messages = chat(IMAGE, "What is it?")
    inputs = encode(processor, messages)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    own = processor.image_text_processor()(images=[IMAGE], text=[prompt], return_tensors="pt")
    assert set(inputs) == set(own)
    assert all(torch.equal(inputs[key], own[key]) for key in own)
    assert torch.equal(logits(model, inputs), logits(base, own))
    suppressed = {"suppress_tokens": model.generation_config.suppress_tokens}
    assert torch.equal(greedy(model, inputs), greedy(base, own, **suppressed))
    beams = {"num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(greedy(model, inputs, **beams), greedy(base, own, **beams, **suppressed))
    # Older transformers mix up several images once beams spread them, in the base as in its wrapper.
    if getattr(base, "_supports_mm_encoder_outputs", lambda: False)():
        two = encode(processor, chat(IMAGE, OTHER_IMAGE, "Which?"))
        copies = greedy(model, two, num_beams=2, num_return_sequences=2)
        again = greedy(model, processor.collate([two, two]), num_beams=2, num_return_sequences=2)
        assert torch.equal(again[:2], copies)


@every_base
def test_images_and_videos_mix(name):
    """An image beside a video in one prompt, both in one batch with a text: each row as it would be alone."""
    images_work(name)
    model, processor = wrapped(name)
    chats = [
        chat(IMAGE, noise_video(3, seed=1), "Is the image in the video?"),
        chat("Only text."),
        chat(noise_video(5, seed=2), "What moves?"),
        chat(IMAGE, "What is it?"),
    ]
    for batch in (encode(processor, *chats), processor.collate([encode(processor, messages) for messages in chats])):
        together = logits(model, batch)
        for row, messages in enumerate(chats):
            single = encode(processor, messages)
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(together[row, -length:], logits(model, single)[0], **CLOSE)
    without = encode(processor, chat(IMAGE, noise_video(3, seed=2), "Is the image in the video?"))
    assert not torch.allclose(logits(model, without)[0], together[0, -without["input_ids"].shape[1] :], atol=1e-3)
    assert greedy(model, encode(processor, chats[0])).shape[1] == encode(processor, chats[0])["input_ids"].shape[1] + 6


@every_base
def test_caches_and_beams(name):
    model, processor = wrapped(name)
    batch = encode(
        processor, chat(noise_video(3), noise_video(2), "Which?"), chat(noise_video(5), "What moves there?")
    )
    expected = greedy(model, batch)
    assert torch.equal(greedy(model, batch, use_cache=False), expected)
    assert torch.equal(greedy(model, batch, cache_implementation="static", disable_compile=True), expected)
    beams = greedy(model, batch, num_beams=3, num_return_sequences=2)
    assert len(beams) == 4
    for row in range(2):
        alone = encode(
            processor, [chat(noise_video(3), noise_video(2), "Which?"), chat(noise_video(5), "What moves there?")][row]
        )
        length = alone["input_ids"].shape[1]
        single = greedy(model, alone, num_beams=3, num_return_sequences=2)
        assert torch.equal(single[:, length:], beams[2 * row : 2 * row + 2, batch["input_ids"].shape[1] :])


@every_base
def test_save_and_load(name, tmp_path):
    model, processor = wrapped(name)
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    model.save_pretrained(tmp_path)
    loaded, info = LinVTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMED)
def test_half_precision(name, dtype, tmp_path):
    model, processor = wrapped(name)
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    model.save_pretrained(tmp_path)
    half = LinVTForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    rows = len(model.get_output_embeddings().weight)  # Molmo's head has fewer than its table
    close, exact = logits(half, inputs)[..., :rows].float(), logits(model, inputs)[..., :rows]
    assert torch.isfinite(close).all()
    assert (close - exact).abs().mean() < 0.05 * exact.std()
    assert greedy(half, inputs).shape[1] == inputs["input_ids"].shape[1] + 6


@pytest.mark.parametrize("name", NAMED)
def test_attention_and_checkpointing(name):
    model, processor = copy.deepcopy(wrapped(name))
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    expected = logits(model, inputs)
    model.set_attn_implementation("eager")
    assert model.base.config.get_text_config()._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    model.set_attn_implementation("sdpa")

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in model.video_tokenizer.parameters()]

    model.train()
    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert model.video_tokenizer.scorer.layers[0].gradient_checkpointing
    for grad, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(grad, expected, **CLOSE)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl_qwen2", "mipha"])
def test_compiled(name):
    """The whole forward in one graph, from the videos' tokens on. (test_cuda.py compiles generation.)"""
    torch._dynamo.reset()
    model, processor = wrapped(name)
    inputs = dict(encode(processor, chat(noise_video(), "What moves?")))
    expected = logits(model, inputs)
    with torch.no_grad():
        inputs["video_embeds"] = model.get_video_features(**model.take_video_inputs(inputs)).pooler_output
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, **CLOSE)


def test_compiled_in_parts():
    """The same answers; and after three lengths of videos and questions, others compile nothing anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    asked = [
        encode(processor, chat(noise_video(frames), "what " * words), num_frames=frames)
        for frames, words in [(4, 3), (7, 5), (10, 9), (5, 4), (9, 7), (12, 11)]
    ]
    expected = [greedy(model, inputs) for inputs in (*asked, encode(processor, *MIXED))]
    model.compile(backend="eager")
    graphs, found = [], []
    own = (
        "recompile_limit" in inspect.signature(torch.compile).parameters
    )  # then that of the thread, below, is not asked
    limit = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True} if own else {"verbose": False}
    # So small, a video may have as many tokens as a question words, and torch would take that for a rule.
    with torch.fx.experimental._config.patch(use_duck_shape=False), torch._dynamo.config.patch(**limit):
        for inputs in asked:
            found.append(greedy(model, inputs))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] > 0, graphs
    found.append(greedy(model, encode(processor, *MIXED)))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(greedy(copy.deepcopy(model), asked[0]), expected[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not here")
def test_compiled_to_kernels(tmp_path, monkeypatch):
    """LinVT's parts by torch's own compiler, which makes other mistakes than tracing does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    videos = model.take_video_inputs(dict(encode(processor, chat(noise_video(7), "What is it?"), num_frames=7)))
    tokenizer = model.video_tokenizer
    with torch.no_grad():
        expected = model.get_video_features(**videos).pooler_output
        for part in (tokenizer.question, tokenizer.scorer, tokenizer.aggregator):
            part.compile(dynamic=True)
        torch.testing.assert_close(model.get_video_features(**videos).pooler_output, expected, **CLOSE)


@every_base
def test_nothing_waits_for_the_frames(name):
    """Between the vision encoder and the language model nothing reads a number that a GPU has yet to find."""
    model, processor = wrapped(name)
    inputs = encode(processor, *MIXED)
    watched, waits = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            watched.append(function)
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append("".join(traceback.format_stack(limit=8)))
            return function(*args, **(kwargs or {}))

    with between_frames_and_words(model, Watch()):
        greedy(model, inputs)
    assert watched and not waits, waits[:1]


def loop(model, input_ids, **inputs):
    """A way to generate of somebody's own: one word, by the forward alone."""
    names = ("logits_processor", "stopping_criteria", "generation_config", "streamer", "synced_gpus")
    kept = {name: value for name, value in inputs.items() if name not in names}
    return torch.cat([input_ids, model(input_ids, **kept).logits[:, -1:].argmax(dim=-1)], dim=1)


def test_encoded_once_however_it_is_generated():
    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    expected, encode_frames, encoded = greedy(model, inputs), model.image_llm.encode_frames, []
    without = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, use_cache=False)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.image_llm, "encode_frames", lambda *args: encoded.append(1) or encode_frames(*args))
        for found in (
            lambda: greedy(model, inputs),
            lambda: greedy(model, inputs, use_cache=False),
            lambda: model.generate(inputs["input_ids"], without, **rest),
            lambda: model.generate(**inputs, generation_config=without),
            lambda: greedy(model, inputs, num_beams=2, num_return_sequences=2)[:1, :0],
            lambda: greedy(model, inputs, custom_generate=loop),
        ):
            encoded.clear()
            tokens = found()
            assert torch.equal(tokens, expected[:, : tokens.shape[1]]) and len(encoded) == 1
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['videos'\]"):
        greedy(model, inputs, videos=[1])


def test_prefix_tuning():
    from peft import PrefixTuningConfig, get_peft_model

    model, processor = copy.deepcopy(wrapped("internvl_qwen2"))
    text = model.config.get_text_config()
    sizes = {"num_layers": text.num_hidden_layers, "num_attention_heads": text.num_key_value_heads}
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    tuned = get_peft_model(
        model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", token_dim=width, **sizes)
    )
    one, other = (greedy(tuned, encode(processor, chat(noise_video(seed=s), "What moves?"))) for s in (1, 2))
    assert one.shape == other.shape and not torch.equal(one, other)


def test_lora():
    from peft import LoraConfig, get_peft_model

    model, processor = copy.deepcopy(wrapped("qwen2_vl"))
    inputs = encode(processor, chat(noise_video(), "What moves?"))
    expected = logits(model, inputs)
    settings = LoraConfig(
        r=4, target_modules=r"base\..*language_model.*\.(q|v)_proj", modules_to_save=["video_tokenizer"]
    )
    tuned = get_peft_model(model, settings)
    assert torch.equal(logits(tuned.eval(), inputs), expected)  # fresh adapters change nothing
    tuned.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("video_tokenizer" in name for name in trained)
    assert not any("base.visual" in name or "base_layer" in name for name in trained)
    assert all(p.grad is not None for n, p in tuned.named_parameters() if n in trained)
    assert greedy(tuned.eval(), inputs).shape[1] == inputs["input_ids"].shape[1] + 6


def test_tied_embeddings(tmp_path):
    model, processor = wrapped("qwen2_vl")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = LinVTForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_wrapping_keeps_the_base():
    base = AutoModelForImageTextToText.from_pretrained(base_folder("internvl_llama"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = LinVTForConditionalGeneration.from_image_llm(base, video_token_id=300, **TINY_LINVT)
    assert model.base is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert base.config._attn_implementation == "sdpa"


def test_chunks_change_nothing():
    for name in ("qwen2_vl", "internvl_qwen2"):
        model, processor = copy.deepcopy(wrapped(name))
        inputs = encode(processor, chat(noise_video(7), "What moves?"), num_frames=7)
        expected = logits(model, inputs)
        for chunk in (1, 2, 100):
            model.config.frames_per_chunk = chunk
            torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)


def test_no_video_is_padded_to_more_than_twice_its_length():
    model, processor = wrapped("internvl_qwen2")
    seen = []
    hook = model.video_tokenizer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    try:
        logits(model, encode(processor, *(chat(noise_video(n), "What moves?") for n in (3, 9, 4, 16)), num_frames=16))
    finally:
        hook.remove()
    assert seen == [(2, 4), (2, 16)]  # videos, frames


def test_question_free():
    model, processor = wrapped("mipha")
    inputs = encode(processor, chat(noise_video(), "What moves?"), questions=False)
    assert "question_ids" not in inputs
    other = encode(processor, chat(noise_video(), "Is it red?"), questions=False)
    tokens = [model.get_video_features(**model.take_video_inputs(dict(x))).pooler_output for x in (inputs, other)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl_qwen2"])
def test_trainer_keeps_every_input(name, tmp_path):
    """transformers.Trainer drops what forward does not name: a batch of an image, a video and a text must survive."""
    from transformers import Trainer, TrainingArguments

    model, processor = copy.deepcopy(wrapped(name))
    chats = [chat(IMAGE, "What?", answer="A"), chat(noise_video(), "What?", answer="B"), chat("Hi", answer="C")]
    rows = [dict(encode(processor, messages, add_generation_prompt=False)) for messages in chats]
    for row in rows:
        row["labels"] = row["input_ids"].clone()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    settings = TrainingArguments(tmp_path, per_device_train_batch_size=3, max_steps=1, report_to=[], use_cpu=True)
    result = Trainer(model, settings, data_collator=processor.collate, train_dataset=rows).train()
    assert 0 < result.training_loss < 100
    assert set().union(*rows) <= seen[0]


def test_a_conversation_goes_on_in_the_cache():
    """The second turn's prompt repeats the first one's video, which the cache holds already."""
    from transformers import DynamicCache

    model, processor = wrapped("internvl_qwen2")
    first = chat(noise_video(), "What moves?")
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = encode(processor, first)
    answer = greedy(model, prompt, **{CACHE: cache})[:, prompt["input_ids"].shape[1] :]
    more = torch.tensor([[65, 66, 67]])
    whole = dict(prompt, input_ids=torch.cat([prompt["input_ids"], answer, more], dim=1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    fresh = greedy(model, whole)
    assert torch.equal(greedy(model, whole, **{CACHE: cache}), fresh)


@pytest.mark.parametrize(
    ("name", "alone"),
    [("internvl_qwen2", False), ("blip3", False), ("blip3", True), ("molmo", False), ("molmo", True)],
)
def test_a_cache_by_either_name(name, alone):
    """transformers renamed it in 5.24; LinVT, and the models that transformers lacks, take both."""
    from transformers import DynamicCache

    model, processor = wrapped(name)
    inputs = dict(encode(processor, chat("Hello") if alone else chat(noise_video(), "What moves?")))
    model = model.base if alone else model
    more = torch.tensor([[65, 66]])
    whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], dim=1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            whole[key] = torch.nn.functional.pad(inputs[key], (0, 2))
    expected = logits(model, whole)[:, -2:]
    for argument in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, **{argument: cache})
            found = model(input_ids=more, attention_mask=whole["attention_mask"], **{argument: cache}).logits
        torch.testing.assert_close(found, expected, **CLOSE)


def test_beams_without_ids():
    model, processor = wrapped("internvl_qwen2")
    inputs = dict(encode(processor, chat(noise_video(), noise_video(3), "Which?")))
    expected = greedy(model, inputs, num_beams=2)
    length = inputs["input_ids"].shape[1]
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(greedy(model, inputs, num_beams=2), expected[:, length:])


def test_the_shape_of_a_frame():
    """Where frames keep their aspect ratio, their tokens lie in rows and columns, not in one row."""
    model, processor = wrapped("mistral3")
    videos = model.take_video_inputs(dict(encode(processor, chat(noise_video(height=28, width=56), "What?"))))
    sizes = {"image_sizes": videos["frames_image_sizes"]}
    assert model.image_llm.grid(8, sizes, 0) == (2, 4)


# ---- what goes wrong says so ----


def test_frames_that_are_not_pooled():
    """All tokens of a frame are those of the same picture as a still image among others; chunks of one frame too."""
    with pytest.raises(ValueError, match="A llava model does not pool its frames"):
        wrap(base_folder("llava"), pool_frames=False)
    model, processor = wrap(base_folder("llava_onevision"), pool_frames=False, num_frames=4, **TINY_LINVT)
    pixels = encode(processor, chat(noise_video(4), "What moves?"))["pixel_values_videos"]
    with torch.no_grad():
        frames = model.image_llm.encode_frames(model.base, pixels, {}, 4, 3)
        vision = model.base.model.vision_tower(pixels[:, 0], output_hidden_states=True).hidden_states[-1]
        expected = model.base.model.multi_modal_projector(vision)
    torch.testing.assert_close(torch.stack(frames), expected, **CLOSE)


def test_generation_without_the_video():
    model, processor = wrapped("internvl_qwen2")
    inputs = dict(encode(processor, chat(noise_video(), "What moves?")))
    with pytest.raises(ValueError, match="prefill_chunk_size does not work with videos"):
        model.generate(**inputs, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="prefill_chunk_size does not work with videos"):
        model.generate(**inputs, generation_config=GenerationConfig(prefill_chunk_size=4, max_new_tokens=1))
    with pytest.raises(ValueError, match=r"positive count for each video; got \[4, 0\]"):
        model(**{**inputs, "num_frames": torch.tensor([4, 0])})
    with pytest.raises(ValueError, match="1 videos, but 2 rows of question_ids"):
        model(**{**inputs, "question_ids": inputs["question_ids"].repeat(2, 1)})
    model.take_video_inputs(inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for prompt in ({}, {"input_ids": None, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="hold video tokens, but no video was given"):
            model.generate(**{**inputs, **prompt})


def test_a_setting_that_does_not_exist():
    base = AutoModelForImageTextToText.from_pretrained(base_folder("internvl_llama"))
    with pytest.raises(ValueError, match="no field queries_per_scal"):
        LinVTForConditionalGeneration.from_image_llm(base, video_token_id=300, queries_per_scal=[1, 1, 1])


def test_a_tensor_is_missing_or_unexpected(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = wrapped("mipha")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop("video_tokenizer.aggregator.queries")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: video_tokenizer.aggregator.queries"):
        LinVTForConditionalGeneration.from_pretrained(tmp_path)
    tensors |= {"video_tokenizer.aggregator.queries": lost, "video_tokenizer.surplus": lost.clone()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: video_tokenizer.surplus"):
        LinVTForConditionalGeneration.from_pretrained(tmp_path)


def test_no_base_and_unknown_bases():
    with pytest.raises(ValueError, match="no base_config"):
        LinVTForConditionalGeneration(LinVTConfig())
    with pytest.raises(ValueError, match="model_type 'no_such_model'"):
        LinVTConfig(base_config={"model_type": "no_such_model"})
    with pytest.raises(ValueError, match="'llama'.* image-text-to-text"):
        LinVTForConditionalGeneration(LinVTConfig(base_config={"model_type": "llama", "hidden_size": 32}))


def test_videos_and_places_must_match():
    model, processor = wrapped("internvl_qwen2")
    inputs = dict(encode(processor, chat(noise_video(), "What moves?")))
    twice = {**inputs, "input_ids": torch.cat([inputs["input_ids"]] * 2), "attention_mask": None}
    with pytest.raises(ValueError, match="hold 16 video tokens, but 1 videos of 8 tokens make 8"):
        model(**twice)
    with pytest.raises(ValueError, match="hold places for 2 videos, and 1 were given"):
        model.generate(**twice, num_beams=2, max_new_tokens=1)
    with pytest.raises(ValueError, match="4 rows, but num_frames asks for 5"):
        model(**{**inputs, "num_frames": torch.tensor([5])})
    # Without ids a placeholder is known by its embedding.
    expected = logits(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(logits(model, {**inputs, "inputs_embeds": embeds}), expected)
    with pytest.raises(ValueError, match="hold 0 video tokens"):
        model(**{**inputs, "inputs_embeds": torch.zeros_like(embeds)})
