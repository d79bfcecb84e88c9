"""Makes tests/fixtures/tokenizers: token ids by llama.cpp, and ids, texts and chats by transformers.

    pip install gguf llama-cpp-python sentencepiece tokenizers transformers
    python scripts/make_tokenizer_fixtures.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

The tests need none of these packages, only what this script writes. tokenizer_texts.py has its inputs.
"""

from __future__ import annotations

import ctypes
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
import tokenizers
import transformers
from tokenizer_texts import CHATS, CORPUS, hard_texts
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "tokenizers"
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "default", "falcon", "deepseek-coder", "tekken", "gpt-4o")
PREFIX = "tokenizer.ggml."


def save(name: str, value: object) -> None:
    """One JSON file, a line for each entry of the outermost object or list."""
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    dump = json.JSONEncoder(separators=(",", ":")).encode
    if isinstance(value, dict):
        lines = [f"{dump(key)}: {dump(item)}" for key, item in value.items()]
    else:
        lines = [dump(item) for item in value]
    brackets = "{}" if isinstance(value, dict) else "[]"
    path.write_text(brackets[0] + "\n" + ",\n".join(lines) + "\n" + brackets[1] + "\n", encoding="ascii")
    print(f"{path.relative_to(FOLDER)}: {path.stat().st_size:,} bytes")


# -- llama.cpp ---------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model.model)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        size = 4 * len(data) + 16
        ids = (ctypes.c_int32 * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, True, True)
        if count < 0:
            raise RuntimeError(f"llama.cpp cannot encode {text[:50]!r}")
        return list(ids[:count])

    def ends(self) -> list[int]:
        count = llama_cpp.llama_vocab_n_tokens(self._vocab)
        return [i for i in range(count) if llama_cpp.llama_vocab_is_eog(self._vocab, i)]


def llama_cpp_of(metadata: dict[str, Any]) -> LlamaCpp:
    """llama.cpp's tokenizer of this metadata, by way of a GGUF file without tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
            writer.add_uint32(f"llama.{key}", 64)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for key, value in metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return LlamaCpp(path)


def byte_level_metadata() -> dict[str, Any]:
    """A byte-level BPE of about 600 tokens: all bytes but four, some special tokens, one marker called normal text."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im", "\n\n\n"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s*\S+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    for pair in ("a \u00ea", "1 \u00ea"):  # which show whether U+A7CB, of Unicode 16, counts as a letter
        merges.append(pair)
        model["vocab"][pair.replace(" ", "")] = len(model["vocab"])
    unused = {"\u0104", "\u0106", "\u00f1", "\u00f2"}  # bytes 0x04, 0x06, 0xF1, 0xF2: SmolLM2 lacks them too
    tokens = [*special, *(token for token in model["vocab"] if token not in unused)]
    kinds = [3, 3, 3, 4, 4] + [1] * (len(tokens) - len(special))
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "tokens": [*tokens, "</s>", "\u0120unmerged"],  # the latter, no merge makes
        PREFIX + "token_type": [*kinds, 1, 1],
        PREFIX + "merges": [merge for merge in merges if not unused & {*merge}],
        PREFIX + "bos_token_id": 1,
        PREFIX + "eos_token_id": 2,
    }


def byte_level_fixture(texts: list[str]) -> None:
    metadata = byte_level_metadata()
    ids, ends = {}, {}
    for pre in PRE_TOKENIZERS:
        oracle = llama_cpp_of({**metadata, PREFIX + "pre": pre})
        ids[pre] = [oracle.encode(text) for text in texts]
        ends[pre] = oracle.ends()
    first = PRE_TOKENIZERS[0]
    differing = {
        pre: {str(i): row for i, row in enumerate(rows) if row != ids[first][i]}
        for pre, rows in ids.items()
        if pre != first
    }
    save("byte_level.json", {"metadata": metadata, "ends": ends[first], "ids": ids[first], "differing": differing})


def sentencepiece_metadata(**options: Any) -> dict[str, Any]:
    """A SentencePiece BPE with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()[:10]),  # Latin script; all else falls back to bytes
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n"],
        minloglevel=2,
        **options,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = pieces.get_piece_size()

    def kind(i: int) -> int:
        if pieces.is_byte(i):
            return 6
        if pieces.is_control(i):
            return 3
        if pieces.is_unknown(i):
            return 2
        return 4 if pieces.id_to_piece(i) in ("<start_of_turn>", "<end_of_turn>", "\n\n") else 1

    return {
        PREFIX + "model": "llama",
        PREFIX + "tokens": [pieces.id_to_piece(i) for i in range(count)],
        PREFIX + "scores": [pieces.get_score(i) for i in range(count)],
        PREFIX + "token_type": [kind(i) for i in range(count)],
        PREFIX + "bos_token_id": 1,
        PREFIX + "eos_token_id": 2,
        PREFIX + "unknown_token_id": 0,
    }


def tied_metadata() -> dict[str, Any]:
    """Few characters, many equal scores, and tokens whose parts are no tokens: where merge rules would go wrong."""
    rng = random.Random(1)
    letters = "ab\u2581\u00e9"
    tokens = {"".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(120)} | {"a", "\u2581", "\u00e9", "xyz"}
    listed = sorted(tokens)
    scores = [float(-rng.randint(0, 6)) for _ in listed]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        PREFIX + "model": "llama",
        PREFIX + "tokens": ["<unk>", "<s>", "</s>", *byte_tokens, *listed],
        PREFIX + "scores": [0.0] * 259 + scores,
        PREFIX + "token_type": [2, 3, 3] + [6] * 256 + [1] * len(listed),
        PREFIX + "add_bos_token": False,
        PREFIX + "add_space_prefix": False,
    }


def sentencepiece_fixture(texts: list[str]) -> None:
    rng = random.Random(2)
    tied_texts = ["".join(rng.choices("aab \u00e9xyz", k=rng.randint(1, 40))) for _ in range(150)]
    tied_texts += ["a" * n for n in range(1, 40)] + [" " * n for n in range(1, 20)] + ["ab" * 30, "xyz", "xy z"]
    llama = sentencepiece_metadata(vocab_size=640)
    gemma = {**sentencepiece_metadata(vocab_size=560, add_dummy_prefix=False), PREFIX + "add_space_prefix": False}
    gemma[PREFIX + "add_eos_token"] = True
    cases = {}
    for name, metadata, inputs in (
        ("llama", llama, texts), ("gemma", gemma, texts), ("tied", tied_metadata(), tied_texts)
    ):  # fmt: skip
        oracle = llama_cpp_of(metadata)
        cases[name] = {
            "metadata": metadata,
            "texts": inputs if inputs is not texts else None,
            "ids": [oracle.encode(text) for text in inputs],
            "ends": oracle.ends(),
        }
    save("sentencepiece.json", cases)


# -- transformers ------------------------------------------------------------------------------------------------


def byte_level_folder() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """In the manner of Llama 3: bos by the post-processor, added tokens that strip, none of them in the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<mask>", lstrip=True, rstrip=True)])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A $B", [bos])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|eot_id|>", "__type": "AddedToken", "lstrip": False, "normalized": False},
        "clean_up_tokenization_spaces": False,
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
    }
    return tokenizer, config


def sentencepiece_folder(metadata: dict[str, Any], prefix_space: bool) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """In the manner of Llama 2 (a space before the text, stripped again; bos) or Gemma (neither)."""
    tokens = metadata[PREFIX + "tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = metadata[PREFIX + "scores"]
    merges = sorted(
        (
            (token[:i], token[i:])
            for token in tokens[259:]
            for i in range(1, len(token))
            if {token[:i], token[i:]} <= set(vocab)
        ),
        key=lambda pair: -scores[vocab["".join(pair)]],
    )
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *space] if prefix_space else space)
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    if prefix_space:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,  # which counts for nothing beside a tokenizer.json
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


def folder_fixtures(texts: list[str]) -> None:
    llama = sentencepiece_folder(sentencepiece_metadata(vocab_size=500), True)
    gemma = sentencepiece_folder(sentencepiece_metadata(vocab_size=500, add_dummy_prefix=False), False)
    for name, (tokenizer, config) in {"llama3": byte_level_folder(), "llama2": llama, "gemma": gemma}.items():
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.enable_truncation(8)  # what the files say about length is the trainer's business, and ignored
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 259]}\n')
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
        oracle.backend_tokenizer.no_truncation()
        rows = []
        for text in texts:
            ids = oracle(text)["input_ids"]
            rows.append([ids, oracle.decode(ids, skip_special_tokens=True), oracle.decode(ids)])
        save(f"{name}/expected.json", rows)


def chat_fixtures() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    cases = []
    for name, template, messages, options in CHATS:
        expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        cases.append({"name": name, "template": template, "messages": messages, "options": options, "text": expected})
    save("chats.json", cases)


def main() -> None:
    texts = hard_texts()
    save("texts.json", texts)
    smollm2 = LlamaCpp(Path(sys.argv[1]))
    save("smollm2.json", {"ends": smollm2.ends(), "ids": [smollm2.encode(text) for text in texts]})
    byte_level_fixture(texts)
    sentencepiece_fixture(texts)
    folder_fixtures(texts)
    chat_fixtures()


if __name__ == "__main__":
    main()
