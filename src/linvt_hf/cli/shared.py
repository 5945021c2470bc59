"""What several commands have in common: the model, where it goes, and what is said meanwhile."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def seconds(text: str) -> float:
    """A moment of a video."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def check_questions(questions: list[str]) -> None:
    """Before a model is loaded for them."""
    if not all(question.strip() for question in questions):
        raise ValueError("A question has no words; ask something.")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model answers, and where and how it is loaded: what `load` reads."""
    parser.add_argument("model", metavar="MODEL", help="LinVT model, or adapters from training: a Hub id or a folder")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or auto for all there is; by default a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, float16, float32"
    )
    parser.add_argument("--quantize", choices=["4bit", "8bit"], help="the image-LLM's weights, by bitsandbytes")
    parser.add_argument("--base", help="the base of adapters, if it is not where they say")


def add_asking(parser: argparse.ArgumentParser) -> None:
    """How one video is read, and how long an answer may be."""
    parser.add_argument("--num-frames", type=count, help="frames to read, instead of the model's default")
    parser.add_argument(
        "--fps", type=positive, help="frames a second to read; at most --num-frames, or the model's default"
    )
    parser.add_argument("--start", type=seconds, metavar="SECONDS", help="leave out what is shown before")
    parser.add_argument("--end", type=seconds, metavar="SECONDS", help="leave out what is shown after")
    add_on_error(parser)
    parser.add_argument("--max-new-tokens", type=count, default=256, help="longest answer, in tokens (256)")


def add_on_error(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-error",
        choices=["raise", "keep"],
        default="raise",
        help="of a file that is damaged or cut short: an error (default), or what is left of it",
    )


def reading_of(args) -> dict:
    """How a video is read, as the pipeline takes it: of what `add_asking` adds."""
    reading = {"start": args.start, "end": args.end, "on_error": args.on_error if args.on_error == "keep" else None}
    reading = {name: value for name, value in reading.items() if value is not None}
    return {"num_frames": args.num_frames, "fps": args.fps, "videos_kwargs": reading or None}


def load(args):
    """A pipeline with the model."""
    say(f"loading {args.model}")
    from linvt_hf.asking.loading import load_pipeline  # torch and transformers take seconds; `--help` should not

    return load_pipeline(args.model, device=args.device, dtype=args.dtype, quantize=args.quantize, base=args.base)


def settings_of(args, kind: type):
    """A dataclass of settings, of the arguments that bear its fields' names."""
    given = {field.name: getattr(args, field.name) for field in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_video(video: str) -> None:
    if "://" not in video and not Path(video).exists():
        raise ValueError(f"There is no video at {video}.")


def say(what: str) -> None:
    print(f"linvt: {what} ...", file=sys.stderr, flush=True)
