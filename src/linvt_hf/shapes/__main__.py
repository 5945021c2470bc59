"""`python -m linvt_hf.shapes data FOLDER` and `python -m linvt_hf.shapes image-llm FOLDER`: see `make shapes`."""

import argparse
from pathlib import Path

from .videos import write_split

SCENES = {
    ("video", "train"): 4000,
    ("video", "validation"): 200,
    ("video", "test"): 500,
    ("long", "train"): 300,
    ("long", "test"): 100,
    ("image", "train"): 1000,
    ("image", "test"): 300,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m linvt_hf.shapes", description="A world of moving shapes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="write videos, pictures and what is asked about them")
    data.add_argument("folder", type=Path)
    data.add_argument("--share", type=float, default=1.0, help="write only this share of the scenes")
    data.set_defaults(run=_data)
    image_llm = commands.add_parser("image-llm", help="train the small image-LLM on pictures alone")
    image_llm.add_argument("folder", type=Path)
    image_llm.add_argument("--seed", type=int, default=0)
    image_llm.add_argument("--vision-steps", type=int, default=2000)
    image_llm.add_argument("--steps", type=int, default=3000)
    image_llm.set_defaults(run=_image_llm)
    args = parser.parse_args()
    args.run(args)


def _data(args) -> None:
    for (kind, split), count in SCENES.items():
        for records in write_split(args.folder, kind, split, max(round(args.share * count), 1)):
            print(f"{records}: {sum(1 for _ in records.open()):,} questions", flush=True)


def _image_llm(args) -> None:
    from .image_llm import evaluate, pretrain, save

    model, tokenizer = pretrain(
        args.vision_steps, args.steps, seed=args.seed, log=lambda text: print(text, flush=True)
    )
    save(model, tokenizer, args.folder)
    print(f"{args.folder}: right answers about pictures of the validation split, {evaluate(model, tokenizer)}")


if __name__ == "__main__":
    main()
