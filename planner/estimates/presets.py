"""Sets of flags under the names that people ask for: a number of bits, or a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.common.units import GIB, size
from planner.estimates.serving import (
    FIXED_BYTES,
    MEMORY_SHARE,
    RANKS,
    Service,
    growth_on_gpu,
    serving_needs,
    weight_room,
)
from planner.model.layout import Layout
from planner.model.sizes import Sizes, estimate
from planner.model.source import SourceModel
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Preset:
    """One row of the table. A flag on the command line counts more.

    Attributes:
        average: value of ``--avg-bits``; None where a GPU decides.
        service: the load and the GPU that decide ``--budget-gib``; None where ``average`` does.
    """

    average: str | None = None
    service: Service | None = None


PRESETS = {
    "2bit": Preset(average="2"),
    "2.5bit": Preset(average="2.5"),
    "3bit": Preset(average="3"),
    "24gb": Preset(service=Service(context=8192, concurrency=4, gpu_gib=24.0)),
    "80gb": Preset(service=Service(context=8192, concurrency=4, gpu_gib=80.0)),
}
"""Name → row."""


def budget_for(
    name: str, model: SourceModel, layout: Layout, settings: QuantizeSettings, choices: Sequence[int], service: Service
) -> float:
    """Return the GiB that one GPU has for weights, in hundredths.

    Args:
        name: the preset, for the message.
        model: the source.
        layout: the source's layout.
        settings: how the model will be quantized.
        choices: widths that experts may have.
        service: the load and the GPU.

    Raises:
        UsageError: even the smallest width takes more; the message says what it would take.
    """
    low = min(choices)
    least = estimate(
        model, layout, {layer.prefix: [low] * layer.num_experts for layer in layout.layers},
        settings.group_size, settings.linear, settings.storage,
    )  # fmt: skip
    budget = _on_disk(weight_room(model.config, layout, service), layout, least)
    if least.total_bytes <= budget * GIB:
        return budget
    needs = serving_needs(model.config, layout, least, service, settings.storage)
    if needs.gpus is None:
        would = f"it takes more than {RANKS[-1]} such GPUs, or fewer requests"
    else:
        flags = f" ({needs.flags})" if needs.flags else ""
        would = f"it takes {needs.gpus} such GPU{'s' if needs.gpus > 1 else ''}{flags}"
    raise UsageError(
        f"--preset {name}: expected room for {size(least.total_bytes)} (--bits {low}), found {budget:g} GiB, "
        f"{MEMORY_SHARE:.0%} of {service.gpu_gib:g} GiB, less {size(FIXED_BYTES)} reserved and the cache of "
        f"{service.concurrency} requests of {service.context} tokens; {would}"
    )


def _on_disk(room: int, layout: Layout, sizes: Sizes) -> float:
    """Return the GiB of a checkpoint, in hundredths, whose weights fill some bytes of a GPU, where experts grow."""
    others = sizes.linear_bytes + sizes.kept_bytes
    size_on_disk = others + (room - others) / growth_on_gpu(layout) if room > others else max(0, room)
    return math.floor(size_on_disk / GIB * 100) / 100
