"""Scenes to data on disk: real mp4 and png files, and JSONL in the `messages` layout that `linvt train` reads."""

import json
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image

from .questions import Question, ask
from .world import CANVAS, FPS, Scene, draw, draw_video, make_scene


def write_mp4(frames: np.ndarray, path: Path, fps: int = FPS) -> None:
    """Frames uint8 [T, H, W, 3] as an H.264 file, like the ones that cameras and editors write."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "15", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1  # the same file on every machine, and faster for frames this small
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def chosen_questions(scene: Scene, random: Random) -> list[Question]:
    """One question of each kind a scene has an answer for, so that no kind outweighs the others."""
    by_kind: dict[str, list[Question]] = {}
    for question in ask(scene, random):
        by_kind.setdefault(question.kind, []).append(question)
    return [random.choice(questions) for questions in by_kind.values()]


def write_split(folder: str | Path, kind: str, split: str, count: int, size: int = CANVAS) -> list[Path]:
    """
    Writes the first `count` scenes of a split and what is asked about them: for training all there is to ask, else one
    question of each kind.

    Args:
        folder: gets `<kind>/<split>/*.mp4` (`*.png` for images), `<kind>-<split>.jsonl` and, for videos,
            `<kind>-<split>-captions.jsonl`.
        kind: "image", "video" or "long"; split: "train", "validation" or "test".
        size: height and width in pixels.
    Returns the JSONL files, a record a question: `messages`, and `kind` and `options` for evaluation.
    """
    folder = Path(folder)
    (folder / kind / split).mkdir(parents=True, exist_ok=True)
    records: dict[str, list[str]] = {}
    for number in range(count):
        scene = make_scene(kind, split, number)
        media = f"{kind}/{split}/{number:05d}.{'png' if kind == 'image' else 'mp4'}"
        _write_media(scene, folder / media, size)
        questions = ask if split == "train" else chosen_questions
        for question in questions(scene, Random(f"questions {kind} {split} {number}")):
            file = f"{kind}-{split}{'-captions' if question.kind == 'caption' else ''}.jsonl"
            records.setdefault(file, []).append(json.dumps(_record(question, media)) + "\n")
    for file, lines in records.items():
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return [folder / file for file in sorted(records)]


def _write_media(scene: Scene, path: Path, size: int) -> None:
    if scene.frames == 1:
        Image.fromarray(draw(scene, 0, size)).save(path)
    else:
        write_mp4(draw_video(scene, size), path)


def _record(question: Question, media: str) -> dict:
    block = "image" if media.endswith(".png") else "video"
    user = [{"type": block, block: media}, {"type": "text", "text": question.text}]
    answer = [{"type": "text", "text": question.answer}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": question.kind, "options": question.options}
