"""Open a checkpoint in AutoGPTQ's format and check all of it before anything is written.

Widths come from the tensors' shapes. The config's ``dynamic`` entry holds regular expressions over module names. It is
never read, since a file is not trusted to bring programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from planner.exchange.autogptq.layout import (
    G_IDX,
    QWEIGHT,
    QZEROS,
    SCALES,
    SUFFIXES,
    WIDTHS,
    ZERO_STORAGE,
    Version,
    decode_zeros,
    group_index,
)
from planner.exchange.autogptq.names import checkpoint_name
from planner.model.architectures import Architecture
from planner.model.layout import architecture_of
from planner.model.source import SourceModel
from vllm_moeq.format import CODES_PER_BLOCK, CheckpointError, ConfigError, UsageError, read_json, unpack
from vllm_moeq.format import dequantize as dequantize_codes
from vllm_moeq.format.schemes import check_finite
from vllm_moeq.format.tensors import Tensors

SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Module:
    """One quantized linear [rows, columns]. ``base`` is its name in the file, ``groups`` counts the groups per row."""

    base: str
    bits: int
    rows: int
    columns: int
    groups: int

    @property
    def group_size(self) -> int:
        """Number of weights per scale."""
        return self.columns // self.groups

    def name(self, suffix: str) -> str:
        """Return the name of one of the linear's tensors."""
        return f"{self.base}.{suffix}"


@dataclass(frozen=True)
class GptqCheckpoint:
    """A GPTQ checkpoint that has passed all checks.

    Attributes:
        model: the checkpoint's folder.
        row: the model's architecture.
        version: storage of zero points.
        whole_rows: whether the config says that a group is a whole row.
        modules: our name → quantized linear.
        others: our name → name in the file, for every other tensor.
    """

    model: SourceModel
    row: Architecture
    version: Version
    whole_rows: bool
    modules: dict[str, Module]
    others: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit dtype of the model's other tensors."""
        named = self.model.config.get("dtype", self.model.config.get("torch_dtype"))
        return torch.float16 if named == "float16" else torch.bfloat16

    def load(self, module: Module, suffix: str) -> torch.Tensor:
        """Return one tensor of a linear."""
        return self.model.shards.load(module.name(suffix))

    def zeros(self, module: Module) -> torch.Tensor:
        """Return the zero points of a linear, uint8 [N, K/G].

        Raises:
            CheckpointError: a stored zero point is ambiguous; see :func:`decode_zeros`.
        """
        try:
            return decode_zeros(self.load(module, QZEROS), module.bits, module.rows, self.version)
        except ValueError as error:
            _refuse(
                self.model.shards,
                module.name(QZEROS),
                "zero points of 1 or more, since programs disagree how checkpoint_format gptq stores 0",
                f"{error}; save the model with checkpoint_format gptq_v2",
            )

    def dequantize(self, module: Module) -> torch.Tensor:
        """Return the weights of a linear, float32 [N, K]."""
        codes = unpack(self.load(module, QWEIGHT).T.contiguous(), module.bits, module.columns)
        scales = self.load(module, SCALES).T.contiguous()
        return dequantize_codes(codes, scales, self.zeros(module).to(scales.dtype))


def read_gptq(model: SourceModel) -> GptqCheckpoint:
    """Check config, headers, group indices, scales and zero points of a folder.

    Raises:
        MoeqError: something is not as it must be; the message names the file and the tensor.
    """
    config = _quantization_config(model)
    version = _version(model, config)
    row = architecture_of(model)
    shards = model.shards
    modules: dict[str, Module] = {}
    others: dict[str, str] = {}
    for name in shards.tensors:
        base, _, suffix = name.rpartition(".")
        if suffix == QWEIGHT:
            if base.endswith("embed_tokens"):
                _refuse(shards, name, "embeddings that are not quantized", "quantized ones")
            _add(shards, modules, checkpoint_name(row, base), _read_module(shards, base), name)
        elif suffix in SUFFIXES:
            if f"{base}.{QWEIGHT}" not in shards.tensors:
                _refuse(shards, name, f"a tensor {base}.{QWEIGHT} beside it", "none")
        else:
            _add(shards, others, checkpoint_name(row, name), name, name)
    if not modules:
        raise CheckpointError(f"{model.folder}: expected quantized linears (tensors *.{QWEIGHT}), found none")
    checkpoint = GptqCheckpoint(model, row, version, config.get("group_size") == -1, modules, others)
    for module in modules.values():
        _check_values(checkpoint, module)
    return checkpoint


def _refuse(shards: Tensors, name: str, expected: str, found: object) -> NoReturn:
    path = shards.folder / shards.info(name).shard
    raise CheckpointError(f"{path}: tensor {name}: expected {expected}, found {found}")


def _add(shards: Tensors, known: dict[str, Any], key: str, value: object, name: str) -> None:
    if key in known:
        _refuse(shards, name, f"one tensor that means {key}", "another")
    known[key] = value


def _quantization_config(model: SourceModel) -> Mapping[str, Any]:
    """Return the quantization settings from config.json, else from quantize_config.json, where AutoGPTQ put them."""
    path = model.folder / "config.json"
    config = model.config.get("quantization_config")
    if config is None and (model.folder / "quantize_config.json").exists():
        path = model.folder / "quantize_config.json"
        config = read_json(path)
        config = {"quant_method": "gptq", **config} if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected the quantization_config of a GPTQ checkpoint, found {config!r:.80}")
    if config.get("quant_method") != "gptq":
        raise UsageError(f"{path}: expected quant_method 'gptq', found {config.get('quant_method')!r:.80}")
    return config


def _version(model: SourceModel, config: Mapping[str, Any]) -> Version:
    """Return how zero points are stored. Files without ``checkpoint_format`` are AutoGPTQ's and use version 1."""
    where = model.folder / "config.json"
    given = [config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None] or ["gptq"]
    for value in given:
        if not isinstance(value, str) or value not in ZERO_STORAGE or value != given[0]:
            raise ConfigError(f"{where}: checkpoint_format: expected {' or '.join(ZERO_STORAGE)}, found {value!r:.80}")
    if config.get("pack_dtype", "int32") != "int32":
        raise ConfigError(f"{where}: pack_dtype: expected int32, found {config['pack_dtype']!r:.80}")
    return ZERO_STORAGE[given[0]]


def _read_module(shards: Tensors, base: str) -> Module:
    """Check the headers of one linear against each other; return the linear with the width that they imply."""
    qweight, g_idx = shards.info(f"{base}.{QWEIGHT}"), shards.info(f"{base}.{G_IDX}")
    scales, qzeros = shards.info(f"{base}.{SCALES}"), shards.info(f"{base}.{QZEROS}")
    if g_idx.dtype != torch.int32 or len(g_idx.shape) != 1 or 0 in g_idx.shape:
        _refuse(shards, f"{base}.{G_IDX}", "a 1-D int32 tensor", f"{g_idx.dtype} {list(g_idx.shape)}")
    columns = g_idx.shape[0]
    if columns % CODES_PER_BLOCK:
        _refuse(shards, f"{base}.{G_IDX}", f"a multiple of {CODES_PER_BLOCK} inputs", columns)
    if qweight.dtype != torch.int32 or len(qweight.shape) != 2:
        _refuse(shards, f"{base}.{QWEIGHT}", "a 2-D int32 tensor", f"{qweight.dtype} {list(qweight.shape)}")
    words, rows = qweight.shape
    bits, remainder = divmod(words * 32, columns)
    if remainder or bits not in WIDTHS:
        _refuse(
            shards, f"{base}.{QWEIGHT}",
            f"{' or '.join(str(columns * width // 32) for width in WIDTHS)} rows, that is 2, 3, 4 or 8 bits "
            f"for {columns} inputs",
            f"{words} ({words * 32 / columns:g} bits)",
        )  # fmt: skip
    if rows == 0 or rows % CODES_PER_BLOCK:
        _refuse(shards, f"{base}.{QWEIGHT}", f"a multiple of {CODES_PER_BLOCK} outputs", rows)
    if scales.dtype not in SCALE_DTYPES or len(scales.shape) != 2 or scales.shape[1] != rows or scales.shape[0] == 0:
        _refuse(shards, f"{base}.{SCALES}", f"float16 [groups, {rows}]", f"{scales.dtype} {list(scales.shape)}")
    groups = scales.shape[0]
    if columns % groups:
        _refuse(shards, f"{base}.{SCALES}", f"groups of equal size of {columns} inputs", f"{groups} groups")
    expected = (groups, rows * bits // 32)
    if qzeros.dtype != torch.int32 or qzeros.shape != expected:
        _refuse(shards, f"{base}.{QZEROS}", f"int32 {list(expected)}", f"{qzeros.dtype} {list(qzeros.shape)}")
    return Module(base, bits, rows, columns, groups)


def _check_values(checkpoint: GptqCheckpoint, module: Module) -> None:
    shards = checkpoint.model.shards
    if not torch.equal(checkpoint.load(module, G_IDX), group_index(module.columns, module.groups)):
        _refuse(
            shards,
            module.name(G_IDX),
            f"input k in group k // {module.group_size}",
            "another order (desc_act across groups); quantize with desc_act false",
        )
    scales = checkpoint.load(module, SCALES)
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        _refuse(shards, module.name(SCALES), "finite scales that are not 0", "others")
    check_finite(scales, shards.place(module.name(SCALES)))
    checkpoint.zeros(module)
