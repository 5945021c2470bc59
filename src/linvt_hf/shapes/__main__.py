"""`python -m linvt_hf.shapes data`, `image-llm`, `evaluate`, `results`, `bases` and `ship`: see the Makefile."""

import argparse
import os
from functools import partial
from pathlib import Path

from .videos import write_split
from .world import SPLITS

SHIPPED = Path("examples/shapes-image-llm")
SCENES = {
    ("video", "train"): 4000,
    ("video", "validation"): 200,
    ("video", "test"): 500,
    ("long", "train"): 300,
    ("long", "validation"): 50,
    ("long", "test"): 100,
    ("image", "train"): 1000,
    ("image", "validation"): 100,
    ("image", "test"): 300,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m linvt_hf.shapes", description="A world of moving shapes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="write videos, pictures and what is asked about them")
    data.add_argument("folder", type=Path)
    data.add_argument("--share", type=float, default=1.0, help="write only this share of the scenes")
    data.set_defaults(run=_data)
    image_llm = commands.add_parser("image-llm", help="train the small image-LLM, on pictures and texts alone")
    image_llm.add_argument("folder", type=Path)
    image_llm.add_argument("--base", default="internvl2", help="architecture: one of the six, internvl2 by default")
    image_llm.add_argument("--seed", type=int, default=0)
    image_llm.add_argument("--vision-steps", type=int, default=2000)
    image_llm.add_argument("--steps", type=int, default=3500)
    image_llm.set_defaults(run=_image_llm)
    evaluate = commands.add_parser("evaluate", help="how many questions a model answers right, word for word")
    evaluate.add_argument("model", type=Path, help="a LinVT model; an image-LLM is given an untrained LinVT")
    evaluate.add_argument("--data", type=Path, default=Path("build/shapes/data"), help="what `data` wrote")
    evaluate.add_argument("--split", default="test", choices=SPLITS)
    evaluate.set_defaults(run=_evaluate)
    results = commands.add_parser("results", help="compare LinVT with simpler ways: train and measure every row")
    results.add_argument("folder", type=Path, help="gets a file a result; what is there is not run again")
    results.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows; all by default")
    results.add_argument("--seeds", type=int, default=3, help="of rows of the table; of those of the curve alone, one")
    results.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    results.add_argument(
        "--write", type=Path, nargs="+", default=[], metavar="FILE", help="Markdown files whose tables are replaced"
    )
    results.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of both stages' recipes")
    results.set_defaults(run=_results)
    bases = commands.add_parser("bases", help="train each of the six small, and compare a few ways on each")
    bases.add_argument("folder", type=Path, help="gets a folder a base; what is there is not run again")
    bases.add_argument(
        "--results", type=Path, default=Path("benchmarks/shapes"), help="where `results` puts its files"
    )
    bases.add_argument("--models", type=Path, default=Path("build/shapes/bases"), help="where the image-LLMs go")
    bases.add_argument("--bases", nargs="+", metavar="NAME", help="only these; all six by default")
    bases.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    bases.set_defaults(run=_bases)
    ship = commands.add_parser("ship", help="a folder to ship: the code as it is now, a video, a model")
    ship.add_argument("folder", type=Path)
    ship.add_argument("--model", type=Path, help="the model to put there; by default the one that is there stays")
    ship.set_defaults(run=_ship)
    args = parser.parse_args()
    args.run(args)


def _data(args) -> None:
    for (kind, split), count in SCENES.items():
        for records in write_split(args.folder, kind, split, max(round(args.share * count), 1)):
            print(f"{records}: {sum(1 for _ in records.open()):,} questions", flush=True)


def _image_llm(args) -> None:
    from .bases import BASES

    _pretrain(_known(args.base, BASES), args.folder, args.seed, args.vision_steps, args.steps)


def _known(name: str, known: dict):
    if name not in known:
        raise SystemExit(f"There is no '{name}'; there are {', '.join(known)}.")
    return known[name]


def _pretrain(base, folder: Path, seed: int = 0, vision_steps: int = 2000, steps: int = 3500) -> None:
    # Room for a compiled kernel for every length and number of pictures; oneDNN reads it once.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")
    from .image_llm import evaluate, pretrain, save

    log = partial(print, flush=True)
    model, tokenizer = pretrain(base, vision_steps, steps, seed=seed, log=log)
    save(model, tokenizer, folder, base)
    log(f"{folder}: right answers about pictures of the validation split, {evaluate(model, tokenizer, base)}")


def _bases(args) -> None:
    from .bases import BASES, INTERNVL2
    from .results import all_jobs, bases_table, read_results, run_all
    from .rows import EACH_BASE

    found = {}
    for name in args.bases or BASES:
        base, model, out = _known(name, BASES), args.models / name, args.folder / name
        if base is INTERNVL2:  # the one that ships, whose rows are in the table of all ways
            model, out = SHIPPED, args.results
        if not (model / "chat_template.jinja").exists():  # what is written last
            _pretrain(base, model)
        jobs = [job for job in all_jobs(out, 1, (f"model={model}",)) if job.row in EACH_BASE]
        run_all(jobs, args.workers)
        found[name] = read_results(jobs)
    print(bases_table(found))


def _evaluate(args) -> None:
    from transformers import AutoConfig

    from ..conversion import wrap
    from ..modeling_linvt import LinVTForConditionalGeneration
    from ..processing_linvt import LinVTProcessor
    from .evaluate import FRAMES, QuestionSet, Score

    if AutoConfig.from_pretrained(args.model).model_type == LinVTForConditionalGeneration.config_class.model_type:
        model = LinVTForConditionalGeneration.from_pretrained(args.model)
        processor = LinVTProcessor.from_pretrained(args.model)
    else:
        model, processor = wrap(args.model)
    for kind, frames in FRAMES.items():
        questions = QuestionSet(args.data / f"{kind}-{args.split}.jsonl", processor, num_frames=frames)
        score = questions.score(model)
        kinds = ", ".join(f"{name} {share:.1%}" for name, share in score.by_kind().items())
        print(f"{kind}, {len(questions.records)} questions: {Score.mean(score.exact):.1%} ({kinds})", flush=True)


def _results(args) -> None:
    from .results import all_jobs, read_results, run_all, tables, write_tables
    from .rows import ROWS

    rows = {row.name: row for row in ROWS}
    chosen = [_known(name, rows) for name in args.rows or rows]
    jobs = all_jobs(args.folder, args.seeds, tuple(args.overrides))
    run_all([job for job in jobs if job.row in chosen], args.workers)
    found = read_results(jobs)
    print(*tables(found).values(), sep="\n\n")
    for file in args.write:
        write_tables(found, file)


def _ship(args) -> None:
    from ..hub_folder import copy_code
    from ..modeling_linvt import LinVTForConditionalGeneration
    from ..processing_linvt import LinVTProcessor
    from .videos import write_mp4
    from .world import draw_video, make_scene

    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        copy_code(args.folder)
    else:
        model = LinVTForConditionalGeneration.from_pretrained(args.model)
        model.save_pretrained(args.folder, processor=LinVTProcessor.from_pretrained(args.model))
    # Its cross moves, its star changes colour, and a circle flashes up.
    write_mp4(draw_video(make_scene("video", "test", 28), 256), args.folder / "example.mp4")


if __name__ == "__main__":
    main()
