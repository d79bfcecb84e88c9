"""The one file that knows llguidance, and a program of its own: it compiles a text and says how that went.

    python grammar.py < {"kind": ..., "text": ...} > {"error": ..., "nbytes": ...}

llguidance bounds most of what a grammar may cost, but not all: some take seconds and gigabytes, and a chain of a few
thousand rules overflows the stack, which no one can catch. So a text is tried in a process that may die of it first.
As a program it imports nothing of tinyllm.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llguidance import LLMatcher, LLTokenizer

__all__ = ["CPU_SECONDS", "make_matcher", "make_tokenizer", "problem"]

CPU_SECONDS = 3  # of the trial
MEMORY_NBYTES = 512 << 20  # that the trial may have mapped, the interpreter included
STACK_NBYTES = 2 << 20  # of the trial; no thread that compiles afterwards should have less

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LIMITS = {
    "max_items_in_row": 1000,  # an object may have some 250 optional properties
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,  # these two: some 10 ms a token at most, on one core
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}


def make_tokenizer(
    tokens: list[bytes], special_ids: list[int], tokenize: Callable[[str], Sequence[int]]
) -> LLTokenizer:
    """llguidance's view of a vocabulary, which gets an end token of its own: id len(tokens).

    Args:
        tokens: what each id adds to a text; ids with b"" are never allowed.
        special_ids: ids that are no text, whatever bytes stand in `tokens`; never allowed either.
        tokenize: how the model writes a text; used where only one text can follow.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    end = len(tokens)
    silent = set(special_ids)

    class Vocabulary:
        eos_token_id = end
        bos_token_id = None
        special_token_ids = (end,)  # else it is a text like any other, and may stand in one

        def __init__(self) -> None:
            self.tokens = [b"" if index in silent else token for index, token in enumerate(tokens)] + [b"<end>"]

        def __call__(self, text: str) -> list[int]:
            return list(tokenize(text))

    return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=end + 1, eos_token=[end])


def make_matcher(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """A matcher before its first token. What is wrong with the text shows as `problem` then."""
    from llguidance import LLMatcher, LLParserLimits

    if kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    elif kind == "grammar":
        grammar = LLMatcher.grammar_from_lark(text)
    else:
        style: Any = _JSON_STYLE
        grammar = LLMatcher.grammar_from_json_schema(text if kind == "json_schema" else '{"type": "object"}', style)
    limits: dict[str, Any] = _LIMITS
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    if not matcher.is_error():
        matcher.compute_bitmask()  # what only shows at the first token
    return matcher


def problem(matcher: LLMatcher) -> str | None:
    """What went wrong, in one line; None if nothing did."""
    if not matcher.is_error():
        return None
    lines = [line.strip() for line in matcher.get_error().replace("<non-verbose/>", "").splitlines()]
    if lines and lines[0] == "NoExtensionBias":
        return "no text can match it"
    # a parser's error shows the source, which the user knows; what it says of it stands in a line "error: ..."
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    message = (said or lines or [""])[0] or "llguidance gave up"
    return message if len(message) <= 240 else f"{message[:237]}..."


def _trial(kind: str, text: str) -> dict[str, Any]:
    tokens = [bytes([byte]) for byte in range(256)]
    before = _peak_nbytes()
    try:
        error = problem(make_matcher(make_tokenizer(tokens, [], lambda text: list(text.encode())), kind, text))
    except ValueError as raised:
        error = " ".join(str(raised).split())[:240]
    return {"error": error, "nbytes": _peak_nbytes() - before}


def _peak_nbytes() -> int:
    """The most memory that this process ever held; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _limit_this_process() -> None:
    try:
        import resource
    except ImportError:
        return
    for name, limit in (("RLIMIT_CPU", CPU_SECONDS), ("RLIMIT_AS", MEMORY_NBYTES), ("RLIMIT_CORE", 0)):
        try:
            number = getattr(resource, name)
            _, hard = resource.getrlimit(number)
            ceiling = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (ceiling, hard))
        except (ValueError, OSError, AttributeError):  # not on this system: the caller's clock is left
            continue


def _main() -> None:
    request = json.load(sys.stdin)
    json.dump(_trial(request["kind"], request["text"]), sys.stdout)


if __name__ == "__main__":
    import threading

    _limit_this_process()
    threading.stack_size(STACK_NBYTES)
    thread = threading.Thread(target=_main)
    thread.start()
    thread.join()
