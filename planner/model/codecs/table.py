"""The table of encodings, and the encoded weights of a folder by it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from planner.model.codecs.awq import AWQ
from planner.model.codecs.codec import Codec
from planner.model.codecs.encoding import WEIGHT, Encoding
from planner.model.codecs.gptq import GPTQ
from planner.model.codecs.pack_quantized import PACK_QUANTIZED
from planner.model.codecs.scaled import FLOAT8, INT8, MXFP4, MXFP4_BLOCKS, MXFP4_PACKED, NVFP4, NVFP4_PACKED
from planner.model.codecs.settings import Settings
from vllm_moeq.format import CheckpointError
from vllm_moeq.format.tensors import Tensors

_MODELOPT = (FLOAT8, NVFP4, MXFP4)

METHODS: dict[str, tuple[Encoding, ...]] = {
    "fp8": (FLOAT8, MXFP4),
    "fbgemm_fp8": (FLOAT8,),
    "mxfp8": (FLOAT8,),
    "mxfp4": (MXFP4_BLOCKS,),
    "compressed-tensors": (FLOAT8, INT8, NVFP4_PACKED, MXFP4_PACKED, PACK_QUANTIZED),
    "modelopt": _MODELOPT,
    "modelopt_fp4": _MODELOPT,
    "modelopt_mixed": _MODELOPT,
    "modelopt_mxfp8": _MODELOPT,
    "quark": (FLOAT8, MXFP4),
    "gptq": (GPTQ,),
    "awq": (AWQ,),
}
"""``quant_method`` → the encodings that its files may have. The first whose names and dtypes are there counts."""

BESIDE = frozenset((
    "input_scale", "input_scale_inv", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale",
    "output_zero_point",
    "activation_scale", "activation_scale_inv", "q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale",
    "k_zero_point", "v_zero_point", "weight_shape", "weight_g_idx", "g_idx", "weight_zero_point",
))  # fmt: skip
"""Last parts of names of tensors that no weight needs: they are for activations, for a cache, or say nothing new."""

SCALES = ("_scale", "_scale_inv")
"""Suffixes of scales that no weight of sixteen bits has."""

FACTORS = ("pre_quant_scale", "bitmask", "compressed")
"""Last parts of names of tensors without which a weight means something else, and which are not read."""


@dataclass(frozen=True, slots=True)
class Weight:
    """An encoded weight.

    Attributes:
        codec: how it is read.
        shape: shape of the decoded weight.
        parts: role → name of the stored tensor; the values come first.
    """

    codec: Codec
    shape: tuple[int, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """The encoded weights of a folder.

    Attributes:
        weights: name → weight.
        hidden: names of stored tensors that belong to encoded weights or to activations.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


def can_read(settings: Settings | None) -> bool:
    """Tell whether sources with these settings are read."""
    return settings is None or settings.method in METHODS


def find_encoded(files: Tensors, settings: Settings | None) -> Encoded:
    """Return the encoded weights of a folder, from headers alone; none where the method has no row.

    Raises:
        CheckpointError: a tensor of an encoded weight is missing, or does not fit the others.
        ConfigError: settings that cannot be used.
    """
    if settings is None or settings.method not in METHODS:
        return Encoded()
    _check_options(settings)
    weights: dict[str, Weight] = {}
    same: dict[Codec, Codec] = {}  # a model has a hundred thousand weights, and a few codecs
    for name in files.tensors:
        found = _encoding_of(files, name, METHODS[settings.method])
        if found is None:
            continue
        encoding, weight = found
        if weight in weights or (weight != name and weight in files.tensors):
            raise CheckpointError(f"{files.place(name)}: expected one tensor that holds {weight}, found another")
        stored = encoding.gather(weight, files)
        bound = encoding.bind(stored, settings)
        weights[weight] = Weight(same.setdefault(bound.codec, bound.codec), bound.shape, stored.names)
    parts = {name for weight in weights.values() for name in weight.parts.values()}
    return Encoded(weights, frozenset(parts | _beside(files, weights, parts)))


def _beside(files: Tensors, weights: Mapping[str, Weight], parts: Set[str]) -> set[str]:
    """Return the tensors that stand beside the parts of weights and are not read.

    Raises:
        CheckpointError: naming a tensor that would have to be.
    """
    found = set()
    for name in files.tensors:
        leaf = name.rpartition(".")[2]
        if name in parts:
            continue
        if leaf in FACTORS:
            raise CheckpointError(f"{files.place(name)}: expected weights without such a tensor, which is not read")
        if leaf in BESIDE or leaf.endswith("_input_scale"):
            found.add(name)
        _refuse_scale(files, name, weights)
    return found


def _check_options(settings: Settings) -> None:
    """Refuse what would change the meaning of all weights.

    Raises:
        ConfigError: naming the option.
    """
    found = settings.options.get("transform_config")
    if isinstance(found, Mapping) and found.get("config_groups"):
        raise settings.refuse("transform_config", "none, as the inputs would have to be transformed")


def _encoding_of(files: Tensors, name: str, encodings: tuple[Encoding, ...]) -> tuple[Encoding, str] | None:
    """Return the encoding whose values a stored tensor holds, and the weight's name; None if it holds none.

    Raises:
        CheckpointError: by its name it can be nothing else, but its dtype, or what is beside it, does not fit.
    """
    info = files.tensors[name]
    named = [(encoding, weight) for encoding in encodings if (weight := encoding.weight_of(name)) is not None]
    typed = [(encoding, weight) for encoding, weight in named if info.dtype in encoding.dtypes]
    for encoding, weight in typed:
        if encoding.missing(weight, files.tensors) is None:
            return encoding, weight
    certain = [(encoding, weight) for encoding, weight in typed or named if encoding.values]
    if not certain:
        return None
    encoding, weight = certain[0]
    if typed:
        missing = encoding.missing(weight, files.tensors)
        raise CheckpointError(f"{files.place(name)}: expected a tensor {missing} beside it, found none")
    dtypes = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for it, _ in certain for dtype in it.dtypes))
    raise CheckpointError(
        f"{files.place(name)}: expected {dtypes}, found {str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
    )


def _refuse_scale(files: Tensors, name: str, weights: Mapping[str, Weight]) -> None:
    """Refuse a scale beside a weight that has none, or beside no weight.

    Raises:
        CheckpointError: naming the scale.
    """
    for suffix in SCALES:
        if name.endswith(WEIGHT + suffix):
            weight = name.removesuffix(suffix)
            found = files.tensors.get(weight)
            if weight not in weights and (found is None or found.dtype.itemsize > 1):
                shown = "no such tensor" if found is None else str(found.dtype).removeprefix("torch.")
                raise CheckpointError(f"{files.place(name)}: expected {weight} of 8 or 4 bits beside it, found {shown}")
