r"""The regular expressions behind `tokenizer.ggml.pre`: how text is cut into words before byte-pair merges.

Each pre-tokenizer is a tuple of expressions, applied in turn to the pieces that the one before it left; what an
expression does not match stays a piece of its own. They are the published expressions of the models, in the form
that llama.cpp gives them (an explicit `'[sS]` where the models say `(?i:'s)`, which would match a long s too).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllm.errors import TokenizerError

__all__ = ["PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """Attributes: patterns, applied in turn; ignore_merges, a word that is a token stays whole; add_bos, by default."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# Letters, digits and punctuation that came with Unicode 16: llama.cpp's tables are of 15.1 and call them none of these.
_UNICODE_16 = (
    "\u1b4e-\u1b4f\u1b7f\u1c89-\u1c8a\ua7cb-\ua7cd\ua7da-\ua7dc\U000105c0-\U000105f3\U00010d40-\U00010d65"
    "\U00010d6e-\U00010d85\U00010ec2-\U00010ec4\U00011380-\U000113b7\U000113d1-\U000113d8\U000116d0-\U000116e3"
    "\U00011bc0-\U00011bf9\U00013460-\U000143fa\U00016100-\U00016139\U00016d40-\U00016d79\U00018cff"
    "\U0001ccf0-\U0001ccf9\U0001e5d0-\U0001e5ff"
)
_L, _N, _P = (rf"[\p{{{category}}}&&[^{_UNICODE_16}]]" for category in "LNP")

_WORDS = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?[^\s{_L}{_N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


def _cl100k(digits: str) -> str:
    """The expression of GPT-4's cl100k and its many heirs, which differ in how they group digits."""
    return rf"{_CONTRACTIONS}|[^\r\n{_L}{_N}]?{_L}+|{digits}| ?[^\s{_L}{_N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_THREE_DIGITS = _cl100k(_N + "{1,3}")

_GPT2 = PreTokenizer((_WORDS,))
_SMOLLM = PreTokenizer((_N, _WORDS))
_LLAMA3 = PreTokenizer((_THREE_DIGITS,), ignore_merges=True, add_bos=True)
_DBRX = PreTokenizer((_THREE_DIGITS,))
_QWEN2 = PreTokenizer((_cl100k(_N),))
_DEFAULT = PreTokenizer((rf"[{_P}\$\+<=>\^~\|]+", _WORDS, rf"{_N}+", "[0-9][0-9][0-9]"))
_FALCON = PreTokenizer((rf"[{_P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]"))
_DEEPSEEK_CODER = PreTokenizer(
    (r"[\r\n]", rf"\s?{_L}+", rf"\s?{_P}+", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&\S]+", _N)
)

_UPPER, _LOWER = f"[{_L}&&[^a-z]]", f"[{_L}&&[^A-Z]]"
_TEKKEN = PreTokenizer(
    (
        rf"[^\r\n{_L}{_N}]?{_UPPER}*{_LOWER}+|[^\r\n{_L}{_N}]?{_UPPER}+{_LOWER}*|{_N}"
        rf"| ?[^\s{_L}{_N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    add_bos=True,
)
_GPT4O = PreTokenizer(
    (
        rf"[^\r\n{_L}{_N}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n{_L}{_N}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|{_N}{{1,3}}| ?[^\s{_L}{_N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_BY_NAME = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "exaone4", "gigachat", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SMOLLM),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "falcon": _FALCON,
    "deepseek-coder": _DEEPSEEK_CODER,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name. Raises TokenizerError for one that tinyllm does not know."""
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(sorted(_BY_NAME))
        raise TokenizerError(f"unknown pre-tokenizer {name[:64]!r} (tokenizer.ggml.pre); known are {known}") from None
