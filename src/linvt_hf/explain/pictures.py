"""
Explanations as pictures: a timeline with the heaviest moments, frames under their heat, and a video of these.

Colours are matplotlib's cividis, which looks alike with and without colour blindness. Shares are of all weight.
"""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, pyplot
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from ..encoded_video import as_encoded
from ..explanation import Explanation
from ..video_reading import Clip

COLOURS = colormaps["cividis"]
_BY = {
    "uniform": "every token alike",
    "gradient": "tokens weighed by gradient × token",
}


def seen_box(processor, height: int, width: int) -> tuple[float, float, float, float]:
    """
    Where a frame lies in what the vision encoder sees of it: top, bottom, left and right, 0 to 1 where it fills that,
    inside where it is padded, outside where it is cropped.

    Found with frames whose brightness tells a place: every pixel that the encoder gets says where it came from. The
    whole, where the encoder gets no picture.
    """
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    across = torch.linspace(0, 255, width).expand(height, width)
    frames = torch.stack([torch.zeros(height, width), torch.full((height, width), 255.0), down, across])
    frames = frames.round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
    seen = [processor._pixels(frame[None])["pixel_values"] for frame in frames]
    if seen[0].ndim < 4 or seen[0].shape[-3] != 3:
        return 0.0, 1.0, 0.0, 1.0
    black, white, *slopes = (picture.flatten(0, -4)[0].mean(dim=0) for picture in seen)  # [H, W]
    real = (white - black).abs() > 0.5 * (white - black).abs().max()  # padding is the same whatever the frame
    ends = []
    for axis, slope in enumerate(slopes):
        came_from = (slope - black) / (white - black)  # 0 to 1 in the frame
        inside = real & (came_from > 0.1) & (came_from < 0.9)  # where resizing mixes in nothing of the edge
        place = (torch.arange(slope.shape[axis]) + 0.5) / slope.shape[axis]
        place = (place[:, None] if axis == 0 else place).expand_as(slope)[inside]
        came_from = came_from[inside]
        scale = ((place - place.mean()) * (came_from - came_from.mean())).sum() / (place - place.mean()).square().sum()
        first = place.mean() - came_from.mean() / scale
        ends += [float(first), float(first + 1 / scale)]
    return tuple(ends)


def heat_on_frames(heat: Tensor, box: Sequence[float], height: int, width: int) -> Tensor:
    """Heat [T, rows, columns] of what the encoder sees as that of the frames' own pixels, [T, H, W], 0 to 1."""
    top, bottom, left, right = box
    down = torch.linspace(-1, 1, 2 * height + 1)[1::2] * (bottom - top) + (top + bottom - 1)
    across = torch.linspace(-1, 1, 2 * width + 1)[1::2] * (right - left) + (left + right - 1)
    where = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # [H, W, 2]
    where = where.expand(len(heat), -1, -1, -1)
    drawn = F.grid_sample(heat[:, None], where, padding_mode="border", align_corners=False)[:, 0]
    return (drawn / heat.max().clamp(min=1e-12)).clamp(0, 1)


def overlay(frames: Tensor, heat: Tensor) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 under heat [T, H, W] of 0 to 1: what weighs nothing is grey and dark."""
    pictures = frames.float().cpu().numpy() / 255
    grey = pictures.mean(axis=-1, keepdims=True)
    share = np.sqrt(heat.cpu().numpy())[..., None]  # so that half the heat is more than half seen
    clear = (1 - share) * 0.65 * grey + share * pictures
    coloured = COLOURS(heat.cpu().numpy())[..., :3]
    mixed = (1 - 0.45 * share) * clear + 0.45 * share * coloured
    return (255 * mixed).round().astype(np.uint8)


def write_explanation(explanation: Explanation, folder: Path) -> None:
    """`explanation.json`: question, answer, and what each frame weighs; `explanation.safetensors`: W and the heat."""
    moments = [None] * len(explanation.weights[0]) if explanation.times is None else explanation.times.tolist()
    shares = explanation.frames().tolist()
    content = {
        "question": explanation.question,
        "answer": explanation.answer,
        "importance by": explanation.importance_by,
        "grid": list(explanation.grid),
        "duration": explanation.duration,
        "averaged": None if explanation.averaged is None else explanation.heat_averaged().tolist(),
        "frames": [
            {"frame": number, "time": moment, "share": share}
            for number, (moment, share) in enumerate(zip(moments, shares, strict=True))
        ],
        "tokens": [
            {
                "token": number,
                "scale": scale,
                "importance": share,
                "heaviest frame": explanation.heaviest(1, token=number)[0],
            }
            for number, (scale, share) in enumerate(
                zip(explanation.scales.tolist(), explanation.importance.tolist(), strict=True)
            )
        ],
    }
    (folder / "explanation.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    tensors = {"weights": explanation.weights, "heat": explanation.heat(), "scores": explanation.scores}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "explanation.safetensors")


class Pictures:
    """
    Of one explanation.

    Args:
        clip: the frames that it is of, as they are in the video.
        box: `seen_box` of them.
    """

    def __init__(self, explanation: Explanation, clip: Clip, box: Sequence[float] = (0.0, 1.0, 0.0, 1.0)):
        if clip.num_frames != len(explanation.weights[0]):
            raise ValueError(
                f"The clip has {clip.num_frames} frames and the explanation {len(explanation.weights[0])}; read the "
                "video as it was for the explanation."
            )
        self.explanation, self.frames = explanation, clip.frames
        self.heat = heat_on_frames(explanation.heat(), box, *clip.frames.shape[1:3])
        self.share = explanation.frames()
        known = explanation.times
        self.moments = torch.arange(len(self.share)) if known is None else known
        self.unit = "frame" if known is None else "s"

    def moment(self, frame: int) -> str:
        moment = self.moments[frame]
        return f"frame {int(moment)}" if self.unit == "frame" else f"{moment:.1f} s"

    def timeline(self, count: int = 5) -> Figure:
        """How much each moment weighs, under pictures of the heaviest."""
        shown = sorted(self.explanation.heaviest(min(count, len(self.share))))
        figure = pyplot.figure(figsize=(10, 4.6), layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=[1, 1.1])
        tops = parts[0].subplots(1, len(shown), squeeze=False)[0]
        pictures = overlay(self.frames[shown], self.heat[shown])
        for axis, frame, picture in zip(tops, shown, pictures, strict=True):
            axis.imshow(picture)
            axis.set_title(f"{self.moment(frame)}: {100 * self.share[frame]:.0f} %", fontsize=10)
            axis.axis("off")
        axis = parts[1].subplots()
        self._bars(axis, shown)
        figure.suptitle(self._title(), fontsize=11)
        return figure

    def _bars(self, axis, shown: Sequence[int]) -> None:
        gaps = self.moments.diff() if len(self.moments) > 1 else torch.ones(1)
        width = 0.9 * float(gaps[gaps > 0].min()) if (gaps > 0).any() else 0.9
        percent = 100 * self.share
        colours = COLOURS((percent / percent.max()).numpy())
        axis.bar(self.moments.numpy(), percent.numpy(), width=width, color=colours)
        for frame in shown:
            axis.annotate(
                "▼", (float(self.moments[frame]), float(percent[frame])), ha="center", va="bottom", fontsize=8
            )
        axis.margins(y=0.15)
        axis.set_xlabel("time, s" if self.unit == "s" else "frame")
        axis.set_ylabel("share of all weight, %")
        axis.spines[["top", "right"]].set_visible(False)

    def _title(self) -> str:
        by = _BY[self.explanation.importance_by]
        if (averaged := self.explanation.heat_averaged()) is not None:
            by += f"; {100 * averaged.sum():.0f} % of all weight is of averages, and not shown"
        return f"{self.explanation.question}  →  {self.explanation.answer}\n{by}"

    def heat_maps(self, count: int = 8) -> Figure:
        """The heaviest frames, in order, as they are and under their heat; with the scale of the colours."""
        shown = sorted(self.explanation.heaviest(min(count, len(self.share))))
        figure, axes = pyplot.subplots(
            2, len(shown), figsize=(1.6 * len(shown) + 1.2, 3.9), squeeze=False, layout="constrained"
        )
        pictures = overlay(self.frames[shown], self.heat[shown])
        for column, frame in enumerate(shown):
            axes[0, column].imshow(self.frames[frame].cpu().numpy())
            axes[0, column].set_title(self.moment(frame), fontsize=10)
            axes[1, column].imshow(pictures[column])
        for axis in axes.flat:
            axis.axis("off")
        top = 100 * float(self.explanation.heat().max())
        colours = pyplot.cm.ScalarMappable(norm=pyplot.Normalize(0, top), cmap=COLOURS)
        figure.colorbar(colours, ax=axes, label="share of all weight at a place, %", shrink=0.9)
        figure.suptitle(self._title(), fontsize=11)
        return figure

    def write_video(self, path: Path, seconds: float = 0.5, least: int = 240) -> None:
        """An mp4 of the frames under their heat, each for some seconds, with a bar of time and weight below."""
        height, width = self.frames.shape[1:3]
        larger = max(-(-least // min(height, width)), 1)
        height, width = (side * larger - side * larger % 2 for side in (height, width))  # H.264 wants even ones
        strip = self._strip(width)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(
                "libx264", rate=1 / Fraction(seconds).limit_denominator(1000), options={"crf": "18"}
            )
            stream.width, stream.height, stream.pix_fmt = width, height + strip.shape[0], "yuv420p"
            for frame in range(len(self.frames)):  # one at a time: as numbers they take ten times their bytes
                one = slice(frame, frame + 1)
                picture = overlay(self.frames[one], self.heat[one])[0].repeat(larger, axis=0).repeat(larger, axis=1)
                bar = strip.copy()
                start, end = (round(place * width / len(self.frames)) for place in (frame, frame + 1))
                bar[:4, start:end] = 255  # where it is
                whole = np.concatenate([picture[:height, :width], bar])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(whole, format="rgb24")))
            container.mux(stream.encode(None))

    def _strip(self, width: int) -> np.ndarray:
        share = (self.share / self.share.max().clamp(min=1e-12)).numpy()
        columns = share[np.arange(width) * len(share) // width]  # of each column's frame
        colours = (255 * COLOURS(columns)[:, :3]).round().astype(np.uint8)
        strip = np.zeros((24, width, 3), dtype=np.uint8)
        strip[6:] = colours
        return strip


def side_by_side(first: Pictures, second: Pictures, count: int = 4) -> Figure:
    """Two questions about one video: where each one's answer was read from."""
    figure = pyplot.figure(figsize=(12, 5), layout="constrained")
    for part, pictures in zip(figure.subfigures(1, 2), (first, second), strict=True):
        top, bottom = part.subfigures(2, 1, height_ratios=[1, 1.1])
        shown = sorted(pictures.explanation.heaviest(min(count, len(pictures.share))))
        drawn = overlay(pictures.frames[shown], pictures.heat[shown])
        for axis, frame, picture in zip(top.subplots(1, len(shown), squeeze=False)[0], shown, drawn, strict=True):
            axis.imshow(picture)
            axis.set_title(f"{pictures.moment(frame)}: {100 * pictures.share[frame]:.0f} %", fontsize=9)
            axis.axis("off")
        pictures._bars(bottom.subplots(), shown)
        part.suptitle(pictures._title(), fontsize=10)
    return figure


def explain_to_folder(
    pipeline,
    video,
    questions: Sequence[str],
    folder: Path,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    videos_kwargs: dict | None = None,
    **kwargs,
) -> list[Explanation]:
    """
    A folder a question, `1`, `2`, ..., with numbers, `timeline.png`, `heat.png` and `heat.mp4`; of two questions also
    `side_by_side.png`. Other arguments as for `pipeline.explain`.
    """
    processor = pipeline.processor
    if as_encoded(video) is not None:
        raise ValueError("An encoded video holds no pictures to explain; give the video itself.")
    clip = processor._read(video, **processor._sampling(num_frames, fps, True, videos_kwargs))
    box = seen_box(processor, *clip.frames.shape[1:3])
    made, explanations = [], []
    for number, question in enumerate(questions, 1):
        explanation = pipeline.explain(clip, question, **kwargs)
        home = folder / str(number)
        home.mkdir(parents=True, exist_ok=True)
        write_explanation(explanation, home)
        pictures = Pictures(explanation, clip, box)
        _save(pictures.timeline(), home / "timeline.png")
        _save(pictures.heat_maps(), home / "heat.png")
        pictures.write_video(home / "heat.mp4")
        made.append(pictures)
        explanations.append(explanation)
    if len(made) == 2:
        _save(side_by_side(*made), folder / "side_by_side.png")
    return explanations


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
