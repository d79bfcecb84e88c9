"""A tokenizer from GGUF metadata (the `tokenizer.ggml.*` keys of the GGUF specification), with llama.cpp's ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from tinyllm.errors import TokenizerError
from tinyllm.tokenization.byte_level import CHAR_OF_BYTE, spelled_bytes
from tinyllm.tokenization.parts import TokenizerParts, tokenizer_errors, words
from tinyllm.tokenization.pretokenizers import PreTokenizer, pre_tokenizer
from tinyllm.tokenization.sentencepiece import SPACE, SentencePieceBPE

__all__ = ["parts_from_gguf"]

_PREFIX = "tokenizer.ggml."
_MAX_TOKENS = 1 << 22

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Tokens that end a turn or a text, by the names that models give them: many files name only one of theirs as eos.
_END_NAMES = words(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] "
    "[EOS] <|end_of_text|> <end_of_utterance> <eos> <\uff5cend\u2581of\u2581sentence\uff5c> <|fim_pad|> <fim-pad> "
    "<fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>"
)
# Other tokens that are markers even in a file that calls them normal text.
_MARKER_NAMES = words(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim\u2581begin\uff5c> <PRE> \u2581<PRE> <|fim_suffix|> "
    "<fim-suffix> <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF> <|fim_middle|> <fim-middle> <fim_middle> "
    "<\uff5cfim\u2581end\uff5c> <MID> \u2581<MID>"
)


def parts_from_gguf(metadata: Mapping[str, Any]) -> TokenizerParts | None:
    """Builds the tokenizer that a GGUF file describes; None when it describes none.

    Raises TokenizerError when the description is damaged or of a kind that tinyllm does not know.
    """
    model = metadata.get(_PREFIX + "model")
    if model is None or model in ("none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise TokenizerError(f"the GGUF tokenizer model {str(model)[:64]!r} is not supported; gpt2 and llama are")
    tokens = _tokens(metadata)
    types = _token_types(metadata, tokens)
    return _byte_level_bpe(metadata, tokens, types) if model == "gpt2" else _sentencepiece(metadata, tokens, types)


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> TokenizerParts:
    pre = pre_tokenizer(_get(metadata, "pre", str, "default"))
    encode_text = _bpe_encoder(tokens, _merges(metadata), pre)
    verbatim = (_CONTROL, _USER_DEFINED, _UNKNOWN)

    def token_bytes(index: int) -> bytes:
        token = tokens[index]
        return token.encode() if types[index] in verbatim else spelled_bytes(token)

    def encode_fragments(fragments: list[str | int]) -> list[int]:
        ids: list[int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += encode_text(fragment)
        return ids

    return _assemble(metadata, tokens, types, encode_fragments, token_bytes, add_bos=pre.add_bos)


def _bpe_encoder(tokens: list[str], merges: list[tuple[str, str]], pre: PreTokenizer) -> Callable[[str], list[int]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    # A byte without a token leaves no id behind, but still keeps its neighbours from merging: it gets an id past the
    # end of the vocabulary, which is taken out again.
    missing, missing_token = len(tokens), "\x00"  # U+0000 is no character of the byte alphabet
    drops_bytes = any(char not in vocab for char in CHAR_OF_BYTE.values())
    unknown = {}
    if drops_bytes:
        if missing_token in vocab:
            raise TokenizerError("the GGUF vocabulary has a token U+0000 but not a token for every byte")
        vocab[missing_token] = missing
        unknown = {"unk_token": missing_token}
    with tokenizer_errors("the GGUF tokenizer cannot be built"):
        library = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges, **unknown))
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(text: str) -> list[int]:
        with tokenizer_errors("the text cannot be encoded"):
            ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return [index for index in ids if index != missing] if drops_bytes else ids

    return encode


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> TokenizerParts:
    scores = _numbers(metadata, "scores", len(tokens), "f")
    if np.isnan(scores).any():
        raise TokenizerError("tokenizer.ggml.scores has a NaN")
    byte_of_id = {index: _byte(tokens[index]) for index, kind in enumerate(types) if kind == _BYTE}
    ids = {token: index for index, token in enumerate(tokens)}
    byte_ids = [ids.get(f"<0x{byte:02X}>", ids.get(chr(byte), -1) if byte < 0x80 else -1) for byte in range(256)]
    unknown_id = _token_id(metadata, "unknown_token_id", len(tokens), 0)
    bpe = SentencePieceBPE(tokens, scores.astype(np.float32).tolist(), byte_ids, unknown_id)
    add_space_prefix = _get(metadata, "add_space_prefix", bool, True)
    verbatim = (_CONTROL, _USER_DEFINED, _UNKNOWN)

    def token_bytes(index: int) -> bytes:
        if index in byte_of_id:
            return bytes([byte_of_id[index]])
        token = tokens[index]
        return (token if types[index] in verbatim else token.replace(SPACE, " ")).encode()

    def encode_fragments(fragments: list[str | int]) -> list[int]:
        output: list[int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                output.append(fragment)
            else:  # at the start or after a special token, for there is no other text between these
                output += bpe.encode(" " + fragment if add_space_prefix else fragment)
        return output

    return _assemble(
        metadata,
        tokens,
        types,
        encode_fragments,
        token_bytes,
        add_bos=True,
        default_bos=1,
        default_eos=2,
        strips_leading_space=add_space_prefix,
    )


def _assemble(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    encode_fragments: Callable[[list[str | int]], list[int]],
    token_bytes: Callable[[int], bytes],
    *,
    add_bos: bool,
    default_bos: int | None = None,
    default_eos: int | None = None,
    strips_leading_space: bool = False,
) -> TokenizerParts:
    size = len(tokens)
    bos = _token_id(metadata, "bos_token_id", size, default_bos)
    eos = _token_id(metadata, "eos_token_id", size, default_eos)
    prefix = [bos] if _get(metadata, "add_bos_token", bool, add_bos) and bos is not None else []
    suffix = [eos] if _get(metadata, "add_eos_token", bool, False) and eos is not None else []
    find_special = SpecialTokens(
        {tokens[i]: i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)}
    ).partition

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = encode_fragments(find_special(text))
        return [*prefix, *ids, *suffix] if add_special_tokens else ids

    named = (_token_id(metadata, key, size, None) for key in ("eot_token_id", "eom_token_id"))
    ends = {i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED) and tokens[i] in _END_NAMES}
    ordered = dict.fromkeys(i for i in (eos, *named, *sorted(ends)) if i is not None)
    roles = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": _token_id(metadata, "unknown_token_id", size, None),
        "pad_token": _token_id(metadata, "padding_token_id", size, None),
    }
    return TokenizerParts(
        encode=encode,
        token_bytes=cache(token_bytes),
        vocab_size=size,
        special_ids=frozenset(i for i, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN)),
        bos_id=bos,
        eos_id=eos,
        eos_ids=tuple(ordered),
        special_tokens={role: tokens[i] for role, i in roles.items() if i is not None},
        chat_template=_chat_template(metadata),
        strips_leading_space=strips_leading_space,
    )


class SpecialTokens:
    """Finds special tokens written in a text, as llama.cpp does: the longest token takes all its places first."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(sorted(ids.items(), key=lambda item: -len(item[0].encode())))
        # Vocabularies hold thousands of these (<unused17>); one look for their common beginning skips most of them.
        self._by_beginning: dict[str, list[str]] = {}
        for token in self._ids:
            self._by_beginning.setdefault(token[:4], []).append(token)

    def partition(self, text: str) -> list[str | int]:
        """Splits a text into ids of special tokens and the text between them, which is never empty."""
        present = {
            token
            for beginning, tokens in self._by_beginning.items()
            if beginning in text
            for token in tokens
            if token in text
        }
        fragments: list[str | int] = [text] if text else []
        for token, index in self._ids.items() if present else ():
            if token not in present:
                continue
            split: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int) or token not in fragment:
                    split.append(fragment)
                    continue
                for n, between in enumerate(fragment.split(token)):
                    if n:
                        split.append(index)
                    if between:
                        split.append(between)
            fragments = split
        return fragments


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = metadata.get(_PREFIX + key, default)
    if isinstance(value, np.bool_):
        value = bool(value)
    if not isinstance(value, kind):
        raise TokenizerError(f"{_PREFIX}{key} must be a {kind.__name__}, not {type(value).__name__}")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, size: int, default: int | None) -> int | None:
    """A token id from the metadata; the default where it is absent or, as llama.cpp has it, out of range."""
    value = metadata.get(_PREFIX + key)
    if value is None:
        value = default
    elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TokenizerError(f"{_PREFIX}{key} must be an integer, not {type(value).__name__}")
    elif not 0 <= value < size:
        value = default
    return None if value is None or not 0 <= value < size else int(value)


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    values = metadata.get(_PREFIX + key)
    if values is None:
        raise TokenizerError(f"the GGUF tokenizer has no {_PREFIX}{key}")
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{_PREFIX}{key} must be an array of strings")
    if len(values) > _MAX_TOKENS:
        raise TokenizerError(f"{_PREFIX}{key} has {len(values)} entries; the limit is {_MAX_TOKENS}")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, count: int, kinds: str) -> np.ndarray[Any, Any]:
    values = metadata.get(_PREFIX + key)
    if values is None:
        raise TokenizerError(f"the GGUF tokenizer has no {_PREFIX}{key}")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise TokenizerError(f"{_PREFIX}{key} is no array of numbers") from error
    if array.ndim != 1 or array.dtype.kind not in kinds + "iu":
        raise TokenizerError(f"{_PREFIX}{key} is no array of numbers")
    if len(array) != count:
        raise TokenizerError(f"{_PREFIX}{key} has {len(array)} entries for {count} tokens")
    return array


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(metadata, "tokens"))]
    if not tokens:
        raise TokenizerError(f"{_PREFIX}tokens is empty")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise TokenizerError(f"{_PREFIX}tokens has {twice[:64]!r} twice")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{_PREFIX}tokens has a token that is not valid Unicode") from error
    return tokens


def _token_types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    if _PREFIX + "token_type" not in metadata:
        types = [_NORMAL] * len(tokens)
    else:
        types = _numbers(metadata, "token_type", len(tokens), "").tolist()
    for index, token in enumerate(tokens):
        if token in _END_NAMES or token in _MARKER_NAMES:
            types[index] = _CONTROL
    return types


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in dict.fromkeys(_strings(metadata, "merges")):  # of equals, the first counts
        cut = merge.find(" ", 1)
        if cut < 0:
            raise TokenizerError(f"{_PREFIX}merges has {merge[:64]!r}, which is not a pair")
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _byte(token: str) -> int:
    try:
        if len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            return int(token[3:5], 16)
    except ValueError:
        pass
    raise TokenizerError(f"{_PREFIX}tokens has {token[:64]!r} as a byte; it should look like <0x0A>")


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer.chat_template must be a string")
    return template
