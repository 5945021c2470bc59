"""Training data: files to conversations, conversations to labels, what cannot be read, and features kept."""

import json
import os
import re
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import NAMED, TINY_BASES, TINY_LINVT, UNNAMED
from tiny_models import base_folder, encode, noise_video, wrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from video_files import moving_square, write_video

from linvt_hf import wrap
from linvt_hf.training import dataset
from linvt_hf.training.dataset import ChatDataset, read_skipped
from linvt_hf.training.feature_cache import FeatureCache, check_frozen
from linvt_hf.training.labels import IGNORED, encode_text
from linvt_hf.training.media import read_frames
from linvt_hf.training.sampler import StepSampler
from linvt_hf.training.sources import Conversation, DataSource, read_records, read_source

BASES = [*NAMED, *UNNAMED, "qwen3_vl"]
every_base = pytest.mark.parametrize("name", BASES)
every_base_with_images = pytest.mark.parametrize("name", [name for name in BASES if name != "mistral3"])


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with a.mkv, b.mkv, a picture c.png, and frames/: a video as ten numbered pictures."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mkv", moving_square(8, seed=1), fps=4)
    write_video(folder / "b.mkv", moving_square(8, height=32, width=64, seed=2), fps=4)
    Image.fromarray(noise_video(1)[0]).save(folder / "c.png")
    (folder / "frames").mkdir()
    for number, frame in enumerate(moving_square(10, seed=3)):
        Image.fromarray(frame).save(folder / "frames" / f"frame_{number + 1}.png")  # 10 sorts before 2 as text
    return folder


def text(words):
    return {"type": "text", "text": words}


def turns(*words, system=None):
    """Question, answer, question, ... as messages."""
    roles = ["user", "assistant"] * len(words)
    messages = [{"role": role, "content": [text(word)]} for role, word in zip(roles, words, strict=False)]
    return [*([{"role": "system", "content": [text(system)]}] if system else []), *messages]


def with_media(messages, *blocks):
    """The same with videos and images before the first question."""
    messages = deepcopy(messages)
    next(m for m in messages if m["role"] == "user")["content"][:0] = list(blocks)
    return messages


def video(seed=0, **size):
    return {"type": "video", "video": noise_video(seed=seed, **size)}


def picture(seed=0):
    return {"type": "image", "image": Image.fromarray(noise_video(1, seed, 56, 56)[0])}


def llava(*values, **fields):
    speakers = ["human", "gpt"] * len(values)
    said = [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]
    return {**fields, "conversations": said}


def write(folder, name, *records):
    """Records as a .json list over several lines, or as .jsonl."""
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if name.endswith("l") else "[\n" + ",\n".join(lines) + "\n]\n")
    return path


def encode_conversation(processor, messages, turns="each"):
    """The sample that a conversation in memory makes."""
    videos = [block["video"] for turn in messages for block in turn["content"] if block["type"] == "video"]
    frames = processor._frames([processor._read(one) for one in videos]) if videos else {}
    frames.pop("video_durations", None)  # which no model takes
    return {**encode_text(processor, messages, turns), **frames}


def learned(processor, sample):
    """The words that have labels, and in between where they do not follow one another."""
    (labels,), (ids,) = sample["labels"], sample["input_ids"]
    places = (labels != IGNORED).nonzero()[:, 0].tolist()
    assert torch.equal(labels[places], ids[places])
    starts = [place for before, place in pairwise([-2, *places]) if place != before + 1]
    pieces = [[p for p in places if start <= p and all(q in places for q in range(start, p))] for start in starts]
    return [processor.tokenizer.decode(ids[piece]) for piece in pieces]


# ---- layouts ----


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (llava("<video>\nWhat?", "A.", video="a.mkv"), [("V:a.mkv", "What?"), ("A.",)]),
        (llava("<image>\nWhat?", "A.", video="a.mkv", data_source="x", id=1), [("V:a.mkv", "What?"), ("A.",)]),
        (llava("What?\n<video>", "A.", video="frames", id="v_1"), [("What?", "V:frames"), ("A.",)]),
        (llava("Is <image> in <video>?", "A.", video="a.mkv", image="c.png"), [
            ("Is ", "I:c.png", " in ", "V:a.mkv", "?"), ("A.",)]),
        (llava(" <video> <video> What ?\n", "A.", video=["a.mkv", "b.mkv"]), [
            ("V:a.mkv", "V:b.mkv", "What ?"), ("A.",)]),
        (llava("Look:\n <video>\n\n What?", "A.", video="a.mkv"), [("Look:", "V:a.mkv", "What?"), ("A.",)]),
        (llava("What?", "A.", video="a.mkv"), [("V:a.mkv", "What?"), ("A.",)]),
        (llava("What?", "A.", system_prompt="Be brief."), [("Be brief.",), ("What?",), ("A.",)]),
        (llava("What?", "A.", system=""), [("What?",), ("A.",)]),
        ({"messages": [{"role": "system", "content": [text("")]}, *turns("What?", "A.")]}, [("What?",), ("A.",)]),
        ({"messages": turns("What?", "A."), "system": "Be brief."}, [("Be brief.",), ("What?",), ("A.",)]),
        (llava("What?", " A.\n", "Why?", "B."), [("What?",), ("A.",), ("Why?",), ("B.",)]),
        (llava("<image>\n<image>\nSame?", "A.", image=["c.png", "c.png"]), [
            ("I:c.png", "I:c.png", "Same?"), ("A.",)]),
        (llava("What?", "A.", "And <video> here?", "B.", video="a.mkv"), [
            ("What?",), ("A.",), ("And ", "V:a.mkv", " here?"), ("B.",)]),
        ({"video": "a.mkv", "QA": [{"i": "Look.", "q": "What?", "a": "A."}, {"i": "Look.", "q": "Why?", "a": "B."}]}, [
            ("V:a.mkv", "Look.\nWhat?"), ("A.",), ("Why?",), ("B.",)]),
        ({"video": "a.mkv", "QA": [{"i": "Describe.", "q": "", "a": "A."}]}, [("V:a.mkv", "Describe."), ("A.",)]),
        ({"image": "c.png", "QA": [{"q": "What?", "a": "A."}]}, [("I:c.png", "What?"), ("A.",)]),
        ({"messages": [*turns("What?", "A.", system="Be brief.")]}, [
            ("Be brief.",), ("What?",), ("A.",)]),
        ({"messages": with_media(turns("What?", "A."), {"type": "video", "path": "a.mkv"})}, [
            ("V:a.mkv", "What?"), ("A.",)]),
        ({"messages": with_media(turns("What?", "A."), {"type": "image"}), "images": ["c.png"]}, [
            ("I:c.png", "What?"), ("A.",)]),
        ({"messages": [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A."}],
          "videos": ["a.mkv"]}, [("V:a.mkv", "What?"), ("A.",)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_layouts(media, tmp_path, record, expected, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist([record, record]), path)
    else:
        write(tmp_path, path.name, record, record)
    first, second = read_source(DataSource(str(path), media=str(media), num_frames=3))
    assert first.messages == second.messages and first.num_frames == 3
    origins = {
        "json": [":2 (record 1)", ":3 (record 2)"],
        "jsonl": [":1", ":2"],
        "parquet": [": record 1", ": record 2"],
    }
    assert [first.origin, second.origin] == [f"{path}{place}" for place in origins[suffix]]

    def short(block):
        kind = block["type"]
        return block["text"] if kind == "text" else f"{kind[0].upper()}:{os.path.relpath(block[kind], media)}"

    assert [tuple(map(short, turn["content"])) for turn in first.messages] == expected
    roles = [turn["role"] for turn in first.messages if turn["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_in_memory_and_saved_datasets(media, tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [llava("<video>\nWhat?", f"{n}.", video="a.mkv") for n in range(3)]
    data = datasets.Dataset.from_list(records)
    answers = [["0.", "1.", "2."]] * 2
    assert [[c.messages[-1]["content"][0]["text"] for c in read_records(r, media=media)] for r in (data, records)] == (
        answers
    )
    data.save_to_disk(tmp_path / "one")
    assert len(read_source(DataSource(str(tmp_path / "one"), media=str(media)))) == 3
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="has the splits train, test; name one with split"):
        read_source(DataSource(str(tmp_path / "two"), media=str(media)))
    with pytest.raises(ValueError, match="has no split dev; it has train, test"):
        read_source(DataSource(str(tmp_path / "two"), split="dev"))
    (conversation,) = read_source(DataSource(str(tmp_path / "two"), split="test", media=str(media)))
    assert conversation.origin == f"{tmp_path / 'two'}: record 1"
    with pytest.raises(ValueError, match="not one that datasets.save_to_disk wrote"):
        read_source(DataSource(str(media)))
    pictures = datasets.Dataset.from_list([{"messages": turns("What?", "A."), "image": str(media / "c.png")}])
    pictures = pictures.cast_column("image", datasets.Image())
    (conversation,) = read_records(pictures)
    assert ChatDataset([conversation], wrapped("llava")[1])[0]["pixel_values"].shape == (1, 3, 28, 28)


def test_media_lie_beside_the_data_file(media, tmp_path):
    path = write(media, "beside.jsonl", llava("What?", "A.", video="a.mkv"))
    assert read_source(DataSource(str(path)))[0].messages[0]["content"][0]["video"] == str(media / "a.mkv")
    frames = [str(media / "frames" / f"frame_{n}.png") for n in (1, 2, 3)]
    (one,) = read_records([llava("What?", "A.", video=frames)])
    assert one.messages[0]["content"][0]["video"] == frames  # one video of three frames, not three videos
    (far,) = read_records([llava("What?", "A.", video="https://example.org/v.mp4")])
    assert far.messages[0]["content"][0]["video"] == "https://example.org/v.mp4"


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (llava("What?", video="a.mkv"), "has no answer."),
        (llava("What?", "A.", "Why?", video="a.mkv"), "has no answer to its last question"),
        (llava("What?", " ", video="a.mkv"), "turn 2 is an empty answer"),
        ({"video": "a.mkv", "QA": [{"q": "What?"}]}, "turn 2 is an empty answer"),
        ({"QA": [{"q": "How many?", "a": 0}]}, "a turn of the assistant says 0, which is no text"),
        ({"QA": []}, "has no answer"),
        (llava("What?", "A.", video="none.mkv"), "there is no video at .*none.mkv"),
        (llava("What?", "A.", image="none.png"), "there is no image at .*none.png"),
        (llava("What?", "A.", video=["f1.png", "f2.png"]), "there is no frame at .*f1.png"),
        (llava("What?", "A.", video={"path": ""}), "the path of its video is empty"),
        (llava("What?", "A.", video={"path": None}), "gives None as its video, which is no path"),
        (llava("What?", "A.", image=5), "gives 5 as its image, which is no path"),
        (llava("<video>\nWhat?", "A."), "hold 1 places for a video, but it names 0"),
        (llava("<image>\nWhat?", "A."), "hold 1 places for a image, but it names 0"),
        (llava("<video><video>\nWhat?", "A.", video="a.mkv"), "hold 2 places for a video, but it names 1"),
        (llava("<video>\nWhat?", "A.", video=["a.mkv", "b.mkv"]), "hold 1 places for a video, but it names 2"),
        (
            {"messages": with_media(turns("What?", "A."), {"type": "video", "path": "a.mkv"}), "video": "b.mkv"},
            "hold 0 places for a video, but it names 1",
        ),
        (llava("What?", "See <video>.", video="a.mkv"), "turn 2, by assistant, holds a video or image"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "a turn is by 'bot', and known are user, human"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "a turn is by 'tool'"),
        ({"messages": [{"content": "Hi"}]}, "a turn is by None"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, r"a turn is by \['user'\]"),
        ({"conversations": "Hi"}, "its conversations must be a list of objects with fields"),
        ({"QA": [["What?", "A."]]}, "its QA must be a list of objects with fields"),
        (llava(3, "A."), "a turn of the user says 3, which is no text"),
        (llava("How many?", 0), "a turn of the assistant says 0, which is no text"),
        ({"messages": turns(3, "A.")}, "a turn of the user says 3, which is no text"),
        ({"messages": turns("What?", "A.")[1:]}, "turn 1 is by assistant, after nothing"),
        ({"messages": turns("What?", "A.")[:1] * 2}, "turn 2 is by user, after user"),
        ({"messages": turns("What?", "A.", system="S")[::2]}, "turn 2 is by assistant, after system"),
        ({"messages": turns("What?", "A.", system="S"), "system": "T"}, "turn 2 is by system, after system"),
        ({"messages": [{"role": "user", "content": ""}, *turns("What?", "A.")[1:]]}, "turn 1, by user, is empty"),
        ({"messages": with_media(turns("What?", "A."), {"type": "audio"})}, "a block of type 'audio'"),
        ({"caption": "A.", "video": "a.mkv"}, "has the fields caption, video, and none of messages, conversations"),
        (["What?", "A."], "a record must be an object with fields, not list"),
        (llava("What?", "A.", video="a.mkv", start=2, end=1), "start must be before end; got 2 and 1 seconds"),
        (llava("What?", "A.", video="a.mkv", end="1"), "end must be a number or None, not '1'"),
        (
            {"messages": with_media(turns("What?", "A."), {"type": "video", "path": "a.mkv", "video_start": "x"})},
            "start must be a number or None, not 'x'",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_that_cannot_be_used(media, tmp_path, record, complaint, suffix):
    path = write(tmp_path, f"data.{suffix}", llava("What?", "A."), record)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint) as error:
        read_source(DataSource(str(path), media=str(media)))
    assert str(error.value).startswith(f"{path}:3 (record 2): " if suffix == "json" else f"{path}:2: ")
    assert str(error.value).count(". ") == 0  # one sentence


def test_files_that_cannot_be_read(media, tmp_path):
    def fails(name, content, complaint, error=ValueError):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(error, match=complaint):
            read_source(DataSource(str(tmp_path / name)))

    record = json.dumps(llava("What?", "A."))
    for name in ("empty.json", "empty.jsonl"):
        fails(name, "", f"{name} holds no records")
        fails(name, "\n\n", f"{name} holds no records")
    fails("none.json", "[]", "none.json holds no records")
    fails("broken.jsonl", f"{record}\n\n{record[:-1]}\n", "broken.jsonl:3: the line is not JSON")
    fails("broken.json", f"[\n{record},\n{record[:20]}\n]", r"broken.json:\d \(record 2\): this is not JSON")
    fails("comma.json", f"[\n{record}\n{record}\n]", "comma.json:3: a comma or ] should follow record 1")
    fails("cut.json", f"[\n{record},\n", "cut.json ends after record 1 without a ]")
    fails("two.json", f"[{record},\n{record}]\n[{record}]\n", "two.json:3: more follows the list of 2 records")
    latin = record.encode().replace(b"A.", b"\xc4.")
    fails("latin.jsonl", record.encode() + b"\n" + latin, "latin.jsonl:2: this is not UTF-8")
    fails("latin.json", b"[" + record.encode() + b",\n" + latin + b"]", "latin.json:2: this is not UTF-8")
    fails("data.csv", "video,question", "ends in '.csv'; data is read from .json, .jsonl, .parquet")
    with pytest.raises(FileNotFoundError, match="There is no data file .*absent.json"):
        read_source(DataSource(str(tmp_path / "absent.json")))
    (tmp_path / "lines.json").write_text(f"{record}\n{record}\n")  # lines in spite of the name
    assert len(read_source(DataSource(str(tmp_path / "lines.json")))) == 2
    path = write(tmp_path, "far.jsonl", llava("What?", "A.", video="none.mkv"))
    assert len(read_source(DataSource(str(path), check_media=False))) == 1
    with pytest.raises(ValueError, match="weight is 0; it must be above 0"):
        DataSource("x.json", weight=0)
    with pytest.raises(
        ValueError, match="x.json: num_frames must be at least 1 and fps above 0 and finite; got 0 and None"
    ):
        DataSource("x.json", num_frames=0)


@pytest.mark.parametrize("broken", ["empty", "text", "cut off", "damaged"])
def test_broken_parquet(broken, tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    rows = pyarrow.Table.from_pylist([llava("What?", f"{n}.") for n in range(2000)])
    parquet.write_table(rows, path, row_group_size=1000, compression="zstd")
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "empty": b"",
        "text": b"[]",
        "cut off": content[:middle],
        "damaged": content[: middle - 500] + bytes(1000) + content[middle + 500 :],
    }
    path.write_bytes(changed[broken])
    with pytest.raises(
        ValueError, match=r"data.parquet is no whole Parquet file beyond record \d+; it may be cut off"
    ):
        read_source(DataSource(path))


# ---- labels ----


def inference_prompt(processor, messages, **kwargs):
    return encode(processor, deepcopy(messages), **kwargs)


@every_base
def test_labels_are_the_answer_and_its_end(name):
    _, processor = wrapped(name)
    mark = TINY_BASES[name].end_of_turn
    messages = with_media(turns("What moves?", "A square: 3 × red, “fast”.", "Where?", "Right"), video())
    for end, answer in ((2, "A square: 3 × red, “fast”."), (4, "Right")):
        sample = encode_conversation(processor, messages[:end])
        (words,) = learned(processor, sample)
        assert words.lstrip() == answer + mark
        # Before the answer, and beside the text, it is what inference has.
        prompt = inference_prompt(processor, messages[: end - 1])
        length = prompt["input_ids"].shape[1]
        assert set(sample) == {*prompt, "labels"}
        assert (sample["labels"][0, :length] == IGNORED).all() and (sample["labels"][0, length:] != IGNORED).all()
        for key, value in prompt.items():
            per_token = value.shape == prompt["input_ids"].shape and key not in ("question_ids", "question_mask")
            assert torch.equal(sample[key][:, :length] if per_token else sample[key], value), key
        assert (sample["attention_mask"] == 1).all()
        if "token_type_ids" in sample:
            assert (sample["token_type_ids"][0, length:] == (1 if name == "paligemma" else 0)).all()


@every_base_with_images
def test_labels_with_images(name):
    _, processor = wrapped(name)
    mark = TINY_BASES[name].end_of_turn
    messages = with_media(turns("What is it?", "A square."), picture())
    sample = encode_conversation(processor, messages)
    prompt = inference_prompt(processor, messages[:1])
    length = prompt["input_ids"].shape[1]
    assert torch.equal(sample["input_ids"][:, :length], prompt["input_ids"])
    assert torch.equal(sample["pixel_values"], prompt["pixel_values"])
    assert set(sample) == {*prompt, "labels"}
    (words,) = learned(processor, sample)
    assert words.lstrip() == "A square." + mark
    for key in ("token_type_ids", "mm_token_type_ids", "attention_mask"):
        assert key not in sample or sample[key].shape == sample["input_ids"].shape


@every_base
def test_all_turns_in_one_sample(name):
    _, processor = wrapped(name)
    mark = TINY_BASES[name].end_of_turn
    messages = with_media(turns("What moves?", "A square.", "Right?", "A square.", "So?", "Right?"), video())
    sample = encode_conversation(processor, messages, turns="all")
    assert [words.lstrip() for words in learned(processor, sample)] == [
        f"{words}{mark}" for words in ("A square.", "A square.", "Right?")
    ]
    newest = encode_conversation(processor, messages)
    assert torch.equal(sample["input_ids"], newest["input_ids"])
    assert processor.tokenizer.decode(sample["question_ids"][0]) == "What moves?\nRight?\nSo?"
    assert processor.tokenizer.decode(newest["question_ids"][0]) == "So?"
    if name == "paligemma":  # the earlier answers must not be read from behind either
        first = (sample["labels"][0] != IGNORED).nonzero()[0, 0]
        assert (sample["token_type_ids"][0, first:] == 1).all() and (sample["token_type_ids"][0, :first] == 0).all()


def test_all_turns_with_an_image_in_a_later_one():
    _, processor = wrapped("idefics3")
    messages = turns("What?", "A.", "And this?", "B.", system="Be brief.")
    messages[3]["content"].insert(0, picture())
    assert learned(processor, encode_conversation(processor, messages, turns="all")) == [
        "A.<|im_end|>",
        "B.<|im_end|>",
    ]


@every_base
def test_the_answer_does_not_change_the_video(name):
    model, processor = wrapped(name)
    samples = [
        encode_conversation(processor, with_media(turns("What moves?", answer), video()))
        for answer in ("A square.", "What moves? Nothing at all, I should say.")
    ]
    with torch.no_grad():
        one, other = (model.get_video_features(**model.take_video_inputs(dict(s))).pooler_output for s in samples)
    assert torch.equal(one, other)
    assert torch.equal(samples[0]["question_ids"], samples[1]["question_ids"])


@pytest.mark.parametrize("name", ["internvl_qwen2", "paligemma"])
def test_the_loss_is_that_of_the_answer_under_inference(name):
    model, processor = wrapped(name)
    messages = with_media(turns("What moves?", "A square."), video())
    sample = encode_conversation(processor, messages)
    prompt = inference_prompt(processor, messages[:1])
    with torch.no_grad():
        loss = model(**sample).loss
        ids, total, count = prompt["input_ids"], 0.0, 0
        for token in sample["labels"][sample["labels"] != IGNORED]:  # one by one, as generation does
            inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "token_type_ids" in prompt:
                inputs["token_type_ids"] = torch.zeros_like(ids)
                inputs["token_type_ids"][:, prompt["input_ids"].shape[1] :] = 1
            total -= model(**inputs).logits[0, -1].log_softmax(dim=-1)[token]
            ids, count = torch.cat([ids, token[None, None]], dim=1), count + 1
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


def test_a_chat_without_words_or_videos():
    _, processor = wrapped("internvl_qwen2")
    sample = encode_conversation(processor, [{"role": "user", "content": [video()]}, *turns("", "A square.")[1:]])
    assert "question_ids" not in sample and learned(processor, sample) == ["A square.<|im_end|>"]
    assert set(encode_conversation(processor, turns("Hi", "Ho"))) == {"input_ids", "attention_mask", "labels"}


def merging_tokenizer():
    """Byte-level BPE that would join the space that ends a prompt and the answer's first letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "A"), ("Ċ", "Ċ"), (":", "Ġ")]
    vocab = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def metaspace_tokenizer():
    """As SentencePiece does it: a text begins with a space of its own, and spaces belong to the word after them."""
    letters = "▁ABQ:abcdefghijklmnopqrstuvwxyz.?\n"
    vocab = {letter: index for index, letter in enumerate(letters)} | {"▁A": 100, "▁B": 101, "<unk>": 102}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "A"), ("▁", "B")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


_TURN = "{% for m in messages %}{{ m['role'] }}: {% for b in m['content'] %}{{ b['text'] }}{% endfor %}"
_TEMPLATES = {
    # template, what is learned of the answer "A b. " after "q?"
    "space before": (_TURN + "</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "A b. </s>"),
    "no space before": (_TURN + "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}", " A b. </s>"),
    "no end mark": (_TURN + "\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}", " A b.</s>"),
    "more after the mark": (
        _TURN + "</s>\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "A b. </s>",
    ),
    "strips": (
        _TURN.replace("b['text']", "b['text'] | trim").replace(": {%", ":{%")
        + "</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "A b.</s>",
    ),
}


@pytest.mark.parametrize("template", _TEMPLATES)
@pytest.mark.parametrize("make_tokenizer", [merging_tokenizer, metaspace_tokenizer])
def test_templates_and_tokenizers_that_join(template, make_tokenizer):
    _, processor = wrapped("llava")
    processor, tokenizer = deepcopy(processor), make_tokenizer()
    processor.tokenizer = tokenizer
    processor.chat_template, expected = _TEMPLATES[template]
    messages = turns("q?", "A b. ")
    sample = encode_conversation(processor, messages)
    prompt = inference_prompt(processor, messages[:1])["input_ids"]
    length = prompt.shape[1]
    assert torch.equal(sample["input_ids"][:, :length], prompt)
    whole, before = (tokenizer.decode(ids) for ids in (sample["input_ids"][0], prompt[0]))
    assert whole == before + expected
    assert (sample["labels"][0, :length] == IGNORED).all()
    assert torch.equal(sample["labels"][0, length:], sample["input_ids"][0, length:])
    # The answer has the very tokens it would have anywhere after a space.
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in sample["input_ids"]


@pytest.mark.parametrize("written", [True, False])
def test_one_token_begins_a_sample(written):
    """Whether the template writes the first token or the tokenizer adds it."""
    _, processor = wrapped("llava")
    processor, tokenizer = deepcopy(processor), merging_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    processor.tokenizer = tokenizer
    processor.chat_template = ("<s>" if written else "") + _TEMPLATES["no space before"][0]
    sample = encode_conversation(processor, turns("q?", "A b.", "r?", "B."), turns="all")
    prompt = inference_prompt(processor, turns("q?"))["input_ids"]
    assert sample["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    assert torch.equal(sample["input_ids"][:, : prompt.shape[1]], prompt)
    assert learned(processor, sample) == [" A b.</s>", " B.</s>"]


def test_templates_that_cannot_be_learned():
    _, processor = wrapped("llava")
    processor = deepcopy(processor)
    processor.chat_template = _TURN + "</s>{% endfor %}{% if add_generation_prompt %}assistant: <think>{% endif %}"
    with pytest.raises(ValueError, match="writes an answer otherwise after its generation prompt"):
        encode_conversation(processor, turns("q?", "A."))
    with pytest.raises(ValueError, match="record 1: The chat template writes an answer otherwise"):
        ChatDataset(read_records([{"messages": turns("q?", "A.")}]), processor)[0]
    # Earlier answers are left out of the history, as reasoning models do it with what they thought.
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'user' or loop.last %}"
        "{{ m['content'][0]['text'] }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(processor, encode_conversation(processor, turns("q?", "A.", "r?", "B."))) == ["B.</s>"]
    with pytest.raises(ValueError, match="writes an earlier turn otherwise than the newest one.*use turns='each'"):
        encode_conversation(processor, turns("q?", "A.", "r?", "B."), turns="all")


# ---- the data set ----


def test_each_turn_is_a_sample(media):
    _, processor = wrapped("internvl_qwen2")
    record = llava("<video>\nWhat?", "A.", "Why?", "B.", video=str(media / "a.mkv"))
    data = ChatDataset(read_records([record, llava("Hi", "Ho")]), processor)
    assert [learned(processor, data[i])[0] for i in range(3)] == ["A.<|im_end|>", "B.<|im_end|>", "Ho<|im_end|>"]
    assert [processor.tokenizer.decode(data[i]["question_ids"][0]) for i in range(2)] == ["What?", "Why?"]
    assert data[0]["frame_times"].tolist() == [[0.25, 0.75, 1.25, 1.75]]
    data = ChatDataset(read_records([record, llava("Hi", "Ho")]), processor, turns="all")
    assert len(data) == 2 and learned(processor, data[0]) == ["A.<|im_end|>", "B.<|im_end|>"]
    with pytest.raises(ValueError, match="turns is 'some'"):
        ChatDataset(read_records([record]), processor, turns="some")


def test_sampling_by_run_and_by_source(media, tmp_path):
    _, processor = wrapped("internvl_qwen2")
    path = str(write(tmp_path, "data.jsonl", llava("What?", "A.", video="a.mkv")))

    def frames(run=None, **source):
        data = ChatDataset([DataSource(path, media=str(media), **source)], processor, **(run or {}))
        return data[0]["frame_times"][0].tolist()

    assert frames() == [0.25, 0.75, 1.25, 1.75]  # the processor's 4 frames
    assert frames({"num_frames": 2}) == [0.5, 1.5]
    assert frames({"num_frames": 2}, num_frames=8) == [n / 4 for n in range(8)]
    assert frames({"num_frames": 2}, fps=1) == [0.0, 1.0]
    assert frames({"num_frames": 4, "fps": 4}, num_frames=2) == [0.5, 1.5]
    with pytest.raises(ValueError, match="got 0 and None"):
        frames({"num_frames": 0})


@pytest.mark.parametrize("part", [{"start": 0.5}, {"end": 0.5}, {"start": 0.25, "end": 0.75}])
def test_parts_of_videos(part, media, tmp_path):
    _, processor = wrapped("internvl_qwen2")
    block = {"type": "video", "path": "a.mkv", **{f"video_{name}": value for name, value in part.items()}}
    records = [llava("What?", "A.", video="a.mkv", **part), {"messages": with_media(turns("What?", "A."), block)}]
    records.append(llava("What?", "A.", video="a.mkv"))
    model, _ = frozen("internvl_qwen2")
    data = ChatDataset(read_records(records, media=media), processor)
    expected = processor._frames([processor._read(str(media / "a.mkv"), **part)])["pixel_values_videos"]
    assert torch.equal(data[0]["pixel_values_videos"], expected)
    assert torch.equal(data[1]["pixel_values_videos"], expected)
    assert not torch.equal(data[2]["pixel_values_videos"], expected)
    data.features = FeatureCache(tmp_path)
    assert data.features.fill(model, data, progress=False) == 2  # of one video


def test_a_folder_of_frames(media):
    _, processor = wrapped("internvl_qwen2")
    (conversation,) = read_records([llava("What?", "A.", video=str(media / "frames"))])
    data = ChatDataset([conversation], processor, num_frames=10, fps=2)  # frames have no times, so no rate either
    messages = with_media(turns("What?"), {"type": "video", "video": moving_square(10, seed=3)})
    expected = inference_prompt(processor, messages, num_frames=10)
    assert torch.equal(data[0]["pixel_values_videos"], expected["pixel_values_videos"])


def test_steps_are_drawn_at_random_and_sorted_by_length(media, tmp_path):
    _, processor = wrapped("internvl_qwen2")
    words = [llava("Say", "la " * (i % 7 + 1)) for i in range(50)]
    long = llava("What?", "A.", "And then?", "A long answer about all that follows.", video="a.mkv")
    sources = [
        DataSource(str(write(tmp_path, "words.jsonl", *words)), weight=0.5),
        DataSource(str(write(tmp_path, "video.jsonl", long)), media=str(media)),
    ]
    data = ChatDataset(sources, processor)
    assert sorted(data.lengths[-2:]) == [7, 53]  # each turn is a sample, with what came before it
    for epoch in (0, 1):  # other words in each
        data.set_epoch(epoch)
        tokens = [data[i]["input_ids"].shape[1] for i in range(25)]
        assert np.corrcoef(data.lengths[:25], tokens)[0, 1] > 0.99

    def steps(seed, epoch, size=8):
        order = list(StepSampler(data, size, seed, lambda: epoch))
        assert sorted(order) == [*range(27)]
        return [order[start : start + size] for start in range(0, 27, size)]

    drawn = steps(0, 0)
    for step in drawn:
        lengths = data.lengths[step].tolist()
        assert lengths == sorted(lengths, reverse=True)
    sets = [{*step} for step in drawn]
    plain = steps(0, 0, size=1)  # nothing to sort
    assert sets == [{index for (index,) in plain[start : start + 8]} for start in range(0, 27, 8)]
    assert steps(0, 0) == drawn
    assert sets not in ([{*step} for step in steps(0, 1)], [{*step} for step in steps(1, 0)])


def test_weights(media, tmp_path):
    _, processor = wrapped("internvl_qwen2")
    paths = [str(write(tmp_path, f"{n}.jsonl", *[llava("Say", f"{n}{i:02}") for i in range(20)])) for n in "ab"]
    data = ChatDataset([DataSource(paths[0], weight=0.5), DataSource(paths[1], weight=2.25)], processor, seed=3)

    def answers(epoch):
        data.set_epoch(epoch)
        assert len(data) == 10 + 45
        return [learned(processor, data[i])[0].removesuffix("<|im_end|>") for i in range(len(data))]

    first, second = answers(0), answers(1)
    a, b = first[:10], first[10:]
    assert len(set(a)) == 10 and set(a) < {f"a{i:02}" for i in range(20)}
    counts = [b.count(f"b{i:02}") for i in range(20)]
    assert sorted(counts) == [2] * 15 + [3] * 5
    assert set(second[:10]) != set(a)  # another half in the next epoch
    assert answers(0) == first
    other = ChatDataset([DataSource(paths[0], weight=0.5)], processor, seed=4)
    assert [learned(processor, other[i])[0].removesuffix("<|im_end|>") for i in range(10)] != a
    with pytest.raises(ValueError, match="b.jsonl: a weight of 0.01 leaves none of its 20 samples; give it at least"):
        ChatDataset([DataSource(paths[0]), DataSource(paths[1], weight=0.01)], processor)
    with pytest.raises(ValueError, match="give at least one source"):
        ChatDataset([], processor)


@every_base_with_images
def test_videos_images_and_texts_in_one_batch(name):
    model, processor = wrapped(name)
    conversations = [
        Conversation(with_media(turns("What moves?", "A square."), video(0)), "a"),
        Conversation(with_media(turns("What is it, and what is behind it?", "A dot."), picture(1)), "b"),
        Conversation(turns("Hello", "Hi"), "c"),
        Conversation(with_media(turns("Both?", "Yes."), video(2), picture(3)), "d"),
    ]
    data = ChatDataset(conversations, processor)
    batch = processor.collate([data[i] for i in range(4)])
    assert batch["labels"].shape == batch["input_ids"].shape
    with torch.no_grad():
        losses = [model(**data[i]).loss for i in range(4)]
        loss = model(**batch).loss
    counts = [(data[i]["labels"] != IGNORED).sum() for i in range(4)]
    together = sum(one * count for one, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(loss, together, rtol=1e-3, atol=1e-4)


def test_texts_that_would_be_read_as_pixels():
    _, processor = wrapped("llava")
    for token in (processor.video_token, "<image>"):
        records = read_records([{"messages": turns("Hi", "Ho")}, {"messages": turns(f"What is {token}?", "A token.")}])
        with pytest.raises(ValueError, match=f"records: record 2: a text holds {re.escape(token)}"):
            ChatDataset(records, processor)


# ---- what cannot be read ----


def broken_sources(folder, media):
    (folder / "broken.mkv").write_bytes(b"not a video")
    (folder / "broken.png").write_bytes((media / "c.png").read_bytes()[:300])
    (folder / "no frames").mkdir()
    return write(
        folder,
        "data.jsonl",
        llava("What?", "1", video=str(media / "a.mkv")),
        llava("What?", "2", video="broken.mkv"),
        llava("What?", "3", image="broken.png"),
        llava("What?", "4", video="no frames"),
        llava("What?", "5", image=str(media / "c.png")),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_media_are_skipped(media, tmp_path, workers):
    _, processor = wrapped("llava")
    path = broken_sources(tmp_path, media)
    skipped = tmp_path / "run" / "skipped.jsonl"
    answers = []
    for _ in range(2):  # a run, and the same once more
        data = ChatDataset([DataSource(str(path))], processor, skipped=skipped)
        loader = DataLoader(data, num_workers=workers, collate_fn=lambda samples: samples[0])
        for _ in range(2):
            answers.append([learned(processor, sample)[0].strip().removesuffix("</s>") for sample in loader])
    assert answers == [["1", "5", "1", "5", "5"]] * 4  # others, not all of them the same
    entries = read_skipped(skipped)
    assert sorted(entry["origin"] for entry in entries) == [f"{path}:{n}" for n in (2, 3, 4)]
    found = {os.path.basename(entry["path"]): entry["reason"] for entry in entries}
    assert "cannot be read as a video" in found["broken.mkv"]
    assert "cannot be read as an image" in found["broken.png"]
    assert "is a folder without images" in found["no frames"]
    with skipped.open("a") as file:
        file.write('{"origin": "torn')
    assert read_skipped(skipped) == entries
    assert read_skipped(tmp_path / "absent") == []


def test_when_nothing_can_be_read(media, tmp_path):
    _, processor = wrapped("llava")
    path = broken_sources(tmp_path, media)
    data = ChatDataset(read_source(DataSource(str(path)))[1:4], processor)
    for index in (0, 1):
        with pytest.raises(ValueError, match="None of 3 samples can be used; the first: .*broken.mkv"):
            data[index]


def test_a_broken_video_is_read_once(media, tmp_path, monkeypatch):
    _, processor = wrapped("llava")
    data = ChatDataset([DataSource(str(broken_sources(tmp_path, media)))], processor)
    tried = []
    monkeypatch.setattr(dataset, "read_frames", lambda p, v: tried.append(v[0].path) or read_frames(p, v))
    for _ in range(3):
        data[1], data[3]
    assert tried == [str(tmp_path / "broken.mkv"), str(tmp_path / "no frames")]


@pytest.mark.parametrize("cached", [False, True])
def test_media_that_are_refused_are_skipped(cached, media, tmp_path, monkeypatch):
    """A server that does not answer, a picture too large to open, and a form that the base does not take."""
    model, processor = frozen("qwen2_vl")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    thin = Image.new("RGB", (600, 2))
    thin.save(tmp_path / "thin.png")
    (tmp_path / "huge").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "huge" / "1.png")
    records = [
        llava("What?", "1", video=str(media / "a.mkv")),
        llava("What?", "2", image="http://127.0.0.1:9/x.png"),
        llava("What?", "3", video="huge"),
        llava("What?", "4", image="thin.png"),
        llava("What?", "5", video=np.stack([np.asarray(thin)] * 3)),
    ]
    features = FeatureCache(memory=True) if cached else None
    conversations = read_records(records, media=tmp_path)
    data = ChatDataset(conversations, processor, skipped=tmp_path / "skipped.jsonl", features=features)
    if cached:
        assert features.fill(model, data, progress=False) == 1
    assert [learned(processor, data[n])[0][0] for n in range(5)] == ["1"] * 5
    reasons = {entry["origin"][-1]: entry["reason"] for entry in read_skipped(tmp_path / "skipped.jsonl")}
    assert reasons["2"] == "http://127.0.0.1:9/x.png cannot be read as an image."
    assert "1.png', cannot be read as an image" in reasons["3"]
    assert f"{tmp_path / 'thin.png'} is refused by the base's image processor: " in reasons["4"]
    assert "a video is refused by the base's image processor: " in reasons["5"]


def test_a_whole_folder_that_is_missing(tmp_path, caplog):
    """What stands in for many broken samples is many others; and only the first few are named while it runs."""
    _, processor = wrapped("llava")
    records = [llava("What?", str(n), **({"video": "gone.mkv"} if 20 <= n < 50 else {})) for n in range(100)]
    conversations = read_records(records, media=tmp_path, check_media=False)
    data = ChatDataset(conversations, processor, skipped=tmp_path / "skipped.jsonl")
    answers = [learned(processor, data[n])[0].strip() for n in range(100)]
    assert [answers.count(f"{n}</s>") for n in range(20, 50)] == [0] * 30
    assert max(answers.count(answer) for answer in answers) == 2
    assert len(read_skipped(tmp_path / "skipped.jsonl")) == 30
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == dataset.WARNINGS
    with pytest.raises(IndexError):
        data[100]


def test_conversations_are_packed(media):
    clip = noise_video()
    records = [llava("What?", "A.", video=str(media / "a.mkv")), llava("What?", "A.", video=clip)]
    packed = read_records([*records, llava("What?", "Ü.", image={"bytes": b"1"})], num_frames=3)
    first, second, third = packed
    assert packed[0] == first and packed[0] is not first and packed[-1].messages == third.messages
    assert packed[1].messages[0]["content"][0]["video"] is clip  # an array is not copied
    assert [c.origin for c in packed[1:]] == ["records: record 2", "records: record 3"]
    assert third.num_frames == 3 and third.messages[1]["content"][0]["text"] == "Ü."
    with pytest.raises(IndexError):
        packed[3]


def test_bugs_are_not_skipped(media, monkeypatch):
    _, processor = wrapped("internvl_qwen2")
    data = ChatDataset(read_records([llava("What?", "A.", video=str(media / "a.mkv"))]), processor)
    monkeypatch.setattr("linvt_hf.processing_videos.frames_to_pixels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_samples_that_are_too_long(tmp_path):
    _, processor = wrapped("internvl_qwen2")
    conversations = [Conversation(turns("Say", "A" * n), f"file:{n}") for n in (5, 50, 6)]
    length = len(encode_conversation(processor, conversations[2].messages)["input_ids"][0])
    data = ChatDataset(conversations, processor, max_length=length, skipped=tmp_path / "skipped.jsonl")
    assert [len(data[i]["input_ids"][0]) for i in range(3)] == [length - 1, length - 1, length]
    reason = f"{length + 44} tokens, max_length {length}"
    assert read_skipped(tmp_path / "skipped.jsonl") == [{"origin": "file:50", "path": None, "reason": reason}]
    with pytest.raises(
        ValueError, match=f"None of 3 samples can be used; the first: {length - 1} tokens, max_length 3"
    ):
        ChatDataset(conversations, processor, max_length=3)[0]


# ---- features kept ----


def frozen(name):
    model, processor = wrapped(name)
    model = deepcopy(model)
    model.base.requires_grad_(False)
    return model, processor


@pytest.fixture
def conversations(media):
    """Two videos of different sizes and lengths, one asked twice, and a text."""
    return read_records(
        [
            llava("What moves?", "A square.", "Where?", "Right.", video=str(media / "a.mkv")),
            llava("And what here?", "A dot.", video=str(media / "b.mkv")),
            llava("<video> or <video>?", "Both.", video=[str(media / "b.mkv"), str(media / "frames")]),
            llava("Hello", "Hi"),
        ]
    )


@every_base
@pytest.mark.parametrize("memory", [True, False])
def test_features_kept_change_nothing(name, memory, conversations, tmp_path):
    model, processor = frozen(name)
    model.train()
    cache = FeatureCache(None if memory else tmp_path, memory=memory)
    data = ChatDataset(conversations, processor, num_frames=3)
    kept = ChatDataset(conversations, processor, num_frames=3, features=cache)
    assert cache.fill(model, kept, progress=False) == 3
    assert cache.fill(model, kept, progress=False) == 0
    assert model.training and model.base.training
    model.eval()
    for _ in range(2):  # also the second time, when more comes from memory
        one, other = (processor.collate([d[i] for i in range(len(d))]) for d in (data, kept))
        assert "pixel_values_videos" not in other and other["frame_features"].dtype == model.dtype
        with torch.no_grad():
            one, other = model(**one), model(**other)
        torch.testing.assert_close(other.logits, one.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.loss, one.loss, rtol=1e-5, atol=1e-6)
    model.train()
    loss = model(**processor.collate([kept[i] for i in range(len(kept))])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.video_tokenizer.parameters())


@every_base
def test_features_are_found_after_model_and_processor_were_saved(name, conversations, tmp_path):
    model, processor = frozen(name)
    data = ChatDataset(conversations, processor, num_frames=3, features=FeatureCache(tmp_path / "cache"))
    assert data.features.fill(model, data, progress=False) == 3
    model.save_pretrained(tmp_path / "saved", processor=processor)
    assert data.features.fill(model, data, progress=False) == 0


def test_features_in_loader_workers_and_a_second_run(conversations, tmp_path):
    model, processor = frozen("qwen2_vl")
    kept = ChatDataset(conversations, processor, features=FeatureCache(tmp_path))
    assert kept.features.fill(model, kept, workers=2, progress=False) == 3
    again = ChatDataset(conversations, processor, features=FeatureCache(tmp_path, memory=True))
    assert again.features.fill(model, again, progress=False) == 0
    loader = DataLoader(again, batch_size=5, num_workers=2, collate_fn=processor.collate)
    (batch,) = loader
    assert batch["num_frames"].tolist() == [4, 4, 4, 4, 4] and batch["frame_features"].shape[0] == 20
    assert set(batch["frames_num_tokens"].tolist()) == {2, 6} and batch["frame_features"].shape[1] == 6


@pytest.mark.parametrize("kept", [0, 50, -10])
def test_damaged_features_are_computed_again(kept, conversations, tmp_path):
    model, processor = frozen("qwen2_vl")
    data = ChatDataset(conversations, processor, features=FeatureCache(tmp_path))
    assert data.features.fill(model, data, progress=False) == 3
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=r"\.safetensors of the feature cache is cut short or damaged .*fill the cache"):
        data[0]
    assert data.features.fill(model, data, progress=False) == 3
    assert "frame_features" in data[0]


def test_several_processes_share_the_work(conversations, tmp_path):
    model, processor = frozen("internvl_qwen2")
    data = [ChatDataset(conversations, processor, features=FeatureCache(tmp_path)) for _ in range(3)]
    # The second starts when the first is done and finds other things missing than it did.
    counts = [d.features.fill(model, d, progress=False, share=(rank, 3)) for rank, d in enumerate(data)]
    assert sum(counts) == 3
    assert data[0].features.fill(model, data[0], progress=False) == 0


def test_features_are_never_stale(media, tmp_path):
    model, processor = frozen("internvl_qwen2")
    path = tmp_path / "v.mkv"

    def dataset(**kwargs):
        cache = FeatureCache(tmp_path / "cache")
        return ChatDataset(read_records([llava("What?", "A.", video=str(path))]), processor, features=cache, **kwargs)

    def computed(model=model, **kwargs):
        data = dataset(**kwargs)
        return data.features.fill(model, data, progress=False)

    path.write_bytes((media / "a.mkv").read_bytes())
    assert [computed(), computed()] == [1, 0]
    assert [computed(num_frames=2), computed(num_frames=2), computed(fps=1)] == [1, 0, 1]
    assert computed(num_frames=4) == 0  # what the processor does of itself
    data = dataset()
    data.features.fill(model, data, progress=False)
    before = data[0]["frame_features"]
    path.write_bytes((media / "b.mkv").read_bytes())  # another video under the same name
    with pytest.raises(ValueError, match="holds nothing for .*v.mkv, which is new or has changed since"):
        data[0]
    assert computed() == 1
    data = dataset()
    data.features.fill(model, data, progress=False)
    assert not torch.equal(data[0]["frame_features"], before)
    os.utime(path, ns=(1, 1))
    assert computed() == 1

    other = deepcopy(model)
    with torch.no_grad():
        next(other.base.model.vision_tower.parameters()).add_(1e-3)
    assert [computed(other), computed(other)] == [1, 0]
    with torch.no_grad():  # the projector too; and neither the language model nor LinVT
        next(other.base.model.multi_modal_projector.parameters()).add_(1e-3)
        assert computed(other) == 1
        next(other.base.model.language_model.parameters()).add_(1e-3)
        next(other.video_tokenizer.parameters()).add_(1e-3)
        assert computed(other) == 0
    processor = deepcopy(processor)
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert computed() == 1
    assert computed(deepcopy(model).bfloat16()) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [computed(), computed()] == [1, 0]


def test_features_of_videos_in_memory():
    model, processor = frozen("internvl_qwen2")
    clips = [noise_video(seed=0), noise_video(seed=0), noise_video(seed=1), list(noise_video(seed=1))]
    conversations = read_records([llava("What?", "A.", video=clip) for clip in clips])
    cache = FeatureCache(memory=True)
    data = ChatDataset(conversations, processor, features=cache)
    assert cache.fill(model, data, progress=False) == 3  # equal arrays are one video, a list of pictures another form
    assert torch.equal(data[0]["frame_features"], data[1]["frame_features"])
    assert torch.equal(data[2]["frame_features"], data[3]["frame_features"])
    assert not torch.equal(data[0]["frame_features"], data[2]["frame_features"])
    first, second = data[0], data[0]
    first["labels"] = None
    assert second["labels"] is not None and data[0]["labels"] is not None  # samples are the caller's own


def test_broken_videos_and_features(media, tmp_path):
    model, processor = frozen("llava")
    path = broken_sources(tmp_path, media)
    cache = FeatureCache(memory=True)
    data = ChatDataset([DataSource(str(path))], processor, features=cache, skipped=tmp_path / "skipped")
    assert cache.fill(model, data, progress=False) == 1
    assert {entry["origin"] for entry in read_skipped(tmp_path / "skipped")} == {f"{path}:{n}" for n in (2, 4)}
    assert [learned(processor, data[i])[0].strip()[0] for i in range(5)] == ["1", "5", "1", "5", "5"]
    assert len(read_skipped(tmp_path / "skipped")) == 3
    os.remove(tmp_path / "broken.mkv")
    assert cache.fill(model, data, progress=False) == 0


def test_the_cache_is_for_frozen_encoders(conversations):
    model, processor = frozen("internvl_qwen2")
    cache = FeatureCache(memory=True)
    data = ChatDataset(conversations, processor, features=cache)
    with pytest.raises(ValueError, match="is not filled yet"):
        data[0]
    model.base.model.language_model.requires_grad_(True)  # as in stage 2
    check_frozen(model)
    model.base.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"of their tensors are to be trained \(model.multi_modal_projector"):
        cache.fill(model, data, progress=False)
    with pytest.raises(ValueError, match="needs a folder, memory=True, or both"):
        FeatureCache()


def test_frame_features_as_input(conversations):
    model, processor = frozen("qwen2_vl")
    cache = FeatureCache(memory=True)
    kept = ChatDataset(conversations, processor, features=cache)
    cache.fill(model, kept, progress=False)
    plain = ChatDataset(conversations, processor)
    with_pixels, with_features = ({k: v for k, v in d[0].items() if k != "labels"} for d in (plain, kept))
    assert torch.equal(
        model.generate(**with_pixels, max_new_tokens=5), model.generate(**with_features, max_new_tokens=5)
    )
    both = {**with_features, "pixel_values_videos": with_pixels["pixel_values_videos"]}
    with pytest.raises(ValueError, match="; pixel_values_videos and frame_features were given"):
        model(**both)
    with pytest.raises(ValueError, match="; none was given"):
        model.get_video_features(num_frames=[4])
    with pytest.raises(ValueError, match="frame_features holds 4 frames, but num_frames asks for 3"):
        model(**{**with_features, "num_frames": torch.tensor([3])})
    weights = model.get_video_features(**model.take_video_inputs(dict(with_features)), output_weights=True).weights
    assert weights[0].shape[1:] == with_features["frame_features"].shape[:2]


def test_a_thousand_samples_cost_little():
    """A guard against work that creeps into every sample, far above what it takes: 0.1 ms a sample."""
    import time

    model, processor = frozen("internvl_qwen2")
    clip = noise_video(seed=0)
    cache = FeatureCache(memory=True)
    data = ChatDataset(read_records([llava(f"{n}?", "A.", video=clip) for n in range(100)]), processor, features=cache)
    cache.fill(model, data, progress=False)
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(10):
            processor.collate([data[i] for i in range(100)])
        seconds = time.perf_counter() - start
    assert seconds < 2, np.round(seconds, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_times_in_the_prompt_are_those_of_inference(media, cached):
    model, processor = wrap(base_folder("internvl_qwen2"), num_frames=3, times_in_prompt="frames", **TINY_LINVT)
    features = FeatureCache(memory=True) if cached else None
    data = ChatDataset(read_records([llava("What?", "A.", video=str(media / "a.mkv"))]), processor, features=features)
    if cached:
        features.fill(model.requires_grad_(False), data, progress=False)
    sample = data[0]
    video = {"type": "video", "path": str(media / "a.mkv")}
    prompt = encode(processor, [{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}])["input_ids"][
        0
    ]
    assert torch.equal(sample["input_ids"][0, : len(prompt)], prompt) and "video_durations" not in sample
    assert "lasts" in processor.tokenizer.decode(prompt)
