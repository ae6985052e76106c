"""The corpus: what is done to a checkpoint, and what the refusal has to say."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.attacks.forge import (
    ATTENTION,
    INDEX,
    LAYER,
    OUTPUT,
    TENSOR,
    added,
    config,
    config_text,
    entry,
    file,
    filled,
    header,
    ours,
    point,
    raw_shard,
    replace_by_link,
    shard,
    sparse,
    tensor,
    weight_map,
    widths,
    with_header,
)

PACKED, SCALE, ZERO = (f"{TENSOR}.weight_{suffix}" for suffix in ("packed", "scale", "zero"))
SHARD = "model-0000"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"
PLAIN = "expected a plain shard file name"


@dataclass(frozen=True)
class Attack:
    """One damage.

    Attributes:
        name: in a few words.
        change: does it to a folder.
        words: what the message has to hold: file, tensor or field, and what is wrong.
        foreign: vLLM and transformers read config.json before they know that it is ours, and fail or not in their own
            way; the check begins where they hand over.
    """

    name: str
    change: Callable[[Path], None]
    words: tuple[str, ...]
    foreign: bool = False


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


def second_copy(folder: Path) -> None:
    shutil.copy(shard(folder), folder / "model.safetensors")


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


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


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
    Attack("one key twice", file(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), (INDEX, "the key 'a' stands twice")),
    Attack("number of many digits", file(INDEX, b'{"weight_map": ' + b"9" * 10_000 + b"}"), (INDEX, "not valid JSON")),
    Attack("ten thousand shards",
           weight_map(lambda it: it.update({f"t{i}": f"{i}.safetensors" for i in range(10_001)})),
           (INDEX, "at most 10000 shards")),
    Attack("weights beside the index", second_copy, ("model.safetensors: expected no such file beside", INDEX)),
]  # fmt: skip

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


def empty_tensors(folder: Path) -> None:
    """Three shards of a hundred thousand tensors without elements, as many as a shard may have."""
    for number in range(3):
        entries = ",".join(f'"e{number}.{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(99_999))
        text = f"{{{entries}}}".encode()
        (folder / f"e{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    more = {f"e{number}.{i}": f"e{number}.safetensors" for number in range(3) for i in range(99_999)}
    weight_map(lambda it: it.update(more))(folder)


MANY = [
    Attack("one shard under two hundred names", same_shard, ("z1.safetensors", "the same file as z0.safetensors")),
    Attack("twenty megabytes of metadata", raw_shard(large_metadata), (SHARD, "__metadata__", "at most 1048576")),
    Attack("three hundred thousand empty tensors", empty_tensors, ("e0.safetensors", "no empty tensor")),
]


def overflowing(name: str, value: float) -> Callable[[Path], None]:
    """Set one element of an expert's scales or zeros in bfloat16, which holds numbers of any size."""

    def change(folder: Path) -> None:
        for part in (SCALE, ZERO):
            tensor(part, lambda it: it.bfloat16())(folder)
        filled(name, value)(folder)

    return change


def key(name: str, value: object) -> Callable[[Path], None]:
    """Set a key of config.json."""
    return config(lambda it: it.update({name: value}))


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

LEADING = [
    Attack(f"leading key: {name}", key(name, value), ("config.json", name, "expected no such key"), foreign=foreign)
    for name, value, foreign in (
        ("transformers_weights", "../outside.safetensors", False),
        ("configuration_files", ["config.4.0.json"], True),
        ("compression_config", {"quant_method": "compressed-tensors"}, True),
        ("speculators_config", {"verifier": {"name_or_path": "evil/model"}}, False),
        ("attn_implementation", "evil/kernel", True),
        ("_attn_implementation", "evil/kernel", True),
        ("experts_implementation", "evil/kernel", True),
        ("_experts_implementation", {"text_config": "evil/kernel"}, True),
        ("vision_config", {"attn_implementation": "evil/kernel"}, True),
    )
]  # fmt: skip
"""Keys of config.json that lead a reader to code, other weights or another config."""

AGAINST_FILES = [
    Attack(f"{name} of {value!r:.20}", key(name, value), ("config.json", name, "expected"), foreign=True)
    for name, value in (
        ("num_hidden_layers", 3), ("num_hidden_layers", 10**8), ("num_hidden_layers", 0), ("num_hidden_layers", -1),
        ("num_hidden_layers", 2.5), ("num_hidden_layers", "2"), ("num_hidden_layers", float("nan")),
        ("hidden_size", -64), ("hidden_size", 0), ("hidden_size", 10**30), ("hidden_size", "64"),
        ("vocab_size", 10**12), ("vocab_size", 1.5), ("num_attention_heads", 0), ("num_attention_heads", float("nan")),
    )
]  # fmt: skip
AGAINST_FILES += [
    Attack("one layer of two", config(lambda it: it.update(num_hidden_layers=1)),
           (SHARD, "tensor model.layers.1.", "expected no such tensor")),
    Attack("half of the width", config(lambda it: it.update(hidden_size=32)), (SHARD, "expected [", "found [")),
    Attack("another vocabulary", config(lambda it: it.update(vocab_size=512)), (SHARD, "expected [512, 64]")),
]  # fmt: skip
"""Sizes in config.json that are not those of the files."""

TENSORS = [
    Attack("dense linear beside the packed one", added(f"{ATTENTION}.weight"), (SHARD, f"{ATTENTION}.weight", "both")),
    Attack("no last norm", tensor("model.norm.weight", lambda _: None), ("model.norm.weight", "is missing")),
    Attack("scale that overflows", overflowing(SCALE, 1e30), (SHARD, SCALE, "values up to 65504")),
    Attack("zero that overflows", overflowing(ZERO, -3e38), (SHARD, ZERO, "values up to 65504")),
    Attack("linear's scale that overflows", filled(f"{ATTENTION}.weight_scale", 1e30),
           (SHARD, f"{ATTENTION}.weight_scale", "values up to 65504")),
    Attack("missing words", tensor(PACKED, lambda _: None), (PACKED, "is missing")),
    Attack("missing scales", tensor(SCALE, lambda _: None), (SCALE, "is missing")),
    Attack("missing zeros", tensor(ZERO, lambda _: None), (ZERO, "is missing")),
    Attack("same tensor in two shards", added(PACKED, f"{LAYER.replace('.0.', '.1.')}.0.w1.weight_packed"),
           (SHARD, PACKED, "is also in")),
    Attack("stray expert", added(f"{LAYER}.8.w1.weight_packed"), (SHARD, f"{LAYER}.8.w1.weight_packed", "no expert")),
    Attack("words of another dtype", tensor(PACKED, lambda it: it.float()), (SHARD, PACKED, "2-D int32")),
    Attack("words of another width", tensor(PACKED, lambda it: it.repeat(1, 2)), (SHARD, PACKED, "for 2 bits")),
    Attack("words in one dimension", tensor(PACKED, lambda it: it.flatten()), (SHARD, PACKED, "2-D int32")),
    Attack("scales of another dtype", tensor(SCALE, lambda it: it.float()), (SHARD, SCALE, "float16 or bfloat16")),
    Attack("scales of another shape", tensor(SCALE, lambda it: it[:, :-1].contiguous()), (SHARD, TENSOR)),
    Attack("no scales", tensor(SCALE, lambda it: it[:, :0].contiguous()), (SHARD, SCALE)),
    Attack("zeros of another dtype", tensor(ZERO, lambda it: it.float()), (SHARD, ZERO, "expected")),
    Attack("scale of 0", filled(SCALE, 0), (SHARD, SCALE, "no scale of 0")),
    Attack("scale NaN", filled(SCALE, float("nan")), (SHARD, SCALE, "finite")),
    Attack("scale infinite", filled(SCALE, float("inf")), (SHARD, SCALE, "finite")),
    Attack("zero NaN", filled(ZERO, float("nan")), (SHARD, ZERO, "finite")),
    Attack("zero infinite", filled(ZERO, float("-inf")), (SHARD, ZERO, "finite")),
    Attack("linear's scale NaN", filled(f"{ATTENTION}.weight_scale", float("nan")),
           (SHARD, f"{ATTENTION}.weight_scale", "finite")),
    Attack("linear's words", tensor(f"{ATTENTION}.weight_packed", lambda it: it[:, :-1].contiguous()),
           (SHARD, f"{ATTENTION}.weight_packed", "do not fit")),
    Attack("linear's scales are whole numbers", tensor(f"{ATTENTION}.weight_scale", lambda it: it.to(torch.int16)),
           (SHARD, f"{ATTENTION}.weight_packed", "do not fit")),
]  # fmt: skip

WIDE = '"experts": {' + ",".join(f'"l{i}": [' + ",".join(["9"] * 900) + "]" for i in range(1000)) + '}, "x": {'
IN_CONFIG = [
    Attack("unknown key in config", ours(lambda it: it.update(surprise=1)),
           ("config.json", "surprise", "not permitted")),
    Attack("unknown key within", ours(lambda it: it["linear"].update(code="x")), ("config.json", "linear.code")),
    Attack("no object", ours(lambda _: [1]), ("config.json",), foreign=True),
    Attack("another version", ours(lambda it: it.update(format_version=3)), ("config.json", "format_version")),
    Attack("true for a number", ours(lambda it: it.update(group_size=True)), ("config.json", "group_size", "True")),
    Attack("endless group size", ours(lambda it: it.update(group_size=10**4000)), ("config.json", "group_size")),
    Attack("width of five bits", ours(lambda it: it["experts"][LAYER].__setitem__(3, 5)),
           ("config.json", f"experts.{LAYER}.3")),
    Attack("width of other words", ours(lambda it: it["experts"][LAYER].__setitem__(3, 3)),
           (SHARD, f"{LAYER}.3.w1.weight_packed", "for 3 bits")),
    Attack("too few experts", ours(lambda it: it["experts"][LAYER].pop() and None),
           ("config.json", LAYER, "expected 8 widths, found 7")),
    Attack("too many experts", ours(lambda it: it["experts"][LAYER].append(1)),
           ("config.json", LAYER, "expected 8 widths, found 9")),
    Attack("model of other experts", config(lambda it: it.update(num_local_experts=4)),
           ("config.json", LAYER, "expected 4 widths, found 8")),
    Attack("list of a hundred thousand widths", ours(lambda it: it["experts"].update({LAYER: [1] * 100_000})),
           ("config.json", LAYER, "4096")),
    Attack("nine hundred thousand mistakes", config_text('"experts": {', WIDE), ("config.json",), foreign=True),
    Attack("a hundred thousand unknown keys", ours(lambda it: it.update({f"k{i}": 1 for i in range(100_000)})),
           ("config.json", "the object", "1024 keys")),
    Attack("twenty thousand layers", ours(lambda it: it["experts"].update({f"l{i}": [1] for i in range(20_000)})),
           ("config.json", "experts", "1024 keys")),
    Attack("number without end", config_text('"group_size": 32', '"group_size": 1e999'), ("config.json", "group_size")),
    Attack("threshold without end", config_text('"quant_method"', f'"odp": {{"{LAYER}": 1e999}}, "quant_method"'),
           ("config.json", f"odp.{LAYER}")),
    Attack("threshold NaN", config_text('"quant_method"', f'"odp": {{"{LAYER}": NaN}}, "quant_method"'),
           ("config.json", f"odp.{LAYER}")),
    Attack("zeta without end", ours(lambda it: it["plan"].update(zeta=float("inf"))), ("config.json", "plan.zeta")),
    Attack("pattern among linears", ours(lambda it: it["unquantized"].append("re:(a+)+$")),
           ("config.json", "unquantized.", "re:(a+)+$")),
    Attack("pattern for a prefix", ours(lambda it: it["experts"].update({"(a+)+$": [1] * 8})),
           ("config.json", "(a+)+$")),
    Attack("bait for patterns", ours(lambda it: it["unquantized"].append("a" * 100_000 + "!")), ("config.json", "512")),
    Attack("projection that is a path", ours(lambda it: it["projections"].update(gate="../w1")),
           ("config.json", "projections.gate")),
    Attack("escape in config", ours(lambda it: it.update(quant_method=f"moeq{ESCAPE}")),
           ("config.json", r"\x1b"), foreign=True),
    Attack("code", config(lambda it: it.update(auto_map={"AutoConfig": "evil.Config"})),
           ("config.json", "auto_map", "expected no such key")),
    Attack("code of the language model",
           config(lambda it: it.update(text_config={"auto_map": {"AutoModel": "evil.M"}})),
           ("config.json", "auto_map"), foreign=True),
    Attack("key twice in config", config_text('"group_size": 32', '"group_size": 64, "group_size": 32'),
           ("config.json", "'group_size' stands twice")),
    Attack("config nested deeply", file("config.json", b'{"a":' * 100_000), ("config.json", "levels"), foreign=True),
    Attack("config nested somewhat", ours(lambda it: it.update(plan=nested(200))),
           ("config.json", "levels"), foreign=True),
    Attack("empty config", file("config.json", b""), ("config.json", "not valid JSON"), foreign=True),
    Attack("config not UTF-8", file("config.json", b'{"\xff": 1}'), ("config.json", "not valid JSON"), foreign=True),
    Attack("config with NUL", file("config.json", b"\x00" * 100), ("config.json", "not valid JSON"), foreign=True),
    Attack("huge sparse config", sparse("config.json", 1 << 40), ("config.json", "expected at most"), foreign=True),
    Attack("config of digits", config_text('"group_size": 32', '"group_size": ' + "9" * 10_000),
           ("config.json", "not valid JSON"), foreign=True),
]  # fmt: skip


OF_LINEARS = [
    Attack("linear of three bits", widths({OUTPUT: 3}), ("config.json", f"linear.widths.{OUTPUT}", "found 3")),
    Attack("linear of true bits", widths({OUTPUT: True}), ("config.json", f"linear.widths.{OUTPUT}", "found True")),
    Attack("linear of other words", widths({OUTPUT: 8}), (SHARD, f"{OUTPUT}.weight_packed", "do not fit 8 bits")),
    Attack("all linears of other words", ours(lambda it: it["linear"].update(bits=8)),
           (SHARD, "weight_packed", "do not fit 8 bits")),
    Attack("linear of two widths", widths({OUTPUT: 4}), ("config.json", OUTPUT, "another width than linear.bits")),
    Attack("linear that is not there", widths({"model.layers.7.self_attn.o_proj": 8}),
           ("config.json", "model.layers.7.self_attn.o_proj.weight_packed is missing")),
    Attack("linear that is not packed", widths({"model.norm": 8}), ("config.json", "model.norm.weight_packed")),
    Attack("linear that is an expert's", widths({TENSOR: 8}), ("config.json", TENSOR, "outside the experts")),
    Attack("linear that is a path", widths({"../o_proj": 8}), ("config.json", "linear.widths", "../o_proj")),
    Attack("width of an unquantized linear", widths({"lm_head": 8}), ("config.json", "lm_head", "unquantized")),
    Attack("packed linear that is unquantized", ours(lambda it: it["unquantized"].append(OUTPUT)),
           (SHARD, f"{OUTPUT}.weight_packed", "unquantized")),
    Attack("widths within what vLLM joins", widths({ATTENTION: 8}),
           ("config.json", ATTENTION, "as vLLM joins them, found")),
    Attack("widths in version 1", widths({OUTPUT: 8}, 1), ("config.json", "format_version: expected 2", "found 1")),
    Attack("version 2 without its keys", ours(lambda it: it.update(format_version=2)),
           ("config.json", "format_version: expected 1", "found 2")),
    Attack("a hundred thousand linears", widths({f"l{i}": 3 for i in range(100_000)}),
           ("config.json", "linear.widths", "16384 keys")),
    Attack("as many mistakes as may be", widths({f"l{i}": 3 for i in range(16_384)}),
           ("config.json", "linear.widths.l0", "found 3")),
]  # fmt: skip
"""Widths of single linears, format version 2."""

CORPUS = [
    *IN_INDEX, *FILES, *PREFERRED, *IN_HEADER, *MANY, *TENSORS, *IN_CONFIG, *OF_LINEARS, *LEADING, *AGAINST_FILES,
]  # fmt: skip
