"""Ways to damage a checkpoint that no honest writer has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.block_sparse_moe.experts"
TENSOR = f"{LAYER}.3.w2"
ATTENTION = "model.layers.0.self_attn.q_proj"
OUTPUT = "model.layers.0.self_attn.o_proj"

Edit = Callable[[Any], Any]


def shard(folder: Path, tensor: str = f"{TENSOR}.weight_packed") -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_json(path: Path, edit: Edit) -> None:
    """Change a parsed file in place, or replace it by what ``edit`` returns."""
    value = json.loads(path.read_text())
    changed = edit(value)
    path.write_text(json.dumps(value if changed is None else changed))


def config(edit: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", edit)


def ours(edit: Edit) -> Callable[[Path], None]:
    """Change the quantization_config."""

    def change(value: dict[str, Any]) -> None:
        changed = edit(value["quantization_config"])
        if changed is not None:
            value["quantization_config"] = changed

    return config(change)


def widths(found: Any, version: int = 2) -> Callable[[Path], None]:
    """Give single linears a width."""
    return ours(lambda it: it.update(format_version=version, linear={**it["linear"], "widths": found}))


def config_text(old: str, new: str) -> Callable[[Path], None]:
    """Change the text of config.json: what no JSON library would write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        text = json.dumps(json.loads(path.read_text()))
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def weight_map(edit: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda index: edit(index["weight_map"]))


def point(target: object) -> Callable[[Path], None]:
    """Have the index say that a tensor is in another file."""
    return weight_map(lambda names: names.update({f"{TENSOR}.weight_packed": target}))


def file(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """Make a file of zeros that takes no space on the disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("wb") as out:
            out.truncate(size)

    return change


def raw_shard(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of a shard."""

    def change(folder: Path) -> None:
        shard(folder).write_bytes(edit(shard(folder).read_bytes()))

    return change


def with_header(header: bytes, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def header(edit: Edit) -> Callable[[Path], None]:
    """Change a shard's parsed header."""

    def change(content: bytes) -> bytes:
        entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        edit(entries)
        return with_header(json.dumps(entries).encode(), content)

    return raw_shard(change)


def entry(edit: Edit, tensor: str = f"{TENSOR}.weight_packed") -> Callable[[Path], None]:
    """Change what a shard's header says of one tensor."""
    return header(lambda entries: edit(entries[tensor]))


def replace_by_link(target: str | Path) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = shard(folder)
        path.unlink()
        path.symlink_to(target)

    return change


def tensor(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Replace one tensor, or remove it, as an honest writer would."""

    def change(folder: Path) -> None:
        path = shard(folder, name)
        tensors = load_file(path)
        changed = edit(tensors.pop(name).clone())
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, path, metadata={"format": "pt"})
        if changed is None:
            weight_map(lambda names: names.pop(name) and None)(folder)

    return change


def filled(name: str, value: float) -> Callable[[Path], None]:
    """Set one element."""

    def edit(values: torch.Tensor) -> torch.Tensor:
        values[-1, -1] = value
        return values

    return tensor(name, edit)


def added(name: str, beside: str = f"{TENSOR}.weight_packed") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = shard(folder, beside)
        save_file({**load_file(path), name: torch.zeros(2, 2)}, path, metadata={"format": "pt"})
        weight_map(lambda names: names.update({name: path.name}))(folder)

    return change
