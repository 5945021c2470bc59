"""What training tests train: a folder with a tiny model, and a data file with short videos."""

import functools
import json
import os
from pathlib import Path

import torch
from tiny_bases import TINY_FRAMES, TINY_LINVT
from tiny_models import base_folder
from video_files import moving_square, write_video

from linvt_hf import wrap
from linvt_hf.training import TrainingSettings

HOME = Path(os.environ["HF_HOME"])


@functools.cache
def linvt_folder(name: str) -> Path:
    """A tiny wrapped base, saved whole."""
    folder = HOME / "tiny-linvt" / name
    torch.manual_seed(0)  # the same weights whatever ran before
    model, processor = wrap(base_folder(name), num_frames=4, frame_kwargs=TINY_FRAMES.get(name), **TINY_LINVT)
    model.save_pretrained(folder, processor=processor)
    return folder


@functools.cache
def data_file(texts: tuple[int, ...] = (), videos: int = 8) -> Path:
    """Questions about short videos, and, in the rows of `texts`, about nothing."""
    folder = HOME / "training-data"
    folder.mkdir(exist_ok=True)
    rows = []
    for row in range(videos):
        video = folder / f"{row}.mp4"
        if not video.exists():
            write_video(video, moving_square(8 + row))
        blocks = [] if row in texts else [{"type": "video", "path": video.name}]
        blocks.append({"type": "text", "text": f"What is it, number {row}?"})
        answer = [{"type": "text", "text": f"It is {row * 7 % 5}{'!' * (row % 4)}"}]  # of several lengths
        rows.append({"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]})
    path = folder / ("data" + "".join(f"-{row}" for row in texts) + f"-{videos}.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def recipe(name: str, output: Path, **values) -> TrainingSettings:
    """Few, quick and large steps on fixed data."""
    from linvt_hf.training.sources import DataSource

    data = values.pop("data", data_file())
    data = data if isinstance(data, DataSource) else DataSource(str(data))
    defaults = {
        "model": str(linvt_folder(name)),
        "output": str(output),
        "data": [data],
        "learning_rate": 1e-2,
        "batch_size": 4,
        "max_steps": 4,
        "workers": 0,
        "log_every": 1,
    }
    return TrainingSettings(**{**defaults, **values})


def weights(model) -> dict:
    """All tensors, those of LoRA layers' frozen parts under the base's own names."""
    return {name.replace(".base_layer.", "."): value.clone() for name, value in model.state_dict().items()}


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.history if "loss" in entry]
