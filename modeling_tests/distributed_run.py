"""
One process of several on CPUs: `python -m torch.distributed.run ... distributed_run.py KIND RECIPE...`, one run after
another. An argument `aside:FOLDER` puts a checkpoint where the next run does not find it.

accelerate knows FSDP and DeepSpeed on accelerators only. With KIND "fsdp2", "zero2" or "zero3" this tells it that the
CPUs are one; all that comes after, its own preparation of the model, the sharding, saving and loading, is what runs on
GPUs.
"""

import os
import sys

kind, *arguments = sys.argv[1:]
os.environ["ACCELERATE_USE_CPU"] = "true"
if kind != "ddp":
    import yaml
    from accelerate import state

    use, prefix = ("FSDP", "") if kind == "fsdp2" else ("DEEPSPEED", "ACCELERATE_DEEPSPEED_")
    with open(os.environ["ACCELERATE_CONFIG"], encoding="utf-8") as file:
        config = yaml.safe_load(file)[f"{use.lower()}_config"]
    os.environ[f"ACCELERATE_USE_{use}"] = "true"
    for name, value in config.items():  # as `accelerate launch` hands its configuration on
        os.environ[prefix + name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    plain = state.AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if fsdp_plugin is None and deepspeed_plugin is None:
            return
        if deepspeed_plugin is not None:
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.DistributedType[use]
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = with_plugin

from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from linvt_hf.training import read_settings, train  # noqa: E402

torch.set_num_threads(1)
for argument in arguments:
    if argument.startswith("aside:"):
        folder = Path(argument.removeprefix("aside:"))
        if int(os.environ["RANK"]) == 0:
            folder.rename(folder.parent / f"aside-{folder.name}")
        torch.distributed.barrier()
        continue
    run = train(read_settings(argument))
    if run.main and kind == "fsdp2":
        from torch.distributed.fsdp import FSDPModule

        sharded = {type(module).__name__ for module in run.model.modules() if isinstance(module, FSDPModule)}
        print("sharded:", sorted(sharded))
torch.distributed.destroy_process_group()
