"""`linvt ask`, `explain` and `batch`: a model and its answers."""

import json
from collections.abc import Callable
from pathlib import Path

from .shared import (
    add_asking,
    add_model,
    add_on_error,
    check_questions,
    check_video,
    count,
    load,
    positive,
    reading_of,
    say,
    settings_of,
)


def add_commands(commands) -> None:
    ask = commands.add_parser("ask", help="ask a LinVT model about a video")
    add_model(ask)
    ask.add_argument("video", metavar="VIDEO", help="a video file or URL")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="one or more; the video is encoded once")
    ask.add_argument("--choices", nargs="+", metavar="CHOICE", help="options; prints the probability of each")
    add_asking(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.set_defaults(run=_ask)

    explain = commands.add_parser(
        "explain", help="pictures of the moments and places of a video that an answer was read from"
    )
    add_model(explain)
    explain.add_argument("video", metavar="VIDEO", help="a video file or URL")
    explain.add_argument("questions", metavar="QUESTION", nargs="+", help="one or more; of two also side by side")
    explain.add_argument("--out", type=Path, required=True, help="folder to write")
    explain.add_argument(
        "--importance",
        choices=["uniform", "gradient"],
        default="gradient",
        help="weigh tokens by how much the answer depends on them, by gradient (default), or all alike",
    )
    add_asking(explain)
    explain.set_defaults(run=_explain)

    batch = commands.add_parser(
        "batch",
        help="ask the same of very many videos, into Parquet",
        description="Asks the same of very many videos: OUTPUT/answers/*.parquet, and what has no answer, with the "
        "reason, in OUTPUT/failed. A job that was stopped goes on when the same command is given again.",
    )
    add_model(batch)
    batch.add_argument(
        "input", metavar="INPUT", help="a .parquet or .jsonl with a column video (and id, question), or a folder"
    )
    batch.add_argument("--questions", nargs="+", default=[], help="of each video; else each row has a question")
    batch.add_argument("--choices", nargs="+", default=[], help="options of every question; the likeliest is taken")
    batch.add_argument("--output", type=Path, required=True, help="folder to write")
    batch.add_argument("--workers", type=count, default=1, help="more than one are Ray's, with a GPU each (1)")
    batch.add_argument(
        "--batch-size", type=count, default=8, help="questions at a time, fewer where memory is short (8)"
    )
    batch.add_argument("--retry", action="store_true", help="also ask again what got no answer, chunk by chunk")
    batch.add_argument("--chunk", type=count, default=256, help="rows that are done, or done again, together (256)")
    batch.add_argument("--num-frames", type=count, help="frames to read, instead of the model's default")
    batch.add_argument("--fps", type=positive, help="frames a second to read; then --num-frames is the most")
    add_on_error(batch)
    batch.add_argument("--max-new-tokens", type=count, default=256, help="longest answer, in tokens (256)")
    batch.set_defaults(run=_batch)


def _ask(args) -> None:
    check_video(args.video)
    check_questions(args.questions)
    pipeline = load(args)
    say(f"reading {args.video}")
    for question in args.questions:
        if len(args.questions) > 1 and not args.json:
            print(question)
        _answer(pipeline, question, args)


def _answer(pipeline, question: str, args) -> None:
    asked = {"video": args.video, "question": question, "progress": _progress(), **reading_of(args)}
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


def _explain(args) -> None:
    check_video(args.video)
    check_questions(args.questions)
    try:
        import matplotlib

        matplotlib.use("Agg")  # pictures go into files; there may be no screen
        from linvt_hf.explain.pictures import explain_to_folder
    except ImportError as error:
        raise ImportError(f"Pictures need more packages ({error}): pip install 'linvt_hf[explain]'.") from error
    pipeline = load(args)
    say(f"reading {args.video}")
    explanations = explain_to_folder(
        pipeline,
        args.video,
        args.questions,
        args.out,
        **reading_of(args),
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

    bar = tqdm(unit=" chunks", disable=None)

    def show(progress: Progress) -> None:
        bar.total = progress.of
        bar.set_postfix(answered=progress.answered, failed=progress.failed, refresh=False)
        bar.update(progress.chunks - bar.n)

    done = run_batch(
        settings_of(args, BatchSettings),
        args.output,
        workers=args.workers,
        device=args.device,
        batch_size=args.batch_size,
        retry=args.retry,
        say=show,
    )
    bar.close()
    if done.failed and not done.answered:
        raise ValueError(f"None of {done.failed:,} questions has an answer; {args.output / 'failed'} says why.")
    print(f"{args.output}: {done.answered:,} answers, {done.failed:,} questions without one.")
