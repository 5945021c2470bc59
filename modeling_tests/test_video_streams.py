"""Videos a few frames at a time: the frames of one reading, in bounded memory, and what a model makes of them."""

import copy
import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_bases import NAMED, UNNAMED
from tiny_models import chat, encode, noise_video, wrapped

av = pytest.importorskip("av", reason="reading video files needs PyAV")

from PIL import Image  # noqa: E402
from video_files import moving_square, relisted, write_video  # noqa: E402

from linvt_hf import EncodedVideo, VideoQuestionAnsweringPipeline, video_decoding  # noqa: E402
from linvt_hf.video_chunks import Chunks  # noqa: E402
from linvt_hf.video_limits import Limits  # noqa: E402
from linvt_hf.video_reading import VideoReadError, read_video, stream_video  # noqa: E402

COUNT = 90
FRAMES = moving_square(COUNT)
FILES = {  # encoder and how it is written
    "groups.mp4": ("libx264", {"gop": 12, "bframes": 3}),
    "groups.mkv": ("libx264", {"gop": 12, "bframes": 3}),
    "one_group.mp4": ("libx264", {"bframes": 2, "options": {"x264-params": "keyint=infinite:scenecut=0"}}),
    "all_keys.mkv": ("mjpeg", {}),
    "animated.gif": ("gif", {}),
    "no_times.avi": ("mpeg4", {"gop": 12, "bframes": 2}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    return {name: write_video(folder / name, FRAMES, codec=codec, **how) for name, (codec, how) in FILES.items()}


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("linvt-decode")]


def gathered(stream) -> tuple[list[int], torch.Tensor]:
    """The numbers that come with the parts of a stream, and its frames, which may begin again."""
    firsts, frames = [], None
    for first, part in stream:
        frames = part if first == 0 else torch.cat([frames, part])
        firsts.append(first)
    return firsts, frames


# ---- the frames ----


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_frames_of_one_reading(files, name, threads):
    for sampling in ({"num_frames": None}, {"num_frames": 13}, {"fps": 3, "start": 0.5}, {"indices": [5, 5, 6, 1000]}):
        whole = read_video(files[name], **sampling)
        for size in (1, 5, 32, 1000):
            stream = stream_video(files[name], chunk_size=size, threads=threads, **sampling)
            assert stream.num_frames == len(whole.frames) and stream.total_frames == whole.total_frames
            assert stream.duration == whole.duration and torch.equal(stream.times, whole.times)
            firsts, parts = zip(*stream, strict=True)
            assert list(firsts) == list(range(0, stream.num_frames, size)) or "indices" in sampling
            assert all(len(part) <= size for part in parts)
            assert torch.equal(torch.cat(parts), whole.frames), (sampling, size)
    assert not decoders()


def test_other_forms(files, tmp_path):
    pictures = [Image.fromarray(frame) for frame in FRAMES[:10]]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    pictures[0].save(tmp_path / "animated.webp", save_all=True, append_images=pictures[1:], lossless=True, duration=40)
    clip = read_video(files["groups.mp4"], num_frames=10)
    sources = [FRAMES, torch.from_numpy(FRAMES), pictures, str(tmp_path / "*.png"), tmp_path / "animated.webp", clip]
    for source in sources:
        whole = read_video(source, num_frames=10)
        firsts, parts = zip(*stream_video(source, num_frames=10, chunk_size=4), strict=True)
        assert firsts == (0, 4, 8) and torch.equal(torch.cat(parts), whole.frames)
    out_of_order = stream_video(files["groups.mp4"], indices=[40, 3, 77, 3, 0], chunk_size=2)
    assert torch.equal(
        torch.cat([part for _, part in out_of_order]),
        read_video(files["groups.mp4"], indices=[40, 3, 77, 3, 0]).frames,
    )


def test_a_file_that_misleads_begins_again(files, monkeypatch):
    """Its last packets are not what was listed, which shows after its first frames were given."""
    listed = video_decoding.list_packets

    def late(*arguments):
        index = listed(*arguments)
        return relisted(index, np.where(index.pts > index.pts.max() * 0.85, index.pts + 1, index.pts))

    monkeypatch.setattr(video_decoding, "list_packets", late)
    firsts, frames = gathered(stream_video(files["groups.mkv"], num_frames=30, chunk_size=6, threads=1))
    again = firsts.index(0, 1)
    assert firsts[:again] == list(range(0, 6 * again, 6)) and firsts[again:] == [0, 6, 12, 18, 24]
    assert torch.equal(frames, read_video(files["groups.mkv"], num_frames=30).frames)


@pytest.mark.parametrize("name", ["groups.mp4", "one_group.mp4"])
@pytest.mark.parametrize("threads", [1, 3])
def test_only_so_much_is_read_ahead(files, monkeypatch, name, threads):
    put, count = Chunks.put, []
    monkeypatch.setattr(Chunks, "put", lambda *arguments: (put(*arguments), count.append(1)))
    stream = stream_video(files[name], num_frames=None, chunk_size=4, threads=threads)
    for number, _ in zip(range(5), stream, strict=False):
        time.sleep(0.1)  # the decoder has time to run away
        assert 4 * (number + 1) <= len(count) <= 4 * (number + 4)
    stream.close()
    assert not decoders() and list(stream) == []


def test_who_leaves_early_leaves_nothing_behind(files):
    before = len(decoders())
    for _ in range(5):
        stream = stream_video(files["one_group.mp4"], num_frames=None, chunk_size=4)
        next(iter(stream))
        del stream
    assert len(decoders()) == before


def test_python_ends_though_a_video_was_not_read_to_its_end(files):
    """With threads that wait for room, which nobody will make."""
    script = f"""
from linvt_hf.video_reading import stream_video
streams = [stream_video({str(files["groups.mp4"])!r}, num_frames=None, chunk_size=4, threads=n) for n in (1, 3)]
print("the end")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "the end\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_one_that_cannot_be_read_leaves_no_other_under_way(files, tmp_path, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    _, processor = wrapped("internvl_qwen2")
    for order in (["groups.mp4", "broken"], ["broken", "groups.mp4"]):
        videos = [files.get(name, tmp_path / "broken.mp4") for name in order]
        with pytest.raises(VideoReadError, match="broken") as held:  # and with it all that its traceback knows
            processor.streams(videos, num_frames=COUNT, chunk_size=4)
        assert not decoders()
        del held


def test_damaged_files(tmp_path):
    data = write_video(tmp_path / "whole.mp4", FRAMES, codec="libx264", gop=12, faststart=True).read_bytes()
    cut = data[: len(data) * 3 // 4]
    with pytest.raises(VideoReadError, match="is damaged: .*; on_error='keep' gives the"):
        list(stream_video(cut, num_frames=None, chunk_size=4))
    _, kept = gathered(stream_video(cut, num_frames=None, chunk_size=4, on_error="keep"))
    assert torch.equal(kept, read_video(cut, num_frames=None, on_error="keep").frames)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):  # at once, not when the frames are wanted
        stream_video("nowhere.mp4")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        stream_video(FRAMES, chunk_size=0)


def test_the_time_of_others_does_not_count(files):
    stream = stream_video(files["one_group.mp4"], num_frames=None, chunk_size=30, limits=Limits(seconds=1.0))
    firsts = []
    for first, _ in stream:
        firsts.append(first)
        time.sleep(0.7)
    assert firsts == [0, 30, 60]
    with pytest.raises(VideoReadError, match="took longer to read than limits.seconds=0.0"):
        stream_video(files["one_group.mp4"], limits=Limits(seconds=0.0))


# ---- encoded ----


@pytest.mark.parametrize("name", [*NAMED, *UNNAMED, "qwen3_vl"])
def test_encoded_is_what_the_pixels_give(name):
    model, processor = wrapped(name)
    videos = [noise_video(7, seed=1), noise_video(2, seed=2), noise_video(1, seed=3)]
    messages = [
        chat(video, question) for video, question in zip(videos, ("Who?", "What moves?", "Where?"), strict=True)
    ]
    told = []
    streams = processor.streams(videos, chunk_size=model.config.frames_per_chunk)
    encoded = model.encode_videos(streams, lambda done, total: told.append((done, total)))
    assert told == [(3, 7), (4, 7), (6, 7), (7, 7)]  # 4 frames are the processor's most
    for video, stream in zip(encoded, streams, strict=True):
        assert video.num_frames == stream.num_frames and video.tokens.values.shape[2] == model.config.hidden_size
    pixels = encode(processor, *messages)
    given = encode(processor, *(chat(v, m[0]["content"][1]["text"]) for v, m in zip(encoded, messages, strict=True)))
    assert "pixel_values_videos" not in given and given["encoded_videos"] == encoded
    assert torch.equal(given["input_ids"], pixels["input_ids"])
    assert torch.equal(given["num_frames"], pixels["num_frames"])
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, model(**pixels).logits, atol=2e-5, rtol=1e-4)
    same = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, **same), model.generate(**pixels, **same))


def test_a_long_video_is_encoded_by_chunks(files, monkeypatch):
    model, processor = wrapped("internvl_qwen2")
    sizes, features = [], type(model.image_llm).features
    monkeypatch.setattr(
        type(model.image_llm),
        "features",
        lambda self, base, pixels: (sizes.append(len(pixels)), features(self, base, pixels))[1],
    )
    how = {"fps": 2, "num_frames": 1000}
    video = model.encode_video(processor.stream(files["groups.mp4"], **how, chunk_size=3))
    whole = read_video(files["groups.mp4"], **how)
    assert sum(sizes) == video.num_frames == len(whole.frames) > 20 and max(sizes) == 3
    assert torch.equal(video.times, whole.times) and video.duration == whole.duration


def test_saved_and_loaded(files, tmp_path):
    model, processor = wrapped("qwen2_vl")
    video = model.encode_video(processor.stream(files["groups.mp4"], num_frames=5))
    video.save(tmp_path / "video.safetensors")
    loaded = EncodedVideo.load(tmp_path / "video.safetensors")
    for name, tensor in video.tokens.tensors().items():
        assert torch.equal(loaded.tokens.tensors()[name], tensor)
    assert torch.equal(loaded.times, video.times) and torch.equal(loaded.made_by, video.made_by)
    assert loaded.nbytes == video.nbytes > video.tokens.values.nbytes
    assert (loaded.grid, loaded.duration, loaded.num_frames) == (video.grid, video.duration, 5)
    pictures = model.encode_video(processor.stream(noise_video(4)))
    pictures.save(tmp_path / "pictures.safetensors")
    loaded = EncodedVideo.load(tmp_path / "pictures.safetensors")
    assert loaded.times is None and loaded.duration is None
    assert loaded.to(dtype=torch.bfloat16).tokens.values.dtype is torch.bfloat16
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors is no encoded video"):
        EncodedVideo.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"There is no encoded video at nowhere\.safetensors"):
        processor(videos="nowhere.safetensors")
    with pytest.raises(ValueError, match=r"is no encoded video of this version \(None\)"):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        EncodedVideo.load(tmp_path / "other.safetensors")


def test_times_in_prompts(files):
    model, processor = wrapped("internvl_qwen2")
    processor.times_in_prompt = "frames"
    try:
        video = model.encode_video(processor.stream(files["groups.mp4"], num_frames=5))
        given, whole = (
            encode(processor, chat(source, "Who?"))
            for source in (video, read_video(files["groups.mp4"], num_frames=5))
        )
        assert torch.equal(given["input_ids"], whole["input_ids"]) and "video_durations" not in given
    finally:
        processor.times_in_prompt = None


def test_what_cannot_be_encoded(files):
    model, processor = wrapped("internvl_qwen2")
    with pytest.raises(ValueError, match=r"A str cannot be encoded; give processor.stream\(video\)"):
        model.encode_video("film.mp4")
    stream = processor.stream(noise_video(4))
    video = model.encode_video(stream)
    with pytest.raises(ValueError, match="gives its frames once, and one of these was read before"):
        model.encode_video(stream)
    with pytest.raises(FileNotFoundError, match="There is no folder no/such to save an encoded video in"):
        video.save("no/such/v.safetensors")
    assert model.encode_video(processor.stream(video)) is video
    with pytest.raises(ValueError, match="1 of 2 videos are encoded and the others are not"):
        encode(processor, chat(video, "Who?"), chat(noise_video(4), "Who?"))
    with pytest.raises(ValueError, match="An encoded video has its frames already"):
        processor(videos=video, num_frames=3)
    narrow = copy.copy(video)
    narrow.tokens = dataclasses.replace(video.tokens, values=video.tokens.values[..., 1:])
    with pytest.raises(ValueError, match=f"tokens of width {model.config.hidden_size - 1}, and this model's are"):
        model.generate(**encode(processor, chat(narrow, "Who?")))
    with pytest.raises(ValueError, match="frame_features and encoded_videos; none was given"):
        model.get_video_features()


def test_of_another_linvt(files):
    """Other precision is no other model, and a saved model is the same."""
    model, processor = wrapped("internvl_qwen2")
    video = model.encode_video(processor.stream(files["groups.mp4"], num_frames=5))
    inputs = encode(processor, chat(video, "Who?"))
    copy.deepcopy(model).to(torch.bfloat16).generate(**inputs, max_new_tokens=1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.video_tokenizer.scorer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    attending = copy.deepcopy(model)
    with torch.no_grad():  # of which a single token would tell nothing
        for name, parameter in attending.video_tokenizer.scorer.layers.named_parameters():
            if "query" in name or "key" in name:
                parameter.normal_()
    refused = pytest.raises(ValueError, match=r"scored by another LinVT \(their scorers differ by \d+%, and by 5%")
    with refused:
        other.generate(**inputs, max_new_tokens=1)
    with refused:
        attending.generate(**inputs, max_new_tokens=1)
    changing = copy.deepcopy(model)
    changing.generate(**inputs, max_new_tokens=1)
    changing.video_tokenizer.scorer.load_state_dict(other.video_tokenizer.scorer.state_dict())
    with refused:  # and not for ever what it was when it was asked first
        changing.generate(**inputs, max_new_tokens=1)


def test_the_pipeline_takes_and_tells(files, tmp_path):
    model, processor = wrapped("internvl_qwen2")
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False}
    path, told = files["groups.mp4"], []
    expected = pipe(video=path, question="Who?", num_frames=7, progress=lambda *n: told.append(n), **settings)
    assert told[-1] == (7, 7) and len(told) == 3
    video = model.encode_video(processor.stream(path, num_frames=7))
    assert pipe(video=video, question="Who?", **settings) == expected
    assert pipe(chat(video, "Who?"), **settings) == expected
    with pytest.raises(ValueError, match="An encoded video has its frames already"):
        pipe(video=video, question="Who?", num_frames=3)
    fewer = pipe(video=path, question="Who?", **settings)
    pairs = [{"video": one, "question": "Who?"} for one in (video, path, video)]
    assert pipe(pairs, batch_size=3, **settings) == [expected, fewer, expected]
    video.save(tmp_path / "video.safetensors")
    assert pipe(video=str(tmp_path / "video.safetensors"), question="Who?", **settings) == expected
    choices = {"choices": ["red", "blue"]}
    assert pipe(video=video, question="Who?", **choices) == pipe(video=path, question="Who?", num_frames=7, **choices)
    with pytest.raises(ValueError, match="A block of type 'video' holds type; give it a 'video'"):
        pipe([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?"}]}])


def test_of_a_long_video_so_much_is_stored(files, tmp_path):
    """And the next question needs no more."""
    model, processor = wrapped("internvl_qwen2")
    model = copy.deepcopy(model)
    for part in (model, model.video_tokenizer, model.video_tokenizer.scorer):
        part.config.num_stored_tokens, part.config.score_window = 40, 32
    video = model.encode_video(processor.stream(files["groups.mp4"], num_frames=30))
    assert video.tokens.values.shape[1] == 40 and video.tokens.dropped is not None
    video.save(tmp_path / "long.safetensors")
    settings = {"max_new_tokens": 5, "do_sample": False}
    one, other = (
        model.generate(**encode(processor, chat(source, "Who?")), **settings)
        for source in (video, EncodedVideo.load(tmp_path / "long.safetensors"))
    )
    assert torch.equal(one, other)
    features = model.get_video_features(encoded_videos=[video], output_weights=True)
    assert features.scores[0].isfinite().sum() == 40 and features.scores[0].shape == (30, video.tokens.places)
    (weights,), (averaged,) = features.weights, features.dropped_weights
    assert weights.shape[1:] == (30, video.tokens.places) and (weights > 0).any(dim=0).sum() <= 40
    torch.testing.assert_close(weights.sum(dim=(1, 2)) + averaged.sum(dim=1), torch.ones(len(weights)))
    picked = weights.flatten(1)[:, video.tokens.index[0]]
    tokens = picked @ video.tokens.values[0] + averaged @ video.tokens.dropped.values[0]
    torch.testing.assert_close(features.pooler_output[0], tokens, atol=1e-4, rtol=1e-4)
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    found = pipe.explain(video, "Who?", answer="him")
    torch.testing.assert_close(found.heat().sum() + found.heat_averaged().sum(), torch.tensor(1.0))
    assert found.heat_averaged(token=3).shape == found.averaged[3].shape and found.heat_averaged().sum() > 0


def test_a_video_is_encoded_once(files, tmp_path, monkeypatch):
    model, processor = wrapped("internvl_qwen2")
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")
    settings = {"max_new_tokens": 3, "do_sample": False}
    encoded, features = [], type(model.image_llm).features
    monkeypatch.setattr(
        type(model.image_llm),
        "features",
        lambda self, base, pixels: (encoded.append(len(pixels)), features(self, base, pixels))[1],
    )
    path = tmp_path / "v.mp4"
    path.write_bytes(files["groups.mp4"].read_bytes())
    first = pipe(video=path, question=["Who?", "Where?", "Why?"], **settings)
    assert sum(encoded) == 4
    assert [pipe(video=path, question=question, **settings) for question in ("Who?", "Where?", "Why?")] == first
    assert sum(encoded) == 4
    pipe(video=path, question="Who?", num_frames=2, **settings)  # sampled otherwise
    assert sum(encoded) == 6
    path.write_bytes(files["groups.mkv"].read_bytes())  # another file under its name
    pipe(video=path, question="Who?", num_frames=2, **settings)
    assert sum(encoded) == 8
    frames = noise_video(3)
    batch = [{"video": frames, "question": question} for question in ("Who?", "Where?", "Why?")]
    pipe(batch, batch_size=3, **settings)
    assert sum(encoded) == 11
    frames[:] = 0  # an array may change between calls
    changed = pipe(batch, batch_size=3, **settings)
    assert sum(encoded) == 14 and changed == pipe(
        [{**one, "video": frames.copy()} for one in batch], batch_size=3, **settings
    )
