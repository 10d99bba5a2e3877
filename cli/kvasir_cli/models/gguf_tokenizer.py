"""The vocabulary in a GGUF file's metadata, and which of its tokens end an answer."""

from collections.abc import Sequence

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import GgufFile
from kvasir_cli.models.tokenizer_json import (
    PRE_TOKENIZERS,
    AddedToken,
    PreTokenizer,
    SentencePiece,
    Vocabulary,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.cpp's token types
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
)
"""Texts of added tokens that end an answer, as llama.cpp knows them too."""
MERGES_MAX = 1 << 23


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises:
        RefusedError: a kind of tokenizer that cannot be rebuilt; it says which.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.integers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise RefusedError(f"{file.path}: its tokenizer has {len(types)} types of {len(tokens)}")
    kind, merges, adds_bos = _pieces_or_bytes(file, tokens, types)

    def named(key: str) -> str | None:
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if 0 <= token_id < len(tokens):
            return tokens[token_id]
        is_needed = key == "unknown" and UNKNOWN in types
        return tokens[types.index(UNKNOWN)] if is_needed else None

    return Vocabulary(
        tokens={token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
        merges=merges,
        added=[
            AddedToken(i, token, special=types[i] == CONTROL)
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, USER_DEFINED)
        ],
        pre_tokenizer=kind,
        bos=named("bos"),
        eos=named("eos"),
        pad=named("padding"),
        unknown=named("unknown"),
        bos_is_added=file.get("tokenizer.ggml.add_bos_token", bool, adds_bos),
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
        context_length=file.need(f"{file.architecture}.context_length", int),
    )


def end_token_ids(file: GgufFile, vocabulary: Vocabulary) -> list[int]:
    """The tokens that end an answer, the model's own end token first."""
    ids = [vocabulary.tokens[vocabulary.eos]] if vocabulary.eos in vocabulary.tokens else []
    turn_end = file.get("tokenizer.ggml.eot_token_id", int, -1)
    ids += [turn_end] if turn_end >= 0 else []
    ids += [token.token_id for token in vocabulary.added if token.content in ENDS]
    return list(dict.fromkeys(ids))


def _pieces_or_bytes(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> tuple[PreTokenizer | SentencePiece, list[tuple[str, str]], bool]:
    """How text is cut, the merges, and whether llama.cpp puts BOS before text by itself."""
    kind = file.need("tokenizer.ggml.model", str)
    if kind == "llama":
        if UNKNOWN not in types and "tokenizer.ggml.unknown_token_id" not in file.fields:
            raise RefusedError(f"{file.path}: its tokenizer has no unknown token")
        pieces = SentencePiece(file.get("tokenizer.ggml.add_space_prefix", bool, True))
        return pieces, _merges_of_pieces(file, tokens, types), True
    if kind != "gpt2":
        raise RefusedError(
            f"{file.path}: tokenizer type {kind!r} is not supported (only `gpt2`, byte-level BPE, "
            "and `llama`, BPE of SentencePiece)"
        )
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise RefusedError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported "
            f"(supported: {', '.join(PRE_TOKENIZERS)})"
        )
    merges = [_pair(file, text) for text in file.strings("tokenizer.ggml.merges")]
    return PRE_TOKENIZERS[pre], merges, pre in ("llama-bpe", "llama3")


def _merges_of_pieces(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: so every way to cut a
    piece into two pieces is a merge, and the pieces' scores are their order."""
    scores = file.floats("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise RefusedError(f"{file.path}: its tokenizer has {len(scores)} scores of {len(tokens)}")
    ids = {
        token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED) and token
    }
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(found, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        if len(merges) > MERGES_MAX:
            raise RefusedError(f"{file.path}: its tokenizer needs more than {MERGES_MAX} merges")
    return merges


def _pair(file: GgufFile, text: str) -> tuple[str, str]:
    left, separator, right = text.partition(" ")
    if not separator:
        raise RefusedError(f"{file.path}: a merge of its tokenizer has one part: {text!r}")
    return left, right
