"""Damages of the shards' headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.attacks.damages.attack import ESCAPE, PACKED, SHARD, Attack
from tests.attacks.forge import INDEX, entry, header, raw_shard, weight_map, with_header


def twice_in_header(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].rstrip()
    begin = text.index(f'"{PACKED}":'.encode())
    return with_header(text[:-1] + b"," + text[begin : text.index(b"}", begin) + 1] + b"}", content)


def long_header(content: bytes) -> bytes:
    return with_header(b'{"' + b"x" * (25 << 20) + b'":1}', content)


def many_tensors(content: bytes) -> bytes:
    entries = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_001))
    return with_header(f"{{{entries}}}".encode(), content)


IN_HEADER = [
    Attack("header of an exabyte", raw_shard(lambda it: b"\xff" * 7 + b"\x0f" + it[8:]),
           (SHARD, "damaged or truncated")),
    Attack("header longer than the file", raw_shard(lambda it: len(it).to_bytes(8, "little") + it[8:]),
           (SHARD, "inside the file")),
    Attack("header of 25 MiB", raw_shard(long_header), (SHARD, "expected a header of at most")),
    Attack("header of many tensors", raw_shard(many_tensors), (SHARD, "expected at most 100000 tensors")),
    Attack("header not UTF-8", raw_shard(lambda it: with_header(b'{"\xff": 1}', it)), (SHARD, "utf-8")),
    Attack("header nested deeply", raw_shard(lambda it: with_header(b"[" * 50_000, it)), (SHARD, "header: ")),
    Attack("tensor twice in the header", raw_shard(twice_in_header), (SHARD, PACKED, "twice")),
    Attack("overlap", entry(lambda it: it.update(data_offsets=[it["data_offsets"][0] - 4, it["data_offsets"][1] - 4])),
           (SHARD, "tensor ", "data_offsets")),
    Attack("hole", entry(lambda it: it.update(data_offsets=[it["data_offsets"][0] + 4, it["data_offsets"][1] + 4])),
           (SHARD, PACKED, "data_offsets")),
    Attack("offsets backwards", entry(lambda it: it["data_offsets"].reverse()), (SHARD, "tensor ", "data_offsets")),
    Attack("negative offset", entry(lambda it: it.update(data_offsets=[-8, 0])), (SHARD, PACKED, "whole numbers")),
    Attack("offset of many digits", entry(lambda it: it.update(data_offsets=[0, 1 << 4000])), (SHARD, PACKED, "whole")),
    Attack("size that overflows", entry(lambda it: it.update(shape=[1 << 40, 1 << 40])), (SHARD, PACKED, "shape")),
    Attack("negative size", entry(lambda it: it.update(shape=[-1, -512])), (SHARD, PACKED, "shape")),
    Attack("fraction of a size", entry(lambda it: it.update(shape=[64.0, 8])), (SHARD, PACKED, "shape")),
    Attack("a hundred dimensions", entry(lambda it: it.update(shape=[1] * 98 + it["shape"])),
           (SHARD, PACKED, "dimensions")),
    Attack("empty but endless", entry(lambda it: it.update(shape=[1 << 60, 0])), (SHARD, PACKED, "shape")),
    Attack("empty but endless strides", entry(lambda it: it.update(shape=[1 << 31, 1 << 31, 1 << 31, 0])),
           (SHARD, PACKED, "shape")),
    Attack("size that is not the tensor's", entry(lambda it: it.update(shape=[63, 8])), (SHARD, PACKED, "bytes")),
    Attack("unknown dtype", entry(lambda it: it.update(dtype="PICKLE")), (SHARD, PACKED, "unsupported dtype")),
    Attack("unknown key", entry(lambda it: it.update(loader="os.system")), (SHARD, PACKED, "data_offsets")),
    Attack("entry of no object", header(lambda it: it.update({PACKED: 1})), (SHARD, PACKED, "data_offsets")),
    Attack("escape in a header", header(lambda it: it.update({ESCAPE: it.pop(PACKED)})), (SHARD, r"tensor '\x1b")),
]  # fmt: skip


def same_shard(folder: Path) -> None:
    """Two hundred names in the index of one shard with much metadata."""
    text = b'{"__metadata__":{"a":"' + b"x" * 900_000 + b'"}}'
    (folder / "z0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for number in range(1, 200):
        (folder / f"z{number}.safetensors").symlink_to("z0.safetensors")
    weight_map(lambda it: it.update({f"t{i}": f"z{i}.safetensors" for i in range(200)}))(folder)


def large_metadata(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    entries = content[8 : 8 + size].rstrip()[1:]
    return with_header(b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"},' + _without_metadata(entries), content)


def _without_metadata(entries: bytes) -> bytes:
    begin = b'"__metadata__"'
    if not entries.startswith(begin):
        return entries
    return entries[entries.index(b"},") + 2 :]


def small_tensors(names: Callable[[int], list[str]], size: int, listed: int | None = None) -> Callable[[Path], None]:
    """Three shards of tensors with so many bytes each; the index names all of them, or the first of each shard."""

    def change(folder: Path) -> None:
        more: dict[str, str] = {}
        for number in range(3):
            entries = ",".join(
                f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{i * size},{(i + 1) * size}]}}'
                for i, name in enumerate(names(number))
            )
            text, shard = f"{{{entries}}}".encode(), f"e{number}.safetensors"
            (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size * len(names(number))))
            more |= dict.fromkeys(names(number)[:listed], shard)
        weight_map(lambda it: it.update(more))(folder)

    return change


def numbered(count: int, end: str = "") -> Callable[[int], list[str]]:
    return lambda number: [f"e{number}.{i}{end}" for i in range(count)]


def lists_in_header(folder: Path) -> None:
    """An entry that is eight million empty lists."""
    text = b'{"a":{"shape":[' + b"[]," * 7_900_000 + b"0]}}"
    (folder / "e0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    weight_map(lambda it: it.update(a="e0.safetensors"))(folder)


def blank_headers(folder: Path) -> None:
    """Twelve shards with headers of 24 MiB, nearly all of it blanks."""
    for number in range(12):
        text = f'{{"a{number}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'.encode().ljust(24 << 20)
        (folder / f"e{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    weight_map(lambda it: it.update({f"a{number}": f"e{number}.safetensors" for number in range(12)}))(folder)


def long_name(folder: Path) -> None:
    """An index whose first name has twenty million letters."""
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"' + "a" * 20_000_000 + '": "x",'))


MANY = [
    Attack("a name of twenty million letters", long_name, (INDEX, "values of at most 65536 characters")),
    Attack("one shard under two hundred names", same_shard, ("z1.safetensors", "the same file as z0.safetensors")),
    Attack("twenty megabytes of metadata", raw_shard(large_metadata), (SHARD, "__metadata__", "at most 1048576")),
    Attack(
        "three hundred thousand unlisted tensors",
        small_tensors(numbered(99_999, ".1" * 60), 1, listed=1),
        ("e0.safetensors", "not in the index"),
    ),
    Attack(
        "three hundred thousand listed tensors",
        small_tensors(numbered(99_999), 1),
        (INDEX, "expected at most", "tensors"),
    ),
    Attack(
        "twenty-four thousand listed tensors",
        small_tensors(numbered(8_000), 1),
        (INDEX, "expected at most", "tensors"),
    ),
    Attack("three thousand empty tensors", small_tensors(numbered(1_000), 0), ("e0.safetensors", "no empty tensor")),
    Attack("a header of lists", lists_in_header, ("e0.safetensors", "values of at most 4096 characters")),
    Attack("blanks in twelve headers", blank_headers, ("bytes of headers in all shards",)),
    Attack(
        "three hundred thousand empty tensors",
        small_tensors(numbered(99_999), 0),
        (INDEX, "expected at most", "tensors"),
    ),
]
