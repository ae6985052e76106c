"""Find transformers' classes for a config.json, and build the model on the meta device: no weights are allocated."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from vllm_moeq.completeness.partial import check_partial
from vllm_moeq.completeness.sizes import check_layer_counts, check_sizes
from vllm_moeq.format import NESTED, ConfigError
from vllm_moeq.format.strangers import QUANTIZATION, keys_within, without_strangers

SAME_CLASS = {"kimi_k2": "deepseek_v3"}
"""``model_type`` that transformers lacks → the one whose class its publishers' own code takes."""

SILENT = 100
"""A level above transformers' gravest: its errors show what config.json holds, escapes and all."""

MOST_MODULES = 1 << 20
"""Modules and parameters of a model: DeepSeek-V3 with a module per expert would have some 100,000."""

SPECIAL = ("Infinity", "-Infinity", "NaN")
"""The numbers that JSON lacks."""


def no_class(config: Mapping[str, Any]) -> str | None:
    """Return the reason why there is no class to compare a checkpoint with, or None if there is one."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    with silence():
        found = find_classes(config)
    if found is None:
        return f"transformers {transformers.__version__} has no class for model_type {config.get('model_type')!r:.80}"
    return None


def find_classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return transformers' classes for a config.json and its model, or None if there are none.

    The model is the class that ``architectures`` names, if it is one for such configs, else the causal language model,
    else the one that reads images and text. Config classes that others have registered, as vLLM does, are not
    transformers' and do not count.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type, named = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        return None
    own = getattr(transformers, CONFIG_MAPPING_NAMES.get(SAME_CLASS.get(model_type, model_type), ""), None)
    if own is None:
        return None
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, str(name), None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and getattr(found, "config_class", None) is own:
            return own, found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if own in mapping:
            return own, mapping[own]
    return None


def meta_model(config: Mapping[str, Any], path: Path, most: int = MOST_MODULES) -> Any:
    """Return transformers' model of a config on the meta device.

    Args:
        config: contents of config.json, with a class (see :func:`no_class`). Without a dtype, weights are bfloat16.
        path: config.json, for messages.
        most: largest number of modules and parameters; many more tensors than the files have need not be built.

    Raises:
        ConfigError: config.json lacks a size, the model has too many modules, or transformers cannot build it.
    """
    check_layer_counts(config, path)
    try:
        with silence(), _bounded(most, path):
            return _build(config, path)
    except ConfigError:
        raise
    except Exception as error:  # the config may hold anything, and transformers raises whatever it meets first
        raise cannot_build(path, error, config) from None


@contextmanager
def _bounded(most: int, path: Path) -> Iterator[None]:
    """Stop the building of a model with too many parts, whichever key of config.json asks for them."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ConfigError(f"{path}: expected a model of at most {most} modules and parameters, found more")

    handles = register_module_module_registration_hook(counted), register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cannot_build(path: Path, error: Exception, config: Mapping[str, Any] | None = None) -> ConfigError:
    """Return the error for a config of which transformers makes no model, naming the key of a value that it lacks."""
    unknown = error.args[0] if isinstance(error, KeyError) and error.args else None
    key = next(
        (place for place, _, value in keys_within(config or {}) if unknown is not None and value == unknown), None
    )
    place = path if key is None else f"{path}: {key}"
    return ConfigError(f"{place}: transformers cannot build the model ({_in_one_line(error)})")


def cannot_load(folder: Path, error: Exception) -> ConfigError:
    """Return the error for a model that transformers does not load."""
    return ConfigError(f"{folder}: transformers cannot load it ({_in_one_line(error)})")


def _in_one_line(error: Exception) -> str:
    """Return the beginning of an error's message; some of transformers' have a line per class that it knows."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


@contextmanager
def silence() -> Iterator[None]:
    """Keep back what transformers says about a model that will only be looked at, and its imports' warnings."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def parse_config(config: Mapping[str, Any], path: Path) -> tuple[Any, Any]:
    """Return transformers' config object of a config.json, and the model's class.

    Raises:
        ConfigError: there is no class, ``architectures`` names one of another model, or config.json lacks a size.
    """
    classes = find_classes(config)
    if classes is None:
        raise ConfigError(f"{path}: expected a model that transformers knows, found {config.get('model_type')!r:.80}")
    _check_architectures(config, classes[1], path)
    _check_methods(config, classes[0], path)
    check_partial(config, classes, path)
    if NESTED in config and NESTED not in (classes[0].sub_configs or {}):
        raise ConfigError(f"{path}: {NESTED}: expected no such key in a config of {classes[0].__name__}")
    parsed = classes[0].from_dict(_plain(config))
    check_sizes(config, parsed, path)
    return parsed, classes[1]


def _build(config: Mapping[str, Any], path: Path) -> Any:
    parsed, model = parse_config(config, path)
    dtype = parsed.dtype if isinstance(parsed.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        return model._from_config(parsed, dtype=dtype)


def _check_architectures(config: Mapping[str, Any], model: Any, path: Path) -> None:
    """Refuse the name of a class that is not of the config's ``model_type``: vLLM builds what is named.

    Raises:
        ConfigError: naming the class.
    """
    known = {_letters(name) for name in sys.modules[model.__module__].__all__}
    for name in config.get("architectures") or ():
        if _letters(str(name)) not in known:
            raise ConfigError(
                f"{path}: architectures: expected a class of model_type {config.get('model_type')}, "
                f"such as {model.__name__}, found {name!r:.80}"
            )


def _check_methods(config: Mapping[str, Any], own: Any, path: Path) -> None:
    """Refuse keys that would take the place of a method of transformers' config class.

    Raises:
        ConfigError: naming the key.
    """
    for part in (config, *filter(lambda value: isinstance(value, Mapping), config.values())):
        for key in part:
            if key.startswith("__") or callable(getattr(own, key, None)):
                raise ConfigError(f"{path}: {key:.80}: expected no such key, found the name of a method")


def _letters(name: str) -> str:
    """Return a class's name without what published names have otherwise: capitals and underscores."""
    return name.lower().replace("_", "")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantization and without what names code or kernels, which a class might fetch."""
    plain = {key: _decoded(value) for key, value in without_strangers(config).items() if key != QUANTIZATION}
    same = SAME_CLASS.get(plain["model_type"])
    return plain if same is None else {**plain, "model_type": same}


def _decoded(value: Any) -> Any:
    """Return a value with its infinities as floats; transformers writes ``{"__float__": "Infinity"}`` for one."""
    if isinstance(value, Mapping):
        special = value.get("__float__") if len(value) == 1 else None
        return float(special) if special in SPECIAL else {key: _decoded(child) for key, child in value.items()}
    return [_decoded(child) for child in value] if isinstance(value, list) else value
