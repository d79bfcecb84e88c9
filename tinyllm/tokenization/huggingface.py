"""A tokenizer from a Hugging Face folder: tokenizer.json and the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tinyllm.errors import TokenizerError
from tinyllm.tokenization.byte_level import spelled_bytes
from tinyllm.tokenization.parts import TokenizerParts, tokenizer_errors
from tinyllm.tokenization.sentencepiece import SPACE

__all__ = ["parts_from_folder"]

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_CONFIG_BYTES = 16 << 20
_MAX_TOKENS = 1 << 22
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def parts_from_folder(folder: Path, vocab_size: int | None = None) -> TokenizerParts | None:
    """Reads a folder's tokenizer; None when it has no tokenizer.json. Raises TokenizerError for a damaged file."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return None
    source = _read(folder / "tokenizer.json", _MAX_TOKENIZER_BYTES)
    config = _read_json(folder / "tokenizer_config.json")
    with tokenizer_errors("tokenizer.json cannot be read"):
        library = Tokenizer.from_str(source)
        library.no_truncation()
        library.no_padding()
    roles = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
    with tokenizer_errors("tokenizer_config.json has special tokens that cannot be added"):
        _add_tokens(library, config, roles)
        vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
        special = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
        added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
    if not vocab:
        raise TokenizerError("tokenizer.json has no tokens")
    size = max(vocab.values()) + 1
    if size > _MAX_TOKENS:
        raise TokenizerError(f"tokenizer.json has a token id of {size - 1}; the limit is {_MAX_TOKENS - 1}")
    token_bytes, strips_space, separator = _decoding(library, added)
    ids = {role: vocab.get(token) for role, token in roles.items()}
    eos = ids.get("eos_token")
    ends = _generation_ends(folder)
    return TokenizerParts(
        encode=_encoder(library),  # where bos and eos belong, tokenizer.json says itself
        token_bytes=cache(token_bytes),
        vocab_size=size if vocab_size is None else max(size, vocab_size),
        special_ids=special,
        bos_id=ids.get("bos_token"),
        eos_id=eos,
        eos_ids=tuple(dict.fromkeys(i for i in (eos, *ends) if i is not None and i < size)),
        special_tokens=roles,
        chat_template=_chat_template(folder, config),
        strips_leading_space=strips_space,
        separator=separator,
    )


def _read(path: Path, limit: int) -> str:
    try:
        size = path.stat().st_size
        if size > limit:
            raise TokenizerError(f"{path.name} has {size} bytes; the limit is {limit}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} must hold a JSON object")
    return value


def _content(token: object) -> str | None:
    """The text of a special token, which configs write as a string or as {"content": ...}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {role: _content(config.get(role)) for role in _ROLES}
    return {role: token for role, token in named.items() if token is not None}


def _add_tokens(library: Any, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Adds the tokens that tokenizer_config.json names and tokenizer.json does not mark as special."""
    from tokenizers import AddedToken

    known = library.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise TokenizerError("added_tokens_decoder in tokenizer_config.json must be an object")
    for index, entry in sorted(((int(key), value) for key, value in listed.items()), key=lambda item: item[0]):
        content = _content(entry)
        if content is None or index in known:
            continue
        flags = {
            name: bool(entry[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if isinstance(entry, Mapping) and name in entry
        }
        library.add_tokens([AddedToken(content, **flags)])
    known = library.get_added_tokens_decoder()
    special = {token.content for token in known.values() if token.special}
    missing = [token for token in dict.fromkeys(roles.values()) if token not in special]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _encoder(library: Any) -> Callable[[str, bool], list[int]]:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        with tokenizer_errors("the text cannot be encoded"):
            ids: list[int] = library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    return encode


def _decoding(library: Any, added: Mapping[int, str]) -> tuple[Callable[[int], bytes], bool, bytes]:
    """How tokens become bytes: (token_bytes, whether a leading space is stripped, what stands between tokens)."""
    if library.decoder is None:
        return (lambda index: (library.id_to_token(index) or "").encode()), False, b" "
    steps = list(_flatten(json.loads(library.decoder.__getstate__())))
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return (
            (
                lambda index: (
                    added[index].encode() if index in added else spelled_bytes(library.id_to_token(index) or "")
                )
            ),
            False,
            b"",
        )
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _sentencepiece_decoding(library, steps)
    raise TokenizerError(f"the decoder of tokenizer.json is not supported: {', '.join(map(str, kinds))[:100]}")


def _sentencepiece_decoding(library: Any, steps: list[dict[str, Any]]) -> tuple[Callable[[int], bytes], bool, bytes]:
    strips_space, byte_fallback, space = False, False, ""
    for step in steps:
        if step["type"] == "Metaspace":
            space = step.get("replacement", SPACE)
            strips_space = step.get("prepend_scheme") != "never"
        elif step["type"] == "Replace":
            if step.get("content") != " " or not isinstance(step.get("pattern", {}).get("String"), str):
                raise TokenizerError("the decoder of tokenizer.json replaces something else than a space")
            space = step["pattern"]["String"]
        elif step["type"] == "Strip":
            if step.get("content") != " " or step.get("start") not in (0, 1) or step.get("stop") != 0:
                raise TokenizerError("the decoder of tokenizer.json strips something else than a leading space")
            strips_space = step["start"] == 1
        elif step["type"] == "ByteFallback":
            byte_fallback = True

    def token_bytes(index: int) -> bytes:
        token: str = library.id_to_token(index) or ""
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return (token.replace(space, " ") if space else token).encode()

    return token_bytes, strips_space, b""


def _flatten(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _flatten(step)
    else:
        yield decoder


def _generation_ends(folder: Path) -> list[int]:
    """eos_token_id, one or many, of generation_config.json, or of config.json where that says nothing."""
    for name in ("generation_config.json", "config.json"):
        ends = _read_json(folder / name).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        ids = [i for i in ends if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if ids:
            return ids
    return []


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default template: chat_template.jinja, else chat_template.json, else tokenizer_config.json's."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path, _MAX_CONFIG_BYTES)
    for source in (_read_json(folder / "chat_template.json"), config):
        template = source.get("chat_template")
        if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
            template = named.get("default")
        if isinstance(template, str):
            return template
        if template is not None:
            raise TokenizerError("chat_template must be a string or a list of named templates with a default")
    return None
