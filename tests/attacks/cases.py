"""The corpus: ways to damage a checkpoint that no honest writer has, by what is damaged."""

from __future__ import annotations

from tests.attacks.damages.configs import AGAINST_FILES, IN_CONFIG, LEADING
from tests.attacks.damages.files import FILES, PREFERRED
from tests.attacks.damages.headers import IN_HEADER, MANY
from tests.attacks.damages.index import IN_INDEX
from tests.attacks.damages.linears import OF_LINEARS
from tests.attacks.damages.tensors import TENSORS
from tests.attacks.damages.trellises import IN_VERSION_TWO

CORPUS = [
    *IN_INDEX, *FILES, *PREFERRED, *IN_HEADER, *MANY, *TENSORS, *IN_CONFIG, *OF_LINEARS, *LEADING, *AGAINST_FILES,
    *IN_VERSION_TWO,
]  # fmt: skip
