"""Every encoding against a library that decodes it too, from the tensors alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from planner.model.codecs import FILES, METHODS, VALUES, Parts, Settings, Weight, find_encoded, read_settings
from planner.model.codecs.encoding import stored_name
from planner.model.codecs.scales import block_of, scale_values
from planner.model.codecs.settings import SAME_FILES
from tests.encoded.forms import EXPONENT, FORMS, Form, Tensors, gptq
from tests.encoded.memory import Memory
from tests.paths import ROOT

DECODED_HERE = [name for name, form in FORMS.items() if form.decode is not None]
ELSEWHERE = [name for name in FORMS if name not in DECODED_HERE]


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.1


def settings_of(form: Form) -> Settings:
    options = form.settings if form.file is None else FILES[form.file](form.settings)
    found = read_settings(Path("folder"), {"quantization_config": options, "dtype": "float32"})
    assert found is not None
    return found


def opened(form: Form, tensors: Tensors) -> tuple[Weight, Parts]:
    """Return the one weight of a form, and its parts; nothing else may be left to see."""
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    encoded = find_encoded(Memory(named), settings_of(form))
    assert list(encoded.weights) == ["m.weight"]
    assert encoded.hidden == named.keys()
    weight = encoded.weights["m.weight"]
    return weight, {role: named[name] for role, name in weight.parts.items()}


@pytest.mark.parametrize("name", DECODED_HERE)
def test_weights_are_those_of_another_library(name: str) -> None:
    """Bit by bit: in float32, or in bfloat16 where that library rounds to it."""
    form = FORMS[name]
    tensors = form.encode(weights(128, 256))
    weight, parts = opened(form, tensors)
    assert weight.shape == (128, 256)
    found = weight.codec.read(parts, 0, 128, 1)
    assert found.dtype is torch.float32
    assert form.decode is not None
    assert torch.equal(found.to(form.exact).float(), form.decode(tensors))
    assert (found - weights(128, 256)).norm() < 0.15 * weights(128, 256).norm()


@pytest.mark.parametrize("name", FORMS)
def test_any_rows_are_read_alone(name: str) -> None:
    weight, parts = opened(FORMS[name], FORMS[name].encode(weights(128, 256)))
    whole = weight.codec.read(parts, 0, 128, 1)
    for first, last, step in ((0, 1, 1), (5, 100, 3), (31, 33, 1), (64, 128, 1), (127, 128, 2), (1, 128, 2)):
        assert torch.equal(weight.codec.read(parts, first, last, step), whole[first:last:step])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What GPTQModel makes of its forms and AWQ's."""
    folder = tmp_path_factory.mktemp("decode")
    about = {
        name: json.dumps([FORMS[name].settings["bits"], FORMS[name].settings["group_size"], _version(name)])
        for name in ELSEWHERE
    }
    stored = {f"{it}.{name}": t for it in ELSEWHERE for name, t in FORMS[it].encode(weights(128, 256)).items()}
    save_file(stored, folder / "forms.safetensors", metadata=about)
    names = [str(folder / name) for name in ("forms.safetensors", "decoded.safetensors")]
    script = ROOT / "tests" / "encoded" / "gptqmodel_decode.py"
    subprocess.run([sys.executable, script, *names], check=True, cwd=folder, timeout=300)
    return load_file(names[1])


def _version(name: str) -> str:
    return str(FORMS[name].settings.get("checkpoint_format", settings_of(FORMS[name]).method))


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_weights_are_gptqmodels(name: str, theirs: dict[str, torch.Tensor]) -> None:
    weight, parts = opened(FORMS[name], FORMS[name].encode(weights(128, 256)))
    assert torch.equal(weight.codec.read(parts, 0, 128, 1), theirs[name])


def test_every_encoding_has_a_form() -> None:
    """But gpt-oss's blocks, which a whole model has in ``test_architectures.py``."""
    every = [encoding for encodings in METHODS.values() for encoding in encodings]
    found = set()
    for form in FORMS.values():
        names = {f"m.{suffix}": tensor for suffix, tensor in form.encode(weights(128, 128)).items()}
        for encoding in METHODS[settings_of(form).method]:
            stored = names.get(stored_name("m.weight", encoding.values))
            if stored is not None and stored.dtype in encoding.dtypes and not encoding.missing("m.weight", names):
                found.add(id(encoding))
                break
    assert [encoding.values for encoding in every if id(encoding) not in found] == ["_blocks"]


@pytest.mark.parametrize("exponent", [0, 1, 126, 127, 254])
def test_exponents_are_powers_of_two(exponent: int) -> None:
    stored = torch.tensor([exponent], dtype=torch.uint8)
    expected = stored.view(EXPONENT).float()
    assert torch.equal(scale_values(stored), expected)
    assert torch.equal(scale_values(stored.view(EXPONENT)), expected)
    assert float(expected) == 2.0 ** (exponent - 127)


def test_the_last_exponent_is_no_number() -> None:
    assert not torch.isfinite(scale_values(torch.tensor([255], dtype=torch.uint8))).any()


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 130), st.integers(1, 130))
def test_blocks_may_be_cut_off(rows: int, columns: int, high: int, wide: int) -> None:
    """Every shape has the scales of its blocks, and each of its scales some weights."""
    scales = (-(-rows // high), -(-columns // wide))
    found = block_of((rows, columns), scales, ((high, wide),))
    assert found == (high, wide)
    assert block_of((rows, columns), (scales[0] + 1, scales[1]), ((high, wide),)) in (None, (1, columns // scales[1]))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 4), st.sampled_from([32, 64]),
    st.sampled_from([0, 1]), st.booleans(), st.data(),
)  # fmt: skip
def test_gptq_of_any_shape(
    bits: int, rows: int, groups: int, group: int, offset: int, ordered: bool, data: st.DataObject
) -> None:
    """The width follows from the shapes, and each weight is the one of the formula."""
    weight = weights(32 * rows, group * groups)
    tensors = gptq(bits, group, offset, ordered)(weight)
    form = {"checkpoint_format": "gptq" if offset else "gptq_v2", "quant_method": "gptq"}
    found, parts = opened(Form(form, lambda _: {}), tensors)
    assert found.shape == weight.shape
    row = data.draw(st.integers(0, len(weight) - 1))
    values = found.codec.read(parts, row, row + 1, 1)[0]
    index = tensors["g_idx"].long()
    code = _code(tensors["qweight"][:, row], bits, weight.shape[1])
    zeros = torch.tensor([_code(words, bits, len(weight))[row] for words in tensors["qzeros"]]) + offset
    assert torch.equal(values, (code - zeros[index]).float() * tensors["scales"][index, row])
    assert VALUES in parts


def _code(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes by one large integer."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return torch.tensor([(whole >> (bits * place)) % 2**bits for place in range(count)])


def test_the_guide_names_every_method() -> None:
    section = (ROOT / "docs" / "guide.md").read_text().split("## Encoded sources\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")][1:]
    named = {word for row in rows for word in row.split("`")[1::2]}
    others = {method for method, _ in SAME_FILES}
    assert named == {*METHODS, *FILES, *others}
