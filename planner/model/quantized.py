"""A moeq checkpoint as an ordinary model: matrices have their plain names and are dequantized while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.model.codecs import Codec, Parts
from planner.model.matrix import Matrix
from planner.model.source import SourceModel
from planner.model.tensors import SourceTensors
from vllm_moeq.format import (
    QUANT_METHOD,
    MoeqConfig,
    Rotated,
    Scheme,
    expert_matrices,
    linear_values,
    load_config,
)
from vllm_moeq.format.linears import SCALES, WORDS
from vllm_moeq.format.tensors import Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedExpert(Codec):
    """Storage format of one expert matrix.

    Attributes:
        bits: width of the codes.
        scheme: storage scheme of the matrix.
        group_size: weights per scale, or −1 for whole rows.
        rotated: the rotation of the inputs and its signs as stored; None if the matrix is not rotated.
    """

    bits: int
    scheme: Scheme
    group_size: int
    rotated: tuple[Rotated, torch.Tensor] | None

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`; float32."""
        bits, size, multiple = self.bits, self.group_size, self.scheme.row_step
        begin, end = first // multiple * multiple, -(-last // multiple) * multiple
        tensors = {
            suffix: parts[suffix][self.scheme.cut(suffix, bits, size, rows=(begin, end))]
            for suffix in self.scheme.suffixes
        }
        weights = self.scheme.dequantize(tensors, bits, size)[first - begin : last - begin : step]
        return weights if self.rotated is None else self.rotated[0].undo(weights, self.rotated[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLinear(Codec):
    """Storage format of one linear, compressed-tensors' ``pack-quantized``.

    Attributes:
        bits: width of the codes.
    """

    bits: int

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`; float32."""
        words, scales = (parts[suffix][first:last:step] for suffix in (WORDS, SCALES))
        return linear_values(words, scales, self.bits)


class DequantizedModel(SourceModel):
    """A moeq checkpoint whose packed matrices are read as float32: only the quantizer has rounded them.

    Args:
        folder: a checkpoint that moeq wrote.

    Raises:
        MoeqError: a damaged config, index or shard; a missing or misshapen expert tensor.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.quantization: MoeqConfig = load_config(folder)
        files = self.shards.files if isinstance(self.shards, SourceTensors) else self.shards
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        self.shards = SourceTensors(folder, self.config, files, _matrices(files, self.quantization))

    @property
    def odp(self) -> Mapping[str, float]:
        """Experts prefix → threshold. An expert is skipped below this share of the token's largest routing weight."""
        return self.quantization.odp or {}


def _matrices(files: Tensors, config: MoeqConfig) -> dict[str, Matrix]:
    """Return plain name → packed matrix, for experts and for other linears."""
    found: dict[str, Matrix] = {}
    for it in expert_matrices(files, config):
        base = f"{it.prefix}.{it.expert}.{it.projection}"
        # Its layer's signs are a part of the matrix that they stand beside.
        parts = {name.removeprefix(f"{base}."): name for name in it.names() if name.startswith(f"{base}.")}
        rotated = (it.rotated, files.load(it.rotated.name)) if it.rotated else None
        codec = PackedExpert(
            dtype=torch.float32, bits=it.bits, scheme=it.scheme, group_size=it.group_size, rotated=rotated
        )
        found[f"{base}.weight"] = Matrix(codec, parts, it.rows, it.columns)
    for name, info in files.tensors.items():
        base = name.removesuffix(f".{WORDS}")
        if base != name and f"{base}.weight" not in found:
            bits = config.linear.bits_of(base)
            linear, parts = PackedLinear(dtype=torch.float32, bits=bits), {it: f"{base}.{it}" for it in (WORDS, SCALES)}
            found[f"{base}.weight"] = Matrix(linear, parts, info.shape[0], info.shape[1] * 32 // bits)
    return found


def is_moeq(config: Any) -> bool:
    """Tell by the contents of a config.json whether moeq wrote the checkpoint."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD
