"""The Mixture-of-Experts models of vLLM's recipes, and what becomes of each: a table from two others.

The rows of README.md's models come from tests that serve a tiny model of each; those of docs/models.md's other families
from ``benchmarks.coverage``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

RECIPES: Mapping[str, tuple[str, ...]] = {
    "afmoe": ("Trinity-Large-Thinking",),
    "bailing_hybrid": (
        "Ling-2.6-1T",
        "Ling-2.6-flash",
        "Ling-3.0-flash",
        "Ling-3.0-tiny",
        "Ring-2.6-1T",
    ),
    "bailing_moe": ("Ring-1T-FP8",),
    "cohere2_moe": ("North-Mini-Code-1.0",),
    "deepseek_v3": (
        "DeepSeek-R1",
        "DeepSeek-V3",
        "DeepSeek-V3.1",
    ),
    "deepseek_v32": (
        "DeepSeek-V3.2",
        "DeepSeek-V3.2-Exp",
    ),
    "deepseek_v4": (
        "DeepSeek-V4-Flash",
        "DeepSeek-V4-Pro",
    ),
    "diffusion_gemma": ("diffusiongemma-26B-A4B-it",),
    "dots3_note": ("dots-3-note-prev",),
    "ernie4_5_moe": ("ERNIE-4.5-21B-A3B-PT",),
    "ernie4_5_vl_moe": ("ERNIE-4.5-VL-28B-A3B-PT",),
    "gemma4": ("gemma-4-26B-A4B-it",),
    "glm4_moe": (
        "GLM-4.5",
        "GLM-4.6",
        "GLM-4.7",
    ),
    "glm4v_moe": (
        "GLM-4.5V",
        "GLM-4.6V",
    ),
    "glm5_next": ("GLM-5.3-Flash",),
    "glm_moe_dsa": (
        "GLM-5",
        "GLM-5.1",
        "GLM-5.2",
        "GLM-5.3",
    ),
    "gpt_oss": (
        "gpt-oss-120b",
        "gpt-oss-20b",
    ),
    "hunyuan_v1_moe": ("Hunyuan-A13B-Instruct",),
    "hy_v3": (
        "Hy3",
        "Hy3-preview",
    ),
    "hy_v4": ("Hy4-preview",),
    "inkling_mm_model": (
        "Inkling",
        "Inkling-Small",
    ),
    "intern_s2_preview": ("Intern-S2-Preview",),
    "interns1": ("Intern-S1",),
    "kimi_k2": (
        "Kimi-K2-Instruct",
        "Kimi-K2-Thinking",
    ),
    "kimi_k25": (
        "Kimi-K2.5",
        "Kimi-K2.6",
        "Kimi-K2.7-Code",
    ),
    "kimi_k3": (
        "Kimi-K3",
        "Kimi-K3-NVFP4",
    ),
    "kimi_linear": ("Kimi-Linear-48B-A3B-Instruct",),
    "laguna": (
        "Laguna-M.1",
        "Laguna-S-2.1",
        "Laguna-XS-2.1",
        "Laguna-XS.2",
    ),
    "lfm2_moe": ("LFM2.5-8B-A1B",),
    "llama4": ("Llama-4-Scout-17B-16E-Instruct",),
    "mellum": (
        "Mellum2-12B-A2.5B-Instruct",
        "Mellum2-12B-A2.5B-Thinking",
    ),
    "mimo_v2": (
        "MiMo-V2.5",
        "MiMo-V2.5-Pro",
    ),
    "mimo_v2_flash": ("MiMo-V2-Flash",),
    "minimax_m2": (
        "MiniMax-M2",
        "MiniMax-M2.1",
        "MiniMax-M2.5",
        "MiniMax-M2.7",
    ),
    "minimax_m3_vl": ("MiniMax-M3",),
    "mistral4": ("Mistral-Small-4-119B-2603",),
    "mistral_large_3": ("Mistral-Large-3-675B-Instruct-2512",),
    "nemotron_h": ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16"),
    "nemotron_h with moe_latent_size": (
        "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
        "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    ),
    "nemotron_h_omni": ("Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16",),
    "qwen3_5_moe": (
        "Qwen3.5-122B-A10B",
        "Qwen3.5-35B-A3B",
        "Qwen3.5-397B-A17B",
        "Qwen3.6-35B-A3B",
    ),
    "qwen3_5_moe_text": ("Qwen3.8-2.4T-A95B",),
    "qwen3_moe": (
        "Qwen3-235B-A22B-Instruct-2507",
        "Qwen3-30B-A3B",
        "Qwen3-Coder-480B-A35B-Instruct",
    ),
    "qwen3_next": ("Qwen3-Next-80B-A3B-Instruct",),
    "qwen3_vl_moe": (
        "Qwen3-VL-235B-A22B-Instruct",
        "Qwen3-VL-30B-A3B-Instruct",
    ),
    "qwen4_exp": ("Qwen3.8-Flash-Next",),
    "step3p5": ("Step-3.5-Flash",),
    "step3p7": ("Step-3.7-Flash",),
}
"""``model_type`` → the models of recipes with ``architecture: moe``, added to github.com/vllm-project/recipes until the
end of August 2026. A recipe does not name the type; most of these were concluded from its parsers and arguments."""

HEADER = """
## vLLM's recipes

The Mixture-of-Experts models for which [vLLM's recipes](https://github.com/vllm-project/recipes) had a page at the end
of August 2026, by `model_type`. A recipe does not say the type; most were concluded from its arguments. Each answer is
that of a tiny random model of the type, built by `tests/architectures.py` or by `benchmarks.coverage` as above. The
models themselves were not tried.

| `model_type` | models | read | calibrated | experts computed by our kernels | served: same tokens | tiny model |
|---|---|---|---|---|---|---|
"""

COLUMNS = 4
TYPE = re.compile(r"`([a-z0-9_]+)`")
NOT_TRIED = ("not tried",) * COLUMNS
REFUSED = ("nemotron_h with moe_latent_size",)
"""Forms of a type that are not read, though its tiny model is: here experts read fewer values than the router."""


def answers(readme: str, families: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return type → whether its tiny model is read, calibrated, computed and served, and where that model is.

    Args:
        readme: the text of README.md. Its table has no column for what kernels compute: all but what is not served.
        families: the table of docs/models.md's other families.
    """
    found = {}
    for line in families.splitlines():
        name, *cells = _cells(line)
        if len(cells) == COLUMNS and (type_ := TYPE.fullmatch(name)):
            found[type_[1]] = tuple(map(_word, cells)), "`benchmarks.coverage`"
    for line in readme.splitlines():
        names, *cells = _cells(line)
        if len(cells) == COLUMNS - 1 and all(cell.startswith(("yes", "no")) for cell in cells):
            read, calibrated, served = map(_word, cells)
            computed = "no" if served == "no" else "yes"
            for name in TYPE.findall(names):
                found[name] = (read, calibrated, computed, served), "`tests/architectures.py`"
    return found


def recipes(readme: str, families: str) -> str:
    """Return the table of recipes with its title; see :func:`answers`."""
    known = answers(readme, families)
    lines, counts = [], [0] * COLUMNS
    for name, models in RECIPES.items():
        cells, where = known.get(name, (("no",) * COLUMNS if name in REFUSED else NOT_TRIED, "–"))
        lines.append(f"| `{name}` | {', '.join(models)} | {' | '.join(cells)} | {where} |\n")
        counts = [count + len(models) * (cell == "yes") for count, cell in zip(counts, cells, strict=True)]
    total = sum(map(len, RECIPES.values()))
    cells = tuple(f"{count} of {total}" for count in counts)
    return f"{HEADER}{''.join(lines)}| all | {total} models | {' | '.join(cells)} | |\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _word(cell: str) -> str:
    """Return an answer without its reason."""
    return re.split("[,;:]", cell)[0]
