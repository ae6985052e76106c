"""Damages of a folder's files: their kinds, their sizes, and what stands beside them."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

from tests.attacks.damages.attack import SHARD, Attack
from tests.attacks.forge import INDEX, file, raw_shard, replace_by_link, shard


def pickled(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def link_out(folder: Path) -> None:
    path = shard(folder)
    outside = folder.with_name("outside.safetensors")
    shutil.move(path, outside)
    path.symlink_to(outside)


def link_to_itself(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    path.symlink_to(path.name)


def config_link(folder: Path) -> None:
    outside = folder.with_name("outside.json")
    shutil.move(folder / "config.json", outside)
    (folder / "config.json").symlink_to(outside)


def fifo(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)


def directory(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    path.mkdir()


FILES = [
    Attack("only a pickle", pickled, ("expected model.safetensors", "found neither")),
    Attack("link out of the folder", link_out, (SHARD, "expected a file inside the folder", "outside.safetensors")),
    Attack("link to a device", replace_by_link("/dev/zero"), (SHARD, "found a link to /dev/zero")),
    Attack("link to itself", link_to_itself, (SHARD, "found a link to none")),
    Attack("config.json is a link", config_link, ("config.json", "expected a file inside the folder")),
    Attack("named pipe", fifo, (SHARD, "found no regular file")),
    Attack("folder", directory, (SHARD, "found no regular file")),
    Attack("empty shard", raw_shard(lambda _: b""), (SHARD, "damaged or truncated shard of 0 bytes")),
    Attack("truncated shard", raw_shard(lambda it: it[:-7]), (SHARD, "damaged or truncated")),
    Attack("bytes at the end", raw_shard(lambda it: it + b"more"), (SHARD, "the end of its tensors")),
]


PREFERRED = [
    Attack(f"another file: {name}", file(name, b"{}"), (name, "expected no such file beside", INDEX))
    for name in (
        "extra.safetensors", "consolidated.safetensors", "consolidated.safetensors.index.json", "MODEL-9.SAFETENSORS",
        "params.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
        "model.gguf", "model.pt", "model.pth", "adapter_config.json", "adapter_model.safetensors",
        "hf_quant_config.json", "modeling_evil.py", "config.4.0.json", "model.tensors",
    )
]  # fmt: skip
"""Weights, configs and code that vLLM or transformers may take instead of what was checked."""
