"""Qwen2-VL from Qwen/Qwen2-VL-*-Instruct: transformers reads it as it is; here its names become transformers' own."""

from transformers import Qwen2VLConfig

from .original import AutoImageProcessor, Original, ProcessorParts
from .rules import Rule


class Qwen2VL(Original):
    name = "Qwen2-VL"
    end_of_turn = "<|im_end|>"
    native = True

    def claims(self, config):
        return config.get("model_type") == "qwen2_vl"

    def config(self, checkpoint, tokenizer):
        return Qwen2VLConfig.from_dict(checkpoint.config)

    def rules(self, checkpoint):
        # Folders that transformers 5 saved itself have the new names already.
        return (
            Rule("model.visual.{rest*}", "model.visual.{rest*}"),
            Rule("model.language_model.{rest*}", "model.language_model.{rest*}"),
            Rule("visual.{rest*}", "model.visual.{rest*}"),
            Rule("model.{rest*}", "model.language_model.{rest*}"),
            Rule("lm_head.weight", "lm_head.weight"),
        )

    def parts(self, checkpoint, config, tokenizer):
        template = checkpoint.json("chat_template.json").get("chat_template")
        if (file := checkpoint.file("chat_template.jinja")) is not None:
            template = file.read_text(encoding="utf-8")
        return ProcessorParts(
            AutoImageProcessor.from_pretrained(checkpoint.folder),
            tokenizer,
            {"processor_class": "Qwen2VLProcessor"},
            template or (tokenizer and tokenizer.chat_template),
        )

    def stops(self, tokenizer):
        return tokenizer.convert_tokens_to_ids([self.end_of_turn, "<|endoftext|>"])
