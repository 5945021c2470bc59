"""Small real video files for the tests, and frames whose index can be read back from the picture.

Import it as `from video_files import write_video, moving_square, frame_index`. Needs PyAV, like reading does.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
    ".gif": "gif",
}
PIXELS = {"gif": "rgb8", "ffv1": "bgr0", "png": "rgb24", "mjpeg": "yuvj420p"}
INDEX_BITS = 8


def has_encoder(codec: str) -> bool:
    """Whether the installed PyAV can write it."""
    import av

    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


def need_encoder(codec: str) -> None:
    """Skips a test of a file that cannot be written here."""
    import pytest

    if not has_encoder(codec):
        pytest.skip(f"this PyAV has no {codec} encoder to write the file with")


def relisted(index: Any, pts: np.ndarray) -> Any:
    """A `VideoIndex` that lists other times for its packets, in the same order, than the file has."""
    index.pts = pts
    for learned in ("_ascending", "_ascending_packets"):  # from the times before
        index.__dict__.pop(learned, None)
    return index


def moving_square(num_frames: int = 24, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3]: a square crossing a background coloured by `seed`, above a strip that spells the index.

    The bottom quarter is eight black or white blocks, the frame's index in binary (highest bit at the left), which
    lossy compression does not flip; `frame_index` reads it.
    """
    if not 0 <= num_frames <= 2**INDEX_BITS:
        raise ValueError(f"the strip counts up to {2**INDEX_BITS} frames, not {num_frames}")
    rng = np.random.default_rng(seed)
    background, square = rng.integers(40, 120, 3), rng.integers(150, 250, 3)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = background
    side, strip = height // 4, height - height // 4
    edges = np.linspace(0, width, INDEX_BITS + 1).astype(int)
    for index, frame in enumerate(frames):
        left = (3 * index) % (width - side)
        top = index % (strip - side)
        frame[top : top + side, left : left + side] = square
        for bit in range(INDEX_BITS):
            on = index >> (INDEX_BITS - 1 - bit) & 1
            frame[strip:, edges[bit] : edges[bit + 1]] = 255 * on
    return frames


def frame_index(frame: Any) -> int:
    """The index that `moving_square` wrote into `frame` ([H, W, 3] array, tensor or PIL image)."""
    pixels = np.asarray(frame).astype(float)
    height, width = pixels.shape[:2]
    strip = height - height // 4
    edges = np.linspace(0, width, INDEX_BITS + 1).astype(int)
    index = 0
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        margin = (right - left) // 4  # the blocks' borders blur into each other
        index = 2 * index + int(pixels[strip + 2 :, left + margin : right - margin].mean() > 127)
    return index


def write_video(
    path: Any,
    frames: Any,
    fps: float = 8,
    codec: str | None = None,
    pix_fmt: str | None = None,
    gop: int | None = None,
    times: Sequence[float] | None = None,
    bframes: int | None = None,
    rotation: float | None = None,
    display_matrix: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
    faststart: bool = False,
) -> Any:
    """Encode `frames` (uint8 [T, H, W, 3]) to `path` with PyAV and return `path`.

    The codec follows the file's ending unless given. `times` (seconds, one per frame, to the millisecond) makes the
    frame rate variable. `rotation` (degrees, counterclockwise) or `display_matrix` (nine integers) is the metadata
    by which a player turns the picture. `format` names the container where `path` is a file object;
    `faststart` puts an mp4's table of contents before its frames.
    """
    import av

    suffix = "" if hasattr(path, "write") else Path(path).suffix.lower()
    codec = codec or CODECS.get(suffix or f".{format}", "libx264")
    frames = np.asarray(frames)
    rate = Fraction(fps).limit_denominator(1001)
    muxing = {"movflags": "faststart"} if faststart else {}
    file = path if hasattr(path, "write") else str(path)
    with av.open(file, "w", format=format, container_options=muxing) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or PIXELS.get(codec, "yuv420p")
        if gop is not None:
            stream.codec_context.gop_size = gop
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if display_matrix is not None:
            stream.set_display_matrix(display_matrix)
        time_base = Fraction(1, 1000) if times is not None else 1 / rate
        stream.codec_context.time_base = time_base
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.time_base = time_base
            frame.pts = index if times is None else round(times[index] * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Any, seconds: float = 0.5) -> Any:
    """A file with one silent audio stream and no video; returns `path`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, int(16000 * seconds)), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
