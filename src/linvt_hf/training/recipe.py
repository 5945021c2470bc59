"""
`train`: one stage of training, from settings to a folder of adapters.

Stage 1 learns LinVT alone, stage 2 LinVT and a LoRA on the language model; that is a difference of settings
(`presets/stage1.yaml`, `presets/stage2.yaml`), not of code.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import LinVTProcessor
from .dataset import ChatDataset, read_skipped
from .feature_cache import FeatureCache
from .preparation import count_parameters, finish, load_model, prepare, set_sampling
from .run_folder import FREE, REPORTS, SKIPPED_FILE, begin, check_data, copy_adapter, data_digests, earlier_run
from .settings import SettingsError, TrainingSettings
from .trainer import LinVTTrainer, Report


@dataclass
class TrainingRun:
    """
    model, processor: as they are after the last step, in evaluation mode; under FSDP2 still in shards.
    folder: adapters of the last step; `best` those of the lowest evaluation loss, if there was an evaluation.
    history: what was logged, in order, as dicts with `step`.
    skipped: videos and samples that could not be used, as dicts of `origin`, `path` and `reason`.
    """

    model: LinVTForConditionalGeneration
    processor: LinVTProcessor
    folder: Path
    best: Path | None = None
    history: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    main: bool = True  # whether this is the process that reports

    def summary(self) -> str:
        """What a person wants to know at the end."""
        lines = [f"{self.folder}: the adapters after the last step"]
        if losses := [entry["loss"] for entry in self.history if "loss" in entry]:
            lines[0] += f", loss {losses[0]:.4f} at first and {losses[-1]:.4f} at last"
        if self.best is not None:
            least = min(entry["eval_loss"] for entry in self.history if "eval_loss" in entry)
            lines.append(f"{self.best}: those with the lowest evaluation loss, {least:.4f}")
        if self.skipped:
            lines.append(f"skipped, {len(self.skipped)} in all (see {self.folder / SKIPPED_FILE}):")
            lines += [f"  {entry['path'] or entry['origin']}: {entry['reason']}" for entry in self.skipped[:10]]
            lines += ["  ..."] if len(self.skipped) > 10 else []
        lines.append(f"next: linvt ask {self.folder} VIDEO QUESTION, or linvt merge {self.folder} OUT")
        return "\n".join(lines)


def train(
    settings: TrainingSettings,
    *,
    model: LinVTForConditionalGeneration | None = None,
    processor: LinVTProcessor | None = None,
    data: Dataset | None = None,
    eval_data: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = lambda text: None,
) -> TrainingRun:
    """
    Runs one stage, or takes it up where it was killed.

    Args:
        model, processor: instead of loading `settings.model`. The model is changed in place.
        data, eval_data: instead of reading `settings.data`; samples as `ChatDataset` makes them.
        callbacks: of `transformers.Trainer`, beside the run's own.
        say: told in a sentence what happens; only in the main process.

    Raises `SettingsError` (a `ValueError`) for settings that do not fit each other, the model or an earlier run, and
    what `read_source` raises for data that cannot be used.
    """
    _check_packages(settings)
    if model is not None:
        if processor is None:
            raise SettingsError("A model is given without its processor; pass train(..., processor=processor) too.")
        settings = dataclasses.replace(settings, model=settings.model or model.name_or_path or type(model).__name__)
    settings.check()
    if data is None and not settings.data:
        raise SettingsError("data is missing; say data=FILE or set it in the recipe.")
    for source in settings.data + settings.eval_data:
        source.check_there()  # before the model is loaded, which takes longer
    folder = Path(settings.output)
    args = _arguments(settings, evaluates=bool(settings.eval_data or eval_data is not None))
    main = args.process_index == 0
    say = say if main else lambda text: None
    checkpoint = earlier_run(settings, folder)
    set_seed(settings.seed)  # what is made anew, LinVT or LoRA, is the same in every process
    autocast = _autocast(settings, args)
    if model is None:
        say(f"loading {settings.model}")
        model, processor = load_model(settings, autocast)
    else:
        set_sampling(processor, settings)
    prepare(model, settings)

    skipped = folder / SKIPPED_FILE
    features = None
    if settings.feature_cache is not None or settings.feature_memory:
        features = FeatureCache(settings.feature_cache, memory=settings.feature_memory)
    if data is None:
        say("reading and checking the data")
        data = _dataset(settings, settings.data, processor, skipped, features)
    if eval_data is None and settings.eval_data:
        eval_data = _dataset(settings, settings.eval_data, processor, skipped, features)
    digests = data_digests(settings, data, eval_data)
    if checkpoint is not None:
        check_data(folder, digests)
    args.distributed_state.wait_for_everyone()  # all have looked into the folder
    if main and checkpoint is None:
        begin(settings, folder, digests)
    report = Report(folder / REPORTS)
    trainer = LinVTTrainer(
        model,
        settings=settings,
        processor=processor,
        autocast=autocast,
        args=args,
        data_collator=processor.collate,
        train_dataset=data,
        eval_dataset=eval_data,
        callbacks=[report, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.wait_for_everyone()  # from here on any process may report what it skips
    if features is not None:
        say("computing visual features that are not there yet")
        _fill_features(trainer, [data, eval_data])
    say(count_parameters(model))
    say(_plan(settings, args, data, eval_data, checkpoint))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        report.close()

    trainer.save_model(str(folder))
    best = trainer.state.best_model_checkpoint
    if main and best is not None and Path(best).is_dir():
        copy_adapter(Path(best), folder / "best")
    trainer.accelerator.wait_for_everyone()
    run = TrainingRun(model, processor, folder, folder / "best" if best else None, trainer.state.log_history)
    run.skipped, run.main = read_skipped(skipped), main
    finish(model)
    return run


# ---- the run ----


def _check_packages(settings: TrainingSettings) -> None:
    needed = ["accelerate", "tensorboard", *(["peft"] if settings.lora is not None else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"Training needs {' and '.join(missing)}: pip install 'linvt_hf[train]'.")


def _arguments(settings: TrainingSettings, evaluates: bool) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        # Only DeepSpeed wants to know; for all others LinVTTrainer does it.
        bf16=os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and settings.bf16 is not False,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # a loss that is not a number should be seen
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,  # the best and the last
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the processor gives what the model takes
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # every parameter has a gradient in every batch
        report_to=[],  # Report does
        disable_tqdm=True,
    )
    args.device  # noqa: B018  decides about devices and processes, and only then can the next line hold
    args._n_gpu = 1  # one process a GPU, started by accelerate; never one process for several
    return args


def _autocast(settings: TrainingSettings, args: TrainingArguments) -> bool:
    if settings.bf16 is not None:
        return settings.bf16
    return args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _dataset(settings: TrainingSettings, sources: list, processor, skipped: Path, features) -> ChatDataset:
    return ChatDataset(
        sources,
        processor,
        num_frames=settings.num_frames,
        fps=settings.fps,
        max_length=settings.max_length,
        turns=settings.turns,
        skipped=skipped,
        features=features,
        seed=settings.seed,
    )


def _fill_features(trainer: LinVTTrainer, datasets: list) -> None:
    """Before training, the frozen encoder's features of all videos; each process computes its share."""
    model = trainer.model.to(trainer.args.device)
    workers, rank = trainer.settings.workers, trainer.args.process_index
    with trainer.compute_loss_context_manager():
        for dataset in datasets:
            if getattr(dataset, "features", None) is not None:
                # What is in memory alone no other process sees.
                share = (0, 1) if dataset.features.folder is None else (rank, trainer.args.world_size)
                dataset.features.fill(model, dataset, workers=workers, progress=rank == 0, share=share)
    trainer.accelerator.wait_for_everyone()
    if not trainer.place_model_on_device:  # it will be, in parts
        model.to("cpu")


# ---- what is said ----


def _plan(settings, args: TrainingArguments, data, eval_data, checkpoint: Path | None) -> str:
    batch = settings.batch_size * settings.accumulation * args.world_size
    parts = [f"{len(data):,} samples", f"{batch} a step"]
    if args.world_size > 1:
        parts.append(f"on {args.world_size} processes")
    if eval_data is not None:
        parts.append(f"{len(eval_data):,} for evaluation")
    if checkpoint is not None:
        parts.append(f"going on from {checkpoint.name}")
        if (before := len(list(checkpoint.glob("rng_state*.pth")))) != args.world_size:
            parts.append(f"which {before} processes wrote, so steps and batches are others from here on")
    return ", ".join(parts)


__all__ = ["FREE", "TrainingRun", "train"]
