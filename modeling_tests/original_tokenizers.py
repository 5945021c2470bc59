"""Toy tokenizers in the published kinds of files (byte-level BPE and sentencepiece), and the ids they give a text."""

import json
import re
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import sentencepiece
from original_parts import IMAGE, write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

WORDS = ["Ġthe", "Ġis", "Ġa", "ing", "user", "ant", "Ġimage", "Ġwhat", "ĊĊ"]
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen2": _SPLIT.replace("DIGITS", r"\p{N}"), "llama3": _SPLIT.replace("DIGITS", r"\p{N}{1,3}")}
PIECES = 320
CORPUS = "what is the image? the user is asking a question. a curious user and an assistant, the answer is the image. "
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def special(*contents: str, rstrip: bool = False) -> list[AddedToken]:
    return [AddedToken(content, rstrip=rstrip, normalized=False, special=True) for content in contents]


def qwen_tokens() -> list[AddedToken]:
    """Qwen2.5's and Qwen2-VL's special tokens, at 151643 and on in the published vocabularies."""
    marks = [f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad", "vision") for side in ("start", "end")]
    pads = ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    return special("<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks, *pads)


def write_settings(folder: Path, added: dict[int, AddedToken], settings: dict, *, later: int = 0) -> None:
    """tokenizer_config.json, special_tokens_map.json, and added_tokens.json with the added ids from `later` on."""
    decoder = {str(id_): {flag: getattr(token, flag) for flag in FLAGS} for id_, token in added.items()}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, **settings})
    write_json(folder / "added_tokens.json", {token.content: id_ for id_, token in added.items() if id_ >= later})
    named = ("additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token")
    write_json(folder / "special_tokens_map.json", {name: settings[name] for name in named if settings.get(name)})


def read_settings(folder: Path) -> tuple[dict[int, AddedToken], dict]:
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {int(id_): AddedToken(**token) for id_, token in settings["added_tokens_decoder"].items()}, settings


# Byte-level BPE ------------------------------------------------------------------------------------------------------


def byte_level_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every byte, and what the merges make that spell WORDS from left to right."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary[word[: end + 1]] = len(vocabulary)
    return vocabulary, merges


def byte_level_ids(contents: list[str]) -> dict[str, int]:
    """The ids of tokens that follow the byte-level vocabulary."""
    first = len(byte_level_vocabulary()[0])
    return {content: first + index for index, content in enumerate(contents)}


def byte_level(kind: str, vocabulary: dict, merges: list, added: list[AddedToken], bos: str | None) -> Tokenizer:
    """`kind` names how text is split before merging: as GPT-2 (and Phi), Qwen2 or Llama 3 do; `bos` opens a text."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama3"))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "gpt2")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    if bos is not None:
        opening = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, opening])
    return tokenizer


def write_byte_level(
    folder: Path,
    kind: str,
    added: list[AddedToken],
    settings: dict,
    *,
    fast: bool = True,
    slow: bool = True,
    bos: str | None = None,
    in_vocabulary: int = 0,
) -> None:
    """tokenizer.json for the fast class, vocab.json and merges.txt for the slow one, and the settings of both.

    The first `in_vocabulary` added tokens stand in vocab.json too, as `<|endoftext|>` does for GPT-2 and Phi.
    """
    vocabulary, merges = byte_level_vocabulary()
    ids = byte_level_ids([token.content for token in added])
    vocabulary |= dict(list(ids.items())[:in_vocabulary])
    if fast:
        byte_level(kind, vocabulary, merges, added, bos).save(str(folder / "tokenizer.json"))
    if slow:
        write_json(folder / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_settings(folder, {ids[token.content]: token for token in added}, settings, later=len(vocabulary))


def read_byte_level(folder: Path) -> Tokenizer:
    """From tokenizer.json, or as the slow class reads vocab.json, merges.txt and the added tokens."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    added, settings = read_settings(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    kind = "qwen2" if settings["tokenizer_class"] == "Qwen2Tokenizer" else "gpt2"
    return byte_level(kind, vocabulary, [tuple(line.split(" ")) for line in lines], list(added.values()), None)


def in_chunks(tokenizer: Tokenizer, text: str, counts: list[int]) -> list[int]:
    """LLaVA's way: what stands between the `<image>` is tokenized alone, and IMAGE stands `count` times at each."""
    chunks = [tokenizer.encode(chunk).ids for chunk in text.split("<image>")]
    ids = chunks[0]
    for count, chunk in zip(counts, chunks[1:], strict=True):
        ids = ids + [IMAGE] * count + chunk
    return ids


# sentencepiece -------------------------------------------------------------------------------------------------------


def train_sentencepiece(
    *, dummy_prefix: bool, symbols: list[str] = (), last: list[str] = (), bos: str = "<s>", eos: str = "</s>"
) -> bytes:
    """A model with every byte; `symbols` follow the control pieces, `last` are put at the end of the vocabulary."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS, CORPUS[::-1]]),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=list(symbols),
        bos_piece=bos,
        eos_piece=eos,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue() + b"".join(_user_defined_piece(piece) for piece in last)


def _user_defined_piece(text: str) -> bytes:
    """One more `pieces` entry of a serialized ModelProto: its text (field 1), score (2) and type USER_DEFINED (3)."""
    content = text.encode()
    piece = b"\x0a" + bytes([len(content)]) + content + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return b"\x0a" + bytes([len(piece)]) + piece


@dataclass
class SlowTokenizer:
    """transformers 4's way with a sentencepiece file: text is cut at the added tokens, what lies between is encoded.

    InternLM2's class and Llama's legacy one give each piece of text to the model as it is. Llama's later one keeps the
    model from putting a space before every piece and puts one before the whole text, which it takes away again only if
    one of the tokens that are special by name (`named`) follows.
    """

    model: sentencepiece.SentencePieceProcessor
    added: dict[int, AddedToken]
    bos: list[int]
    legacy: bool
    named: list[str]

    @classmethod
    def read(cls, folder: Path) -> "SlowTokenizer":
        added, settings = read_settings(folder)
        serialized = (Path(folder) / "tokenizer.model").read_bytes()
        legacy = settings.get("legacy", True)
        if not legacy:
            serialized += b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false, over what it says
        model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        bos = [model.bos_id()] if settings.get("add_bos_token", True) else []
        named = [settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")]
        return cls(model, added, bos, legacy, named + settings.get("additional_special_tokens", []))

    def encode(self, text: str) -> list[int]:
        tokens = {token.content: (id_, token) for id_, token in self.added.items()}
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        parts = re.split(f"({'|'.join(longest_first)})", text)
        if not self.legacy and not (parts[0] == "" and parts[1:] and parts[1] in self.named):
            parts[0] = "\u2581" + parts[0]
        ids = list(self.bos)
        for before, part in zip([None, *parts], parts, strict=False):
            if part in tokens:
                ids.append(tokens[part][0])
            else:
                strips = before in tokens and tokens[before][1].rstrip
                ids += self.model.encode(part.lstrip() if strips else part)
        return ids
