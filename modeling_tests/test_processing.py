"""The processor: prompts and questions, videos in every form, batches, and what it says when input is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import CHATML, NAMED, TINY_LINVT, UNNAMED
from tiny_models import base_folder, chat, encode, noise_video, wrapped
from video_files import moving_square, write_video

from linvt_hf import LinVTProcessor, wrap
from linvt_hf.chat_templates import VIDEO_TOKEN, turn_marks

every_base = pytest.mark.parametrize("name", [*NAMED, *UNNAMED, "qwen3_vl"])


@every_base
def test_a_video_in_the_prompt(name):
    model, processor = wrapped(name)
    messages = chat(noise_video(), "What moves?")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.count(processor.video_token) == 1
    inputs = encode(processor, messages)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == model.config.num_video_tokens
    # In two steps, as many tools do it, the same comes out, the question included.
    both = processor(text=prompt, videos=noise_video())
    assert set(both) == set(inputs)
    assert all(torch.equal(both[key], inputs[key]) for key in inputs)
    assert processor.tokenizer.decode(inputs["question_ids"][0]) == "What moves?"
    assert inputs["num_frames"].tolist() == [4]


@every_base
def test_saved_and_loaded(name, tmp_path):
    _, processor = wrapped(name)
    processor.save_pretrained(tmp_path)
    loaded = LinVTProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    messages = [chat(noise_video(), "What moves?"), chat("Only text, and more of it than there.")]
    first, second = encode(processor, *messages), encode(loaded, *messages)
    assert all(torch.equal(first[key], second[key]) for key in first)
    plain = {"str", "int", "float", "bool", "list", "NoneType"}  # its own settings; parts save themselves
    for key, value in vars(processor).items():
        assert type(value).__name__ not in plain or getattr(loaded, key) == value, key


def test_the_newest_question_counts():
    _, processor = wrapped("internvl_qwen2")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are brief."}]},
        *chat(noise_video(), "What moves?", answer="A square."),
        *chat("And what colour is it?", answer="Red."),
        *chat("<b>Where</b> does it go, in 2 words?"),
    ]
    inputs = encode(processor, messages)
    assert processor.tokenizer.decode(inputs["question_ids"][0]) == "<b>Where</b> does it go, in 2 words?"
    inputs = encode(processor, messages[:3], add_generation_prompt=False)  # as in training, with the answer
    assert processor.tokenizer.decode(inputs["question_ids"][0]) == "What moves?"
    inputs = encode(processor, messages, question_turn="first")
    assert processor.tokenizer.decode(inputs["question_ids"][0]) == "What moves?"
    with pytest.raises(ValueError, match="question_turn is 'last'; it is 'newest' or 'first'."):
        encode(processor, messages, question_turn="last")


def test_an_end_of_turn_that_is_the_tokenizers_eos_marks_a_question():
    template = CHATML.replace("IMAGE", "<image>")
    assert turn_marks(template, (("eos_token", "<|im_end|>"),)) == (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )


def test_questions_by_hand():
    _, processor = wrapped("mipha")

    def asked(text, **kwargs):
        ids = processor(text=text, videos=[noise_video()] * np.size(text), **kwargs)["question_ids"]
        return [processor.tokenizer.decode(row).rstrip("!") for row in ids]  # id 0 pads and decodes as "!"

    assert asked(f"{VIDEO_TOKEN} Describe it.") == ["Describe it."]  # no chat template in sight: the whole prompt
    assert asked(f"{VIDEO_TOKEN} A: it is red", questions="What colour?") == ["What colour?"]
    assert asked([f"{VIDEO_TOKEN} a", f"{VIDEO_TOKEN} b"], questions=["One", "Another"]) == ["One", "Another"]
    with pytest.raises(ValueError, match="2 prompts, but 1 questions"):
        asked([f"{VIDEO_TOKEN} a", f"{VIDEO_TOKEN} b"], questions=["One"])


def test_chats_without_videos_are_the_bases_own():
    _, processor = wrapped("qwen2_vl")
    own = (base_folder("qwen2_vl") / "chat_template.jinja").read_text()
    messages = chat("Hello", answer="Hi.") + chat(Image.new("RGB", (56, 56)), "And this?")
    messages.insert(0, {"role": "system", "content": "Be kind."})
    ours = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert ours == processor.apply_chat_template(messages, chat_template=own, add_generation_prompt=True)


def test_every_form_of_a_video(tmp_path):
    _, processor = wrapped("internvl_qwen2")
    frames = moving_square(8)
    path = write_video(tmp_path / "v.mkv", frames, fps=4)
    images = []
    for index, frame in enumerate(frames):
        images.append(tmp_path / f"{index}.png")
        Image.fromarray(frame).save(images[-1])
    messages = chat("dummy", "What moves?")

    def pixels(video):
        messages[0]["content"][0] = {"type": "video", "video": video}
        return encode(processor, messages)

    from_file = pixels(str(path))
    assert from_file["frame_times"].tolist() == [[0.25, 0.75, 1.25, 1.75]]
    for form in (path, path.read_bytes(), open(path, "rb")):  # noqa: SIM115
        assert torch.equal(pixels(form)["pixel_values_videos"], from_file["pixel_values_videos"])
    from_array = pixels(frames)
    assert "frame_times" not in from_array  # nobody knows them
    for form in (
        torch.from_numpy(frames),
        [Image.fromarray(frame) for frame in frames],
        images,
        list(map(str, images)),
    ):
        assert torch.equal(pixels(form)["pixel_values_videos"], from_array["pixel_values_videos"])


def test_sampling():
    _, processor = wrapped("internvl_qwen2")
    messages = chat(noise_video(9), "What moves?")
    assert encode(processor, messages)["num_frames"].tolist() == [4]
    assert encode(processor, messages, num_frames=6)["num_frames"].tolist() == [6]
    assert encode(processor, messages, num_frames=60)["num_frames"].tolist() == [9]  # no more than there are
    assert encode(processor, messages, do_sample_frames=False)["num_frames"].tolist() == [9]
    every_third = noise_video(9)[[1, 3, 5, 7]]
    assert torch.equal(
        encode(processor, messages)["pixel_values_videos"],
        encode(processor, chat(every_third, "What moves?"))["pixel_values_videos"],
    )


def test_sampling_by_rate(tmp_path):
    _, processor = wrapped("internvl_qwen2")
    path = write_video(tmp_path / "v.mp4", moving_square(24), fps=8)
    messages = chat(path, "What moves?")
    assert encode(processor, messages, fps=1)["num_frames"].tolist() == [3]
    assert encode(processor, messages, fps=8)["num_frames"].tolist() == [4]  # the default number is the most
    assert encode(processor, messages, videos_kwargs={"num_frames": 2})["num_frames"].tolist() == [2]
    with pytest.raises(ValueError, match="fps=2"):
        encode(processor, chat(noise_video(), "What?"), fps=2)
    _, by_rate = wrap(base_folder("internvl_qwen2"), fps=1)
    assert encode(by_rate, messages)["num_frames"].tolist() == [3]
    assert encode(by_rate, chat(noise_video(), "What?"))["num_frames"].tolist() == [5]  # no times: all, up to the most


def test_several_videos():
    _, processor = wrapped("qwen2_vl")
    a, b, c = (noise_video(frames, seed=frames) for frames in (2, 3, 4))
    texts = [f"{VIDEO_TOKEN} and {VIDEO_TOKEN}: which?", "nothing", f"{VIDEO_TOKEN} what?"]
    flat = processor(text=texts, videos=[a, b, c])
    nested = processor(text=texts, videos=[[a, b], [], [c]])
    assert all(torch.equal(flat[key], nested[key]) for key in flat)
    assert flat["num_frames"].tolist() == [2, 3, 4]
    words = [row[mask] for row, mask in zip(flat["question_ids"], flat["question_mask"], strict=True)]
    assert processor.tokenizer.batch_decode(words) == ["and : which?", "and : which?", "what?"]
    with pytest.raises(ValueError, match=r"hold \[2, 0, 1\] video placeholders .* but \[1, 1, 1\] videos"):
        processor(text=texts, videos=[[a], [b], [c]])


def test_collate_equals_a_batch():
    _, processor = wrapped("qwen2_vl")
    chats = [chat(noise_video(3), "Who?"), chat("Text."), chat(noise_video(5, seed=1), "What is it that moves there?")]
    batch, collated = encode(processor, *chats), processor.collate([encode(processor, messages) for messages in chats])
    assert set(batch) == set(collated)
    assert all(torch.equal(batch[key], collated[key]) for key in batch)


def test_frames_of_different_shapes():
    """Qwen2-VL keeps aspect ratios: a batch holds videos with different numbers of tokens a frame."""
    model, processor = wrapped("qwen2_vl")
    chats = [chat(noise_video(3, height=28, width=84), "Who?"), chat(noise_video(3, height=56, width=56), "What?")]
    batch = encode(processor, *chats)
    sizes = batch["frames_image_grid_thw"].prod(dim=1).unique().tolist()
    assert len(sizes) == 2
    with torch.no_grad():
        together = model(**batch).logits
        for row, messages in enumerate(chats):
            single = encode(processor, messages)
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(together[row, -length:], model(**single).logits[0], atol=2e-5, rtol=1e-4)


# ---- wrap ----


def test_video_token_where_the_table_is_full(tmp_path):
    """InternVL2's table has no free row: a spare token of its vocabulary is used, or the user is asked for one."""
    import tiny_bases
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    tiny_bases.save_tiny_base("internvl_qwen2", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"filler{index}" for index in range(320 - len(tokenizer))])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="320 rows and its tokenizer 320 tokens.*video_token="):
        wrap(base)
    _, processor = wrap(base, video_token="filler3")
    assert processor.video_token == "filler3"
    assert (
        processor.tokenizer("a filler3filler3", add_special_tokens=False)["input_ids"][-2:]
        == [processor.video_token_id] * 2
    )

    tokenizer = AutoTokenizer.from_pretrained(base_folder("internvl_qwen2"))
    tokenizer.add_tokens([f"filler{i}" for i in range(318 - len(tokenizer))] + ["[UNUSED_TOKEN_7]", "other"])
    tokenizer.save_pretrained(base)
    assert wrap(base)[1].video_token == "[UNUSED_TOKEN_7]"


def test_wrap_a_model_and_its_processor():
    from transformers import AutoModelForImageTextToText, LlavaProcessor

    base = AutoModelForImageTextToText.from_pretrained(base_folder("llava"))
    with pytest.raises(ValueError, match="pass its processor too"):
        wrap(base)
    image_processor, tokenizer = (getattr(wrapped("llava")[1], part) for part in ("image_processor", "tokenizer"))
    own = LlavaProcessor(image_processor, tokenizer, patch_size=7, vision_feature_select_strategy="default")
    own.chat_template = (base_folder("llava") / "chat_template.jinja").read_text()
    model, processor = wrap(base, own, num_frames=3)
    assert model.base is base
    assert processor.base_processor["patch_size"] == 7
    assert encode(processor, chat(noise_video(), "What?"))["num_frames"].tolist() == [3]


def test_wrap_twice(tmp_path):
    model, processor = wrapped("mipha")
    model.save_pretrained(tmp_path, processor=processor)
    with pytest.raises(ValueError, match="already; wrap the image-LLM"):
        wrap(tmp_path)
    with pytest.raises(ValueError, match="LinVT model or processor already"):
        wrap(model, base_folder("mipha"))
    with pytest.raises(ValueError, match="LinVT model or processor already"):
        wrap(model.base, processor)
    with pytest.raises(ValueError, match="num_frames must be at least 1 or None for every frame, not 0"):
        wrap(base_folder("mipha"), num_frames=0)


def test_a_tokenizer_without_padding_and_templates_by_name(tmp_path):
    import json
    import shutil

    base = tmp_path / "base"
    shutil.copytree(base_folder("mipha"), base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "other.jinja").write_text("other")
    _, processor = wrap(base, num_frames=2)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    assert "ASSISTANT:" in processor.chat_template
    assert encode(processor, chat(noise_video(), "What?"), chat("Text"))["input_ids"].shape[0] == 2


def test_a_base_without_a_chat_template(tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(base_folder("llava"), base)
    (base / "chat_template.jinja").unlink()
    _, processor = wrap(base, num_frames=2)
    messages = chat(Image.new("RGB", (28, 28)), noise_video(), "What?")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == f"User: <image>{VIDEO_TOKEN}\nWhat?\nAssistant:"


def test_collate_of_labels():
    _, processor = wrapped("qwen2_vl")
    first, second = encode(processor, chat("Longer text")), encode(processor, chat("Text"))
    first["labels"] = first["input_ids"].clone()
    assert (processor.collate([first, second])["labels"][1] == -100).all()
    with pytest.raises(ValueError, match="tensors all"):
        processor.collate([{"input_ids": [[1, 2]]}])


def test_wrap_refuses():
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    with pytest.raises(ValueError, match="LlamaForCausalLM has no get_image_features"):
        wrap(LlamaForCausalLM(LlamaConfig(**settings)), base_folder("llava"))
    with pytest.raises(OSError, match="no model at no/such"):
        wrap("no/such")


# ---- wrong input ----


def test_the_mask_of_assistant_tokens_is_refused():
    _, processor = wrapped("mipha")
    with pytest.raises(ValueError, match="return_assistant_tokens_mask does not count a video's tokens"):
        messages = chat(noise_video(), "What?", answer="A")
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)


def test_every_block_of_a_chat_is_looked_at():
    """Also after the first video, and where text is all that is wanted: templates leave out what they do not know."""
    _, processor = wrapped("mipha")
    broken = {"role": "assistant", "content": [{"type": "txt", "text": "lost"}]}
    messages = [*chat(noise_video(), "What?"), broken, *chat("And?")]
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="a block of type 'txt'; blocks are of type 'text'"):
            processor.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize)


def test_settings_of_the_text():
    _, processor = wrapped("mipha")
    texts = [f"{VIDEO_TOKEN} what?", f"{VIDEO_TOKEN} and what is that?"]
    inputs = processor(text=texts, videos=[noise_video()] * 2, text_kwargs={"padding": "max_length", "max_length": 50})
    assert inputs["input_ids"].shape == (2, 50)


def test_numpy_is_refused():
    with pytest.raises(ValueError, match="return_tensors='np'"):
        wrapped("mipha")[1](text="a", return_tensors="np")


@pytest.mark.parametrize(
    ("text", "videos", "kwargs", "message"),
    [
        (f"{VIDEO_TOKEN} what?", None, {}, "holds 1 video placeholders .* but 0 videos"),
        (f"{VIDEO_TOKEN} what?", "twice", {}, "holds 1 video placeholders .* but 2 videos"),
        ("what?", "once", {}, "holds 0 video placeholders .* but 1 videos"),
        (f"{VIDEO_TOKEN} what?", "once", {"num_frames": 0}, "num_frames.*0"),
        (VIDEO_TOKEN, "once", {}, "A question has no words"),
        (f"{VIDEO_TOKEN} what?", "once", {"questions": " "}, "A question has no words"),
        (None, None, {}, "all three are missing"),
        ("hear", None, {"audio": "x"}, "reads no audio"),
    ],
)
def test_one_sentence(text, videos, kwargs, message):
    _, processor = wrapped("llava")
    videos = {"once": noise_video(), "twice": [noise_video(), noise_video()]}.get(videos)
    with pytest.raises(ValueError, match=message) as caught:
        processor(text=text, videos=videos, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


def test_videos_of_a_batch_are_read_at_once(tmp_path):
    _, processor = wrapped("internvl_qwen2")
    paths = [write_video(tmp_path / f"{seed}.mp4", moving_square(12 + seed, seed=seed)) for seed in range(5)]
    texts = [f"{VIDEO_TOKEN} what?"] * 5
    one = processor(text=texts, videos=[str(path) for path in paths])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = processor(text=texts, videos=[str(path) for path in paths])
        with pytest.raises(FileNotFoundError):
            processor(text=texts, videos=[*map(str, paths[:4]), "nowhere.mp4"])
    finally:
        torch.set_num_threads(before)
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)


def test_a_part_of_a_video(tmp_path):
    _, processor = wrapped("internvl_qwen2")
    path = str(write_video(tmp_path / "a.mp4", moving_square(24), fps=8))
    inputs = processor(text=f"{VIDEO_TOKEN} what?", videos=path, videos_kwargs={"start": 1.0, "end": 2.0})
    assert inputs["num_frames"].tolist() == [4] and 1 <= inputs["frame_times"].min() < inputs["frame_times"].max() < 2
    with pytest.raises(ValueError, match="start must be a number or None, not '1'"):
        processor(text=f"{VIDEO_TOKEN} what?", videos=path, videos_kwargs={"start": "1"})
    with pytest.raises(ValueError, match="num_frames is 4, and 8 in videos_kwargs; give one of them"):
        processor(text=f"{VIDEO_TOKEN} what?", videos=path, num_frames=4, videos_kwargs={"num_frames": 8})
    with pytest.raises(ValueError, match="videos_kwargs has begin; known are end, exact, "):
        processor(text=f"{VIDEO_TOKEN} what?", videos=path, videos_kwargs={"begin": 1.0})


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("said", ["duration", "frames"])
def test_times_in_the_prompt(name, said, tmp_path):
    model, plain = wrapped(name)
    _, processor = wrap(base_folder(name), num_frames=3, times_in_prompt=said, **TINY_LINVT)
    video = {"type": "video", "path": str(write_video(tmp_path / "a.mp4", moving_square(24), fps=8))}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}]
    ids = encode(processor, messages)["input_ids"][0]
    text = processor.tokenizer.decode(ids)
    without = encode(plain, messages)["input_ids"][0]
    assert (ids == processor.video_token_id).sum() == (without == plain.video_token_id).sum()
    assert len(ids) > len(without)
    words = " ".join(text.split())
    assert "lasts" in words and "3.0" in words or "3.00" in words
    if said == "frames":
        assert all(time in words for time in ("0.5", "1.5", "2.5"))
    assert words.index("lasts") < words.index("What?")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert processor.question_of(prompt) == "What?"  # what is said is no part of the question
    # Pictures have no times, and nothing is said of them.
    frames = chat(noise_video(3), "What?")
    assert torch.equal(encode(processor, frames)["input_ids"], encode(plain, frames)["input_ids"])
    processor.save_pretrained(tmp_path / "saved")
    again = LinVTProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(encode(again, messages)["input_ids"][0], ids)


def test_times_of_several_videos(tmp_path):
    _, processor = wrap(base_folder("internvl_qwen2"), num_frames=2, times_in_prompt="frames", **TINY_LINVT)
    first, second = (str(write_video(tmp_path / f"{n}.mp4", moving_square(n), fps=8)) for n in (8, 16))
    text = f"a {VIDEO_TOKEN} b <img>{VIDEO_TOKEN}</img>\nc"
    inputs = processor(text=[text, f"{VIDEO_TOKEN} what?"], videos=[[first, second], [first]])
    assert "video_durations" not in inputs
    said = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    assert said.index("lasts1.0") < said.index("b<img>") < said.index("</img>") < said.index("lasts2.0")
    with pytest.raises(ValueError, match="times_in_prompt is 'minutes'; known are 'duration', 'frames'"):
        wrap(base_folder("internvl_qwen2"), times_in_prompt="minutes", **TINY_LINVT)
