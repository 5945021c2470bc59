"""
What a bounded memory costs in answers: the small model on videos of `shapes`, with fewer and fewer of their tokens
stored, and with shorter windows to compare them in.

    python benchmarks/long_videos.py [--model FOLDER] [--videos 100] [--json results.json]

Of a long video, 256 frames and 4,096 tokens, is asked what is there for a moment only; of a short one, 16 frames and
256 tokens, all kinds of things. Videos are encoded before a question is known; right is word for word.
"""

import argparse
import json
from itertools import groupby, islice
from pathlib import Path

from measuring import environment, save, show

from linvt_hf import VideoQuestionAnsweringPipeline
from linvt_hf.asking.loading import load_pipeline
from linvt_hf.shapes.evaluate import FRAMES

PLACES = 16  # tokens of a frame
# Stored tokens and frames of a window, by kind of video.
SETTINGS = {
    "long": [(4096 // part, 256) for part in (1, 2, 4, 8, 16, 32)]
    + [(stored, frames) for frames in (64, 16) for stored in (4096, 512)],
    "video": [(256 // part, 16) for part in (1, 2, 4, 8)],
}
COLUMNS = {"videos": "", "questions": "d", "stored": "d", "window, frames": "d", "right %": ".1f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/linvt-shapes")
    parser.add_argument("--data", type=Path, default=Path("build/shapes/data"), help="what `make shapes` writes first")
    parser.add_argument("--videos", type=int, default=100, help="of each kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipeline = load_pipeline(args.model, device="cpu")
    rows = []
    for kind, settings in SETTINGS.items():
        asked = questions(args.data / f"{kind}-test.jsonl", args.videos)
        for stored, frames in settings:
            pipeline.model.config.num_stored_tokens, pipeline.model.config.score_window = stored, frames * PLACES
            about = {"videos": kind, "questions": sum(map(len, asked.values()))}
            about |= {"stored": stored, "window, frames": frames}
            rows.append(about | score(pipeline, asked, FRAMES[kind]))
            show(rows, COLUMNS)
            save(args.json, {"top-k": pipeline.model.config.num_selected_tokens, "rows": rows, **environment("cpu")})


def questions(file: Path, count: int) -> dict[Path, list[dict]]:
    """The first videos that a file asks about, and its records of each."""
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    videos = groupby(records, lambda record: record["messages"][0]["content"][0]["video"])
    return {file.parent / video: list(several) for video, several in islice(videos, count)}


def score(pipeline: VideoQuestionAnsweringPipeline, asked: dict[Path, list[dict]], frames: int) -> dict[str, float]:
    right = []
    for video, records in asked.items():
        encoded = pipeline.model.encode_video(pipeline.processor.stream(video, num_frames=frames))
        inputs = [{"video": encoded, "question": record["messages"][0]["content"][1]["text"]} for record in records]
        truths = [record["messages"][1]["content"][0]["text"] for record in records]
        answers = pipeline(inputs, batch_size=len(inputs), max_new_tokens=8)
        right += [answer[0]["answer"] == truth for answer, truth in zip(answers, truths, strict=True)]
    return {"right %": 100 * sum(right) / len(right)}


if __name__ == "__main__":
    main()
