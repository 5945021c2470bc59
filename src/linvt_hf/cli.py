"""The `linvt` command: convert and wrap an image-LLM, train it, ask a model about a video."""

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

TRAINING = Path(__file__).parent / "training"


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one sentence on standard error if the user can mend what went wrong."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.running:  # hours of work went before: say all there is to say
            traceback.print_exc()
        # transformers explains at length, and its first line says what is wrong; a data loader's process hands on the
        # whole account of what happened there, and the last line says it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        print(f"linvt: {lines[-1 if lines[0].startswith('Caught ') else 0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from the last checkpoint" if args.running else ""
        print(f"linvt: interrupted{again}.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linvt", description="Video for image-LLMs, with LinVT.")
    parser.set_defaults(running=False)  # whether a run has begun, which a mistake in the command no longer explains
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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

    ask = commands.add_parser("ask", help="ask a LinVT model about a video")
    ask.add_argument("model", metavar="MODEL", help="LinVT model, or adapters from training: a Hub id or a folder")
    ask.add_argument("video", metavar="VIDEO", help="a video file or URL")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="one or more; the video is encoded once")
    ask.add_argument("--choices", nargs="+", metavar="CHOICE", help="options; prints the probability of each")
    ask.add_argument("--num-frames", type=int, help="frames to read, instead of the model's default")
    ask.add_argument("--fps", type=float, help="frames a second to read, instead of the model's default")
    ask.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (256)")
    ask.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or auto for all there is; by default a GPU if there is one"
    )
    ask.add_argument(
        "--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, float16, float32"
    )
    ask.add_argument("--quantize", choices=["4bit", "8bit"], help="the image-LLM's weights, by bitsandbytes")
    ask.add_argument("--base", help="the base of adapters, if it is not where they say")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.set_defaults(run=_ask)

    explain = commands.add_parser(
        "explain", help="pictures of the moments and places of a video that an answer was read from"
    )
    explain.add_argument("model", metavar="MODEL", help="LinVT model, or adapters: a Hub id or a folder")
    explain.add_argument("video", metavar="VIDEO", help="a video file or URL")
    explain.add_argument("questions", metavar="QUESTION", nargs="+", help="one or more; of two also side by side")
    explain.add_argument("--out", type=Path, required=True, help="folder to write")
    explain.add_argument(
        "--importance",
        choices=["uniform", "gradient"],
        default="gradient",
        help="weigh tokens by how much the answer depends on them, by gradient (default), or all alike",
    )
    explain.add_argument("--num-frames", type=int, help="frames to read, instead of the model's default")
    explain.add_argument("--fps", type=float, help="frames a second to read, instead of the model's default")
    explain.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (256)")
    explain.add_argument("--device", help="cpu, cuda, or auto; by default a GPU if there is one")
    explain.add_argument("--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, ...")
    explain.add_argument("--quantize", choices=["4bit", "8bit"], help="the image-LLM's weights, by bitsandbytes")
    explain.add_argument("--base", help="the base of adapters, if it is not where they say")
    explain.set_defaults(run=_explain)

    batch = commands.add_parser(
        "batch",
        help="ask the same of very many videos, into Parquet",
        description="Asks the same of very many videos: OUTPUT/answers/*.parquet, and what has no answer, with the "
        "reason, in OUTPUT/failed. A job that was stopped goes on when the same command is given again.",
    )
    batch.add_argument("model", metavar="MODEL", help="LinVT model, or adapters: a Hub id or a folder")
    batch.add_argument(
        "input", metavar="INPUT", help="a .parquet or .jsonl with a column video (and id, question), or a folder"
    )
    batch.add_argument("--questions", nargs="+", default=[], help="of each video; else each row has a question")
    batch.add_argument("--choices", nargs="+", default=[], help="options of every question; the likeliest is taken")
    batch.add_argument("--output", type=Path, required=True, help="folder to write")
    batch.add_argument("--workers", type=int, default=1, help="more than one are Ray's, with a GPU each (1)")
    batch.add_argument(
        "--batch-size", type=int, default=8, help="questions at a time, fewer where memory is short (8)"
    )
    batch.add_argument("--chunk", type=int, default=256, help="rows that are done, or done again, together (256)")
    batch.add_argument("--num-frames", type=int, help="frames to read, instead of the model's default")
    batch.add_argument("--fps", type=float, help="frames a second to read; then --num-frames is the most")
    batch.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (256)")
    batch.add_argument("--device", help="of one worker: cpu, cuda, or auto; by default a GPU if there is one")
    batch.add_argument("--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, ...")
    batch.add_argument("--quantize", choices=["4bit", "8bit"], help="the image-LLM's weights, by bitsandbytes")
    batch.add_argument("--base", help="the base of adapters, if it is not where they say")
    batch.set_defaults(run=_batch)

    train = commands.add_parser(
        "train",
        help="train LinVT, and a LoRA on the language model, by a recipe",
        description="Trains LinVT, and a LoRA on the language model, by a recipe: a YAML file of settings.",
        epilog=_about_training(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with linvt")
    train.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that go before the recipe's: model=FOLDER data=FILE output=FOLDER lora.rank=8 ...",
    )
    train.add_argument("--show", action="store_true", help="print all settings as they would be used, and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="run benchmarks by lmms-eval, and say how sure the scores are",
        description="Runs benchmarks by lmms-eval's own command, and says how sure the scores are.",
        epilog=_ABOUT_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("model", metavar="MODEL", help="LinVT model, or adapters: a Hub id or a folder")
    evaluate.add_argument("--tasks", required=True, help="names of tasks or groups, with commas between")
    evaluate.add_argument(
        "--output", type=Path, required=True, help="folder for results; what is done is not run again"
    )
    evaluate.add_argument("--data", type=Path, help="where benchmarks lie that are not on the Hub, a folder each")
    evaluate.add_argument("--num-frames", type=int, help="frames to read, instead of the task's or the model's number")
    evaluate.add_argument("--fps", type=float, help="frames a second to read; then --num-frames is the most")
    evaluate.add_argument("--max-new-tokens", type=int, help="longest answer, instead of the tasks'")
    evaluate.add_argument(
        "--letters",
        default="generate",
        choices=["generate", "likelihood"],
        help="of lettered options: generate the answer (default), or take the likeliest letter",
    )
    evaluate.add_argument("--batch-size", type=int, default=1, help="questions at a time (1)")
    evaluate.add_argument("--processes", type=int, default=1, help="processes, each with a GPU of its own (1)")
    evaluate.add_argument("--limit", type=int, help="only the first questions of each task, to try it out")
    evaluate.add_argument("--device", help="cpu, cuda, or auto; by default a GPU if there is one")
    evaluate.add_argument("--dtype", default="auto", help="type of the weights: auto (as stored), bfloat16, ...")
    evaluate.add_argument("--quantize", choices=["4bit", "8bit"], help="the image-LLM's weights, by bitsandbytes")
    evaluate.add_argument("--base", help="the base of adapters, if it is not where they say")
    evaluate.add_argument("--judge", metavar="URL", help="OpenAI-compatible API that judges open answers")
    evaluate.add_argument("--judge-model", metavar="NAME", help="the judge's name there; its key is OPENAI_API_KEY")
    evaluate.add_argument("--compare", action="store_true", help="print published figures beside the scores")
    evaluate.add_argument(
        "--lmms-eval", dest="extra", nargs=argparse.REMAINDER, default=[], help="all that follows goes to lmms_eval"
    )
    evaluate.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="whether two runs of linvt eval differ, on the same questions")
    compare.add_argument("first", metavar="FIRST", type=Path, help="what linvt eval wrote, or a task's folder there")
    compare.add_argument("second", metavar="SECOND", type=Path, help="another")
    compare.set_defaults(run=_compare)

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

    merge = commands.add_parser("merge", help="make one whole model of adapters and their base")
    merge.add_argument("adapter", metavar="ADAPTER", help="what training wrote: a folder or a Hub id")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    merge.add_argument("--base", help="the base, if it is not where the adapters say")
    merge.set_defaults(run=_merge)
    return parser


_ABOUT_EVAL = """\
examples:
  linvt eval MODEL --tasks mvbench,egoschema_subset --output runs/eval --num-frames 64 --batch-size 8 --compare
  linvt eval MODEL --tasks msvd_qa,tgif_qa --data benchmarks --output runs/eval \\
      --judge http://localhost:8000/v1 --judge-model Qwen/Qwen3-8B
  linvt eval examples/linvt-shapes --tasks linvt_shapes --output runs/shapes --batch-size 16

A run that was stopped goes on when the same command is given again. Tasks are lmms-eval's, of which
`lmms_eval --tasks list` tells the names, and msvd_qa, msrvtt_qa, activitynet_qa, tgif_qa (tgif_qa_frame, _action,
_transition, _count), videovista, linvt_shapes and linvt_shapes_long. Videos that lmms-eval itself has to fetch come
from the Hub.
"""


def _about_training() -> str:
    recipes = sorted(path.relative_to(TRAINING / "presets").with_suffix("") for path in TRAINING.rglob("stage*.yaml"))
    return f"""\
recipes that come with linvt:
  {", ".join(map(str, recipes))}

a recipe may begin with extends: and the name of another; settings, with defaults and their sources, are in
  {TRAINING / "settings.py"}

examples:
  linvt train qwen2_vl/stage1 data=train.jsonl output=runs/stage1
  linvt train qwen2_vl/stage2 model=runs/stage1 data=train.jsonl eval_data=test.jsonl output=runs/stage2
  linvt train my.yaml data='[{{path: a.jsonl, weight: 0.5}}, b.parquet]' lora.rank=8 max_steps=100 --show

several GPUs, with one of the configurations (ddp, fsdp2, zero2, zero3) in
  {TRAINING / "accelerate"}:
  accelerate launch --config_file .../ddp.yaml --num_processes 8 -m linvt_hf.cli train ...

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""


def _convert(args) -> None:
    _say(f"reading {args.checkpoint}")
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
    _say(f"loading {args.base}")
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
    _say(f"writing {args.out}")
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


def _ask(args) -> None:
    _check_video(args.video)
    _say(f"loading {args.model}")
    from linvt_hf.asking.loading import load_pipeline

    pipeline = load_pipeline(args.model, device=args.device, dtype=args.dtype, quantize=args.quantize, base=args.base)
    _say(f"reading {args.video}")
    for question in args.questions:
        if len(args.questions) > 1 and not args.json:
            print(question)
        _answer(pipeline, question, args)


def _answer(pipeline, question: str, args) -> None:
    asked = {
        "video": args.video,
        "question": question,
        "num_frames": args.num_frames,
        "fps": args.fps,
        "progress": _progress(),
    }
    if args.choices:
        answers = pipeline(**asked, choices=args.choices)
        text = "\n".join(f"{100 * answer['score']:5.1f} %  {answer['answer']}" for answer in answers)
    else:
        from transformers import TextStreamer

        streamer = None if args.json else TextStreamer(pipeline.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answers = pipeline(**asked, max_new_tokens=args.max_new_tokens, streamer=streamer)
        text = None  # the streamer has printed it
    if args.json:
        result = {"answers": answers} if args.choices else answers[0]
        text = json.dumps({"video": args.video, "question": question, **result}, ensure_ascii=False)
    if text is not None:
        print(text, flush=True)


def _explain(args) -> None:
    _check_video(args.video)
    try:
        import matplotlib

        matplotlib.use("Agg")  # pictures go into files; there may be no screen
        from linvt_hf.explain.pictures import explain_to_folder
    except ImportError as error:
        raise ImportError(f"Pictures need more packages ({error}): pip install 'linvt_hf[explain]'.") from error
    from linvt_hf.asking.loading import load_pipeline

    _say(f"loading {args.model}")
    pipeline = load_pipeline(args.model, device=args.device, dtype=args.dtype, quantize=args.quantize, base=args.base)
    _say(f"reading {args.video}")
    explanations = explain_to_folder(
        pipeline,
        args.video,
        args.questions,
        args.out,
        num_frames=args.num_frames,
        fps=args.fps,
        importance=args.importance,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
    )
    for number, explanation in enumerate(explanations, 1):
        frame = explanation.heaviest(1)[0]
        when = f"frame {frame}" if explanation.times is None else f"{explanation.times[frame]:.1f} s"
        share = 100 * explanation.frames()[frame]
        print(f"{args.out / str(number)}: {explanation.question} {explanation.answer} ({share:.0f} % from {when})")


def _batch(args) -> None:
    try:
        from linvt_hf.asking.batch import BatchSettings, Progress, run_batch
    except ImportError as error:
        raise ImportError(f"Batches need more packages ({error}): pip install 'linvt_hf[batch]'.") from error
    from tqdm import tqdm

    names = {field.name for field in fields(BatchSettings)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items() if name in names}
    bar = tqdm(unit=" chunks", disable=None)

    def say(progress: Progress) -> None:
        bar.total = progress.of
        bar.set_postfix(answered=progress.answered, failed=progress.failed, refresh=False)
        bar.update(progress.chunks - bar.n)

    done = run_batch(
        BatchSettings(**given),
        args.output,
        workers=args.workers,
        device=args.device,
        batch_size=args.batch_size,
        say=say,
    )
    bar.close()
    print(f"{args.output}: {done.answered:,} answers, {done.failed:,} questions without one.")


def _progress() -> Callable[[int, int], None]:
    """A bar on a terminal, for videos that take longer than two seconds."""
    from tqdm import tqdm  # comes with transformers

    bar = tqdm(unit=" frames", delay=2, disable=None, leave=False)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _train(args) -> None:
    try:
        from linvt_hf.training import read_settings, train
    except ImportError as error:
        raise ImportError(f"Training needs more packages ({error}): pip install 'linvt_hf[train]'.") from error

    settings = read_settings(args.recipe, args.overrides)
    if args.show:
        import yaml

        print(yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True), end="")
        return
    from torch import distributed
    from transformers import TrainerCallback

    class Begun(TrainerCallback):
        def on_train_begin(self, *_, **__):
            args.running = True

    run = train(settings, callbacks=[Begun()], say=lambda text: print(f"linvt: {text}", file=sys.stderr, flush=True))
    if run.main:
        print(run.summary())
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _publish(args) -> None:
    from linvt_hf.publishing.publish import check_folder, publish

    if args.repo.count("/") != 1:
        raise ValueError(f"REPO is {args.repo}; on the Hub it is owner/name.")
    _say(f"checking {args.folder}")
    report = check_folder(args.folder, say=_say)
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


def _merge(args) -> None:
    from linvt_hf.conversion.convert import check_free
    from linvt_hf.training import load_adapter, merge

    check_free(args.out)
    _say(f"loading {args.adapter}")
    model, processor = load_adapter(args.adapter, args.base)
    _say(f"writing {args.out}")
    merge(model).save_pretrained(args.out, processor=processor)
    print(f"{args.out}: {args.adapter} and its base in one model.")


def _eval(args) -> None:
    try:
        from linvt_hf.evaluation.judge import Judge
        from linvt_hf.evaluation.report import beside_published, table
        from linvt_hf.evaluation.run import EvalSettings, evaluate
    except ImportError as error:
        raise ImportError(
            f"Evaluation needs more packages ({error}): pip install 'linvt_hf[eval]', and lmms-eval by itself, "
            "pip install --no-deps 'lmms-eval>=0.7.3'."
        ) from error
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("Give both --judge URL and --judge-model NAME; one of them is missing.")
    names = {field.name for field in fields(EvalSettings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    run = evaluate(
        EvalSettings(**{**given, "extra": tuple(args.extra)}),
        [task for task in args.tasks.split(",") if task],
        args.output,
        processes=args.processes,
        batch_size=args.batch_size,
        data=args.data,
        judge=None if args.judge is None else Judge(args.judge, args.judge_model),
        say=lambda text: print(f"linvt: {text}", file=sys.stderr, flush=True),
    )
    print(table(run.scores))
    for task, said in run.judge.items():
        print(f"\n{task}, judged by {said['judge']}: {said['judged']} judged, {said['unjudged']} not")
    if args.compare:
        print(f"\n{beside_published(run.scores)}")
    if run.failed:
        raise RuntimeError(f"No result for {', '.join(run.failed)}; the others are above and in {args.output}.")


def _compare(args) -> None:
    from linvt_hf.evaluation.report import compare_runs, comparison_table
    from linvt_hf.evaluation.scores import read_answers

    print(comparison_table(compare_runs(read_answers(args.first), read_answers(args.second))))


def _check_video(video: str) -> None:
    if "://" not in video and not Path(video).exists():
        raise ValueError(f"There is no video at {video}.")


def _say(what: str) -> None:
    print(f"linvt: {what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
