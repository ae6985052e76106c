"""This module prepares the Switch Transformer's text: Python sources, and functions with a sentence on each.

The files belong to the standard library and to installed packages. A file is either for training or held out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.models import corpus
from benchmarks.models.architectures import SHARED
from benchmarks.replication.switch.describe import Example, common_calls, describe, functions
from planner.output.files import write_json
from vllm_moeq.format import read_json

PAD = "<|pad|>"
SENTINELS = 32
"""Tokens that stand for a removed span: more than a window has spans."""

SOURCE_TOKENS = 128
TARGET_TOKENS = 40
HELD_OUT = 12
"""This many of 256 files are held out, as :func:`benchmarks.models.corpus.read_sources` does it."""

HELD_OUT_EXAMPLES = 500

WINDOW = 128
SPAN = 4
SPANS = 9
"""Spans of ``SPAN`` tokens that are removed from a window: 28% of it."""


class Batch(NamedTuple):
    """Padded token ids.

    Attributes:
        source: [sequences, length], what the encoder reads.
        mask: 1 where ``source`` is no padding.
        labels: [sequences, length], −100 where there is nothing to predict.
    """

    source: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Text:
    """Everything that is read.

    Attributes:
        tokenizer: byte-level BPE, with padding and sentinels.
        stream: token ids to pre-train on, int32.
        train: functions to fine-tune on.
        held_out: functions to evaluate on.
    """

    tokenizer: PreTrainedTokenizerFast
    stream: torch.Tensor
    train: list[Example]
    held_out: list[Example]


def split_functions(
    tokenizer: PreTrainedTokenizerFast, train: Sequence[str], held_out: Sequence[str]
) -> tuple[list[Example], list[Example]]:
    """Return the distinct functions of either side that are short enough; held-out ones are not in training as well.

    Packages copy from each other, and from the standard library.
    """
    nodes = [[node for text in side for node in functions(text)] for side in (train, held_out)]
    known = common_calls(nodes[0])
    sides = [list(dict.fromkeys(Example(ast.unparse(node), describe(node, known)) for node in side)) for side in nodes]
    seen = {example.source for example in sides[0]}
    sides[1] = [example for example in sides[1] if example.source not in seen]
    return _short(tokenizer, sides[0]), sorted(_short(tokenizer, sides[1]), key=_digest)[:HELD_OUT_EXAMPLES]


def _short(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Example]:
    """Return the examples that are read and written to the end."""
    sources = tokenizer([example.source for example in examples], verbose=False)["input_ids"]
    targets = tokenizer([example.target for example in examples], verbose=False)["input_ids"]
    lengths = ((len(source), len(target) + 1) for source, target in zip(sources, targets, strict=True))
    fits = [source <= SOURCE_TOKENS and target <= TARGET_TOKENS for source, target in lengths]
    return [example for example, fit in zip(examples, fits, strict=True) if fit]


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.source.encode()).digest()


def read_files(quick: bool) -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts); few of them if it has to be quick."""
    train, held_out = corpus.read_sources()
    if quick:
        return train[:40], held_out[:8]
    for text in corpus.read_installed(30_000_000):
        digest = hashlib.sha256(text.encode()).digest()
        (held_out if digest[0] < HELD_OUT else train).append(text)
    return sorted(train, key=lambda text: hashlib.sha256(text.encode()).digest()), held_out


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer and add padding (id ``vocabulary``) and sentinels (the ids behind it)."""
    tokenizer = corpus.train_tokenizer(texts, vocabulary)
    tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.add_tokens([AddedToken(f"<|span {number}|>", special=True) for number in range(SENTINELS)])
    return tokenizer


def prepare(folder: Path, quick: bool) -> Text:
    """Return the text; read and split once, then kept in ``folder``: packages may change between two runs."""
    if not (folder / "examples.json").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = read_files(quick)
        some = list(corpus.limited(train, 1_000_000 if quick else 12_000_000))
        tokenizer = make_tokenizer(some, 512 if quick else int(SHARED["vocab_size"]))
        tokenizer.save_pretrained(folder)
        save_file({"stream": corpus.encode(tokenizer, some).int()}, folder / "stream.safetensors")
        train_examples, held_out_examples = split_functions(tokenizer, some, held_out)
        write_json(folder / "examples.json", {"train": train_examples, "held_out": held_out_examples})
    kept = read_json(folder / "examples.json")
    train_examples, held_out_examples = ([Example(*pair) for pair in kept[side]] for side in ("train", "held_out"))
    stream = load_file(folder / "stream.safetensors")["stream"]
    return Text(AutoTokenizer.from_pretrained(folder), stream, train_examples, held_out_examples)


def corrupt(window: torch.Tensor, first_sentinel: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace spans by sentinels; return what is left, and sentinels with what they stand for, an end token behind.

    The window is cut into slots, and each of the chosen slots begins with a span: spans never touch.
    """
    slots = window.numel() // (SPAN + 1)
    chosen = torch.randperm(slots, generator=generator)[:SPANS].sort().values
    shift = int(torch.randint(window.numel() - slots * (SPAN + 1) + 1, (1,), generator=generator))
    source, target, at = [], [], 0
    for number, slot in enumerate(chosen.tolist()):
        begin = shift + slot * (SPAN + 1)
        sentinel = torch.tensor([first_sentinel + number])
        source += [window[at:begin], sentinel]
        target += [sentinel, window[begin : begin + SPAN]]
        at = begin + SPAN
    return torch.cat([*source, window[at:]]), torch.cat([*target, torch.zeros(1, dtype=window.dtype)])


def denoising_batches(text: Text, batch: int, steps: int, seed: int) -> Iterator[Batch]:
    """Yield batches of random windows with spans removed: T5's objective, which Switch Transformer is trained by."""
    generator = torch.Generator().manual_seed(seed)
    sentinel = int(text.tokenizer.pad_token_id) + 1
    for _ in range(steps):
        starts = torch.randint(text.stream.numel() - WINDOW, (batch,), generator=generator).tolist()
        pairs = [corrupt(text.stream[at : at + WINDOW].long(), sentinel, generator) for at in starts]
        source, labels = (torch.stack(side) for side in zip(*pairs, strict=True))
        yield Batch(source, torch.ones_like(source), labels)


def encode_examples(text: Text, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Return (source ids, target ids and an end token)."""
    sources = text.tokenizer([example.source for example in examples], verbose=False)["input_ids"]
    targets = text.tokenizer([example.target for example in examples], verbose=False)["input_ids"]
    return [
        (source[:SOURCE_TOKENS], [*target, 0][:TARGET_TOKENS])
        for source, target in zip(sources, targets, strict=True)
    ]  # fmt: skip


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pad pairs to the longest of each side."""
    source, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(pair[side]) for pair in pairs], True, value)
        for side, value in ((0, pad), (1, -100))
    )
    return Batch(source, (source != pad).long(), labels)


def example_batches(text: Text, batch: int, steps: int, seed: int, pool: int = 16) -> Iterator[Batch]:
    """Yield batches of training examples, each epoch a new permutation; of similar length, which saves padding.

    Args:
        text: with the examples.
        batch: examples in each.
        steps: batches.
        seed: the seed of the order.
        pool: batches' worth of examples that are sorted by length.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = encode_examples(text, text.train)
    waiting: list[list[tuple[list[int], list[int]]]] = []
    order: list[int] = []
    for _ in range(steps):
        if not waiting:
            while len(order) < batch * pool:
                order += torch.randperm(len(pairs), generator=generator).tolist()
            taken = sorted((pairs[i] for i in order[: batch * pool]), key=lambda pair: len(pair[0]))
            del order[: batch * pool]
            waiting = [taken[i * batch : (i + 1) * batch] for i in torch.randperm(pool, generator=generator).tolist()]
        yield collate(waiting.pop(), int(text.tokenizer.pad_token_id))
