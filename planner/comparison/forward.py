"""Run many candidates over a text together, layer by layer. Candidates with equal expert matrices share them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from planner.calibration.reading.decoder import ROWS, Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed, finish, route
from planner.common.progress import Progress
from planner.comparison.candidates import Candidate
from planner.model.layout import MoeLayer
from planner.model.quantized import DequantizedModel
from planner.quantization.quantizers import quantize_linear
from vllm_moeq.format import Linear, drop_weak, linear_values
from vllm_moeq.format.linears import SCALES, WORDS


def read_text(
    decoder: Decoder,
    first: torch.Tensor,
    candidates: Sequence[Candidate],
    linear: Linear,
    store: HiddenStates,
    progress: Progress,
) -> torch.Tensor:
    """Return the last layer's output of each candidate [candidates, sequences, length, hidden], mapped from a file.

    Args:
        decoder: the original model.
        first: the first layer's input [sequences, length, hidden].
        candidates: candidates whose experts replace the model's.
        linear: format of the other linears, the same for all candidates without linears of their own.
        store: store for the files of hidden states.
        progress: shows the progress.
    """
    shape = (len(candidates) * len(first), *first.shape[1:])
    hidden, result = (store.scratch(f"candidates-{number}.bin", shape, store.dtype) for number in range(2))
    hidden.view(len(candidates), *first.shape)[:] = first
    for index in progress.track(range(len(decoder)), "evaluating"):
        begin = 0
        for linears, group in groupby(candidates, lambda candidate: candidate.weights.linears()):
            members = list(group)
            rows = slice(begin * len(first), (begin + len(members)) * len(first))
            begin += len(members)
            replaced = rounded_linears(decoder, index, linear) if linears is None else _stored(decoder, index, linears)
            _advance(decoder, index, (hidden[rows], result[rows]), members, store, replaced)
        hidden, result = result, hidden
    return hidden.view(len(candidates), *first.shape)


def _advance(
    decoder: Decoder,
    index: int,
    states: tuple[torch.Tensor, torch.Tensor],
    candidates: Sequence[Candidate],
    store: HiddenStates,
    replaced: Mapping[str, torch.Tensor],
) -> None:
    """Run one layer of candidates with the same other linears: from its input to its output, ``states``."""
    hidden, result = states
    layer, outputs = decoder.moe.get(index), None
    if layer is not None:
        routed = prune(route(decoder, index, hidden, store, replaced), candidates)
        add_experts(decoder, layer, routed, candidates)
        outputs = routed.outputs
    finish(decoder, index, hidden, result, outputs, replaced)


def _stored(decoder: Decoder, index: int, checkpoint: DequantizedModel) -> dict[str, torch.Tensor]:
    """Return checkpoint name → dequantized weights, for a layer's linears that are not experts."""
    return {name: checkpoint.shards.map(name) for name in _names(decoder, index)}


def _names(decoder: Decoder, index: int) -> list[str]:
    return [name for name in decoder.layout.linears if name.startswith(f"model.layers.{index}.")]


def rounded_linears(decoder: Decoder, index: int, linear: Linear) -> dict[str, torch.Tensor]:
    """Return checkpoint name → quantized and dequantized weights, for a layer's linears that are not experts."""
    found = {}
    for name in _names(decoder, index):
        alone = linear.alone(name)
        if alone.bits != 16:
            packed = quantize_linear(decoder.model.shards.load(name), alone)
            found[name] = linear_values(packed[WORDS], packed[SCALES], alone.bits)
    return found


def prune(routed: Routed, candidates: Sequence[Candidate]) -> Routed:
    """Drop the experts with a small routing weight for each candidate with an ODP threshold."""
    if not any(candidate.odp for candidate in candidates):
        return routed
    ids, weights = routed.ids.clone(), routed.weights.clone()
    span = len(ids) // len(candidates)
    for number, candidate in enumerate(candidates):
        rows = slice(number * span, (number + 1) * span)
        if candidate.odp:
            ids[rows], weights[rows] = drop_weak(ids[rows], weights[rows], candidate.odp)
    return replace(routed, ids=ids, weights=weights)


def add_experts(decoder: Decoder, layer: MoeLayer, routed: Routed, candidates: Sequence[Candidate]) -> None:
    """Add the outputs of every candidate's experts to ``routed.outputs``. One expert is in memory at a time."""
    span = len(routed.ids) // len(candidates)
    for expert in range(layer.num_experts):
        tokens, slots = routed.slots(expert)
        owners = tokens // span
        for members in _sharing(layer, expert, candidates).values():
            mine = torch.isin(owners, torch.tensor(members))
            if not bool(mine.any()):
                continue
            weights = candidates[members[0]].weights.load(decoder, layer, expert)
            for places, columns in zip(tokens[mine].split(ROWS), slots[mine].split(ROWS), strict=True):
                inputs = routed.inputs[places].to(decoder.device)
                output = weights(inputs, decoder.activation).float()
                routed.add(places, output * routed.weights[places, columns].to(output)[:, None])


def _sharing(layer: MoeLayer, expert: int, candidates: Sequence[Candidate]) -> Mapping[Hashable, list[int]]:
    """Return key of an expert's matrices → indices of the candidates that share them."""
    groups: dict[Hashable, list[int]] = {}
    for number, candidate in enumerate(candidates):
        groups.setdefault(candidate.weights.key(layer, expert), []).append(number)
    return groups
