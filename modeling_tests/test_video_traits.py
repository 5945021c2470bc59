"""What video files have beside frames: a turned or mirrored picture, odd sizes, colours of several kinds, sound."""

import itertools

import numpy as np
import PIL.Image
import pytest
import torch

av = pytest.importorskip("av", reason="reading video files needs PyAV")

from video_files import frame_index, has_encoder, moving_square, need_encoder, write_video  # noqa: E402

from linvt_hf.video_reading import VideoReadError, read_video, video_info  # noqa: E402

FRAMES = moving_square(6)
ONE = 1 << 16


def needs(codec):
    return pytest.mark.skipif(not has_encoder(codec), reason=f"this PyAV has no {codec} encoder")


@needs("libx264")
@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_matrix"),
    reason="this PyAV cannot write rotation metadata (18 can)",
)
@pytest.mark.parametrize(("turned", "one", "other"), list(itertools.product([False, True], [1, -1], [1, -1])))
def test_every_way_to_turn_and_mirror(tmp_path, turned, one, other):
    """The matrix says where a stored pixel (x, y) is shown: at (x, y) with signs, or at (y, x) with signs."""
    matrix = [0, one, 0, other, 0, 0] if turned else [one, 0, 0, 0, other, 0]
    path = write_video(
        tmp_path / "m.mp4", FRAMES, codec="libx264", display_matrix=[ONE * entry for entry in matrix] + [0, 0, 1 << 30]
    )
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    height, width = stored.shape[:2]
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    y, x = np.mgrid[:height, :width]
    column, row = a * x + c * y, b * x + d * y
    expected = np.empty((height, width, 3) if not turned else (width, height, 3), np.uint8)
    expected[row - row.min(), column - column.min()] = stored
    clip = read_video(path, indices=[0])
    assert np.array_equal(clip.frames[0].numpy(), expected)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.apng", "apng", "rgb24"),
    ],
)
def test_odd_sizes(tmp_path, name, codec, pix_fmt):
    need_encoder(codec)
    frames = moving_square(5, 67, 101)
    clip = read_video(write_video(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt), num_frames=None)
    assert clip.frames.shape == (5, 67, 101, 3)
    assert [frame_index(frame) for frame in clip.frames] == list(range(5))


@needs("libx264")
@pytest.mark.parametrize("space", ["ITU601", "ITU709"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["c.mp4", "c.mkv"])
def test_colours_are_what_they_were(tmp_path, name, space, full):
    """Of both common colour spaces, from 16 to 235 or from 0 to 255, as the file says."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255], [128, 128, 128]], np.uint8)
    picture = np.repeat(colours[None], 64, axis=0).repeat(32, axis=1)  # [64, 192, 3]
    numbers = {"ITU601": 6, "ITU709": 1}  # as H.273 counts them
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 192, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = numbers[space], 2 if full else 1
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv444p", dst_colorspace=space, dst_color_range="JPEG" if full else "MPEG"
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_video(path, num_frames=2)
    shown = clip.frames[:, 32, 16::32].numpy().astype(int)  # the middle of each field
    assert abs(shown - colours.astype(int)).max() <= 4


@needs("apng")
def test_transparent_pictures_become_rgb(tmp_path):
    path = tmp_path / "a.apng"
    with av.open(str(path), "w", format="apng") as container:
        stream = container.add_stream("apng", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "rgba"
        for index, picture in enumerate(FRAMES):
            pixels = np.concatenate([picture, np.full((64, 96, 1), 255, np.uint8)], axis=2)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_video(path, num_frames=None)
    assert np.array_equal(clip.frames.numpy(), FRAMES)


@needs("mpeg4")
@pytest.mark.parametrize("name", ["s.mp4", "s.mkv", "s.avi", "s.ts"])
def test_sound_beside_it(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=8)
        picture.height, picture.width, picture.pix_fmt = 64, 96, "yuv420p"
        codec = "mp2" if name.endswith(("avi", "ts")) else "aac"
        sound = container.add_stream(codec, rate=16000, layout="mono")
        for index, pixels in enumerate(FRAMES):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(picture.encode(frame))
            kind, samples = ("s16", np.int16) if codec == "mp2" else ("fltp", np.float32)
            audio = av.AudioFrame.from_ndarray(np.zeros((1, 2000), samples), format=kind, layout="mono")
            audio.sample_rate, audio.pts = 16000, 2000 * index
            container.mux(sound.encode(audio))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    clip = read_video(path, num_frames=None)
    assert [frame_index(frame) for frame in clip.frames] == list(range(6))
    assert clip.times.tolist() == pytest.approx([index / 8 for index in range(6)], abs=0.002)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.gif", "a.ts"])
def test_what_a_file_is(tmp_path, name):
    codec = {"webm": "libvpx-vp9", "gif": "gif", "avi": "mpeg4"}.get(name[2:], "libx264")
    need_encoder(codec)
    path = write_video(tmp_path / name, moving_square(24), fps=8, codec=codec)
    for source in (path, path.read_bytes()):
        info = video_info(source)
        assert (info.width, info.height, info.rotation, info.num_frames, info.problem) == (96, 64, 0, 24, None)
        assert info.duration == pytest.approx(3, abs=0.02) and info.fps == pytest.approx(8, rel=0.01)
        assert info.codec == {"libvpx-vp9": "vp9", "libx264": "h264"}.get(codec, codec)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        video_info(b"nothing")


def test_what_an_animated_webp_is(tmp_path):
    first, *others = (PIL.Image.fromarray(frame) for frame in FRAMES)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=125, lossless=True)
    info = video_info(tmp_path / "a.webp")
    assert (info.num_frames, info.duration, info.fps, info.width, info.height) == (6, 0.75, 8.0, 96, 64)
    data = (tmp_path / "a.webp").read_bytes()
    assert "cannot be decoded" in video_info(data[:-600]).problem  # Pillow takes it for none, and libav tries
    at = data.rindex(b"VP8L") + 20  # within the last frame's picture, which is looked at only when it is shown
    for read in (video_info, read_video):
        with pytest.raises(VideoReadError, match="cannot be read as an animated image"):
            read(data[:at] + b"\xff" * 40 + data[at + 40 :])


@needs("libx264")
def test_what_a_turned_file_is(tmp_path):
    path = write_video(tmp_path / "t.mp4", moving_square(6), codec="libx264", rotation=90)
    info = video_info(path)
    assert (info.width, info.height, info.rotation) == (64, 96, 90)
    clip = read_video(path, num_frames=1)
    assert clip.frames.shape[1:3] == (info.height, info.width)


@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_matrix"),
    reason="this PyAV cannot write rotation metadata (18 can)",
)
def test_scaled_frames(tmp_path):
    """About what scaling whole frames gives, upright, in every form of a video."""
    frames = moving_square(12, 96, 64)
    path = write_video(tmp_path / "v.mp4", frames, rotation=90)
    whole = read_video(path, num_frames=4)
    assert whole.frames.shape == (4, 64, 96, 3)
    for size in ((32, 48), (64, 96), (40, 41), (100, 130)):
        pixels = torch.nn.functional.interpolate(
            whole.frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
        ).permute(0, 2, 3, 1)
        for source in (path, whole.frames, list(whole.frames.numpy())):
            small = read_video(source, num_frames=4, size=size)
            assert small.frames.shape == (4, *size, 3)
            assert (small.frames.float() - pixels.float()).abs().mean() < (4 if source is path else 1e-6)
    with pytest.raises(ValueError, match=r"size must be a height and a width of at least 1, not \(0, 5\)"):
        read_video(path, size=(0, 5))
