"""`linvt convert`, `wrap`, `merge` and `publish`: models into folders, and folders onto the Hub."""

import json
import math
from pathlib import Path

from .shared import say


def add_commands(commands) -> None:
    convert = commands.add_parser("convert", help="make a published image-LLM one that transformers loads")
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="a Hub id or a folder, as its makers published it")
    convert.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    convert.add_argument("--revision", help="of a Hub id")
    convert.add_argument(
        "--dtype",
        default="bfloat16",
        help="type of the weights: bfloat16 (default), float16, float32, auto (as stored)",
    )
    convert.add_argument("--dry-run", action="store_true", help="print what each tensor becomes, and write nothing")
    convert.set_defaults(run=_convert)

    wrap = commands.add_parser("wrap", help="give an image-LLM a video tokenizer and save the whole as a Hub folder")
    wrap.add_argument("base", metavar="BASE", help="image-LLM: a Hub id or a folder")
    wrap.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    wrap.add_argument("--num-frames", type=int, default=32, help="frames read from each video by default (32)")
    wrap.add_argument(
        "--times-in-prompt",
        choices=["duration", "frames"],
        help="what prompts say of a video's times",
    )
    wrap.add_argument("--fps", type=float, help="frames a second by default; then --num-frames is the most")
    wrap.add_argument("--video-token", help="token that stands for a video, if the base has no free one")
    wrap.add_argument(
        "--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, float16, float32"
    )
    wrap.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of LinVTConfig, e.g. --set num_selected_tokens=2048 (value in JSON); may be repeated",
    )
    wrap.set_defaults(run=_wrap)

    merge = commands.add_parser("merge", help="make one whole model of adapters and their base")
    merge.add_argument("adapter", metavar="ADAPTER", help="what training wrote: a folder or a Hub id")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    merge.add_argument("--base", help="the base, if it is not where the adapters say")
    merge.set_defaults(run=_merge)

    publish = commands.add_parser(
        "publish",
        help="check a model's folder as a stranger will find it, and upload it to the Hub",
        description="Checks a folder: no pickles, secrets or paths of a machine, a card with its metadata, all the "
        "code it needs, and an answer about a video in a fresh process without this package. Then uploads it.",
    )
    publish.add_argument("folder", metavar="FOLDER", type=Path, help="a whole model, or adapters from training")
    publish.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    publish.add_argument("--dry-run", action="store_true", help="only check, and show what would be uploaded")
    publish.add_argument("--private", action="store_true", help="if the repo is new, let nobody else see it")
    publish.add_argument("--message", help="of the commit")
    publish.set_defaults(run=_publish)


def _convert(args) -> None:
    say(f"reading {args.checkpoint}")
    from linvt_hf.conversion import convert

    plan = convert(args.checkpoint, args.out, revision=args.revision, dtype=args.dtype, dry_run=args.dry_run)
    parameters = sum(math.prod(shape) for shape in plan.shapes.values())
    written = "would be written" if args.dry_run else "written"
    if args.dry_run:
        print(plan)
    print(
        f"{args.out}: {len(plan.shapes):,} tensors, {parameters:,} parameters {written}, {len(plan.dropped)} dropped."
    )


def _wrap(args) -> None:
    from linvt_hf.conversion.convert import check_free

    check_free(args.out)
    settings = dict(_setting(pair) for pair in args.set)
    say(f"loading {args.base}")
    from linvt_hf import wrap  # torch and transformers take seconds to import; `--help` should not

    model, processor = wrap(
        args.base,
        video_token=args.video_token,
        num_frames=args.num_frames,
        times_in_prompt=args.times_in_prompt,
        fps=args.fps,
        model_kwargs={"dtype": args.dtype},
        **settings,
    )
    say(f"writing {args.out}")
    model.save_pretrained(args.out, processor=processor)
    added = sum(parameter.numel() for parameter in model.video_tokenizer.parameters())
    print(f"{args.out}: {args.base} with a video tokenizer of {added:,} untrained parameters.")


def _setting(pair: str) -> tuple[str, object]:
    from linvt_hf import LinVTConfig

    name, separator, value = pair.partition("=")
    fields = LinVTConfig.__dataclass_fields__
    if not separator or name not in fields:
        raise ValueError(f"--set {pair}: expected FIELD=VALUE with a field of LinVTConfig.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--set {pair}: the value is not JSON ({error}).") from error


def _merge(args) -> None:
    from linvt_hf.conversion.convert import check_free
    from linvt_hf.training import load_adapter, merge

    check_free(args.out)
    say(f"loading {args.adapter}")
    model, processor = load_adapter(args.adapter, args.base)
    if processor is None:
        raise ValueError(
            f"{args.adapter} holds no processor, and without it no video can be asked about; save it there with "
            "processor.save_pretrained."
        )
    say(f"writing {args.out}")
    merge(model).save_pretrained(args.out, processor=processor)
    print(f"{args.out}: {args.adapter} and its base in one model.")


def _publish(args) -> None:
    from linvt_hf.publishing.publish import check_folder, publish

    if args.repo.count("/") != 1:
        raise ValueError(f"REPO is {args.repo}; on the Hub it is owner/name.")
    say(f"checking {args.folder}")
    report = check_folder(args.folder, say=say)
    for name, size in report.files.items():
        print(f"{size:>14,}  {name}")
    print(f"{sum(report.files.values()):>14,}  bytes in {len(report.files)} files for {args.repo}")
    if report.problems:
        print("\n".join(report.problems))
        raise ValueError(f"{args.folder} is not fit to be published: {len(report.problems)} problems, named above.")
    print(f"Asked about a video, it answers: {report.answer}")
    if args.dry_run:
        print("Nothing was uploaded, since this is a dry run.")
    else:
        print(publish(args.folder, args.repo, private=args.private, message=args.message))
