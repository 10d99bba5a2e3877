"""The vocabulary in a GGUF file's metadata, and which of its tokens end an answer."""

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import GgufFile
from kvasir_cli.models.tokenizer_json import PRE_TOKENIZERS, AddedToken, Vocabulary

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # llama.cpp's token types
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>")
"""Texts of control tokens that end an answer, as llama.cpp knows them too."""


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises:
        RefusedError: a kind of tokenizer that cannot be rebuilt; it says which.
    """
    kind = file.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise RefusedError(
            f"{file.path}: tokenizer type {kind!r} is not supported (only byte-level BPE, `gpt2`)"
        )
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise RefusedError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported "
            f"(supported: {', '.join(PRE_TOKENIZERS)})"
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.integers("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [_pair(file, text) for text in file.strings("tokenizer.ggml.merges")]

    def named(key: str) -> str | None:
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        return tokens[token_id] if 0 <= token_id < len(tokens) else None

    return Vocabulary(
        tokens={token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
        merges=merges,
        added=[
            AddedToken(i, token, special=types[i] == CONTROL)
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, USER_DEFINED)
        ],
        pre_tokenizer=PRE_TOKENIZERS[pre],
        bos=named("bos"),
        eos=named("eos"),
        pad=named("padding"),
        unknown=named("unknown"),
        bos_is_added=file.get("tokenizer.ggml.add_bos_token", bool, pre in ("llama-bpe", "llama3")),
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
        context_length=file.need(f"{file.architecture}.context_length", int),
    )


def end_token_ids(file: GgufFile, vocabulary: Vocabulary) -> list[int]:
    """The tokens that end an answer, the model's own end token first."""
    ids = [vocabulary.tokens[vocabulary.eos]] if vocabulary.eos in vocabulary.tokens else []
    turn_end = file.get("tokenizer.ggml.eot_token_id", int, -1)
    ids += [turn_end] if turn_end >= 0 else []
    ids += [token.token_id for token in vocabulary.added if token.special and token.content in ENDS]
    return list(dict.fromkeys(ids))


def _pair(file: GgufFile, text: str) -> tuple[str, str]:
    left, separator, right = text.partition(" ")
    if not separator:
        raise RefusedError(f"{file.path}: a merge of its tokenizer has one part: {text!r}")
    return left, right
