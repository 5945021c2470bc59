"""`linvt eval` and `compare`: how well a model answers, and whether two runs differ."""

import argparse
import sys
from pathlib import Path

from .shared import add_model, count, positive, settings_of

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


def add_commands(commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="run benchmarks by lmms-eval, and say how sure the scores are",
        description="Runs benchmarks by lmms-eval's own command, and says how sure the scores are.",
        epilog=_ABOUT_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(evaluate)
    evaluate.add_argument("--tasks", required=True, help="names of tasks or groups, with commas between")
    evaluate.add_argument(
        "--output", type=Path, required=True, help="folder for results; what is done is not run again"
    )
    evaluate.add_argument("--data", type=Path, help="where benchmarks lie that are not on the Hub, a folder each")
    evaluate.add_argument(
        "--num-frames", type=count, help="frames to read, instead of the task's or the model's number"
    )
    evaluate.add_argument("--fps", type=positive, help="frames a second to read; then --num-frames is the most")
    evaluate.add_argument("--max-new-tokens", type=count, help="longest answer, instead of the tasks'")
    evaluate.add_argument(
        "--letters",
        default="generate",
        choices=["generate", "likelihood"],
        help="of lettered options: generate the answer (default), or take the likeliest letter",
    )
    evaluate.add_argument("--batch-size", type=count, default=1, help="questions at a time (1)")
    evaluate.add_argument("--processes", type=count, default=1, help="processes, each with a GPU of its own (1)")
    evaluate.add_argument("--limit", type=count, help="only the first questions of each task, to try it out")
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


def _eval(args) -> None:
    from linvt_hf.evaluation import MISSING

    try:
        from linvt_hf.evaluation.judge import Judge
        from linvt_hf.evaluation.report import beside_published, table
        from linvt_hf.evaluation.run import EvalSettings, evaluate
    except ImportError as error:
        raise ImportError(MISSING.format(error)) from error
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("Give both --judge URL and --judge-model NAME; one of them is missing.")
    run = evaluate(
        settings_of(args, EvalSettings),
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
