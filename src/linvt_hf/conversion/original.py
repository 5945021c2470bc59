"""`Original`: what converting an image-LLM from its makers' layout takes. A base's module says it for that base."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

# From its module: the name in transformers 5.17 itself asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .checkpoint import Checkpoint
from .rules import Drop, Rule

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Begins a chat template: `words` writes a turn's texts, and in an image's place what `picture` holds.
WORDS = """\
{%- macro words(content, picture) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for block in content -%}
{%- if block['type'] == 'image' -%}{{ picture }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""


class ProcessorParts(NamedTuple):
    """
    What turns texts and images into a base's inputs.

    settings: of the base's processor class, with its name as `processor_class`; None if it has none.
    tokenizer: None where a checkpoint comes without.
    """

    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase | None
    settings: dict | None
    chat_template: str | None


class Original:
    """
    One of the image-LLMs, as it was published. Everything here is read from a checkpoint's config.json, its tensors'
    shapes and its tokenizer files; none of its code is run.
    """

    name: str
    # Ends a turn, and with it an answer.
    end_of_turn: str
    # Whether transformers itself reads the published files.
    native = False

    def claims(self, config: dict) -> bool:
        """Whether a config.json is one of this base."""
        raise NotImplementedError

    def config(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
        raise NotImplementedError

    def rules(self, checkpoint: Checkpoint) -> Iterable[Rule | Drop]:
        raise NotImplementedError

    def tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """The checkpoint's own, with what the model needs added."""
        return self.load_tokenizer(checkpoint)

    @staticmethod
    def load_tokenizer(checkpoint: Checkpoint, **kwargs) -> PreTrainedTokenizerBase:
        """A tokenizer of a kind that transformers knows. kwargs: of its `from_pretrained`."""
        # Without config.json, whose model type transformers would look up in vain.
        with tempfile.TemporaryDirectory() as folder:
            for name in TOKENIZER_FILES:
                if (file := checkpoint.file(name)) is not None:
                    (Path(folder) / name).symlink_to(file.resolve())
            # tokenizer.json as it is: by its class, transformers 5 may make the tokenizer anew, and otherwise.
            whole = checkpoint.file("tokenizer.json") is not None
            kind = PreTrainedTokenizerFast if whole else AutoTokenizer
            tokenizer = kind.from_pretrained(folder, **kwargs)
        settings = checkpoint.json("tokenizer_config.json")
        if settings.get("tokenizer_class", "").startswith("LlamaTokenizer") and settings.get("legacy") is False:
            # The tokenizer that Phi-3's models were trained with writes no blank where a text goes on after a special
            # token; what transformers 5 makes of its files does. The templates write the one at the very beginning.
            tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
        return tokenizer

    def parts(
        self, checkpoint: Checkpoint, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> ProcessorParts:
        raise NotImplementedError

    def stops(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids that end an answer."""
        return [tokenizer.convert_tokens_to_ids(self.end_of_turn)]


def make_image_processor(kind: str, **settings) -> BaseImageProcessor:
    """One of transformers' own, of the class that works here: with torchvision, or with PIL."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "preprocessor_config.json"
        file.write_text(json.dumps({"image_processor_type": kind, **settings}), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def taken(config: dict, *names: str) -> dict:
    """Those of the named fields that a config has."""
    return {name: config[name] for name in names if config.get(name) is not None}


def layers(checkpoint: Checkpoint, prefix: str) -> int:
    """How many numbered layers there are under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in checkpoint.shapes if name.startswith(prefix)})
