"""Reading videos: the right frames, at the right times, from every form a video comes in."""

import ast
import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

av = pytest.importorskip("av", reason="the tests write and read video files with PyAV, which is not installed")

from video_files import frame_index, has_encoder, moving_square, need_encoder, write_audio, write_video  # noqa: E402

import linvt_hf.video_reading as video_reading  # noqa: E402
from linvt_hf import video_decoding  # noqa: E402
from linvt_hf.video_reading import Clip, VideoReadError, is_one_video, read_video  # noqa: E402
from linvt_hf.video_sampling import sample_indices  # noqa: E402

FRAMES = moving_square(24)
CENTRES = [2, 7, 12, 16, 21]  # of five segments of 24 frames

needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_matrix"),
    reason="this PyAV cannot write rotation metadata (18 can)",
)


H264 = "libx264" if has_encoder("libx264") else "mpeg4"


def indices(clip):
    return [frame_index(frame) for frame in clip.frames]


def decode_all(path):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """24 frames at 8 per second, with B-frames: three seconds."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", FRAMES, fps=8, codec=H264, bframes=3)


@pytest.fixture
def scans(monkeypatch):
    """Which scans a reading made: False for packets only, True for a full decode."""
    made = []
    for decodes, name in ((False, "list_packets"), (True, "list_frames")):
        list_them = getattr(video_decoding, name)

        def spy(*arguments, decodes=decodes, list_them=list_them):
            made.append(decodes)
            return list_them(*arguments)

        monkeypatch.setattr(video_decoding, name, spy)
    return made


# Which frames


def test_sample_indices_are_segment_centres():
    assert sample_indices(24, 5) == CENTRES
    assert sample_indices(100, 1) == [50]
    assert sample_indices(10, 4) == [1, 3, 6, 8]
    for total in range(1, 70):
        for wanted in range(1, 40):
            picks = sample_indices(total, wanted)
            assert len(picks) == min(total, wanted)
            assert picks == sorted(set(picks)) and picks[0] >= 0 and picks[-1] < total
            if wanted <= total:
                assert picks == [int((i + 0.5) * total / wanted) for i in range(wanted)]


def test_sample_indices_never_repeat_a_frame():
    assert sample_indices(3, 8) == [0, 1, 2]
    assert sample_indices(3, None) == [0, 1, 2]
    assert sample_indices(0, 8) == []


@pytest.mark.parametrize("bad", [0, -4])
def test_bad_num_frames(mp4, bad):
    for read in (lambda: sample_indices(5, bad), lambda: read_video(mp4, num_frames=bad)):
        with pytest.raises(ValueError, match=f"num_frames must be at least 1 or None for every frame, not {bad}"):
            read()


def test_a_rate_above_all(mp4):
    assert torch.equal(read_video(mp4, fps=1e308, num_frames=None).frames, read_video(mp4, num_frames=None).frames)


@pytest.mark.parametrize("bad", [0, -1.5, float("nan"), float("inf")])
def test_bad_fps(mp4, bad):
    with pytest.raises(ValueError, match=f"fps must be a positive .* not {bad}"):
        read_video(mp4, fps=bad)


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("b.mp4", H264, {"bframes": 3}),
        ("b.mkv", H264, {"bframes": 3}),
        ("short_gop.mp4", H264, {"bframes": 2, "gop": 5}),
        ("vp8.webm", "libvpx", {}),
        ("vp9.webm", "libvpx-vp9", {}),
        ("b.avi", "mpeg4", {"bframes": 2}),
        ("b.ts", "mpeg2video", {"bframes": 2, "fps": 25}),
        ("raw.avi", "rawvideo", {}),
        ("intra.mkv", "mjpeg", {}),
        ("a.gif", "gif", {}),
    ],
)
def test_exact_frames(tmp_path, scans, name, codec, options):
    need_encoder(codec)
    path = write_video(tmp_path / name, FRAMES, codec=codec, **options)
    fps = options.get("fps", 8)
    whole = decode_all(path)
    for wanted, expected in ((5, CENTRES), (None, list(range(24))), (24, list(range(24)))):
        clip = read_video(path, num_frames=wanted)
        assert indices(clip) == expected
        assert torch.equal(clip.frames, whole[expected])
        assert clip.total_frames == 24
        # GIF and Matroska round times to 10 ms and 1 ms
        torch.testing.assert_close(clip.times, torch.tensor(expected) / fps, atol=0.011, rtol=0)
        assert clip.duration == pytest.approx(24 / fps, abs=0.011)
    assert clip.frames.dtype == torch.uint8 and clip.times.dtype == torch.float32
    assert not any(scans)  # the packets told the truth: nothing was decoded twice


@pytest.mark.parametrize("name, codec", [("a.mkv", H264), ("a.webm", "libvpx-vp9")])
def test_headers_without_a_count(tmp_path, name, codec):
    need_encoder(codec)
    path = write_video(tmp_path / name, FRAMES, codec=codec)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert read_video(path).total_frames == 24


def test_fewer_frames_than_asked(mp4):
    clip = read_video(mp4, num_frames=1000)
    assert indices(clip) == list(range(24))
    assert indices(read_video(mp4)) == list(range(24))  # the default, 32


def test_one_frame(tmp_path):
    clip = read_video(write_video(tmp_path / "one.mp4", FRAMES[5:6], codec=H264), fps=1)
    assert indices(clip) == [5] and clip.times.tolist() == [0.0] and clip.total_frames == 1


# When


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_frame_rate(tmp_path, name):
    times = [0.0, 0.1, 0.15] + [0.5 + 0.05 * i * i for i in range(21)]
    path = write_video(tmp_path / name, FRAMES, codec=H264, times=times, bframes=2)
    clip = read_video(path, num_frames=None)
    assert indices(clip) == list(range(24))
    torch.testing.assert_close(clip.times, torch.tensor(times), atol=0.001, rtol=0)
    few = read_video(path, num_frames=5)
    assert indices(few) == CENTRES
    torch.testing.assert_close(few.times, torch.tensor(times)[CENTRES], atol=0.001, rtol=0)
    # 0, 0.5, 1.0 ... 3.0 s are nearest to 0, 0.5, 0.95, 1.3 (1.5 is nearer to it than to 1.75), ...
    assert indices(read_video(path, fps=2))[:6] == [0, 3, 6, 7, 8, 9]


def test_times_start_at_zero(tmp_path):
    path = write_video(tmp_path / "late.mkv", FRAMES, codec=H264, times=[7 + i / 8 for i in range(24)])
    clip = read_video(path, num_frames=5)
    assert clip.times.tolist() == pytest.approx([i / 8 for i in CENTRES])
    assert clip.duration == pytest.approx(3, abs=0.01)


def test_frames_an_edit_list_hides_are_not_there(tmp_path, scans):
    path = write_video(tmp_path / "cut.mp4", FRAMES, codec=H264, times=[(i - 6) / 8 for i in range(24)], bframes=2)
    with av.open(str(path)) as container:
        if not any(packet.is_discard for packet in container.demux(video=0)):
            pytest.skip("this FFmpeg writes no edit list for negative times")
    clip = read_video(path, num_frames=None)
    assert indices(clip) == list(range(6, 24))
    assert clip.total_frames == 18 and clip.times[0] == 0 and clip.duration == pytest.approx(2.25)
    assert scans == [False]


@pytest.mark.parametrize(
    "fps, expected",
    [
        (1, [0, 8, 16]),
        (2, [0, 4, 8, 12, 16, 20]),
        (8, list(range(24))),
        (1000, list(range(24))),
        (0.1, [0]),
        (3, [0, 3, 5, 8, 11, 13, 16, 19, 21]),
    ],
)
def test_fps(mp4, fps, expected):
    clip = read_video(mp4, fps=fps)
    assert indices(clip) == expected
    assert clip.times.tolist() == [i / 8 for i in expected]


def test_fps_is_capped_by_num_frames(mp4):
    assert indices(read_video(mp4, fps=2, num_frames=3)) == [4, 12, 20]
    assert indices(read_video(mp4, fps=2, num_frames=6)) == [0, 4, 8, 12, 16, 20]
    assert indices(read_video(mp4, fps=8, num_frames=None)) == list(range(24))


def test_fps_needs_times():
    with pytest.raises(ValueError, match="fps=2 needs a video with known times.*use num_frames"):
        read_video(FRAMES, fps=2)
    with pytest.raises(ValueError, match="fps=2 .* the given list of 24 "):
        read_video(list(FRAMES), fps=2)


# Files that do not tell the truth


def test_a_stream_without_timestamps(tmp_path):
    path = write_video(tmp_path / "raw.m1v", FRAMES, codec="mpeg1video", format="mpeg1video", fps=25, bframes=2)
    clip = read_video(path, num_frames=5)
    assert indices(clip) == CENTRES
    assert clip.times.tolist() == pytest.approx([i / 25 for i in CENTRES])


@pytest.mark.skipif(H264 != "libx264", reason="this PyAV has no libx264 encoder to write the file with")
@pytest.mark.parametrize("name, fps", [("raw.h264", 25), ("b.avi", 8)])
def test_h264_where_packets_lie(tmp_path, scans, name, fps):
    # raw H.264 has no timestamps; AVI dates packets in decoding order, which is wrong with B-frames
    path = write_video(tmp_path / name, FRAMES, codec="libx264", bframes=3, fps=fps)
    clip = read_video(path, num_frames=5)
    assert scans == [False, True]
    assert indices(clip) == CENTRES
    assert clip.times.tolist() == pytest.approx([i / fps for i in CENTRES])
    assert clip.duration == pytest.approx(24 / fps)


def test_damaged_packets_are_left_out(tmp_path, scans, caplog):
    path = write_video(tmp_path / "intra.mkv", FRAMES, codec="mjpeg")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        spans = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for index in (3, 12):
        at = data.find(spans[index])
        data[at : at + len(spans[index])] = bytes(len(spans[index]))
    with pytest.raises(
        VideoReadError, match="is damaged: after frame .* cannot be decoded .*on_error='keep' gives the 22"
    ):
        read_video(bytes(data), num_frames=None)
    scans.clear()
    clip = read_video(bytes(data), num_frames=None, on_error="keep")
    assert "is damaged: after frame" in caplog.text and "it gives 22 frames" in caplog.text
    assert scans == [False, True]
    there = [i for i in range(24) if i not in (3, 12)]
    assert indices(clip) == there and clip.total_frames == 22
    assert clip.times.tolist() == pytest.approx([i / 8 for i in there], abs=0.001)
    assert len(read_video(bytes(data), num_frames=5, on_error="keep").frames) == 5


@pytest.mark.skipif(H264 != "libx264", reason="this PyAV has no libx264 encoder to write the file with")
def test_frames_that_a_decoder_makes_up(tmp_path):
    grain = np.random.default_rng(0).integers(0, 255, (24, 64, 96, 3), dtype=np.uint8)
    data = bytearray(write_video(tmp_path / "a.mp4", grain, codec="libx264", gop=8).read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        at, size = packets[10].pos, packets[10].size
    data[at + size // 2 : at + size // 2 + 40] = bytes(range(40))
    with pytest.raises(VideoReadError, match="is damaged: "):
        read_video(bytes(data), num_frames=None)
    assert len(read_video(bytes(data), num_frames=None, on_error="keep").frames) >= 20
    whole, kept = read_video(tmp_path / "a.mp4", indices=[2, 20]), read_video(bytes(data), indices=[2, 20])
    assert torch.equal(whole.frames, kept.frames)  # in other groups of pictures, which are as they were


@pytest.mark.parametrize(
    "name, codec",
    [
        ("whole.mkv", "mjpeg"),
        ("whole.webm", "libvpx-vp9"),
        ("whole.avi", "mpeg4"),
        ("whole.mp4", H264),
        ("whole.ts", H264),
    ],
)
def test_a_file_that_breaks_off(tmp_path, name, codec):
    data = write_video(tmp_path / name, FRAMES, codec=codec, faststart=True).read_bytes()
    data = data[: len(data) * (18 if name == "whole.avi" else 15) // 20]  # an AVI file begins with 5 KB of nothing
    if name != "whole.ts":  # of which nothing tells how long it should be
        with pytest.raises(VideoReadError, match="is damaged: .*; on_error='keep' gives the .+ frames"):
            read_video(data, num_frames=None)
    clip = read_video(data, num_frames=None, on_error="keep")
    there = indices(clip)
    assert 2 < len(there) == clip.total_frames < 24
    assert there == sorted(there) and there[:3] == [0, 1, 2]  # of the last ones, not all can be decoded


@pytest.mark.skipif(H264 != "libx264", reason="this PyAV has no libx264 encoder to write the file with")
def test_a_size_that_changes_on_the_way(tmp_path):
    parts = [moving_square(24)[:12], moving_square(24, height=32, width=48)[12:]]
    data = b"".join(write_video(tmp_path / f"{i}.h264", part).read_bytes() for i, part in enumerate(parts))
    clip = read_video(data, num_frames=None)
    assert clip.frames.shape == (24, 64, 96, 3)
    assert indices(clip) == list(range(24))


def test_text_that_is_not_utf8(tmp_path):
    path = write_video(tmp_path / "named.mkv", FRAMES[:2], codec="mjpeg")
    data = path.read_bytes()
    assert b"Lavf" in data
    clip = read_video(data.replace(b"Lavf", b"\xff\xfe\xfd\xfc"))
    assert len(clip.frames) == 2


# Upright


@needs_rotation
@pytest.mark.parametrize("name", ["r.mp4", "r.mkv"])
@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation(tmp_path, name, degrees):
    # the picture is stored turned the other way, as a phone held sideways stores it
    stored = np.rot90(FRAMES[:6], -degrees // 90, axes=(1, 2))
    clip = read_video(write_video(tmp_path / name, stored, codec=H264, rotation=degrees), num_frames=None)
    assert clip.frames.shape == (6, 64, 96, 3)
    assert indices(clip) == list(range(6))


@needs_rotation
def test_rotation_of_the_quicktime_matrix(tmp_path):
    # (x, y) -> (-y, x) with y downwards sends the right edge to the bottom: a clockwise quarter turn, whatever
    # sign PyAV gives it
    stored = np.rot90(FRAMES[:3], 1, axes=(1, 2))
    one = 1 << 16
    path = write_video(
        tmp_path / "m.mp4", stored, codec=H264, display_matrix=[0, one, 0, -one, 0, 0, 96 * one, 0, 1 << 30]
    )
    assert indices(read_video(path)) == [0, 1, 2]


# Forms


class Pipe(io.RawIOBase):
    """A binary stream that cannot seek."""

    def __init__(self, data):
        self.inner = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.inner.readinto(buffer)


def test_every_form_of_a_file(mp4):
    expected = read_video(mp4, num_frames=5)
    data = mp4.read_bytes()
    with open(mp4, "rb") as opened:
        opened.seek(100)
        forms = [str(mp4), mp4.as_uri(), data, bytearray(data), memoryview(data), io.BytesIO(data), opened, Pipe(data)]
        for form in forms:
            clip = read_video(form, num_frames=5)
            assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.times, expected.times)
            assert (clip.duration, clip.total_frames) == (expected.duration, expected.total_frames)
            assert is_one_video(form)
        assert not opened.closed


def test_odd_names(mp4, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b#c%20d.mp4", "concat:x.mp4", "no_ending", "clé.mp4"):
        (tmp_path / name).write_bytes(mp4.read_bytes())
        for form in (name, (tmp_path / name).as_uri(), pathlib.Path(name)):
            assert read_video(form, num_frames=5).total_frames == 24


def test_arrays_and_tensors():
    first = np.moveaxis(FRAMES, -1, 1)
    read_only = FRAMES.copy()
    read_only.flags.writeable = False
    forms = [FRAMES, read_only, torch.from_numpy(FRAMES), first, torch.from_numpy(first), list(FRAMES)]
    forms += [list(torch.from_numpy(FRAMES)), tuple(FRAMES), [PIL.Image.fromarray(frame) for frame in FRAMES]]
    for form in forms:
        clip = read_video(form, num_frames=5)
        assert torch.equal(clip.frames, torch.from_numpy(FRAMES[CENTRES])) and clip.frames.is_contiguous()
        assert clip.times is None and clip.duration is None and clip.total_frames == 24
        assert is_one_video(form)
    assert indices(read_video(FRAMES[::-1], num_frames=None)) == list(range(23, -1, -1))


def test_the_clip_is_not_the_callers_array():
    array = FRAMES[:4].copy()
    tensor = torch.from_numpy(array)
    clips = [read_video(form) for form in (array, tensor, list(array), list(tensor))]
    array[:] = 0
    assert all(indices(clip) == [0, 1, 2, 3] for clip in clips)


def test_image_paths(tmp_path):
    paths = [tmp_path / f"{i:03}.png" for i in range(24)]
    for path, frame in zip(paths, FRAMES, strict=True):
        PIL.Image.fromarray(frame).save(path)
    for form in (paths, [str(path) for path in paths], [path.as_uri() for path in paths]):
        assert is_one_video(form)
        assert torch.equal(read_video(form, num_frames=5).frames, torch.from_numpy(FRAMES[CENTRES]))


def test_pictures_become_rgb():
    grey, clear = PIL.Image.new("L", (8, 4), 7), PIL.Image.new("RGBA", (8, 4), (1, 2, 3, 0))
    assert read_video([grey, clear]).frames[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animated_images(tmp_path, suffix):
    path = tmp_path / f"animated{suffix}"
    pictures = [PIL.Image.fromarray(frame) for frame in FRAMES]
    times = [100 + 50 * (i % 2) for i in range(24)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
    for form in (path, path.read_bytes()):
        clip = read_video(form, num_frames=5)
        assert indices(clip) == CENTRES and clip.total_frames == 24
        torch.testing.assert_close(clip.times, torch.tensor([sum(times[:i]) / 1000 for i in CENTRES]))
        assert clip.duration == pytest.approx(3.0)
        assert len(read_video(form, fps=1).frames) == 3
    assert is_one_video(path)
    with open(path, "rb") as opened:
        assert indices(read_video(opened, num_frames=1)) == [12] and not opened.closed


def test_a_clip_passes_through(mp4):
    clip = read_video(mp4, num_frames=2)
    assert read_video(clip, num_frames=1) is clip and isinstance(clip, Clip) and is_one_video(clip)


def test_lists_of_videos():
    for videos in (
        ["a.mp4", "b.mp4"],
        ["a.gif", "b.gif"],
        [pathlib.Path("a.mp4")],
        [FRAMES, FRAMES],
        [torch.from_numpy(FRAMES)],
        [[FRAMES[0], FRAMES[1]], [FRAMES[2]]],
        [b"", b""],
        [read_video(FRAMES)],
        [],
        np.stack([FRAMES, FRAMES]),
    ):
        assert not is_one_video(videos)
    with pytest.raises(ValueError, match="the given list of 2 holds items that are not images"):
        read_video(["a.mp4", "b.mp4"])


# What cannot be read


def test_missing_file(tmp_path):
    for missing in ("nowhere.mp4", tmp_path / "nowhere.mp4", "file:///nowhere.mp4", "s3://bucket/a.mp4", "x" * 5000):
        with pytest.raises(FileNotFoundError, match="is neither an existing file nor a file://, http"):
            read_video(missing)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_video(["nowhere.png"])


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder without images"):
        read_video(tmp_path)


def test_text_named_mp4(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("not a video\n" * 200)
    for source, name in ((path, r"text\.mp4' "), (path.read_bytes(), "the given file of 2400 bytes ")):
        with pytest.raises(ValueError, match=name + "cannot be read as a video") as caught:
            read_video(source)
        assert isinstance(caught.value.__cause__, av.error.FFmpegError)
        assert not isinstance(caught.value, av.error.FFmpegError)


def test_audio_only(tmp_path):
    with pytest.raises(ValueError, match=r"sound\.m4a' holds no video stream"):
        read_video(write_audio(tmp_path / "sound.m4a"))


def test_empty_file(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    for source in (path, b"", io.BytesIO()):
        with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
            read_video(source)


def test_no_frames():
    with pytest.raises(ValueError, match="the given array holds no frames"):
        read_video(FRAMES[:0])
    with pytest.raises(ValueError, match="the given list of 0 holds no frames"):
        read_video([])


def test_bytes_that_are_not_an_image(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match=r"image 0 of the given list of 1, .*text\.png', cannot be read as an image"):
        read_video([path])


def test_wrong_arrays():
    for wrong in (FRAMES / 255, torch.from_numpy(FRAMES).float(), FRAMES.astype(np.int64), [FRAMES[0] / 255]):
        with pytest.raises(ValueError, match=r"is (float|int)\d\d, and uint8 0\.\.255 is expected: cast it"):
            read_video(wrong)
    for wrong in (FRAMES[0], FRAMES[..., :2], FRAMES[None], [FRAMES[0][..., :1]]):
        with pytest.raises(ValueError, match=r"has shape \[.*\], and \[.*\] with RGB colours is expected"):
            read_video(wrong)


def test_different_sizes():
    images = [PIL.Image.new("RGB", (64, 48)), PIL.Image.new("RGB", (32, 24))]
    with pytest.raises(ValueError, match=r"64x48 and of 32x24 \(width x height\)"):
        read_video(images)


@pytest.mark.parametrize("wrong", [3, None, {}, PIL.Image.new("RGB", (4, 4)), io.StringIO("text")])
def test_not_a_video(wrong):
    with pytest.raises(ValueError, match="is not a video: give a path, URL, bytes"):
        read_video(wrong)


# The file travels alone


def test_without_pyav(mp4, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="needs PyAV: pip install av"):
        read_video(mp4)
    assert len(read_video(FRAMES, num_frames=5).frames) == 5


def test_the_modules_stand_alone(tmp_path):
    files = sorted(pathlib.Path(video_reading.__file__).parent.glob("video_*.py"))
    files = [file for file in files if file.stem != "video_tokenizer"]
    imported = set()
    for file in files:
        shutil.copy(file, tmp_path)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in {other.name for other in files}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"av", "numpy", "PIL", "torch"}
    code = f"import sys; import {tmp_path.name}.video_reading; assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path.parent)
