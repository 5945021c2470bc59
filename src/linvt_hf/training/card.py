"""Model cards of trained models: what a run was made of, as Markdown with the Hub's metadata."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_linvt import is_hub_id

if TYPE_CHECKING:
    from .settings import TrainingSettings

CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
tags:
- linvt
- video
- video-question-answering
- adapter
{lora_tag}{base_lines}---

# LinVT adapters for {base}

The trained parts of a LinVT model ([arXiv 2412.05185](https://arxiv.org/abs/2412.05185)), which lets an image-LLM read
videos: {parts}. The image-LLM itself is not in here{named}.
Needs the package `linvt_hf`:

```python
from linvt_hf.training import load_adapter, merge

model, processor = load_adapter("path/to/this/folder")
merge(model).save_pretrained("whole-model", processor=processor)  # one folder that needs no package
```

```bash
linvt ask path/to/this/folder video.mp4 "What happens?"
linvt merge path/to/this/folder whole-model
```

## Training

{training}
"""


def adapter_card(config, origin: dict, lora: bool, training: str | None) -> str:
    """The card of a folder of adapters. `origin`: its base's name on the Hub, if it has one, and revision."""
    hub, made_from = origin["base_model"], config.base_config.name_or_path
    revision = f" (revision `{origin['revision']}`)" if origin["revision"] else ""
    named = f"; it is `{hub}`{revision}" if hub else ""
    if not hub and is_hub_id(made_from):
        hub, named = made_from, f"; it is, or was made from, `{made_from}`"
    lines = f"base_model: {hub}\nbase_model_relation: adapter\n" if hub else ""
    return CARD.format(
        base=hub or config.base_config.model_type,
        base_lines=lines,
        lora_tag="- lora\n" if lora else "",
        parts="the video tokenizer" + (" and a LoRA on its language model" if lora else ""),
        named=named,
        training=training or "Not recorded.",
    )


def training_text(settings: "TrainingSettings", facts: dict[str, str]) -> str:
    """A run in Markdown: `facts` (steps, losses, counts), then its settings as a recipe."""
    import yaml

    values = settings.to_dict()
    for name in ("output", "resume", "workers", "feature_cache", "feature_memory", "log_every", "save_every"):
        values.pop(name)  # of the machine, not of the model
    for name in ("model", "base"):
        if not is_hub_id(values[name] or ""):
            values[name] = None
    for source in values["data"] + values["eval_data"]:
        source["path"] = Path(source["path"]).name
        source.pop("media", None)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    recipe = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"| | |\n|---|---|\n{rows}\n\nSettings:\n\n```yaml\n{recipe}```"
