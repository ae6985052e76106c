"""What each quantizer gains beside rounding to nearest, measured on experts of the shipped Mixtral."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from planner.calibration.kl.gains import Gains, Reach, Trial, gains
from planner.calibration.kl.others import check_trellises, other_gains
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.planner.calibration.layers import Read, reading
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import UsageError

pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
WIDTHS = (1, 2, 3, 4, 8)
SEQUENCES = 16


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    tokens = calibration_text(MIXTRAL, str(CALIBRATION_TEXT), SEQUENCES, 128, 0).tokens
    with reading(MIXTRAL, tokens, tmp_path_factory.mktemp("states")) as found:
        yield found


@pytest.fixture(scope="module")
def found(read: Read) -> dict[str, Gains]:
    return other_gains(read.decoder, read.store, SEQUENCES, WIDTHS, False, QUIET)


def mean(gained: Gains, bits: int) -> float:
    return float(torch.stack([layer[bits].mean() for layer in gained.values()]).mean())


def test_trellises_gain_most(read: Read, found: dict[str, Gains]) -> None:
    plain = gains(read.decoder, read.store, SEQUENCES, WIDTHS, {"": Trial()}, Reach(False), "gains", QUIET)[""]
    assert set(found) == {"trellis", "rotated", "viterbi"}
    for bits in (1, 2, 3, 4):
        assert 0 < mean(found["trellis"], bits) < mean(found["rotated"], bits) < mean(plain, bits)
        assert mean(found["viterbi"], bits) < 1
    assert mean(found["trellis"], 2) < 0.7 * mean(plain, 2)


def test_eight_bits_are_a_rotated_grid(found: dict[str, Gains]) -> None:
    for prefix, layer in found["trellis"].items():
        assert torch.equal(layer[8], found["rotated"][prefix][8])


def test_every_expert_has_a_gain_of_its_own_or_its_layers(read: Read) -> None:
    trials = {"trellis": Trial("trellis", rotated=True)}
    few, every = (
        gains(read.decoder, read.store, SEQUENCES, (2,), trials, reach, "gains", QUIET)["trellis"]
        for reach in (Reach(False, 2), Reach(True))
    )
    first, last = (read.decoder.moe[index].prefix for index in (0, 2))
    assert len(set(few[first][2].tolist())) == 1 < len(set(every[first][2].tolist()))
    assert few[first][2][0] == few[last][2][0]  # neither layer was tried: both take the mean of the others
    assert all(bool((layer[2] > 0).all()) for layer in every.values())


@pytest.mark.parametrize("tried", [1, 2, 3])
def test_layers_are_spread(read: Read, tried: int) -> None:
    """Each lies in the middle of its part of the model."""
    layers = len(read.decoder.moe)
    found = sorted(Reach(False, tried).indices(read.decoder))
    assert len(found) == tried
    for turn, index in enumerate(found):
        assert abs(index - (turn + 0.5) * layers / tried) < 1


@pytest.mark.parametrize("tried", [None, MIXTRAL_SIZES.layers, 2 * MIXTRAL_SIZES.layers])
def test_all_layers_may_be_tried(read: Read, tried: int | None) -> None:
    assert Reach(False, tried).indices(read.decoder) == set(range(MIXTRAL_SIZES.layers))


def test_experts_that_fill_no_tiles_are_refused(narrow_mixtral: Path) -> None:
    with SourceModel(narrow_mixtral) as model, pytest.raises(UsageError, match=r"--scheme: .* found \[64, 48\]"):
        check_trellises(model, read_layout(model), torch.device("cpu"))
