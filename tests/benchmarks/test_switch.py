"""The Switch Transformer experiment on a tiny model, end to end: what is quantized, how wide, what is counted."""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from benchmarks.replication.switch import run as switch
from benchmarks.replication.switch.describe import common_calls, describe, functions
from benchmarks.replication.switch.evaluate import Bootstrap, likelihood
from benchmarks.replication.switch.quantize import Scores, Shelf, assign, moved, orders, random_order, uniform, usage
from benchmarks.replication.switch.stages import STARTS, finetune
from benchmarks.replication.switch.text import (
    SOURCE_TOKENS,
    SPAN,
    SPANS,
    TARGET_TOKENS,
    Text,
    corrupt,
    encode_examples,
    example_batches,
    prepare,
    split_functions,
)
from benchmarks.replication.switch.train import PAPER_SIGMA, QUICK, Model, moe_layers, objective, routers

pytestmark = pytest.mark.slow

LAYERS, EXPERTS = 2, QUICK.experts
METHODS = ("change", "change + MaxVar", "norm", "norm + MaxVar", "frequency", "weight", "random")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switch") / "results"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert switch.main(["--quick", "--output", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def found(output: Path) -> dict[str, Any]:
    return json.loads((output / "switch.json").read_text())


@pytest.fixture(scope="module")
def text(output: Path) -> Text:
    return prepare(output / "model" / "text", True)


@pytest.fixture(scope="module")
def model(output: Path, text: Text) -> Model:
    return finetune(output / "model", text, QUICK, "pre-trained").model


def test_everything_is_written(output: Path, found: dict[str, Any]) -> None:
    assert (output / "switch.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "switch.md").read_text()
    assert all(f"| {method} |" in table for method in ("change", "norm + MaxVar", "frequency", "random", "uniform"))
    with (output / "switch.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in found["rows"]]
    assert all(row["rouge2_low"] <= row["rouge2"] <= row["rouge2_high"] for row in found["rows"])
    assert all(row["loss_low"] <= row["loss"] <= row["loss_high"] for row in found["rows"])
    differences = {(row["choices"], row["method"]) for row in found["differences"]}
    assert differences == {
        (choices, method) for choices in ("2,3", "1,2") for method in METHODS if method != switch.OURS
    }


def test_widths_average_as_asked(found: dict[str, Any]) -> None:
    mixed = [row for row in found["rows"] if row["widths"]]
    assert {row["method"] for row in mixed} == {*METHODS, "uniform"}
    for row in mixed:
        assert len(row["widths"]) == LAYERS
        for widths in row["widths"].values():
            assert len(widths) == EXPERTS
            assert sum(widths) / EXPERTS == row["average"]
            assert max(widths) - min(widths) <= 1


def test_experts_first_in_an_order_are_the_wide_ones() -> None:
    assert assign({"layer": [3, 1, 0, 2]}, Fraction("2.25"), (2, 3)) == {"layer": [2, 2, 2, 3]}
    assert assign({"layer": [3, 1, 0, 2]}, Fraction("2.75"), (2, 3)) == {"layer": [3, 3, 2, 3]}


def test_orders() -> None:
    scores = Scores(
        [1.0] * 4, [4.0, 2.0, 3.0, 1.0], [0.1, 0.2, 0.4, 0.3], [1.0, 1.0, 3.5, 1.5], [5, 0, 5, 9], [1, 0, 2, 1.5]
    )
    by = {name: order["layer"] for name, order in orders({"layer": scores}).items()}
    assert by["change"] == [0, 1, 3, 2]
    assert by["norm"] == [3, 1, 2, 0]
    assert by["change + MaxVar"] == [2, 0, 1, 3]
    assert by["norm + MaxVar"] == [3, 2, 1, 0]
    assert by["frequency"] == [3, 0, 2, 1]
    assert by["weight"] == [2, 3, 0, 1]
    assert moved({"layer": by["change + MaxVar"]}, {"layer": by["change"]}) == 1
    assert sorted(random_order({"layer": scores}, 1)["layer"]) == [0, 1, 2, 3]


def test_quantization_touches_only_what_it_should(model: Model) -> None:
    shelf = Shelf(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widths = {name: [2, 1, *[3] * (EXPERTS - 2)] for name in moe_layers(model)}
    after = shelf.quantized(widths).state_dict()
    levels = {}
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])
        kept = ("shared", "embed_tokens", "lm_head", "router", "norm", "relative_attention_bias")
        if any(part in name for part in kept):
            assert torch.equal(after[name], tensor), name
            continue
        assert not torch.equal(after[name], tensor), name
        levels[name] = max(len(row.unique()) for row in after[name])
        if ".experts." not in name:
            step = (tensor.amax(dim=1) - tensor.amin(dim=1)).max() / 255
            assert (after[name] - tensor).abs().max() < step, name
    assert any(levels[name] > 8 for name in levels if ".experts." not in name)
    assert all(levels[name] <= 4 for name in levels if ".expert_0." in name)
    assert all(levels[name] <= 2 for name in levels if ".expert_1." in name)
    assert all(4 < levels[name] <= 8 for name in levels if ".expert_2." in name)
    rest = shelf.quantized(None).state_dict()
    assert all(torch.equal(rest[name], before[name]) for name in before if ".experts." in name)


def test_eight_bits_lose_nothing(model: Model, text: Text) -> None:
    batch = next(example_batches(text, 16, 1, 3))
    quantized = Shelf(model).quantized(uniform(model, 8))
    exact, rounded = (sum(likelihood(one, batch)[0]) for one in (model, quantized))
    assert rounded == pytest.approx(exact, rel=2e-3)


def test_hooks_count_every_token_once(model: Model, text: Text, found: dict[str, Any]) -> None:
    batches = list(example_batches(text, 8, 3, 5))
    read, written = sum(int(batch.mask.sum()) for batch in batches), sum(int((b.labels != -100).sum()) for b in batches)
    assert any(int((batch.mask == 0).sum()) for batch in batches)
    counted = usage(model, batches)
    for name, (tokens, gates) in counted.items():
        assert sum(tokens) == (read if name.startswith("encoder") else written)
        assert all(count / EXPERTS <= gate <= count for count, gate in zip(tokens, gates, strict=True))
    assert all(not layer.router._forward_hooks for layer in moe_layers(model).values())
    totals = Counter({(row["start"], row["layer"]): 0 for row in found["experts"]})
    for row in found["experts"]:
        totals[row["start"], row["layer"]] += row["tokens"]
    assert len(totals) == LAYERS * len(STARTS)
    assert len({total for (_, layer), total in totals.items() if layer.startswith("encoder")}) == 1


def test_correlations_are_those_of_the_written_numbers(found: dict[str, Any]) -> None:
    written = {(row["since"], row["layer"]): row for row in found["correlations"]}
    for start in STARTS:
        for layer in {row["layer"] for row in found["experts"]}:
            mine = [row for row in found["experts"] if (row["start"], row["layer"]) == (start, layer)]
            norms, changes = ([row[name] for row in mine] for name in ("norm", "change"))
            row = written[f"{start}, before fine-tuning", layer]
            assert row["spearman"] == pytest.approx(spearmanr(norms, changes).statistic)
            assert row["kendall"] == pytest.approx(kendalltau(norms, changes).statistic)
            assert changes == pytest.approx([row["norm"] - row["initial"] for row in mine], abs=1e-6)
    assert len(written) == LAYERS * (len(STARTS) + 1)


def test_initial_routers_are_those_before_fine_tuning(output: Path, text: Text, model: Model) -> None:
    folder = output / "model"
    before = routers(Model.from_pretrained(folder / "pretrained", dtype=torch.float32))
    kept = finetune(folder, text, QUICK, "pre-trained")
    drawn = finetune(folder, text, QUICK, "random").initial
    for name, router in before.items():
        assert torch.equal(kept.initial[name], router)
        assert not torch.equal(routers(model)[name], router)
        assert float(drawn[name].std()) == pytest.approx(PAPER_SIGMA, rel=0.2)


def test_a_second_run_trains_and_evaluates_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr("benchmarks.replication.switch.stages.fit", never)
    monkeypatch.setattr("benchmarks.replication.switch.evaluate.evaluate", never)
    before = (output / "switch.csv").read_text()
    assert switch.main(["--quick", "--output", str(output)]) == 0
    assert (output / "switch.csv").read_text() == before


def test_models_of_another_seed_are_refused(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert switch.main(["--quick", "--seed", "1", "--output", str(output)]) == 1
    assert "other settings" in capsys.readouterr().err


def test_training_reaches_every_router(model: Model, text: Text) -> None:
    total, tokens = objective(model, next(example_batches(text, 8, 1, 0)))
    assert float(total.detach()) > float(tokens.detach())
    total.backward()
    assert all(float(layer.router.classifier.weight.grad.abs().sum()) > 0 for layer in moe_layers(model).values())
    model.zero_grad()


SOURCE = '''
class A:
    @property
    def small(self):
        """Return a number."""
        return self._small  # why

    async def large(self, x, *, y=1):
        """Documented."""
        for part in x:
            if part is None:
                raise ValueError(f"{part}")
            self.last = await part.read(len(x))

    def both(self):
        """Only documented."""

def alone(a, b, c, d):
    try:
        return [one for one in a if helper(one) > 0]
    except KeyError:
        return a == b
'''


def test_functions_are_described_by_their_syntax() -> None:
    nodes = {node.name: node for node in functions(SOURCE)}
    assert ast.unparse(nodes["small"]) == "@property\ndef small(self):\n    return self._small"
    assert ast.unparse(nodes["both"]) == "def both(self):\n    pass"
    assert common_calls(nodes.values()) == ["helper", "len", "read"]
    assert {name: describe(node, ("len", "read")) for name, node in nodes.items()} == {
        "small": "Property with no arguments that returns an attribute.",
        "large": "Asynchronous method with two arguments that loops, tests conditions, formats strings, awaits, sets "
        "attributes, calls read and len, raises ValueError, returns nothing.",
        "both": "Method with no arguments that returns nothing.",
        "alone": "Function with many arguments that collects values, catches KeyError, returns a truth value.",
    }
    assert list(functions("def broken(:\n")) == []


def test_held_out_functions_are_new(text: Text) -> None:
    train, held_out = split_functions(text.tokenizer, [SOURCE], [SOURCE, "def new():\n    return 1"])
    assert [example.source for example in held_out] == ["def new():\n    return 1"]
    assert {example.source for example in train} < {
        ast.unparse(node) for node in functions(SOURCE)
    }  # some are too long
    assert not {example.source for example in text.train} & {example.source for example in text.held_out}
    pairs = encode_examples(text, [*text.train, *text.held_out])
    assert max(len(source) for source, _ in pairs) <= SOURCE_TOKENS
    assert max(len(target) for _, target in pairs) <= TARGET_TOKENS


def test_removed_spans_can_be_put_back() -> None:
    window = torch.randint(1000, (128,), generator=torch.Generator().manual_seed(1))
    source, target = corrupt(window, 1000, torch.Generator().manual_seed(2))
    assert len(source) == len(window) - SPANS * (SPAN - 1)
    assert target[-1] == 0
    spans = {int(target[i]): target[i + 1 : i + 1 + SPAN].tolist() for i in range(0, len(target) - 1, SPAN + 1)}
    restored = [token for place in source.tolist() for token in spans.get(place, [place])]
    assert restored == window.tolist()


def test_intervals_hold_the_mean_and_shrink_for_equal_values() -> None:
    bootstrap = Bootstrap(4, 0)
    assert bootstrap.interval([2.0] * 4) == (2.0, 2.0)
    low, high = bootstrap.interval([0.0, 1.0, 2.0, 3.0])
    assert low < 1.5 < high
    assert bootstrap.interval([2.0, 4.0, 6.0, 8.0], [1, 2, 3, 4]) == (2.0, 2.0)
