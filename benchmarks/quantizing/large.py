"""This benchmark measures the planner's speed and peak memory on a checkpoint of any size, and a plain read beside it.

The checkpoint has Mixtral's layout and random weights, by default 21 GiB of experts. It is written into --folder and
deleted afterwards:

    python benchmarks/quantizing/large.py --folder /data/tmp
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.format import ShardSet

GB, GIB = 1e9, 1 << 30
BLOCK = 1 << 24
SAMPLE_SECONDS = 0.01
VOCABULARY, HEADS, KEY_VALUE_HEADS, HEAD = 32_000, 32, 8, 128


@dataclass(frozen=True)
class Run:
    """Time and memory of a command."""

    seconds: float
    peak: int
    anonymous: int


def shapes(layers: int, experts: int, hidden: int, intermediate: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard: one per decoder layer, then the rest."""
    for index in range(layers):
        base = f"model.layers.{index}"
        shard: dict[str, tuple[int, ...]] = {f"{base}.{name}_layernorm.weight": (hidden,) for name in ("input", "post")}
        for name, heads in (("q", HEADS), ("k", KEY_VALUE_HEADS), ("v", KEY_VALUE_HEADS)):
            shard[f"{base}.self_attn.{name}_proj.weight"] = (heads * HEAD, hidden)
        shard[f"{base}.self_attn.o_proj.weight"] = (hidden, HEADS * HEAD)
        shard[f"{base}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name in ("w1", "w3"):
                shard[f"{base}.block_sparse_moe.experts.{expert}.{name}.weight"] = (intermediate, hidden)
            shard[f"{base}.block_sparse_moe.experts.{expert}.w2.weight"] = (hidden, intermediate)
        yield shard
    yield {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }


def write_model(folder: Path, layers: int, experts: int, hidden: int, intermediate: int) -> None:
    """Write a bfloat16 checkpoint whose tensors are pieces of one random block, each from another place on."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator).mul_(0.02).bfloat16()
    data = block.repeat(2).view(torch.uint8).numpy().data
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shapes(layers, experts, hidden, intermediate)):
        name = f"model-{number:05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in tensors.items():
            size = 2 * int(torch.Size(shape).numel())
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in header.values():
                begin, left = int(torch.randint(BLOCK, (1,), generator=generator)), entry["data_offsets"]
                size = left[1] - left[0]
                while size:
                    size -= file.write(data[2 * begin : 2 * begin + min(size, 2 * BLOCK)])
            os.fsync(file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "mixtral", "num_hidden_layers": layers, "num_local_experts": experts, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path, names: Sequence[str]) -> tuple[int, float]:
    """Read the bytes of some tensors, 1 MiB at a time into one buffer; return bytes and seconds."""
    with ShardSet(folder) as shards:
        infos = [shards.info(name) for name in names]
        files = {shard: os.open(folder / shard, os.O_RDONLY) for shard in {info.shard for info in infos}}
        view = torch.empty(1 << 20, dtype=torch.uint8).numpy().data
        total, began = 0, time.perf_counter()
        for info in infos:
            done = 0
            while done < info.nbytes:
                wanted = min(len(view), info.nbytes - done)
                done += os.preadv(files[info.shard], [view[:wanted]], info.offset + done)
            total += done
        seconds = time.perf_counter() - began
        for descriptor in files.values():
            os.close(descriptor)
    return total, seconds


def measured(arguments: Sequence[str]) -> Run:
    """Run ``moeq`` and watch its memory, that of its workers included."""
    command = [str(Path(sys.executable).with_name("moeq")), *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, dict[str, int]] = {}
    while process.poll() is None:
        for pid in (process.pid, *_children(process.pid)):
            entry = peaks.setdefault(pid, {})
            for key, value in _memory(pid).items():
                entry[key] = max(value, entry.get(key, 0))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {process.stderr.read() if process.stderr else ''}")
    total = {key: sum(entry.get(key, 0) for entry in peaks.values()) for key in ("VmHWM", "RssAnon")}
    return Run(seconds, total["VmHWM"], total["RssAnon"])


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) << 10 for key in ("VmHWM", "RssAnon") if key in fields}


def main() -> None:
    """Write the model, run the commands, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint may go")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14_336)
    parser.add_argument("--quantizers", default="rtn,hqq")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        model, began = Path(temporary) / "model", time.perf_counter()
        write_model(model, args.layers, args.experts, args.hidden, args.intermediate)
        with ShardSet(model) as shards:
            infos = shards.tensors
        whole = sum(info.nbytes for info in infos.values())
        by_shard: dict[str, int] = {}
        for name, info in infos.items():
            if name.startswith("model.layers."):
                by_shard[info.shard] = by_shard.get(info.shard, 0) + info.nbytes
        largest = max(by_shard.values())
        experts = sum(info.nbytes for name, info in infos.items() if ".experts." in name)
        scored = [name for name in infos if name.endswith((".w1.weight", "block_sparse_moe.gate.weight"))]
        print(
            f"{args.layers} layers of {args.experts} experts, hidden {args.hidden}, intermediate {args.intermediate}: "
            f"{whole / GIB:.2f} GiB, {experts / GIB:.2f} GiB of them experts, largest layer {largest / GIB:.2f} GiB; "
            f"written in {time.perf_counter() - began:.0f} s; {torch.get_num_threads()} threads\n"
        )
        print(
            "| step | GB read | seconds | GB/s | M weights/s | of plain read | whole command, s "
            "| peak GiB | anonymous GiB | peak / largest layer |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for state in ("cold", "warm"):
            if state == "cold":
                forget(model)
            size, seconds = plain_read(model, scored)
            if state == "warm":
                size, seconds = min((plain_read(model, scored) for _ in range(3)), key=lambda found: found[1])
            plain = size / seconds
            print(
                f"| plain read, {state} | {size / GB:.2f} | {seconds:.2f} | {plain / GB:.2f} | | | | | | |", flush=True
            )
            if state == "cold":
                forget(model)
            path = Path(temporary) / "plan.json"
            run = measured(["plan", str(model), "--avg-bits", "2.5", "-o", str(path)])
            seconds = json.loads(path.read_text())["cost"]["seconds"]
            rate = size / seconds
            print(
                f"| plan, {state} | {size / GB:.2f} | {seconds:.2f} | {rate / GB:.2f} | {rate / 2e6:.0f} "
                f"| {rate / plain:.0%} | {run.seconds:.2f} | {run.peak / GIB:.2f} | {run.anonymous / GIB:.2f} "
                f"| {run.peak / largest:.2f} |",
                flush=True,
            )
        for quantizer in filter(None, args.quantizers.split(",")):
            forget(model)
            output = Path(temporary) / quantizer
            arguments = ["--plan", str(path), "--quantizer", quantizer, "--jobs", str(args.jobs), "-o", str(output)]
            run = measured(["quantize", str(model), *arguments])
            shutil.rmtree(output)
            print(
                f"| quantize, {quantizer}, cold | {whole / GB:.2f} | {run.seconds:.1f} "
                f"| {whole / run.seconds / GB:.3f} | {whole / 2e6 / run.seconds:.1f} | | {run.seconds:.1f} "
                f"| {run.peak / GIB:.2f} | {run.anonymous / GIB:.2f} | {run.peak / largest:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
