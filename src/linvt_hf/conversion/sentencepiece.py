"""A sentencepiece model, of InternLM2's kind, as a fast tokenizer."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

# Words, blanks, digits, signs, and a character that no model has.
_PROBE = "Where is the  red ball?\nIt's at 12:30, (left) of x_1 — 左边的红球。 🂡"


def tokenizer_of_pieces(file: Path, settings: dict, **more) -> PreTrainedTokenizerFast:
    """
    Args:
        file: a sentencepiece model of type BPE, whose bytes are pieces too.
        settings: what tokenizer_config.json says: added tokens with their ids, which are special, and whether, as with
            Llama's `legacy`, a blank goes before every piece of text between special tokens.
        more: arguments of `PreTrainedTokenizerFast`.

    Raises `ImportError` without the sentencepiece package, `ValueError` if the fast tokenizer does not give what
    sentencepiece does.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"{file} needs the sentencepiece package: pip install 'linvt_hf[convert]'.") from error

    pieces = SentencePieceProcessor(model_file=str(file))
    added = {int(index): dict(token) for index, token in settings.get("added_tokens_decoder", {}).items()}
    # Some added tokens have taken the place of a piece that was kept free for that.
    names = [pieces.id_to_piece(index) for index in range(len(pieces))]
    names = [added[index]["content"] if index in added else name for index, name in enumerate(names)]
    vocabulary = {name: index for index, name in enumerate(names)}
    plain = {
        piece: pieces.get_score(index)
        for piece, index in vocabulary.items()
        if index not in added and not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
    }
    # The better a piece's score, the earlier its two halves are joined.
    merges = generate_merges({**vocabulary}, plain)
    unknown = pieces.id_to_piece(pieces.unk_id())
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Whether a blank is put before every text, and so, in transformers 4, after every special token.
    blank = pieces.encode("a", out_type=str)[0].startswith("▁")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if blank and settings.get("legacy", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
    strip = [decoders.Strip(" ", 1, 0)] if blank else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    probe = _PROBE if settings.get("legacy", True) or not blank else f" {_PROBE}"
    if tokenizer.encode(probe).ids != pieces.encode(_PROBE):
        raise ValueError(f"{file} holds a kind of sentencepiece model that cannot be made a fast tokenizer.")

    tokenizer.add_tokens([AddedToken(token.pop("content"), **token) for _, token in sorted(added.items())])
    names = {
        name: _content(settings[f"{name}_token"])
        for name in ("bos", "eos", "unk", "pad")
        if settings.get(f"{name}_token")
    }
    if settings.get("add_bos_token", True):
        bos = names.get("bos", pieces.id_to_piece(pieces.bos_id()))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}, **more
    )


def _content(token: str | dict) -> str:
    return token if isinstance(token, str) else token["content"]
