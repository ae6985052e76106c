"""What is fuzzed: functions of bytes that raise nothing but this project's errors, and whose results are consistent."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save

from planner.plan_file import Plan
from planner.reporting.card import BEGIN, END, refresh_card
from planner.text.formats import read_documents
from planner.text.tokenizer import encode, load_tokenizer
from vllm_moeq.format import (
    BIT_WIDTHS,
    GRID,
    SIGNS,
    TRELLIS_SCHEME,
    MoeqError,
    ShardSet,
    expert_matrices,
    pack,
    parse_config,
    parse_json,
    unpack,
)
from vllm_moeq.format.problems import first_problem

LIMIT = 1 << 16
PLAN = {"method": "kl", "avg_bits": 2.0, "achieved_avg_bits": 2.0, "bit_choices": [1, 2, 3]}
CONFIG = {
    "quant_method": "moeq",
    "format_version": 1,
    "group_size": 32,
    "projections": {"gate": "w1", "up": "w3", "down": "w2"},
    "experts": {"model.layers.0.experts": [1, 2, 3]},
    "linear": {"bits": 4, "group_size": 32},
    "unquantized": ["lm_head"],
    "plan": {**PLAN, "zeta": 3.0, "fallback": {"model.layers.0.experts": [0]}},
    "odp": {"model.layers.0.experts": 0.5},
}
WITH_WIDTHS: dict[str, Any] = {
    **CONFIG,
    "format_version": 2,
    "linear": {"bits": 4, "group_size": 32, "widths": {"model.layers.0.self_attn.o_proj": 8}},
}
SECOND: dict[str, Any] = {
    **WITH_WIDTHS,
    "experts": {"model.layers.0.experts": [2, 8]},
    "plan": {**PLAN, "bit_choices": [2, 8]},
    "schemes": {"model.layers.0.experts": ["trellis", "grid"]},
    "rotation": {"input": 32, "inner": 16},
}
WHOLE_PLAN = {
    "version": 1,
    **PLAN,
    "experts": {"a.b": [1, 3]},
    "order": {"a.b": [1, 0]},
    "scores": {"a.b": {"x": [1.0]}},
}


def schema(data: bytes) -> None:
    """Config and plan: an error of one line, or an object that says the same when it is read again."""
    try:
        parsed = parse_json(data, "fuzz")
    except MoeqError as error:
        _one_line(error)
        return
    try:
        config = parse_config(parsed, "fuzz")
        assert parse_config(json.loads(config.model_dump_json(exclude_none=True)), "again") == config
    except MoeqError as error:
        _one_line(error)
    try:
        plan = Plan.model_validate(parsed)
        assert Plan.model_validate(plan.model_dump(mode="json")).experts == plan.experts
    except ValidationError as error:
        _one_line(MoeqError(first_problem(error)))


def _one_line(error: MoeqError) -> None:
    text = str(error)
    assert text.isprintable(), repr(text)
    assert len(text) < 4096


@contextmanager
def _folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def headers(data: bytes) -> None:
    """A shard, or an index, a NUL and its shard: refused, or every tensor reads the same in all three ways."""
    with _folder() as folder:
        if data[:1] == b"\x00" or b"\x00" not in data:
            (folder / "model.safetensors").write_bytes(data[1:])
        else:
            index, _, shard = data.partition(b"\x00")
            (folder / "model.safetensors.index.json").write_bytes(index)
            (folder / "a.safetensors").write_bytes(shard)
        try:
            shards = ShardSet(folder)
        except MoeqError as error:
            _one_line(error)
            return
        with shards:
            for name, info in shards.tensors.items():
                _reads_alike(shards, name, (folder / info.shard).stat().st_size)


def _reads_alike(shards: ShardSet, name: str, size: int) -> None:
    info = shards.info(name)
    assert 8 <= info.offset <= info.offset + info.nbytes <= size
    try:
        whole = shards.load(name)
        assert tuple(whole.shape) == info.shape
        others = [shards.map(name)]
        if info.shape and info.numel:
            others.append(shards.read_rows(name, 0, info.shape[0]))
    except MoeqError as error:
        _one_line(error)
        return
    for other in others:
        assert torch.equal(other.contiguous().view(-1).view(torch.uint8), whole.contiguous().view(-1).view(torch.uint8))


def experts(data: bytes) -> None:
    """A config, a NUL and its shard: an error of one line, or matrices whose weights can be read."""
    config, _, shard = data.partition(b"\x00")
    with _folder() as folder:
        (folder / "model.safetensors").write_bytes(shard)
        try:
            found = parse_config(parse_json(config, "fuzz"), "fuzz")
            with ShardSet(folder) as shards:
                for matrix in expert_matrices(shards, found):
                    assert matrix.dequantize(shards).shape == (matrix.rows, matrix.columns)
        except MoeqError as error:
            _one_line(error)


def _shard_of_experts() -> bytes:
    """Return the shard of the experts that :data:`SECOND` describes, 32 neurons wide."""
    prefix = next(iter(SECOND["experts"]))
    tensors = {f"{prefix}.0.{name}.{SIGNS}": torch.tensor([7], dtype=torch.int32) for name in ("w1", "w2")}
    for expert, (scheme, bits) in enumerate(((TRELLIS_SCHEME, 2), (GRID, 8))):
        for name in ("w1", "w2", "w3"):
            for suffix, it in scheme.layout(32, 32, bits, 32).items():
                tensors[f"{prefix}.{expert}.{name}.{suffix}"] = torch.ones(it.shape, dtype=it.dtypes[0])
    return save(tensors, {"format": "pt"})


def unpacking(data: bytes) -> None:
    """Words, a width and a number of codes: a ValueError, or the bitstream read as one integer says the same."""
    if len(data) < 3:
        return
    bits, count = data[0] % 10, int.from_bytes(data[1:3], "little") % 600
    body = data[3:][: len(data[3:]) // 4 * 4]
    words = torch.frombuffer(bytearray(body), dtype=torch.int32) if body else torch.empty(0, dtype=torch.int32)
    try:
        codes = unpack(words, bits, count)
    except ValueError:
        assert bits not in BIT_WIDTHS or count % 32 or words.numel() != count * bits // 32
        return
    stream = int.from_bytes(body, "little")
    assert codes.tolist() == [stream >> (i * bits) & ((1 << bits) - 1) for i in range(count)]
    assert torch.equal(pack(codes, bits), words)


NAMES = ("a", "a.jsonl", "a.json", "a.csv", "a.txt.gz")
"""Names of a text file: the first byte of an input chooses one."""


def texts(data: bytes) -> None:
    """A text file: an error of one line, or documents that a tokenizer can be given."""
    with _folder() as folder:
        path = folder / NAMES[data[0] % len(NAMES) if data else 0]
        path.write_bytes(data[1:])
        try:
            for document in read_documents(path, LIMIT):
                assert document.text is not None or document.messages is not None
                for text in [document.text or "", *(message["content"] for message in document.messages)]:
                    text.encode()
        except MoeqError as error:
            _one_line(error)


VOCABULARY = {token: number for number, token in enumerate(["<s>", "</s>", "a", "b", "c", "ab", "abc", " ", "\u00e9"])}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True},
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+|b"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"], ["ab", "c"]], "unk_token": "</s>"},
}  # fmt: skip


def tokenizers(data: bytes) -> None:
    """A tokenizer.json: an error of one line, or numbers for which the model has embeddings."""
    with _folder() as folder:
        (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": len(VOCABULARY)}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "tokenizer.json").write_bytes(data)
        try:
            ids = encode(load_tokenizer(folder), "abc cab \u00e9", "text", special=True)
        except MoeqError as error:
            _one_line(error)
            return
        assert all(0 <= number < len(VOCABULARY) for number in ids)


def card(data: bytes) -> None:
    """A model card, a NUL and evaluation.json: an error of one line, or a card with one section replaced."""
    text, _, evaluation = data.partition(b"\x00")
    with _folder() as folder:
        (folder / "README.md").write_bytes(text)
        (folder / "evaluation.json").write_bytes(evaluation)
        try:
            changed = refresh_card(folder)
        except MoeqError as error:
            _one_line(error)
            return
        after = (folder / "README.md").read_bytes()
        assert changed or after == text
        assert not changed or (after.startswith(text.partition(BEGIN.encode())[0]) and BEGIN.encode() in after)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "schema": schema,
    "headers": headers,
    "experts": experts,
    "unpack": unpacking,
    "texts": texts,
    "tokenizers": tokenizers,
    "card": card,
}


def seeds(target: str) -> list[bytes]:
    """Return inputs that a target accepts, to start from."""
    if target == "schema":
        return [json.dumps(value).encode() for value in (CONFIG, WITH_WIDTHS, SECOND, WHOLE_PLAN)]
    if target == "experts":
        return [json.dumps(SECOND).encode() + b"\x00" + _shard_of_experts()]
    if target == "headers":
        shard = save({"a": torch.arange(6).view(2, 3).int(), "b": torch.ones(2, 2).bfloat16()}, {"format": "pt"})
        index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}).encode()
        return [b"\x00" + shard, index + b"\x00" + shard]
    if target == "texts":
        rows = [{"text": "a b"}, {"messages": [{"role": "user", "content": "c"}], "id": 1}]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = (lines, json.dumps(rows).encode(), b"id,text\n1,a b\n", b"plain", gzip.compress(lines))
        return [bytes([number]) + content for number in range(len(NAMES)) for content in files]
    if target == "card":
        texts = (f"# A card\n\n{BEGIN}\nold\n{END}\nmore", "# Another", f"{BEGIN}{BEGIN}{END}{END}")
        task = {"task": "piqa", "metric": "acc", "value": 0.5, "samples": 10}
        records = ({"version": 1}, {"version": 1, "tasks": [task]})
        return [text.encode() + b"\x00" + json.dumps(record).encode() for text in texts for record in records]
    if target == "tokenizers":
        return [json.dumps(TOKENIZER).encode()]
    generator = random.Random(0)
    return [
        bytes([bits]) + (64).to_bytes(2, "little") + generator.randbytes(64 * bits // 8) for bits in (*BIT_WIDTHS, 5)
    ]
