"""A sentencepiece model, of InternLM2's kind, as a fast tokenizer."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

# Words, blanks, digits, signs, and a character that no model has.
_PROBE = "Where is the  red ball?\nIt's at 12:30, (left) of x_1 — 左边的红球。 🂡"


def tokenizer_of_pieces(file: Path, settings: dict) -> PreTrainedTokenizerFast:
    """
    Args:
        file: a sentencepiece model of type BPE, whose bytes are pieces too.
        settings: what tokenizer_config.json says: added tokens with their ids, and which are special.

    Raises `ImportError` without the sentencepiece package, `ValueError` if the fast tokenizer does not give what
    sentencepiece does.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"{file} needs the sentencepiece package: pip install 'linvt_hf[convert]'.") from error

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(index): index for index in range(len(pieces))}
    plain = {
        piece: pieces.get_score(index)
        for piece, index in vocabulary.items()
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
    }
    # The better a piece's score, the earlier its two halves are joined.
    merges = generate_merges({**vocabulary}, plain)
    unknown = pieces.id_to_piece(pieces.unk_id())
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    leading_blank = pieces.encode("a", out_type=str)[0].startswith("▁")
    blanks = [normalizers.Prepend("▁")] if leading_blank else []
    tokenizer.normalizer = normalizers.Sequence([*blanks, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if leading_blank else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if tokenizer.encode(_PROBE).ids != pieces.encode(_PROBE):
        raise ValueError(f"{file} holds a kind of sentencepiece model that cannot be made a fast tokenizer.")

    added = sorted((int(index), token) for index, token in settings.get("added_tokens_decoder", {}).items())
    tokenizer.add_tokens([AddedToken(token.pop("content"), **token) for _, token in _copied(added)])
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
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


def _copied(added: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    return [(index, dict(token)) for index, token in added]


def _content(token: str | dict) -> str:
    return token if isinstance(token, str) else token["content"]
