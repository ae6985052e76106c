"""Damages of the index."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks.damages.attack import ESCAPE, PACKED, Attack
from tests.attacks.forge import INDEX, edit_json, file, point, shard, sparse, weight_map

PLAIN = "expected a plain shard file name"


def second_copy(folder: Path) -> None:
    shutil.copy(shard(folder), folder / "model.safetensors")


def metadata(value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda it: it.update(metadata=value))


def without_one(names: dict[str, str]) -> None:
    del names[PACKED]


def no_metadata(folder: Path) -> None:
    edit_json(folder / INDEX, lambda it: {"weight_map": it["weight_map"]})


def renamed(name: str) -> Callable[[Path], None]:
    """Give a shard another name, in the index too."""

    def change(folder: Path) -> None:
        old = shard(folder)
        old.rename(folder / name)
        weight_map(lambda it: it.update({tensor: name for tensor, file in it.items() if file == old.name}))(folder)

    return change


IN_INDEX = [
    Attack("traversal", point("../../secret.safetensors"), (INDEX, PACKED, PLAIN, "../../secret")),
    Attack("absolute path", point("/etc/secret.safetensors"), (INDEX, PACKED, PLAIN, "/etc/secret")),
    Attack("device in the index", point("/dev/zero"), (INDEX, PACKED, PLAIN, "/dev/zero")),
    Attack("pickle in the index", point("pytorch_model.bin"), (INDEX, PACKED, PLAIN, "pytorch_model.bin")),
    Attack("shard that is a number", point(7), (INDEX, PACKED, PLAIN, "7")),
    Attack("shard that is a list", point(["a.safetensors"]), (INDEX, PACKED, PLAIN)),
    Attack("shard name with an escape", point(f"{ESCAPE}.safetensors"), (INDEX, PACKED, PLAIN, r"\x1b")),
    Attack("missing shard", point("b.safetensors"), ("b.safetensors", "found no regular file")),
    Attack("name with an escape", weight_map(lambda it: it.update({ESCAPE: "a.safetensors"})),
           (INDEX, r"tensor '\x1b")),
    Attack("endless name", weight_map(lambda it: it.update({"n" * 5000: "a.safetensors"})),
           (INDEX, "at most 512 char")),
    Attack("wrong shard", point("model-00003-of-00003.safetensors"), ("model-00003", PACKED, "in the index but not")),
    Attack("index of no object", file(INDEX, b"[]"), (INDEX, "weight_map")),
    Attack("index without text", file(INDEX, b""), (INDEX, "not valid JSON")),
    Attack("index not UTF-8", file(INDEX, b'{"weight_map": {"\xff": 1}}'), (INDEX, "not valid JSON")),
    Attack("index nested deeply", file(INDEX, b'{"weight_map":' * 100_000), (INDEX, "levels")),
    Attack("index nested somewhat", file(INDEX, b'{"a":' * 99 + b"1" + b"}" * 99), (INDEX, "at most 64 levels")),
    Attack("huge sparse index", sparse(INDEX, 1 << 40), (INDEX, "expected at most")),
    Attack("index of a million objects", file(INDEX, b'{"weight_map":[' + b"{}," * (1 << 20)), (INDEX, "values")),
    Attack("wide characters", file(INDEX, '"\N{GRINNING FACE}'.encode() + b"x" * (9 << 20)), (INDEX, "not all ASCII")),
    Attack("one key twice", file(INDEX, b'{"weight_map": {"a": "b.safetensors", "a": "c"}}'),
           (INDEX, "the key 'a' stands twice")),
    Attack("one key twice, once escaped", file(INDEX, b'{"weight_map": {"a": "b.safetensors", "\\u0061": "c"}}'),
           (INDEX, "the key 'a' stands twice")),
    Attack("two maps in the index", file(INDEX, b'{"weight_map": {"a": "b.safetensors"}, "weight_map": {}}'),
           (INDEX, "the key 'weight_map' stands twice")),
    Attack("more behind the index", file(INDEX, b'{"weight_map": {"a": "b.safetensors"}} {}'),
           (INDEX, "expected no more text")),
    Attack("number of many digits", file(INDEX, b'{"weight_map": ' + b"9" * 10_000 + b"}"), (INDEX, "not valid JSON")),
    Attack("four thousand shards",
           weight_map(lambda it: it.update({f"t{i}": f"{i}.safetensors" for i in range(4_001)})),
           (INDEX, "at most 4000 shards")),
    Attack("no metadata in the index", no_metadata, (INDEX, "metadata", "which transformers reads")),
    Attack("metadata of no object", metadata([]), (INDEX, "metadata", "which transformers reads")),
    Attack("metadata of null", metadata(None), (INDEX, "metadata", "which transformers reads")),
    Attack("a tensor that the index lacks", weight_map(without_one),
           (PACKED, "in the file but not in the index")),
    *(Attack(f"a shard named {name}", renamed(name), (name, "a reader might prefer it"))
      for name in ("model.safetensors", "consolidated-7.safetensors", ".hidden.safetensors")),
    Attack("weights beside the index", second_copy, ("model.safetensors: expected no such file beside", INDEX)),
]  # fmt: skip
