"""A checkpoint's facts without its weights, of any number of layers and experts; and results of an evaluation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from planner.evaluation.record import Divergence, Evaluations, TaskResult, TextResult
from planner.plan_file import Plan
from planner.quantization.record import Recorded
from planner.reporting.facts import CheckpointSizes, Facts, LayerFacts, Part
from planner.reporting.value_maps import ValueMap, ValueMaps
from vllm_moeq.format import parse_config

WIDTHS = (1, 2, 3, 4, 8)
PREFIX = "model.layers.{}.mlp.experts"


EVALUATIONS = Evaluations(
    texts=[
        TextResult(
            data="held_out.txt", sha256="a" * 64, window=256, tokens=65536, perplexity=12.563, perplexity_error=0.171,
            reference="stdlib-mixtral", reference_perplexity=12.228,
            kl=Divergence(
                mean=0.0298, error=0.0007, median=0.0113, p99=0.262, max=3.41, same_top=0.9312, same_top_error=0.001
            ),
        )
    ],
    tasks=[TaskResult(task="arc_easy", metric="acc", value=0.2612, stderr=0.009, samples=2376, backend="vllm")],
)  # fmt: skip
"""Results of a text with a reference, and of a task."""


def synthetic(layers: int, experts: int, name: str = "owner/Model-A3B") -> tuple[Facts, ValueMaps]:
    """Return facts and quantities drawn at random, the same every time."""
    draw = random.Random(layers * 1000 + experts)
    prefixes = [PREFIX.format(layer) for layer in range(layers)]
    widths = {prefix: draw.choices(WIDTHS, (4, 5, 5, 2, 1), k=experts) for prefix in prefixes}
    average = sum(map(sum, widths.values())) / (layers * experts)
    plan = {"method": "router-norm-maxvar", "avg_bits": 2.5, "achieved_avg_bits": average, "bit_choices": list(WIDTHS)}
    config = parse_config(
        {
            "quant_method": "moeq", "format_version": 1, "group_size": 128, "experts": widths, "unquantized": [],
            "projections": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "linear": {"bits": 4},
            "plan": {**plan, "quantizer": "gptq"},
        },
        "synthetic",
    )  # fmt: skip
    entries: list[dict[str, Any]] = [
        {
            "prefix": prefix,
            "experts": [
                {
                    "expert": expert,
                    "relative_error": 2.0**-bits * draw.uniform(0.8, 1.2),
                    "tokens": int(10 ** draw.uniform(0, 5)),
                }
                for expert, bits in enumerate(found)
            ],
        }
        for prefix, found in widths.items()
    ]
    recorded = Recorded.model_validate({"layers": entries, "source": {"name": name, "bytes": 60 << 30}})
    facts = Facts(
        folder=Path(f"synthetic-{layers}x{experts}"),
        model={"model_type": "qwen3_moe"},
        config=config,
        plan=Plan.model_validate({"version": 1, "experts": widths, **plan}),
        recorded=recorded,
        evaluations=Evaluations(),
        layers=tuple(
            LayerFacts(
                prefix,
                str(layer),
                tuple(widths[prefix]),
                frozenset(draw.sample(range(experts), experts // 16 + 1)),
                dict.fromkeys(draw.sample(range(experts), experts // 32), "3 calibration tokens, fewer than 64"),
                tuple("grid" for _ in widths[prefix]),
            )
            for layer, prefix in enumerate(prefixes)
        ),
        sizes=CheckpointSizes(
            (*(Part(f"experts of {bits} bits", 2 << 30, bits) for bits in WIDTHS), Part("everything else", 2 << 30)),
            60 << 30,
            60 << 30,
        ),
        average_bits=average,
    )

    def grid(key: str, title: str, unit: str, low: float, high: float) -> ValueMap:
        rows = [tuple(draw.uniform(low, high) for _ in range(experts)) for _ in range(layers)]
        return ValueMap(key, title, "a quantity drawn at random", unit, tuple(rows))

    tokens = tuple(tuple(float(it["tokens"]) for it in entry["experts"]) for entry in entries)
    errors = tuple(tuple(100 * it["relative_error"] for it in entry["experts"]) for entry in entries)
    return facts, ValueMaps(
        (
            grid("router_norm", "Router norm", "", 0.4, 3),
            grid("max_var", "MaxVar", "", 0.0001, 0.0008),
            ValueMap("tokens", "Routed tokens", "calibration tokens that chose the expert", "tokens", tokens),
            ValueMap("relative_error", "Error of weights", "‖W − Ŵ‖ / ‖W‖", "%", errors),
            grid("output_error", "Error of outputs", "%", 2, 60),
        ),
        (),
    )
