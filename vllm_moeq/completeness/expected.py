"""The tensors that a model of a config.json has: transformers' class, built on the meta device."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.completeness.sizes import check_layer_counts, check_sizes
from vllm_moeq.format import ConfigError, TensorInfo
from vllm_moeq.format.strangers import QUANTIZATION, without_strangers

LEFTOVERS = (r"\.rotary_emb\.inv_freq$", r"\.(q|k|v|kv|prob)_scale$")
"""Patterns of tensors that other tools leave in checkpoints of any architecture, and no model reads: frequencies that
follow from the config, and scales of a key/value cache in eight bits."""


@dataclass(frozen=True)
class Expected:
    """The tensors of a model, under the names that a published checkpoint has.

    Attributes:
        class_name: name of transformers' class.
        tensors: name → shape and dtype, in the model's order.
        tied: name → name in ``tensors`` of the same weight; a file may hold it or not.
        optional: patterns of names that a file may lack.
        ignored: patterns of names that a file may have besides, such as layers for speculative decoding.
    """

    class_name: str
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]
    optional: tuple[str, ...]
    ignored: tuple[str, ...]


def no_class(config: Mapping[str, Any]) -> str | None:
    """Return the reason why there is no class to compare a checkpoint with, or None if there is one."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    with _silence():
        found = find_classes(config)
    if found is None:
        return f"transformers {transformers.__version__} has no class for model_type {config.get('model_type')!r:.80}"
    return None


def find_classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return transformers' classes for a config.json and its model, or None if there are none.

    The model is the class that ``architectures`` names, if it is one for such configs, else the causal language model.
    Config classes that others have registered, as vLLM does, are not transformers' and do not count.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type, named = config.get("model_type"), config.get("architectures")
    own = getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type, ""), None) if isinstance(model_type, str) else None
    if own is None:
        return None
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, str(name), None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and getattr(found, "config_class", None) is own:
            return own, found
    if own not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return own, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[own]


def expected_tensors(config: Mapping[str, Any], path: Path) -> Expected:
    """Return the tensors of a model, from its config alone. No weights are allocated.

    Args:
        config: contents of config.json, with a class (see :func:`no_class`). Without a dtype, weights are bfloat16.
        path: config.json, for messages.

    Raises:
        ConfigError: config.json lacks a size, or transformers cannot build its model.
    """
    check_layer_counts(config, path)
    try:
        with _silence():
            return _of_model(_build(config, path), path.name)
    except ConfigError:
        raise
    except Exception as error:  # the config may hold anything, and transformers raises whatever it meets first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: transformers cannot build the model ({reason:.300})") from None


@contextmanager
def _silence() -> Iterator[None]:
    """Keep back what transformers says about a model that will only be looked at, and its imports' warnings."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _build(config: Mapping[str, Any], path: Path) -> Any:
    """Return transformers' model on the meta device."""
    classes = find_classes(config)
    if classes is None:
        raise ConfigError(f"{path}: expected a model that transformers knows, found {config.get('model_type')!r:.80}")
    _check_architectures(config, classes[1], path)
    parsed = classes[0].from_dict(_plain(config))
    check_sizes(config, parsed, path)
    dtype = parsed.dtype if isinstance(parsed.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        return classes[1]._from_config(parsed, dtype=dtype)


def _check_architectures(config: Mapping[str, Any], model: Any, path: Path) -> None:
    """Refuse the name of a class that is not of the config's ``model_type``: vLLM builds what is named.

    Raises:
        ConfigError: naming the class.
    """
    known = {name.lower() for name in sys.modules[model.__module__].__all__}  # published names differ in capitals
    for name in config.get("architectures") or ():
        if str(name).lower() not in known:
            raise ConfigError(
                f"{path}: architectures: expected a class of model_type {config.get('model_type')}, "
                f"such as {model.__name__}, found {name!r:.80}"
            )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantization and without what names code or kernels, which a class might fetch."""
    return {key: value for key, value in without_strangers(config).items() if key != QUANTIZATION}


def _of_model(model: Any, file: str) -> Expected:
    """Return a model's tensors under the checkpoint's names; weights that are tied stand in ``tensors`` once."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            state[name] = tensor.detach()
        else:
            tied[name] = first[id(tensor)]

    def saved(names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(names))
        return found

    def saved_name(name: str, weight: str) -> str:
        return next(iter(saved({name: state[weight]})))

    tensors = {name: TensorInfo(file, tuple(tensor.shape), tensor.dtype, 0) for name, tensor in saved(state).items()}
    return Expected(
        type(model).__name__,
        tensors,
        {saved_name(name, weight): saved_name(weight, weight) for name, weight in tied.items()},
        tuple(model._keys_to_ignore_on_load_missing or ()),
        (*LEFTOVERS, *(model._keys_to_ignore_on_load_unexpected or ())),
    )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)
