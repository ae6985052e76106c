"""Write the dequantized experts of Slim-LLM. Its widths per group do not fit the checkpoint format."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.calibration.reading.routed import Routed, finish, first_hidden, route
from planner.common.progress import Progress
from planner.comparison.fallbacks import INDEX, KEY
from planner.comparison.forward import rounded_linears
from planner.model.layout import MoeLayer
from planner.output.files import write_json, write_tensors
from planner.quantization.quantizers import quantizer_for
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.slim import quantize_slim
from planner.quantization.quantizers.table import DEFAULT, DEFAULT_ONE_BIT
from vllm_moeq.format import Linear

SAMPLE = 2048
"""Number of tokens that decide how many groups change their width."""


def write_slim(
    decoder: Decoder,
    tokens: torch.Tensor,
    bits: int,
    group_size: int,
    linear: Linear,
    min_tokens: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Quantize a model's experts by Slim-LLM and write their dequantized matrices.

    Each layer gets the hidden states of the quantized layers before it.

    Args:
        decoder: the original model.
        tokens: calibration tokens, int64 [sequences, length].
        bits: average width of every expert.
        group_size: number of weights that share a scale and a width.
        linear: format of the other linears.
        min_tokens: minimum number of tokens; hqq quantizes experts that saw fewer, with one width for all groups.
        folder: folder to create.
        progress: shows the progress.

    Raises:
        MoeqError: a damaged tensor, a full disk.
    """
    folder.mkdir()
    names: dict[str, str] = {}
    fallbacks = 0
    with TemporaryDirectory() as temporary:
        store = first_hidden(decoder, tokens, Path(temporary))
        for index in progress.track(range(len(decoder)), "quantizing by Slim-LLM"):
            hidden, layer, outputs = store.load(index), decoder.moe.get(index), None
            replaced = rounded_linears(decoder, index, linear)
            if layer is not None:
                routed = route(decoder, index, hidden, store, replaced)
                shard = f"layer-{index:05d}.safetensors"
                tensors, missed = _layer(decoder, layer, routed, bits, group_size, min_tokens)
                fallbacks += missed
                write_tensors(folder / shard, tensors)
                names.update(dict.fromkeys(tensors, shard))
                outputs = routed.outputs
            finish(decoder, index, hidden, store.create(index + 1), outputs, replaced)
            store.complete(index + 1)
            store.drop(index)
    write_json(folder / INDEX, {"metadata": {KEY: fallbacks}, "weight_map": names})


def _layer(
    decoder: Decoder, layer: MoeLayer, routed: Routed, bits: int, group_size: int, min_tokens: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the dequantized expert matrices of a layer, and how many experts were not calibrated.

    Their outputs are added to ``routed.outputs``.
    """
    tensors, missed = {}, 0
    for expert in range(layer.num_experts):
        exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
        tokens, _ = routed.slots(expert)
        inputs = routed.inputs[tokens].to(decoder.device).float()
        try:
            found = _expert(decoder, exact, inputs, bits, group_size) if len(tokens) >= min_tokens else None
        except NotPositiveDefiniteError:
            found = None
        if found is None:
            missed += 1
            quantizer = quantizer_for(bits, DEFAULT, DEFAULT_ONE_BIT)
            found = exact.replaced(quantizer(matrix, bits, group_size).dequantize() for matrix in exact.matrices())
        for part, weights, places in routed.chunks(expert, decoder.device):
            routed.add(places, found(part.float(), decoder.activation) * weights[:, None])
        for projection, matrix in zip(layer.projections.names(), found.matrices(), strict=True):
            tensors[layer.weight(expert, projection)] = matrix.cpu().contiguous()
    return tensors, missed


def _expert(decoder: Decoder, exact: ExpertWeights, inputs: torch.Tensor, bits: int, group_size: int) -> ExpertWeights:
    settings = GptqSettings()
    moments, sample = inputs.mT @ inputs / len(inputs), inputs[:SAMPLE]
    first = [quantize_slim(matrix, moments, sample, bits, group_size, settings)[0] for matrix in exact.first]
    inner = exact.replaced((*first, exact.down)).inner(inputs, decoder.activation)
    moments = inner.mT @ inner / len(inner)
    down, _ = quantize_slim(exact.down, moments, inner[:SAMPLE], bits, group_size, settings)
    return exact.replaced((*first, down))
