"""Tokenizers from Hugging Face folders: transformers' ids and texts, and damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library, decoders, models

from tests.unit.tokenizer_files import FOLDER, fixture
from tinyllm.errors import TokenizerError
from tinyllm.tokenizer import Tokenizer

FOLDERS = ("llama3", "llama2", "gemma")


def tokenizer(folder: Path, **options: Any) -> Tokenizer:
    made = Tokenizer.from_folder(folder, **options)
    assert made is not None
    return made


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_transformers(name: str) -> None:
    made = tokenizer(FOLDER / name)
    for text, (ids, shown, everything) in zip(fixture("texts.json"), fixture(f"{name}/expected.json"), strict=True):
        assert made.encode(text) == ids, text
        assert made.decode(ids) == shown, text
        assert made.decode(ids, skip_special_tokens=False) == everything, text


def test_special_tokens_and_ends() -> None:
    made = tokenizer(FOLDER / "llama3")
    assert made.token_text(made.bos_token_id or 0) == "<|begin_of_text|>"
    assert made.token_text(made.eos_token_id or 0) == "<|eot_id|>"
    assert made.eos_token_ids == (made.eos_token_id, 2, 259)  # and those of generation_config.json
    assert made.encode("a", add_special_tokens=False) == made.encode("a")[1:]
    assert made.chat_template == "{{ bos_token }}{{ messages[0].content }}"
    assert made.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|begin_of_text|>Hi"


def copied(tmp_path: Path, name: str = "llama3") -> Path:
    return Path(shutil.copytree(FOLDER / name, tmp_path / name))


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


def test_tokenizer_json_is_enough(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "llama3" / "tokenizer.json", tmp_path)
    made = tokenizer(tmp_path)
    assert made.encode("Hello") == tokenizer(FOLDER / "llama3").encode("Hello")
    assert (made.bos_token_id, made.eos_token_ids, made.chat_template) == (None, (), None)


def test_ids_of_a_padded_vocabulary_decode_to_nothing() -> None:
    made = tokenizer(FOLDER / "llama3", vocab_size=1000)
    assert made.vocab_size == 1000
    assert made.decode([999, 998]) == made.token_text(999) == ""
    assert tokenizer(FOLDER / "llama3", vocab_size=3).vocab_size == tokenizer(FOLDER / "llama3").vocab_size == 425


def test_templates_in_files_of_their_own_come_first(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert tokenizer(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert tokenizer(folder).chat_template == "jinja"


def test_ends_come_from_config_json_where_there_is_no_generation_config(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert tokenizer(folder).eos_token_ids == (422, 7)
    (folder / "config.json").write_text('{"eos_token_id": [true, "x", -1, 1e9, 99999]}')
    assert tokenizer(folder).eos_token_ids == (422,)


def test_special_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    config = {"pad_token": "<tool>", "added_tokens_decoder": {"425": {"content": "<new>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = tokenizer(folder)
    tool, new = made.encode("<tool><new>", add_special_tokens=False)
    assert {tool, new} <= made.special_token_ids
    assert new == 425
    assert made.decode([tool, new]) == ""


def test_an_added_token_stands_for_itself_even_where_its_characters_could_spell_bytes(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"425": {"content": "<\\u00e9>"}}}')
    made = tokenizer(folder)
    assert made.encode("<\u00e9>", add_special_tokens=False) == [425]
    assert made.decode([425]) == "<\u00e9>"


def test_whole_words_are_joined_with_spaces(tmp_path: Path) -> None:
    Library(models.WordLevel({"a": 0, "bc": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    made = tokenizer(tmp_path)
    assert made.decode([0, 1, 0]) == "a bc a"
    stream = made.stream_decoder()
    assert [stream.push(0), stream.push(1)] == ["a", " bc"]


def edited(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_damaged_tokenizer_json(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    path = folder / "tokenizer.json"
    whole = path.read_text()
    for content in ("", "{", "null", "[]", "{}", whole[: len(whole) // 2], '{"model": {"type": "BPE"}}', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read") as caught:
            Tokenizer.from_folder(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "cannot be read"),
        ({"type": "BPE", "vocab": {"a": -1}, "merges": []}, "cannot be read"),
        ({"type": "BPE", "vocab": {"a": 2**32}, "merges": []}, "cannot be read"),
        ({"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, "a token id of 2147483648"),
        ({"type": "Nonsense", "vocab": {"a": 0}}, "cannot be read"),
        ({"type": "BPE", "vocab": [], "merges": {}}, "cannot be read"),
        ({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}, "cannot be read"),
    ],
)
def test_damaged_models(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    folder = copied(tmp_path)
    edited(folder / "tokenizer.json", model=model, added_tokens=[], post_processor=None)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    Library(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no tokens"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Replace("a", "b"), decoders.Strip("x", 1, 0)]
)
def test_decoders_that_are_not_supported(tmp_path: Path, decoder: Any) -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.decoder = decoder
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"decoder of tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 10**5])
def test_damaged_configs_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = copied(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"chat_template": 5},
        {"chat_template": [{"name": "tool_use", "template": "x"}, 3]},
    ],
)
def test_configs_that_make_no_sense(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = copied(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if isinstance(config.get("chat_template"), list):
        assert tokenizer(folder).chat_template is None
    else:
        with pytest.raises(TokenizerError):
            Tokenizer.from_folder(folder)
