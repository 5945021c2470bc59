"""
A tiny image-LLM of InternVL's architecture, trained from nothing on the pictures of `shapes`.

It is small enough for two CPU cores because its targets are dense: many questions and a full description a picture,
and, while it trains, a head on its visual tokens that names what lies in each token's part of the picture.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from .questions import PLACES, ask, place_name
from .world import CANVAS, COLOURS, SHAPES, Scene, draw, make_scene

VOCABULARY = 640
PATCH = 8
SIDE = CANVAS // PATCH // 2  # visual tokens a side: InternVL joins 2 x 2 patches
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<IMG_CONTEXT>\n{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that reads any text, and the words of `shapes` as one token each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(NAMED_TOKENS.values())]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,  # room for the video token, and more that somebody may want to add
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=NAMED_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def _words() -> Iterator[str]:
    for kind in ("image", "video", "long"):
        for number in range(400):
            for question in ask(make_scene(kind, "train", number), Random(number)):
                yield from (question.text, question.answer, "user\n", "assistant\n", "system\n")


def build_image_llm(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """An InternVL of about two million parameters: 16 visual tokens a picture of 64 x 64."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": [CANVAS, CANVAS],
            "patch_size": [PATCH, PATCH],
            "norm_type": "layer_norm",
            # For a shallow encoder that starts from nothing; InternVL's own values are for fine-tuning a deep one.
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.06,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=SIDE**2,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


# ---- pretraining ----


@dataclass
class Picture:
    """One training sample: pixels uint8 [64, 64, 3], ids and labels of its conversation, [S]."""

    pixels: np.ndarray
    ids: list[int]
    labels: list[int]
    contents: np.ndarray  # [tokens, colours + shapes], how much of each lies in each token's part


def picture(scene: Scene, random: Random, tokenizer, text: bool = True) -> Picture:
    if not text:
        return Picture(draw(scene, 0), [], [], contents(scene))
    questions = ask(scene, random)
    description = questions.pop()
    random.shuffle(questions)
    # A description alone or last, never first: what follows it could be read off the text instead of the picture.
    turns = random.choice([[description], [*questions[:3], description], [*questions[:3], description], questions[:5]])
    ids, labels = [], []

    def add(text: str, learn: bool = False):
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if learn else [-100] * len(new))

    for index, question in enumerate(turns):
        image = "<img>" + "<IMG_CONTEXT>" * SIDE**2 + "</img>\n" if index == 0 else ""
        add(f"<|im_start|>user\n{image}{question.text}<|im_end|>\n<|im_start|>assistant\n")
        add(f"{question.answer}<|im_end|>", learn=True)
        add("\n")
    return Picture(draw(scene, 0), ids, labels, contents(scene))


def contents(scene: Scene) -> np.ndarray:
    """
    What each visual token should know, 0 or 1, [16, colours * shapes + colours + shapes + places]: which things lie
    in its part of the picture or reach well into it, and by what name their places go.
    """
    part = CANVAS / SIDE
    centers = (np.arange(SIDE) + 0.5) * part
    kinds = np.zeros((SIDE, SIDE, len(COLOURS), len(SHAPES)), dtype=np.float32)
    places = np.zeros((SIDE, SIDE, len(PLACES)), dtype=np.float32)
    for thing in scene.things:
        x, y = thing.start
        reach = part / 2 + 0.35 * thing.radius
        inside = (abs(centers - y) < reach)[:, None] & (abs(centers - x) < reach)
        kinds[inside, list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)] = 1
        places[inside, PLACES.index(place_name(thing.start))] = 1
    each = [kinds.reshape(SIDE, SIDE, -1), kinds.max(axis=3), kinds.max(axis=2), places]
    return np.concatenate(each, axis=-1).reshape(SIDE**2, -1)


class ContentsHead(nn.Linear):
    """Names what lies in each visual token's part of the picture; trains the encoder, and is thrown away after it."""

    def __init__(self, width: int):
        super().__init__(width, len(COLOURS) * len(SHAPES) + len(COLOURS) + len(SHAPES) + len(PLACES))

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:  # [B, 16, D], [B, 16, contents]
        return F.binary_cross_entropy_with_logits(self(tokens), target, reduction="none").sum(dim=-1).mean()


def pretrain(
    vision_steps: int = 2500,
    steps: int = 2000,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerFast]:
    """
    First the vision encoder alone, by what lies where; then all of it, by questions and descriptions. No scene is
    seen twice. About 40 minutes on two CPU cores.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_image_llm(tokenizer)
    head = ContentsHead(model.config.text_config.hidden_size)
    vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    scenes = (make_scene("image", "train", number) for number in itertools.count())
    random = Random(seed)
    model.train()
    _run(
        lambda inputs: head.loss(_features(model, inputs), inputs["contents"]),
        [*vision, *head.parameters()],
        ((picture(scene, random, tokenizer, text=False) for scene in scenes), tokenizer, batch),
        vision_steps,
        rate,
        log,
        "vision",
    )

    def loss(inputs):
        features = _features(model, inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter((inputs["input_ids"] == model.config.image_token_id)[..., None], features)
        # Padding comes last, so causal attention needs no mask.
        answers = model(inputs_embeds=embeds, labels=inputs["labels"]).loss
        return answers + 0.25 * head.loss(features, inputs["contents"])

    _run(
        loss,
        [*model.parameters(), *head.parameters()],
        ((picture(scene, random, tokenizer) for scene in scenes), tokenizer, batch),
        steps,
        rate / 2,
        log,
        "all",
    )
    return model.eval(), tokenizer


def _features(model, inputs) -> Tensor:
    return model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output


def _run(loss_of, parameters, data, steps: int, rate: float, log, name: str) -> None:
    samples, tokenizer, batch = data
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of(collate(list(itertools.islice(samples, batch)), tokenizer))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            log(f"{name} step {step}/{steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s")


def collate(samples: list[Picture], tokenizer) -> dict[str, Tensor]:
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    labels = torch.full((len(samples), length), -100)
    mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(sample.ids), torch.tensor(sample.labels), 1
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "pixel_values": pixels.float() / 127.5 - 1,
        "contents": torch.from_numpy(np.stack([sample.contents for sample in samples])),
    }


@torch.no_grad()
def evaluate(model, tokenizer, scenes: int = 200) -> dict[str, float]:
    """Share of answers that greedy decoding would give word for word, by kind of question."""
    right: dict[str, list[bool]] = {}
    for number in range(scenes):
        scene = make_scene("image", "validation", number)
        samples, kinds = [], []
        for question in ask(scene, Random(number)):
            prompt = (
                "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * SIDE**2 + f"</img>\n{question.text}<|im_end|>\n"
                "<|im_start|>assistant\n"
            )
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer = tokenizer(question.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
            samples.append(Picture(draw(scene, 0), ids + answer, [-100] * len(ids) + answer, contents(scene)))
            kinds.append(question.kind)
        inputs = collate(samples, tokenizer)
        del inputs["contents"]
        labels = inputs.pop("labels")[:, 1:]
        guess = model(**inputs).logits[:, :-1].argmax(-1)
        ok = ((guess == labels) | (labels == -100)).all(dim=1).tolist()
        for kind, one in zip(kinds, ok, strict=True):
            right.setdefault(kind, []).append(one)
    return {kind: round(sum(ones) / len(ones), 3) for kind, ones in right.items()}


def save(model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder in transformers' own layout, with image processor and processor, that `linvt wrap` takes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": CANVAS, "width": CANVAS},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "crop_to_patches": False,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": SIDE**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
