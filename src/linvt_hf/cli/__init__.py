"""The `linvt` command: make a model, train it, ask it, measure it, publish it."""

import argparse
import sys
import traceback

from . import asking, making, measuring, serving, training


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
    for group in (making, training, asking, serving, measuring):
        group.add_commands(commands)
    return parser
