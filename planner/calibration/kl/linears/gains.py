"""GPTQ's output error relative to rounding to nearest, for each width, tried on a few groups of linears per kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from planner.calibration.gptq.moments import Inputs, Moments
from planner.calibration.gptq.stages import ConstantExperts, find_stages
from planner.calibration.kl.linears.rounding import rounded_group, stored_values
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress
from planner.model.linear_groups import LinearGroup
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.linear import quantize_linears_gptq
from vllm_moeq.format import Linear

TRYING = "gains of GPTQ for linears"
"""Name of this work in the progress."""

TRIED = 2
"""Number of groups of each kind to try."""

MOST = 8192
"""Maximum number of tokens. Half of them give second moments, the others errors."""

Gains = Mapping[int, float]
"""Width → ‖Δ of GPTQ‖² / ‖Δ of rounding to nearest‖², Δ the change of the outputs."""


def linear_gains(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    groups: Sequence[LinearGroup],
    formats: Sequence[Linear],
    progress: Progress,
) -> dict[tuple[str, ...], Gains]:
    """Return kind of group → gains of GPTQ; 1 where GPTQ cannot be tried.

    Args:
        decoder: the model.
        store: the input of every layer.
        sequences: number of the store's sequences to read.
        groups: all groups.
        formats: one format per width.
        progress: shows the progress.
    """
    kinds = dict.fromkeys(group.kind for group in groups)
    found: dict[tuple[str, ...], Gains] = {}
    for kind in progress.track(list(kinds), TRYING):
        same = [group for group in groups if group.kind == kind]
        tried = dict.fromkeys(same[(2 * turn + 1) * len(same) // (2 * TRIED)] for turn in range(TRIED))
        errors = [error for group in tried if (error := _errors(decoder, store, sequences, group, formats))]
        found[kind] = {
            spec.bits: sum(error[spec.bits][0] for error in errors) / sum(error[spec.bits][1] for error in errors)
            if errors
            else 1.0
            for spec in formats
        }
    return found


def _errors(
    decoder: Decoder, store: HiddenStates, sequences: int, group: LinearGroup, formats: Sequence[Linear]
) -> dict[int, tuple[float, float]] | None:
    """Return width → squared output errors of GPTQ and of rounding; None if GPTQ fails or rounding changes nothing."""
    inputs = _inputs(decoder, store, sequences, group)
    if inputs is None:
        return None
    exact = [decoder.model.shards.load(name).to(decoder.device).float() for name in group.names]
    found: dict[int, tuple[float, float]] = {}
    for spec in formats:
        try:
            moments = Moments.of([Inputs(inputs[::2])]).check()
            packed = quantize_linears_gptq(exact, moments.second, None, spec, GptqSettings())
        except (NotPositiveDefiniteError, ValueError):
            return None
        plain = rounded_group(decoder.model, group, spec).values()
        better = (stored_values(tensors, spec) for tensors in packed)
        errors = [
            sum(
                float((inputs[1::2] @ (value.to(decoder.device) - weight).mT).square().sum())
                for value, weight in zip(values, exact, strict=True)
            )
            for values in (better, plain)
        ]
        if not errors[1]:
            return None
        found[spec.bits] = errors[0], errors[1]
    return found


def _inputs(decoder: Decoder, store: HiddenStates, sequences: int, group: LinearGroup) -> torch.Tensor | None:
    """Return the inputs of a group's linears, float32 [tokens, K]; None if they depend on the experts' outputs."""
    read = store.load(group.index)[: max(1, min(sequences, MOST // store.shape[1]))]
    experts = ConstantExperts()
    with decoder.layer(group.index, experts if group.index in decoder.moe else None) as call:
        stages = find_stages(decoder, group.index, group.names, call, experts, read[:1]).stages
        stage = next((stage for stage in stages if group.names[0] in stage.modules), None)
        if stage is None:
            return None
        with stage.reader(call) as inputs:
            rows = torch.cat([inputs(part) for part in read.split(1)]).float()
    return rows[torch.isfinite(rows).all(dim=1)]
