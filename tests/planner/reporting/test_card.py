"""The model card that every output has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from planner.evaluation.record import Evaluations
from planner.reporting.card import BEGIN, END, refresh_card
from planner.reporting.command_lines import quantize_line
from planner.reporting.facts import collect
from tests.conftest import Outcome
from tests.planner.reporting.test_report import EVALUATIONS, HOSTILE

Moeq = Callable[..., Outcome]
FLAGS = ("--group-size", 32, "--quantizer", "rtn")


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def read(folder: Path) -> str:
    return (folder / "README.md").read_text()


def quantized(moeq: Moeq, source: Path, folder: Path, *flags: object) -> Path:
    outcome = moeq("quantize", source, *FLAGS, *flags, "-o", folder)
    assert outcome.code == 0, outcome.err
    return folder


def test_the_front_matter_is_what_the_hub_reads(quantized_mixtral: Path) -> None:
    assert front_matter(read(quantized_mixtral)) == {
        "base_model": "mixtral",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["moeq", "vllm-moeq", "mixture-of-experts", "mixed-precision"],
    }


def test_the_card_tells_plan_sizes_and_commands(quantized_mixtral: Path, tiny_mixtral: Path) -> None:
    card = read(quantized_mixtral)
    for line in (
        "# mixtral, 3 bits per expert weight",
        "Method by hand: 3 bits on average requested, 3.0000 achieved. Codes: hqq, groups of 32",
        "| 2 | 4 | 25.0% |",
        "To install: `pip install '.[gpu]'` in a clone of vllm-moeq; for CPUs: `make setup` there.",
        "moeq serve DIR",
        "vllm serve DIR",
        'AutoModelForCausalLM.from_pretrained("DIR")',
        "None: no text was read.",
        "Not measured yet: `moeq eval DIR --data text.txt`.",
    ):
        assert line in card
    assert str(tiny_mixtral.parent) not in card
    assert str(quantized_mixtral.parent) not in card


def test_the_card_tells_schemes(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    flags = ("--bits", "2,8", "--avg-bits", 5)
    card = read(quantized(moeq, tiny_mixtral, tmp_path / "out", *flags, "--scheme", "trellis"))
    assert "| bits | scheme | experts | share |" in card
    assert "| 2 | trellis | 8 | 50.0% |" in card
    assert "| 8 | grid | 8 | 50.0% |" in card
    assert ", groups of 32; trellis by viterbi; experts in a rotated basis" in card
    assert "scales and zero points, and signs of the rotation" in card
    command = next(line for line in card.splitlines() if line.startswith("moeq quantize"))
    assert "--scheme trellis" in command
    again = command.replace("DIR", str(tmp_path / "again")).replace("mixtral ", f"{tiny_mixtral} ", 1)
    assert moeq(*again.split()[1:]).code == 0
    assert read(tmp_path / "again") == card
    report = moeq("report", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert report.code == 0, report.err
    assert "2 bits, trellis" in page
    assert '"schemes":[["' in page


def test_records_of_gptq_without_passes_afterwards(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    """As checkpoints had them before there were such passes. A trellis has none, so that the flag would be refused."""
    settings = {"damping": 0.01, "act_order": "group", "static_groups": False, "symmetric": False, "search": "mse"}
    for scheme, flags, word in (("grid", FLAGS, True), ("trellis", FLAGS[2:], False)):
        folder = tmp_path / scheme
        made = moeq("quantize", tiny_mixtral, *flags, "--bits", "1,2,3", "--scheme", scheme, "-o", folder)
        assert made.code == 0, made.err
        path = folder / "quantization_report.json"
        report = json.loads(path.read_text())
        report["settings"]["gptq"] = settings
        path.write_text(json.dumps(report))
        line = quantize_line(collect(folder), "out")
        assert ("--sweeps 0" in line, "--group-size 32" in line) == (word, word)


def test_a_plan_of_trellises_that_could_have_had_grids(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    flags = ("--method", "router-norm", "--bits", "2,8", "--avg-bits", 2, "--scheme", "trellis")
    out = quantized(moeq, tiny_mixtral, tmp_path / "out", *flags)
    plan = out / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"method": "ours"}))  # no flag names it
    words = quantize_line(collect(out), "again")
    assert "--plan again/plan.json" in words
    assert "--group-size" not in words
    again = words.replace("again/plan.json", str(plan)).replace("-o again", f"-o {tmp_path / 'again'}")
    assert moeq(*again.replace("mixtral ", f"{tiny_mixtral} ", 1).split()[1:]).code == 0


def test_the_name_of_the_folder_changes_nothing(moeq: Moeq, mixtral_copy: Path, tmp_path: Path) -> None:
    one, other = (quantized(moeq, mixtral_copy, tmp_path / name) for name in ("one", "other"))
    assert read(one) == read(other)


def test_license_and_card_of_the_source(moeq: Moeq, mixtral_copy: Path, tmp_path: Path) -> None:
    (mixtral_copy / "README.md").write_text(
        "---\nlanguage: [en]\nlicense: other\nlicense_name: 'tiny-license'\nlicense_link: LICENSE\n---\n# Theirs\n"
    )
    folder = quantized(moeq, mixtral_copy, tmp_path / "out")
    fields = front_matter(read(folder))
    assert [fields[name] for name in ("license", "license_name", "license_link")] == [
        "other",
        "tiny-license",
        "LICENSE",
    ]
    assert "The source model’s: tiny-license." in read(folder)
    assert "Theirs" not in read(folder)


def test_a_name_of_the_hub_and_its_commit(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--Tiny-8x" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_mixtral, cached)
    card = read(quantized(moeq, cached, tmp_path / "out"))
    assert front_matter(card)["base_model"] == "owner/Tiny-8x"
    assert f"owner/Tiny-8x, commit {'0' * 40}, quantized by vllm-moeq" in card
    assert "moeq quantize owner/Tiny-8x --method" in card


def test_a_name_that_the_hub_refuses_is_no_base_model(moeq: Moeq, mixtral_copy: Path, tmp_path: Path) -> None:
    source = mixtral_copy.rename(tmp_path / "my model (2) `x`")
    card = read(quantized(moeq, source, tmp_path / "out"))
    assert "base_model" not in front_matter(card)
    assert "# my model (2) \\`x\\`, " in card


def test_coverage_of_a_calibration(quantized_copy: Path) -> None:
    path = quantized_copy / "quantization_report.json"
    report = json.loads(path.read_text())
    report["calibration"] = {"data": "c4", "seed": 3, "sequences": 128, "seq_len": 2048}
    for expert in range(5, 8):
        report["layers"][1]["experts"][expert]["fallback"] = f"{expert} calibration tokens, fewer than 64"
    path.write_text(json.dumps(report))
    (quantized_copy / "README.md").unlink()
    assert refresh_card(quantized_copy)
    card = read(quantized_copy)
    assert "128 × 2,048 tokens of c4, seed 3. 3 of 16 experts were quantized without it:" in card
    assert "- layer 1, expert 6: 6 calibration tokens, fewer than 64" in card


def test_evaluations_replace_their_section_only(moeq: Moeq, quantized_copy: Path) -> None:
    mine = read(quantized_copy).replace("## Use", "## Use\n\nMy own words: äöü.")
    (quantized_copy / "README.md").write_text(mine)
    EVALUATIONS.write(quantized_copy)
    assert moeq("report", quantized_copy, "--no-png").code == 0
    card = read(quantized_copy)
    assert "| held\\_out.txt | 256 | 65,536 | 12.56 ± 0.17 | 12.23 |" in card
    assert "| arc\\_easy | acc | 0.2612 ± 0.0090 | 2,376 | vllm |" in card
    outside = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    assert outside.sub("", card) == outside.sub("", mine)


def test_a_card_of_somebody_else_is_left_alone(moeq: Moeq, quantized_copy: Path) -> None:
    (quantized_copy / "README.md").write_bytes(b"# Mine \xff\n")
    outcome = moeq("report", quantized_copy, "--no-png")
    assert outcome.code == 0
    assert "README.md is as it was: it has no evaluation section of ours" in outcome.err
    assert (quantized_copy / "README.md").read_bytes() == b"# Mine \xff\n"


def test_a_model_that_vllm_does_not_serve(moeq: Moeq, tmp_path: Path) -> None:
    from tests.architectures import build

    build("switch_transformers", tmp_path / "source")
    card = read(quantized(moeq, tmp_path / "source", tmp_path / "out"))
    fields = front_matter(card)
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text2text-generation")
    assert "moeq serve" not in card
    assert "vLLM has no encoder-decoder of the T5 family" in card
    assert "AutoModelForSeq2SeqLM" in card


def test_hostile_names_stay_text(quantized_copy: Path) -> None:
    path = quantized_copy / "quantization_report.json"
    report = json.loads(path.read_text())
    report["source"].update(name=f"{HOSTILE}\n---\nlicense: mit\n```", license="x: y\n- z")
    report["calibration"] = {"data": HOSTILE, "sequences": 1, "seq_len": 1}
    path.write_text(json.dumps(report))
    text = EVALUATIONS.texts[0].model_copy(update={"data": f"{HOSTILE}{END}", "reference": HOSTILE})
    Evaluations(texts=[text]).write(quantized_copy)
    (quantized_copy / "README.md").unlink()
    refresh_card(quantized_copy)
    card = read(quantized_copy)
    fields = front_matter(card)
    assert fields["license"] == "x: y\ufffd- z"
    assert "base_model" not in fields
    body = re.sub(r"```\w*\n.*?\n```", "", card[card.index("\n---\n") :], flags=re.DOTALL)
    assert "<img" not in body.replace("\\<img", "")
    assert body.count(END) == 1
    before = card
    refresh_card(quantized_copy)
    assert read(quantized_copy) == before
