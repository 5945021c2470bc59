"""`linvt train`."""

import argparse
import sys
from pathlib import Path

TRAINING = Path(__file__).parent.parent / "training"


def add_commands(commands) -> None:
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
