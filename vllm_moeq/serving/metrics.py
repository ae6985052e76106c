"""The checkpoint's facts for Prometheus, beside vLLM's own metrics at ``/metrics``."""

from __future__ import annotations

import functools
from collections import Counter

from prometheus_client import Gauge

from vllm_moeq.format import MoeqConfig

NAME = "moeq_info"
"""The metric's name, without ``vllm``: vLLM unregisters every metric with these letters when it starts."""

LABELS = ("average_bits", "experts", "layers", "linear_bits", "schemes", "widths")


@functools.cache
def _gauge() -> Gauge:
    # All API servers publish the same value, so the most recent one is right.
    return Gauge(NAME, "The mixed-precision checkpoint that is served.", LABELS, multiprocess_mode="mostrecent")


def publish(config: MoeqConfig) -> None:
    """Set the gauge ``moeq_info`` to 1, with the checkpoint's facts as labels.

    Args:
        config: the checkpoint's configuration. The average counts experts alike, whatever their sizes.
    """
    widths = Counter(bits for layer in config.experts.values() for bits in layer)
    schemes = Counter(config.scheme(prefix, e).name for prefix, row in config.experts.items() for e in range(len(row)))
    count = sum(widths.values())
    gauge = _gauge()
    gauge.clear()
    gauge.labels(
        average_bits=f"{sum(bits * number for bits, number in widths.items()) / max(count, 1):.4g}",
        experts=str(count),
        layers=str(len(config.experts)),
        linear_bits=",".join(map(str, config.linear.choices)),
        schemes=_counted(schemes),
        widths=_counted(widths),
    ).set(1)


def _counted(found: Counter[int] | Counter[str]) -> str:
    return ",".join(f"{key}:{number}" for key, number in sorted(found.items()))
