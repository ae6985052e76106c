"""Tokenizers that cannot be loaded, do not fit the model, or fail: one line, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.evaluation.perplexity import read_texts, read_tokens
from planner.text.documents import Document
from planner.text.tokenizer import encode, load_tokenizer, render
from tests.conftest import one_line
from tests.paths import MIXTRAL
from vllm_moeq.format import ConfigError, MoeqError, UsageError

pytestmark = pytest.mark.slow

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})
TEMPLATE = "{% for it in messages %}<{{ it.role }}>{{ it.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Config and tokenizer of the shipped Mixtral."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MIXTRAL / name, made / name)
    return made


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def added(number: int, token: str = "<|im_start|>") -> Callable[[Any], Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return lambda value: value["added_tokens"].append({"id": number, "content": token, "special": True, **flags})


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a later kind": lambda path: edit(path, lambda value: value["model"].update(type="BPE-of-a-later-version")),
    "no JSON": lambda path: path.write_text("{"),
    "a list": lambda path: path.write_text("[]"),
    "no object": lambda path: path.write_text("null"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe" * 100),
    "a folder": lambda path: path.rename(path.with_name("elsewhere")).parent.joinpath(path.name).mkdir(),
    "no vocabulary": lambda path: edit(path, lambda value: value["model"].pop("vocab")),
    "none": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_cannot_be_loaded(damage: str, folder: Path) -> None:
    DAMAGES[damage](folder / "tokenizer.json")
    with pytest.raises(
        MoeqError, match=f"^{folder}.*(: transformers cannot load its tokenizer|: expected a regular file)"
    ) as error:
        load_tokenizer(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_token_beyond_the_embeddings(folder: Path) -> None:
    edit(folder / "tokenizer.json", added(2048))
    with pytest.raises(MoeqError, match=r"numbers below 2048.*found token '<\|im_start\|>' with the number 2048"):
        load_tokenizer(folder)


@pytest.mark.parametrize("change", [added(1 << 31), lambda value: value["model"]["vocab"].update(large=1 << 31)])
def test_a_number_that_would_fill_the_memory(folder: Path, change: Callable[[Any], Any]) -> None:
    edit(folder / "tokenizer.json", change)
    with pytest.raises(MoeqError, match=r"tokenizer\.json: expected numbers up to 16777216, found token .* 2147483648"):
        load_tokenizer(folder)


def test_another_file_than_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: fast_tokenizer_files: expected no such key"):
        load_tokenizer(folder)


def test_fewer_tokens_than_embeddings_are_usual(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(vocab_size=4096))
    assert load_tokenizer(folder).get_vocab()


def test_a_failing_tokenizer_is_one_line(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^here: the model's tokenizer cannot read it \("):
        encode(load_tokenizer(folder), "half \ud83d", "here")


def test_a_pattern_that_explodes_is_one_line(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|aa|aaa)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", lambda value: value.update(pre_tokenizer=split))
    with pytest.raises(UsageError, match=r"^here: the model's tokenizer cannot read it \("):
        encode(load_tokenizer(folder), "a" * 5000 + "b", "here")


class TestConversations:
    def test_are_written_by_the_models_template(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        assert render(Document("here", messages=CHAT), load_tokenizer(folder)) == "<user>hi<assistant>yes"

    def test_need_one(self, folder: Path) -> None:
        with pytest.raises(UsageError, match=r"^here: a conversation needs the model's chat template, .*field text"):
            render(Document("here", messages=CHAT), load_tokenizer(folder))

    @pytest.mark.parametrize(
        "template", ["{{ raise_exception('no') }}", "{{ messages.x.y }}", "{% for %}", "{{ 1/0 }}"]
    )
    def test_that_it_does_not_take(self, folder: Path, template: str) -> None:
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(UsageError, match=r"^here: the model's chat template does not take the conversation \("):
            render(Document("here", messages=CHAT), load_tokenizer(folder))


class TestTokens:
    def test_of_one_text_are_the_tokenizers(self, folder: Path) -> None:
        assert read_tokens(folder, ["a = 1\n"], None, "x") == load_tokenizer(folder)("a = 1\n")["input_ids"]

    def test_of_several_are_separated_by_the_end_of_text(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a = 1", "b = 2")]
        assert read_tokens(folder, ["a = 1", "b = 2"], None, "x")[-len(plain[1]) - 1 :] == [
            tokenizer.eos_token_id, *plain[1],
        ]  # fmt: skip

    def test_the_first_are_those_of_the_whole_text(self, folder: Path) -> None:
        text = (MIXTRAL / "held_out.txt").read_text()[:100_000]
        whole = read_tokens(folder, [text], None, "x")
        for most in (2, 1000, 20_000):
            assert read_tokens(folder, [text], most, "x") == whole[:most]

    def test_the_first_of_a_long_text_take_little_of_it(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[int] = []

        def counted(tokenizer: Any, text: str, where: str, special: bool = False) -> list[int]:
            given.append(len(text))
            return encode(tokenizer, text, where, special)

        monkeypatch.setattr("planner.text.tokenizer.encode", counted)
        assert len(read_tokens(folder, ["\u200d" * 2_000_000, "b"], 64, "x")) == 64
        assert sum(given) < 5000

    def test_a_template_does_not_begin_it_twice(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        begin = tokenizer.bos_token
        assert begin is not None
        (folder / "chat_template.jinja").write_text(begin + TEMPLATE)
        (folder / "chat.jsonl").write_text(json.dumps({"messages": list(CHAT)}))
        ids = read_tokens(folder, read_texts(folder / "chat.jsonl", folder), None, "x")
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_text_at_all(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path / name}: expected a text, found none: the file is empty"):
        read_texts(tmp_path / name, tmp_path)


@pytest.mark.parametrize("content", ["[]", '[{"text": " "}]', '{"text": ""}\n'])
def test_documents_without_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "blank.json").write_text(content)
    with pytest.raises(UsageError, match=r"blank\.json: expected a text, found none: .* blanks alone"):
        read_texts(tmp_path / "blank.json", tmp_path)


COMMANDS: dict[str, tuple[object, ...]] = {
    "quantize": ("--avg-bits", 3, "--method", "uniform", "--samples", 4, "--seq-len", 32, "-o", "out"),
    "calibrate": ("--samples", 4, "--seq-len", 32, "-o", "stats.safetensors"),
    "eval": ("--max-tokens", 64),
    "compare": ("--methods", "frequency", "--samples", 4, "--seq-len", 32, "--held-out", "text", "-o", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", ["a later kind", "beyond"])
def test_every_command_refuses(moeq: Callable[..., Any], tmp_path: Path, command: str, damage: str) -> None:
    """Before any work, and where the text does not hold the token."""
    model = shutil.copytree(MIXTRAL, tmp_path / "model")
    tokenizer = model / "tokenizer.json"
    if damage == "beyond":
        edit(tokenizer, added(2048))
    else:
        DAMAGES[damage](tokenizer)
    (tmp_path / "text").write_text("import os\n" * 200)
    flags = [tmp_path / flag if flag in ("text", "out", "stats.safetensors") else flag for flag in COMMANDS[command]]
    assert "tokenizer" in one_line(moeq(command, model, "--data", tmp_path / "text", *flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text"]
