"""
Whether explanations are true, on the test videos of `shapes`, of which everything is known.

    python -m linvt_hf.explain.faithfulness examples/linvt-shapes --json FILE --figure FILE

Deletion: without the frames that weigh most, fewer questions should be answered right than without as many random
ones, and without the lightest nearly as many as with all. Read from its end, the curve of the lightest is insertion:
the video made of the heaviest frames alone. Pointing: the heaviest frame and place should be where that is which the
question is about. What is explained is the right answer, whatever the model says.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..asking.loading import load_pipeline
from ..evaluation.layouts import read_records
from ..explanation import Explanation
from ..shapes.world import CANVAS, Scene, Thing, make_scene

IMPORTANCE = ("uniform", "gradient")
ORDERS = ("heaviest", "random", "lightest")
REMOVED = (0, 1, 2, 4, 8, 12, 15)  # frames, of 16


@dataclass(frozen=True)
class Asked:
    """A question of the test split, its scene, and the thing it is about, if it is about one."""

    video: str
    question: str
    answer: str
    kind: str
    scene: Scene

    @property
    def thing(self) -> Thing | None:
        things = self.scene.things
        if self.kind.startswith("flash"):
            return next(thing for thing in things if thing.is_brief)
        named = [thing for thing in things if thing.shape in self.question]  # every shape is there once at most
        return named[0] if self.kind in ("motion", "direction", "colour in time") and len(named) == 1 else None


def questions(count: int) -> list[Asked]:
    """The first of the test split."""
    records = read_records("linvt_shapes")[:count]
    return [
        Asked(
            video=record["video"],
            question=record["question"],
            answer=record["answer"],
            kind=record["kind"],
            scene=make_scene("video", "test", int(Path(record["video"]).stem)),
        )
        for record in records
    ]


# ---- deletion ----


@torch.no_grad()
def right_without(pipeline, asked: Asked, kept: list[list[int]]) -> list[bool]:
    """Whether the answer is right of a video that has only these frames, for each list of frames."""
    model, processor = pipeline.model, pipeline.processor
    encoded = model.encode_video(processor.stream(asked.video, chunk_size=model.config.frames_per_chunk))
    content = [{"type": "video", "video": encoded}, {"type": "text", "text": asked.question}]
    features = dict(pipeline._features([{"role": "user", "content": content}]))
    inputs = model.take_video_inputs(features)
    values = encoded.tokens.values[0].unflatten(0, (encoded.num_frames, -1))  # [T, N, D]
    times = torch.zeros(len(kept), max(map(len, kept)))
    for row, frames in enumerate(kept):
        times[row, : len(frames)] = encoded.times[frames]
    found = model.get_video_features(
        frame_features=torch.cat([values[frames] for frames in kept]),
        num_frames=[len(frames) for frames in kept],
        frame_times=times,
        question_ids=inputs["question_ids"].expand(len(kept), -1),
        question_mask=inputs["question_mask"].expand(len(kept), -1),
    )
    rows = {name: value.expand(len(kept), -1) for name, value in features.items()}
    logits = model(**rows, video_embeds=found.pooler_output, logits_to_keep=1).logits[:, -1]
    (right,) = processor.tokenizer(asked.answer, add_special_tokens=False)["input_ids"]  # every answer is one token
    return (logits.argmax(dim=-1) == right).tolist()


def orders(explanation: Explanation, seed: int) -> dict[str, list[int]]:
    """All frames, in the order in which they are removed."""
    count = len(explanation.frames())
    heaviest = explanation.heaviest(count)
    random = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return dict(zip(ORDERS, (heaviest, random, heaviest[::-1]), strict=True))


# ---- pointing ----


def hits(thing: Thing, frames: int, grid: tuple[int, int]) -> Tensor:
    """Where a thing is: [T, rows, columns], True for places that it touches."""
    rows, columns = grid
    there = torch.zeros(frames, rows, columns, dtype=torch.bool)
    for frame in range(frames):
        if not thing.is_there(frame):
            continue
        x, y = thing.place(frame)
        for row in range(rows):
            for column in range(columns):
                # From the centre to the nearest point of the place's rectangle.
                across = max(column * CANVAS / columns - x, x - (column + 1) * CANVAS / columns, 0)
                down = max(row * CANVAS / rows - y, y - (row + 1) * CANVAS / rows, 0)
                there[frame, row, column] = math.hypot(across, down) < thing.radius
    return there


def points(explanation: Explanation, thing: Thing) -> dict[str, float]:
    """
    Whether the heaviest frame, and the heaviest place of all, have the thing; how much of all weight lies on it; and
    the same by chance.
    """
    heat = explanation.heat()
    there = hits(thing, len(heat), explanation.grid)
    frames = there.any(dim=(1, 2))
    return {
        "frame": float(frames[explanation.frames().argmax()]),
        "frame by chance": frames.float().mean().item(),
        "place": float(there.flatten()[heat.argmax()]),
        "place by chance": there.float().mean().item(),
        "weight": heat[there].sum().item(),
    }


# ---- all of it ----


def measure(pipeline, asked: list[Asked]) -> dict:
    """Shares of right answers by importance, order and number of frames removed; pointing by importance and kind."""
    right: dict[tuple, list[bool]] = defaultdict(list)
    pointed: dict[tuple, list[dict]] = defaultdict(list)
    for number, one in enumerate(asked):
        jobs = []
        for importance in IMPORTANCE:
            explanation = pipeline.explain(one.video, one.question, answer=one.answer, importance=importance)
            for order, frames in orders(explanation, seed=number).items():
                jobs += [(importance, order, count, sorted(frames[count:])) for count in REMOVED]
            if one.thing is not None:
                pointed[importance, "a flash" if one.thing.is_brief else "another thing"].append(
                    points(explanation, one.thing)
                )
        for (importance, order, count, _), good in zip(
            jobs, right_without(pipeline, one, [frames for *_, frames in jobs]), strict=True
        ):
            right[importance, order, count].append(good)
    return {
        "questions": len(asked),
        "deletion": {
            importance: {
                order: {str(count): statistics.mean(right[importance, order, count]) for count in REMOVED}
                for order in ORDERS
            }
            for importance in IMPORTANCE
        },
        "pointing": {
            f"{importance}, {kind}": {
                "questions": len(found),
                **{name: statistics.mean(each[name] for each in found) for name in found[0]},
            }
            for (importance, kind), found in pointed.items()
        },
    }


def figure(result: dict, file: Path) -> None:
    """The deletion curves."""
    from matplotlib import pyplot

    frames, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    styles = {"heaviest": ("#D55E00", "o"), "random": ("#777777", "s"), "lightest": ("#0072B2", "^")}
    for axis, importance in zip(axes, IMPORTANCE, strict=True):
        for order, (colour, marker) in styles.items():
            curve = result["deletion"][importance][order]
            axis.plot(
                list(map(int, curve)),
                [100 * share for share in curve.values()],
                color=colour,
                marker=marker,
                label=order,
            )
        axis.set_title({"uniform": "weights W alone", "gradient": "W, by what the answer depends on"}[importance])
        axis.set_xlabel("frames removed, of 16")
    axes[0].set_ylabel("right answers, %")
    axes[0].set_ylim(0, 100)
    axes[0].legend(title="removed first", frameon=False)
    frames.tight_layout()
    frames.savefig(file, dpi=150)
    pyplot.close(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    result = measure(load_pipeline(args.model), questions(args.questions))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)
    if args.figure:
        figure(result, args.figure)


if __name__ == "__main__":
    main()
