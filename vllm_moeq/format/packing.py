"""Bit packing of quantization codes.

Layout (format version 1): codes run along the last dimension as a bitstream, least significant bit first, in
little-endian order of 32-bit words. Bit j of code i is bit (i·b + j) mod 32 of word (i·b + j) // 32. 32 codes of b
bits are exactly b words; a 3-bit code may straddle two words.
"""

from __future__ import annotations

import torch

BIT_WIDTHS: tuple[int, ...] = (1, 2, 3, 4, 8)
"""The widths in bits that an expert may have. All code that reads or decodes codes supports exactly these."""

CODES_PER_BLOCK = 32
"""The number of codes packed together; the input dimension must be a multiple of it."""

WHOLE_ROW = -1
"""The group size that means one group per row."""


def _check_bits(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, got {bits}")


def packed_words(num_codes: int, bits: int) -> int:
    """Return the number of 32-bit words that ``num_codes`` codes of ``bits`` bits take.

    Raises:
        ValueError: ``bits`` is not a known width or ``num_codes`` is not a multiple of 32.
    """
    _check_bits(bits)
    if num_codes % CODES_PER_BLOCK:
        raise ValueError(f"the number of codes must be a multiple of {CODES_PER_BLOCK}, got {num_codes}")
    return num_codes * bits // 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes into 32-bit words along the last dimension.

    Args:
        codes: integer tensor [..., K] with values in [0, 2**bits), K a multiple of 32.
        bits: one of :data:`BIT_WIDTHS`.

    Returns:
        int32 tensor [..., K * bits // 32].

    Raises:
        ValueError: the width is unknown, K is not a multiple of 32, or codes are not integers or out of range.
    """
    num_words = packed_words(codes.shape[-1], bits)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes of {bits} bits must lie in [0, {(1 << bits) - 1}]")
    blocks = codes.to(torch.int32).unflatten(-1, (-1, CODES_PER_BLOCK))
    words = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for i in range(CODES_PER_BLOCK):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= blocks[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= blocks[..., i] >> (32 - shift)
    return words.reshape(*codes.shape[:-1], num_words)


def unpack(words: torch.Tensor, bits: int, num_codes: int) -> torch.Tensor:
    """Invert :func:`pack`.

    Args:
        words: int32 tensor [..., num_codes * bits // 32].
        bits: one of :data:`BIT_WIDTHS`.
        num_codes: the length K of the result's last dimension.

    Returns:
        uint8 tensor [..., num_codes].

    Raises:
        ValueError: the width is unknown, or the last dimension does not hold ``num_codes`` codes.
    """
    expected = packed_words(num_codes, bits)
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        raise ValueError(
            f"{num_codes} codes of {bits} bits are {expected} int32 words, got {words.shape[-1]} of {words.dtype}"
        )
    mask = (1 << bits) - 1
    blocks = words.unflatten(-1, (-1, bits)) if words.numel() else words.reshape(*words.shape[:-1], 0, bits)
    codes = torch.empty(*blocks.shape[:-1], CODES_PER_BLOCK, dtype=torch.uint8, device=words.device)
    for i in range(CODES_PER_BLOCK):
        word, shift = divmod(i * bits, 32)
        code = blocks[..., word] >> shift
        if shift + bits > 32:
            # The arithmetic shift above filled the top with sign bits; keep only the code's own bits.
            low = code & ((1 << (32 - shift)) - 1)
            code = low | (blocks[..., word + 1] << (32 - shift))
        codes[..., i] = code & mask
    return codes.reshape(*words.shape[:-1], num_codes)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the weights (q − zero) · scale of one matrix in float32.

    Args:
        codes: uint8 [N, K].
        scales: float16, bfloat16 or float32 [N, K / G].
        zeros: a tensor of the same shape and dtype.

    Returns:
        The weights, float32 [N, K].

    Raises:
        ValueError: the shapes do not match, or the number of groups does not divide K.
    """
    rows, columns = codes.shape
    groups = scales.shape[-1]
    if scales.shape != zeros.shape or scales.shape[0] != rows or groups == 0 or columns % groups:
        raise ValueError(
            f"codes {list(codes.shape)} do not match scales {list(scales.shape)} and zeros {list(zeros.shape)}"
        )
    grouped = codes.reshape(rows, groups, -1).to(torch.float32)
    weight = (grouped - zeros.float()[..., None]) * scales.float()[..., None]
    return weight.reshape(rows, columns)
