"""A model that reads tokens layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed, finish, first_hidden, route
from planner.calibration.statistics import LayerStatistics, observe
from planner.model.layout import read_layout
from planner.model.source import SourceModel


@dataclass(frozen=True)
class Read:
    """A model that has read: what stands between its layers, and what each layer saw.

    Attributes:
        store: hidden states before each layer, and behind the last.
        routed: each layer's experts of every token.
        observed: each layer's statistics.
    """

    decoder: Decoder
    store: HiddenStates
    routed: list[Routed]
    observed: list[LayerStatistics]


@contextmanager
def reading(folder: Path, tokens: torch.Tensor, where: Path) -> Iterator[Read]:
    """Have a model read tokens layer by layer, in float32; yield it with all that it saw."""
    with SourceModel(folder) as model:
        decoder = Decoder(model, read_layout(model), torch.device("cpu"), torch.float32)
        store = first_hidden(decoder, tokens, where)
        routings, observed = [], []
        for index in range(len(decoder)):
            hidden = store.load(index)
            routed = route(decoder, index, hidden, store)
            observed.append(observe(decoder, decoder.moe[index], routed))
            finish(decoder, index, hidden, store.create(index + 1), routed.outputs)
            store.complete(index + 1)
            routings.append(routed)
        yield Read(decoder, store, routings, observed)
