"""Check the values in a config.json: each is of its kind, and every number is finite."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moeq.completeness.sizes import MAX_INTEGER, SIZES, numbers, parts
from vllm_moeq.format import EXPERT_COUNT, NESTED, ConfigError
from vllm_moeq.format.strangers import QUANTIZATION

MAX_NUMBER = 1 << 53
"""The largest magnitude of a number in a config.json: floats hold all integers up to it."""

MAX_POSITION = 1 << 31
"""The largest number of positions that a config.json may name."""


@dataclass(frozen=True)
class Kind:
    """The kind of a value. null stands for a value that is not there, and is of every kind.

    Attributes:
        words: the kind, as a message names it.
        fits: tells whether a value is of this kind.
        listed: whether a list with a value per layer may stand in its place.
    """

    words: str
    fits: Callable[[Any], bool]
    listed: bool = False


def _integer(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and fits(value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("torch.") in ("bfloat16", "float16", "float32")


SIZE = Kind(f"a positive integer of at most {MAX_INTEGER}", _integer(1, MAX_INTEGER), listed=True)
COUNT = Kind(f"an integer from 0 to {MAX_INTEGER}", _integer(0, MAX_INTEGER), listed=True)
POSITIONS = Kind(f"a positive integer of at most {MAX_POSITION}", _integer(1, MAX_POSITION), listed=True)
WINDOW = Kind(f"an integer from 0, for no window, to {MAX_POSITION}", _integer(0, MAX_POSITION), listed=True)
POSITIVE = Kind("a positive number", _number(lambda value: value > 0))
FRACTION = Kind("a number from 0 to 1", _number(lambda value: 0 <= value <= 1))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
LINE = Kind("a line of text", lambda value: isinstance(value, str) and value.isprintable())
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(it, str) for it in value))
TRUE = Kind("true", lambda value: value is True)
DTYPE = Kind("bfloat16, float16 or float32", _is_dtype)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

KINDS: dict[str, Kind] = {
    **dict.fromkeys((*SIZES, *EXPERT_COUNT, "head_dim", "v_head_dim", "decoder_sparse_step"), SIZE),
    **dict.fromkeys(
        (
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "n_group", "topk_group",
            "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace",
            "moe_layer_freq", "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings", "max_seq_len", "max_seq_length", "max_sequence_length", "model_max_length",
            "n_positions", "seq_len", "seq_length",
        ),
        POSITIONS,
    ),
    "sliding_window": WINDOW,
    **dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings"), POSITIVE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "partial_rotary_factor"), FRACTION),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "attention_bias"), FLAG),
    **dict.fromkeys(("return_dict", "use_return_dict", "is_causal"), TRUE),
    **dict.fromkeys(("model_type", "hidden_act"), TEXT),
    "transformers_version": LINE,
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "architectures": NAMES,
    NESTED: OBJECT,
}  # fmt: skip
"""Key → the kind of its value, in a config, in its language model's part and in their settings of rotary embeddings."""

UNBOUNDED = ("time_step_limit",)
"""Keys under which infinity is a value: Mamba's layers have a range of time steps without an upper end."""

MAX_LISTED = 1 << 16
"""The largest number in a list within a list, which may say how often its neighbour is repeated."""

MAX_LABELS = 1 << 12
MAX_KEYS = 1 << 12
"""Keys of an object; no model has as many labels."""

LABELS = re.compile(r"(^|\.)num_labels$")
"""The keys for the number of a classifier's labels, of which transformers makes a name each."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that control a terminal or cannot be printed; blanks and line breaks are none of them."""

NO_NUMBER = (str, list, Mapping)

ROTARY = ("rope_parameters", "rope_scaling")


def check_values(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a value that no model has, before anything is imported or read for it.

    Args:
        config: contents of config.json, of bounded depth.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the key.
    """
    _check_texts({key: value for key, value in config.items() if key != QUANTIZATION}, path)
    for key, value in numbers(config):
        if not 0 <= value <= MAX_LABELS and LABELS.search(key):
            raise ConfigError(f"{path}: {key}: expected at most {MAX_LABELS} labels, found {_short(value)}")
        if not abs(value) <= MAX_NUMBER and not (value == math.inf and key.rpartition(".")[2] in UNBOUNDED):
            raise ConfigError(f"{path}: {key}: expected a number up to 2^53, found {_short(value)}")
    for key, value in _listed(config):
        if not abs(value) <= MAX_LISTED:
            raise ConfigError(f"{path}: {key}: expected at most {MAX_LISTED} in a list of lists, found {_short(value)}")
    for part in _with_rotary(config):
        for key, value in part.items():
            kind = KINDS.get(key)
            if kind is None or value is None:
                continue
            values = value if kind.listed and isinstance(value, list) else [value]
            if not all(kind.fits(item) for item in values):
                raise ConfigError(f"{path}: {key}: expected {kind.words}, found {_short(value)}")


def _check_texts(config: Any, path: Path, place: str = "") -> None:
    """Refuse texts that would control a terminal: other readers print them in their warnings."""
    if isinstance(config, str):
        if CONTROL.search(config):
            raise ConfigError(f"{path}: {place}: expected a text that can be printed, found {config!r:.80}")
    elif isinstance(config, Mapping):
        if len(config) > MAX_KEYS:
            raise ConfigError(f"{path}: {place or 'the file'}: expected at most {MAX_KEYS} keys, found {len(config)}")
        for key, value in config.items():
            _check_texts(key, path, place or "its keys")
            if isinstance(value, NO_NUMBER):
                _check_texts(value, path, f"{place}.{key!s:.80}".removeprefix("."))
    elif isinstance(config, list):
        for value in config:
            if isinstance(value, NO_NUMBER):
                _check_texts(value, path, place)


def _listed(value: Any, place: str = "", *, within: int = 0) -> Iterator[tuple[str, float]]:
    """Yield (dotted key, number) for all numbers in lists within lists."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            if isinstance(child, NO_NUMBER):
                yield from _listed(child, f"{place}.{key!s:.80}".removeprefix("."))
    elif isinstance(value, list):
        for child in value:
            if isinstance(child, NO_NUMBER):
                yield from _listed(child, place, within=within + 1)
            elif within and isinstance(child, int | float):
                yield place, child


def _short(value: Any) -> str:
    """Return the beginning of a value; Python refuses to print an integer of many digits."""
    if type(value) is int and abs(value) > MAX_NUMBER:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.40}"


def _with_rotary(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config, its language model's part, and their settings of rotary embeddings."""
    for part in parts(config):
        yield part
        for key in ROTARY:
            rotary = part.get(key)
            if isinstance(rotary, Mapping):
                yield rotary
                yield from (inner for inner in rotary.values() if isinstance(inner, Mapping))
