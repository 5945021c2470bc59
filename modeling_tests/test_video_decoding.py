"""Frames of video files, whatever their structure, to the pixel those of a decode of the whole file."""

import random
import tracemalloc

import numpy as np
import pytest

av = pytest.importorskip("av", reason="reading video files needs PyAV")

from video_files import moving_square, need_encoder, relisted, write_video  # noqa: E402

from linvt_hf import video_decoding  # noqa: E402
from linvt_hf.video_decoding import VideoFile  # noqa: E402
from linvt_hf.video_index import list_packets, list_table  # noqa: E402
from linvt_hf.video_reading import read_video  # noqa: E402
from linvt_hf.video_tables import mp4_table  # noqa: E402

COUNT = 90
X264, X265 = "x264-params", "x265-params"
QUIET = "log-level=none:pools=1:frame-threads=1"


def noisy_frames() -> np.ndarray:
    """With grain, so that every frame leans on those it refers to."""
    grain = np.random.default_rng(0).integers(0, 30, (COUNT, 48, 64, 3))
    return (moving_square(COUNT, 48, 64).astype(int) + grain).clip(0, 255).astype(np.uint8)


FRAMES = noisy_frames()
UNEVEN = (np.cumsum(np.random.default_rng(1).integers(20, 200, COUNT)) / 1000).tolist()
B = {"gop": 12, "bframes": 3}
# Files by name: encoder, how they are written, and whether decoding may begin on the way.
CORPUS = {
    "closed.mp4": ("libx264", B, True),
    "closed.mov": ("libx264", B, True),
    "closed.mkv": ("libx264", B, True),
    "closed.ts": ("libx264", B, True),
    "closed.flv": ("libx264", B, True),
    "open.mp4": ("libx264", {**B, "options": {X264: "open-gop=1:b-pyramid=normal"}}, True),
    "open.ts": ("libx264", {**B, "options": {X264: "open-gop=1"}}, True),
    "many_references.mp4": ("libx264", {"gop": 40, "bframes": 5, "options": {X264: "ref=6:b-pyramid=strict"}}, True),
    "no_keys.mp4": ("libx264", {"bframes": 2, "options": {X264: "keyint=infinite:scenecut=0"}}, False),
    "intra_refresh.mp4": (
        "libx264",
        {"gop": 24, "bframes": 0, "options": {X264: "intra-refresh=1:scenecut=0"}},
        False,
    ),
    "interlaced.mp4": ("libx264", {**B, "options": {X264: "interlaced=1"}}, True),
    "ten_bits.mp4": ("libx264", {**B, "pix_fmt": "yuv420p10le"}, True),
    "full_colour.mkv": ("libx264", {**B, "pix_fmt": "yuv444p"}, True),
    "uneven.mp4": ("libx264", {**B, "times": UNEVEN}, True),
    "uneven.mkv": ("libx264", {**B, "times": UNEVEN}, True),
    "hevc_open.mp4": ("libx265", {**B, "options": {X265: f"open-gop=1:{QUIET}"}}, True),
    "hevc_closed.mkv": ("libx265", {**B, "options": {X265: f"open-gop=0:{QUIET}"}}, True),
    "hevc.ts": ("libx265", {**B, "options": {X265: f"open-gop=1:{QUIET}"}}, True),
    "hevc_layers.mp4": ("libx265", {**B, "options": {X265: f"temporal-layers=2:{QUIET}"}}, True),
    "hidden_frames.webm": ("libvpx", {"gop": 12, "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}}, True),
    "vp9.webm": ("libvpx-vp9", {"gop": 24, "options": {"lag-in-frames": "16"}}, True),
    "vp9.mp4": ("libvpx-vp9", {"gop": 24}, True),
    "av1.mp4": ("libsvtav1", {"gop": 24}, True),
    "av1.mkv": ("libsvtav1", {"gop": 24}, True),
    "mpeg2.ts": ("mpeg2video", {**B, "fps": 25}, True),
    "mpeg2.mkv": ("mpeg2video", {**B, "fps": 25}, True),
    "mpeg4.avi": ("mpeg4", {"gop": 12}, True),
    "mpeg4_reordered.avi": ("mpeg4", {"gop": 12, "bframes": 2}, False),
    "mpeg4.mp4": ("mpeg4", {"gop": 12, "bframes": 2}, True),
    "prores.mov": ("prores_ks", {"pix_fmt": "yuv422p10le"}, True),
    "mjpeg.mkv": ("mjpeg", {}, True),
    "ffv1.mkv": ("ffv1", {"gop": 12}, True),
    "animated.gif": ("gif", {}, False),
    "animated.apng": ("apng", {"pix_fmt": "rgb24"}, False),
}
REFERENCES_ONLY = [name for name, (codec, _, seeks) in CORPUS.items() if seeks and codec in ("libx264", "mpeg2video")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """name -> (path, pixels [T, H, W, 3], seconds [T]) by a plain decode of the whole."""
    folder, known = tmp_path_factory.mktemp("corpus"), {}

    def whole(name):
        if name not in known:
            codec, options, _ = CORPUS[name]
            need_encoder(codec)
            path = write_video(folder / name, FRAMES, codec=codec, **options)
            with av.open(str(path)) as container:
                frames = list(container.decode(video=0))
            assert len(frames) == COUNT
            pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
            known[name] = path, pixels, np.array([float(frame.pts * frame.time_base) for frame in frames])
        return known[name]

    return whole


@pytest.mark.parametrize("name", CORPUS)
def test_every_choice_of_frames(corpus, name, monkeypatch):
    path, pixels, _ = corpus(name)
    relisted = []
    monkeypatch.setattr(video_decoding, "list_frames", lambda *_: relisted.append("frames"))
    if name.endswith(("mp4", "mov")) and name != "intra_refresh.mp4":  # of which the table does not tell
        monkeypatch.setattr(video_decoding, "list_packets", lambda *_: relisted.append("packets"))
    for seed in range(10):
        draw = random.Random(seed)
        picks = sorted(draw.sample(range(COUNT), draw.choice([1, 1, 2, 3, 5, 8, 20, COUNT])))
        for threads in (1, 2, 3):
            video = VideoFile(str(path), name, threads)
            index, chosen, frames = video.read(lambda index, picks=picks: picks)
            assert (index.total, chosen) == (COUNT, picks)
            assert np.array_equal(frames, pixels[picks])
            if CORPUS[name][2] and len(picks) < 3 and threads == 1:
                assert video.decoded <= 40 * len(picks) and video.decoded < picks[-1] + 9  # of the longest group
    assert not relisted  # what the packets said was right


@pytest.mark.parametrize("name", CORPUS)
def test_every_way_to_sample(corpus, name):
    path, pixels, seconds = corpus(name)
    seconds = seconds - seconds[0]
    ways = {
        "num_frames": ({"num_frames": 7}, [(2 * i + 1) * COUNT // 14 for i in range(7)]),
        "indices": ({"indices": [40, 3, 3, 1000]}, [40, 3, 3, COUNT - 1]),
        "times": ({"times": [0.0, seconds[33] + 0.004, 1e6]}, [0, 33, COUNT - 1]),
        "rate": (
            {"fps": 1.0, "num_frames": None},
            sorted({int(np.argmin(abs(seconds - tick))) for tick in range(int(np.ceil(seconds[-1])))}),
        ),
        "part": ({"start": seconds[20], "end": seconds[50], "num_frames": None}, list(range(20, 50))),
    }
    for way, (arguments, expected) in ways.items():
        clip = read_video(path, **arguments)
        found = [int(np.argmin(abs(seconds - time))) for time in clip.times.tolist()]
        if way == "rate":  # the two nearest may be as near
            assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), name
            expected = found
        assert found == expected, way
        assert np.array_equal(clip.frames.numpy(), pixels[expected]), way
        assert clip.times.numpy() == pytest.approx(seconds[expected], abs=1e-4)


@pytest.mark.parametrize("name", REFERENCES_ONLY)
def test_nothing_is_decoded_that_is_not_needed(corpus, name):
    """Of H.264 and MPEG-2: the wanted frame, and of those before it in its group only what others refer to."""
    path, _, _ = corpus(name)
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        referred = {frame.pts for frame in container.decode(stream)}
    shown = sorted(pts for pts, _ in packets)
    for pick, wanted in enumerate(shown):
        video = VideoFile(str(path), name, 1)
        video.read(lambda index, pick=pick: [pick])
        last = next(i for i, (pts, _) in enumerate(packets) if pts == wanted)
        first = max(i for i, (pts, key) in enumerate(packets[: last + 1]) if key and pts <= wanted)
        assert video.decoded <= sum(pts in referred or pts == wanted for pts, _ in packets[first : last + 1])


def test_intra_frames_are_decoded_alone(corpus):
    for name in ("prores.mov", "mjpeg.mkv"):
        path, _, _ = corpus(name)
        video = VideoFile(str(path), name, 2)
        video.read(lambda index: [3, 4, 9, 50])
        assert video.decoded == 4


def test_nearest_key_frames(corpus):
    path, pixels, seconds = corpus("closed.mp4")
    with av.open(str(path)) as container:
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    clip = read_video(path, num_frames=30, exact=False)
    assert len(clip.frames) == len(keys) and np.array_equal(clip.frames.numpy(), pixels[keys])
    assert clip.times.numpy() == pytest.approx(seconds[keys] - seconds[0])
    video = VideoFile(str(path), "x", 1)
    video.read(lambda index: index.nearest_keys([5, 30]))
    assert video.decoded == 2
    path, pixels, _ = corpus("animated.gif")  # has none to begin at
    assert np.array_equal(read_video(path, indices=[7, 20], exact=False).frames.numpy(), pixels[[7, 20]])


def test_frames_that_are_not_what_the_packets_said(corpus, monkeypatch):
    """Then the whole file is decoded, from its start, and that is what counts."""
    path, pixels, _ = corpus("closed.mkv")
    listed, listed_by_frames, used = video_decoding.list_packets, video_decoding.list_frames, []

    def shifted(*arguments):
        index = listed(*arguments)
        return relisted(index, index.pts + 1)

    monkeypatch.setattr(video_decoding, "list_packets", shifted)
    monkeypatch.setattr(video_decoding, "list_frames", lambda *a: (used.append(1), listed_by_frames(*a))[1])
    clip = read_video(path, indices=[60, 61])
    assert np.array_equal(clip.frames.numpy(), pixels[[60, 61]]) and used == [1]


@pytest.mark.parametrize("name", [name for name in CORPUS if name.endswith(("mp4", "mov"))])
def test_a_table_of_contents_tells_what_the_packets_do(corpus, name):
    path, _, _ = corpus(name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        listed = list_packets(container, stream, lambda: None)
        for file in (str(path), path.read_bytes(), path.open("rb")):
            table = list_table(container, stream, file)
            assert np.array_equal(table.pts, listed.pts) and np.array_equal(table.order, listed.order)
            assert table.duration == pytest.approx(listed.duration)
            assert np.array_equal(table.keys, listed.keys) or name == "intra_refresh.mp4"


def test_tables_that_leave_something_open(tmp_path):
    """Fragments and hidden frames are left to libav; so is what is cut or makes no sense."""
    whole = write_video(tmp_path / "whole.mp4", FRAMES[:12], codec="mpeg4", faststart=True)
    data = whole.read_bytes()
    assert mp4_table(data, 1) is not None and mp4_table(data, 2) is None
    for size in range(0, len(data), 7):
        table = mp4_table(data[:size], 1)
        assert table is None or size > data.index(b"mdat") - 16
    at = data.index(b"elst")
    hiding = data[: at + 16] + (10**4).to_bytes(4, "big") + data[at + 20 :]
    assert mp4_table(hiding, 1) is None
    for box in (b"mdia", b"stbl", b"stts", b"mdhd", b"tkhd", b"trak", b"moov"):
        assert mp4_table(data.replace(box, b"none"), 1) is None
    first = data.index(b"stts") + 12  # a number of samples: a small file that tells of many takes no memory
    many = data[:first] + (2**28).to_bytes(4, "big") + data[first + 4 :]
    tracemalloc.start()
    assert mp4_table(many, 1) is None and tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert mp4_table(b"", 1) is None and mp4_table(b"\0" * 100, 1) is None and mp4_table("nowhere.mp4", 1) is None
