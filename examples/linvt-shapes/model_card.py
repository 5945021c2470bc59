"""The model card (README.md) of a folder with a LinVT model, from its config."""

from .configuration_linvt import is_hub_id

CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
tags:
- linvt
- video
- video-question-answering
{base_line}---

# LinVT on {base}

An image-LLM ({base_type}) that reads videos: the Linear Video Tokenizer of LinVT
([arXiv 2412.05185](https://arxiv.org/abs/2412.05185)) condenses the visual tokens of all frames into {tokens} tokens,
guided by the question. Each is a linear combination of the image-LLM's own tokens, with weights that can be asked for.

```python
from transformers import pipeline

answer = pipeline("video-question-answering", model="path/to/this/folder", trust_remote_code=True)
print(answer(video="video.mp4", question="What happens?"))
```

Needs `transformers>=5.17`, `torch`, `einops`, `pillow` and `av` (PyAV), nothing else. `trust_remote_code=True`
runs the Python files of this folder.

| | |
|---|---|
| video tokens a video | {tokens} |
| visual tokens kept by top-k | {selected} |
| bottleneck width | {bottleneck} |
| scoring / aggregation layers | {scoring} / {aggregation} |

## Training

{training}
"""

UNTRAINED = (
    "None yet: the video tokenizer has its initial weights, which pool what is new in the frames, in order. Answers "
    "about videos are the image-LLM's reading of that summary."
)


def model_card(config, training: str | None) -> str:
    """A card in Markdown with Hub metadata. `training`: how LinVT was trained, if that is known."""
    base = config.base_config.name_or_path
    named = is_hub_id(base)
    base = base if named else config.base_config.model_type
    return CARD.format(
        base=base,
        base_line=f"base_model: {base}\n" if named else "",
        base_type=config.base_config.model_type,
        training=training or "Not recorded.",
        tokens=config.num_video_tokens,
        selected=config.num_selected_tokens,
        bottleneck=config.bottleneck_size,
        scoring=config.num_scoring_layers,
        aggregation=config.num_aggregation_layers,
    )
