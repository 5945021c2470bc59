"""
`transformers.Trainer` for a model of which most is frozen: what differs, and only that.

- Parameter groups with rates of their own for LinVT, LoRA and projector.
- Checkpoints are adapter folders with the optimizer's state, not whole models, and complete or not there at all.
- Autocast around float32 LinVT and LoRA on a frozen base in half precision.
- The evaluation loss is the mean over all answers' tokens, however they fall into batches and processes.
- Every epoch is told to the data, also where accelerate does not.
- The batches of a step hold samples of like length (see `StepSampler`).
- Under FSDP2 only the language model's blocks are sharded apart (see `_blocks_apart`).
"""

import contextlib
import json
import math
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter_files import load_weights, save_adapter, saved_parameters, trained_tensors
from .adapters import language_model_blocks, part_of
from .card import training_text
from .labels import IGNORED
from .sampler import StepSampler
from .settings import TrainingSettings

# LinVT's parameters that are no maps: decay would pull every query to the video's start, and forget what is new.
NO_DECAY = ("queries", "centers", "log_widths", "no_text", "novelty_gain")


class LinVTTrainer(Trainer):
    """
    Trainer for `LinVTForConditionalGeneration`.

    Args:
        settings: the run's.
        processor: saved with each checkpoint; its `collate` makes the batches.
        autocast: whether matrices are multiplied in bfloat16.
        kwargs: `Trainer`'s.
    """

    def __init__(self, model, *, settings: TrainingSettings, processor, autocast: bool, **kwargs):
        self.settings, self.processor, self.autocast = settings, processor, autocast
        self.samples = self.tokens = 0  # of this process since `self.since`, padding not counted
        self.since = time.perf_counter()
        super().__init__(model, **kwargs)
        self.add_callback(Epochs())
        vars(model.config).pop("use_cache", None)  # the Trainer notes its own there, and the config is saved

    # ---- what is learned, and how fast ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.settings)
            # One fused kernel a step on a GPU; on a CPU the plain one, whose order of operations does not vary.
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=fused or None)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None) -> StepSampler:
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return StepSampler(data, step, args.seed, epoch=lambda: int(self.state.epoch or 0))

    def compute_loss_context_manager(self):
        # Ours rather than accelerate's, which casts every logit to float32 and, under FSDP2, LinVT to bfloat16.
        stack = super().compute_loss_context_manager()
        if self.autocast and not self.is_deepspeed_enabled:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}  # a cache would only fill memory, and bases warn of it
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.is_deepspeed_enabled and inputs.get("question_ids") is None:
            # It adds gradients up in the order they come. Where one process has none for LinVT, or has them earlier,
            # those of different parameters would be added up, and nobody would notice.
            raise ValueError(
                "A batch holds no video with a question, and DeepSpeed needs one in every batch of every process; "
                "leave texts and images out of the data, or use ddp.yaml or fsdp2.yaml, which take any batch."
            )
        self.samples += len(inputs["input_ids"])
        self.tokens = self.tokens + inputs["attention_mask"].sum()  # a tensor: nobody waits for the GPU
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted over every parameter of the base in every step, and nobody asks for it

    # ---- evaluation ----

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluated = [0.0, 0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self._sums(*self._evaluated)
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs["labels"] = inputs["labels"].clone()
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # the last batches are filled up with the first samples
            labels[max(state.remainder - self.args.process_index * self.args.eval_batch_size, 0) :] = IGNORED
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**inputs, use_cache=False, num_items_in_batch=1).loss  # the sum, not the mean
        tokens = (labels[:, 1:] != IGNORED).sum()
        self._evaluated = [self._evaluated[0] + float(total), self._evaluated[1] + int(tokens)]
        return total / tokens.clamp(min=1), None, None

    # ---- what is reported ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            samples, tokens = self._sums(self.samples, int(self.tokens))
            seconds = max(now - self.since, 1e-9)
            logs["samples_per_second"], logs["tokens_per_second"] = samples / seconds, tokens / seconds
            groups = self.optimizer.param_groups  # the schedule scales them all alike
            for group in groups:
                share = group["initial_lr"] / groups[0]["initial_lr"]
                logs[f"learning_rate/{group['name'].split('/')[0]}"] = logs["learning_rate"] * share
            self.samples, self.tokens, self.since = 0, 0, now
        super().log(logs, start_time)

    def _sums(self, *counts: float) -> list[float]:
        """Over all processes; in one, without its device, which may have no float64."""
        if self.args.world_size == 1:
            return list(counts)
        counts = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(counts, reduction="sum").tolist()

    def train(self, *args, **kwargs):
        self.since = time.perf_counter()  # features may have been computed since this trainer was made
        self.model.training_text = None  # until something is saved
        return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        before = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.since += time.perf_counter() - before  # evaluating is not training slowly
        return metrics

    def _determine_best_metric(self, metrics, trial) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or best  # else its weights would be lost
        return best

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every process must call this: sharded parameters are gathered."""
        model = self._unwrapped()
        with self._gathered():
            tensors = trained_tensors(model)
        model.training_text = training_text(self.settings, self._facts())
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_adapter(model, folder, self.processor, tensors=tensors, training=model.training_text)

    def _facts(self) -> dict[str, str]:
        """The run so far, for the model card."""
        settings, losses = self.settings, [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        batch = settings.batch_size * settings.accumulation * self.args.world_size
        facts = {"steps": f"{self.state.global_step} of {self.state.max_steps}", "samples a step": str(batch)}
        if losses:
            facts["training loss"] = f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"
        if self.state.best_metric is not None:
            facts["lowest evaluation loss"] = f"{self.state.best_metric:.4f} at step {self.state.best_global_step}"
        facts["software"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return facts

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The Trainer would write the frozen base too.
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next: where it stands, all that every process had to write is there.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self._unwrapped(), resume_from_checkpoint)

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @contextlib.contextmanager
    def _gathered(self):
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None) if self.is_deepspeed_enabled else None
        if plugin is None or plugin.zero_stage != 3:
            yield
        else:
            import deepspeed

            with deepspeed.zero.GatheredParameters(saved_parameters(self._unwrapped())):
                yield

    # ---- several processes ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError("Only FSDP2 is supported; set fsdp_version: 2 in the configuration of accelerate.")
            plugin.transformer_cls_names_to_wrap = [type(language_model_blocks(self.model.base)[1][0]).__name__]
            plugin.mixed_precision_policy = None  # autocast does it, and LinVT stays float32

    def _prepare_for_training(self, *args, **kwargs):
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        # Blocks are gathered again when gradients come back through them. Those of words alone would have none to
        # bring back, and the other processes would wait.
        self.model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_(True))
        with _blocks_apart(self.model):
            return super()._prepare_for_training(*args, **kwargs)


@contextlib.contextmanager
def _blocks_apart(model: nn.Module):
    """
    Makes accelerate shard the language model's blocks one by one and everything else as one group.

    Each group is gathered whenever its module runs, by all processes together. The blocks run once a batch in every
    process. The vision tower runs once a chunk of frames, the tokenizer once a shape of video, the embeddings once
    more for questions: apart, they would make the processes wait for each other for ever when batches differ.
    Accelerate takes embeddings and head apart unless it finds none.
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict]:
    """Groups for the optimizer, "linvt", "lora" and "projector", each split by whether weight decay applies."""
    rates = {
        "linvt": settings.learning_rate,
        "lora": settings.lora_learning_rate or settings.learning_rate,
        "projector": settings.projector_learning_rate or settings.learning_rate,
    }
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        for own, _ in module.named_parameters(recurse=False)
    }
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name).lower()
        last = name.rpartition(".")[2]
        decays = last != "bias" and name not in norms and last not in NO_DECAY
        key = part if decays else f"{part}/no_decay"
        decay = settings.weight_decay if decays else 0.0
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rates[part], "weight_decay": decay})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run. One that was being written when the run was killed does not count."""
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
    return max(found)[1] if found else None


class Epochs(TrainerCallback):
    """
    Tells the data which epoch it is, which decides what part of a source with a fractional weight is used. accelerate
    does so in one process, but neither in several nor in the epoch in which a run is taken up again.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class Report(TrainerCallback):
    """A bar on a terminal, else a line a report; and every number to TensorBoard."""

    def __init__(self, folder: Path):
        self.folder, self.bar, self.writer = folder, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm.auto import tqdm

        # Steps after the last checkpoint are taken again; their first record must not stand beside the second.
        self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=None
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is None:
            return
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                tag = name if "/" in name or "eval" in name else f"train/{name}"
                self.writer.add_scalar(tag, value, state.global_step)
        if "loss" in logs:
            text = f"loss {logs['loss']:.4f}  rate {logs['learning_rate']:.2e}"
            text += f"  {logs['samples_per_second']:.1f} samples/s"
            if self.bar.disable:
                print(f"step {state.global_step}/{state.max_steps}  {text}", flush=True)
            else:
                self.bar.set_postfix_str(text)
        elif "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}  evaluation loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Also for a run that does not come to its end: what was reported so far is kept."""
        if self.writer is not None:
            self.bar.close()
            self.writer.close()


__all__ = ["Epochs", "LinVTTrainer", "Report", "last_checkpoint", "parameter_groups"]
