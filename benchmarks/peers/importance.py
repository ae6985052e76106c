"""llama.cpp's importance matrix: the mean square of each input of an expert matrix over the tokens routed to it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.peers.processes.job import PLACES
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.routed import Routed, finish, first_hidden, route
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.output.files import write_tensors


def write_importance(model: SourceModel, tokens: torch.Tensor, path: Path) -> None:
    """Write ``layer.expert.place`` → float32 [inputs]; ones for an expert that no token chooses, as llama.cpp takes.

    Args:
        model: the original.
        tokens: the calibration text, int64 [sequences, length].
        path: the file.
    """
    decoder = Decoder(model, read_layout(model), torch.device("cpu"), torch.float32)
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        store = first_hidden(decoder, tokens, Path(temporary))
        for index in range(len(decoder)):
            hidden, outputs = store.load(index), None
            if index in decoder.moe:
                routed = route(decoder, index, hidden, store)
                found |= _layer(decoder, index, routed)
                outputs = routed.outputs
            finish(decoder, index, hidden, store.create(index + 1), outputs)
            store.complete(index + 1)
    write_tensors(path, found)


def _layer(decoder: Decoder, index: int, routed: Routed) -> dict[str, torch.Tensor]:
    """Return the importance of a layer's inputs, and compute the outputs of its experts."""
    layer, found = decoder.moe[index], {}
    routed.outputs.zero_()
    for expert in range(layer.num_experts):
        matrices = load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype)
        sums, count = [torch.zeros(weight.shape[1]) for weight in matrices.matrices()], 0
        for inputs, share, places in routed.chunks(expert, decoder.device):
            inner = matrices.inner(inputs, decoder.activation)
            for total, values in zip(sums, (inputs, inputs, inner), strict=True):
                total += values.square().sum(dim=0)
            count += len(places)
            routed.add(places, matrices.outputs(inner) * share[:, None])
        for place, total in zip(PLACES, sums, strict=True):
            found[f"{index}.{expert}.{place}"] = total / count if count else torch.ones_like(total)
    return found
