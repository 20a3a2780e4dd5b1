"""Codes to 32-bit words and back: the one layout that both checkpoint formats use.

Codes lie one after the other, lowest bits first, without gaps: 32 codes fill exactly `bits` words (8 of 4 bits fill
one), and a 3-bit code may straddle two of them. compressed-tensors packs so too, but for 3 bits only from 0.18 on
(older ones leave gaps); a file must not depend on which one is installed, so its function is the tests' reference and
not called here.

Shapes: R rows, C codes in a row, W = ceil(C * bits / 32) words in a row.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

_WORD = 0xFFFFFFFF


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 words [R, W] of uint8 codes [R, C]; the last word of a row is filled up with zero bits."""
    rows, count = codes.shape
    period, filled = _period(bits)
    blocks = -(-count // period)
    padded = pad(codes, (0, blocks * period - count)).view(rows, blocks, period)
    words = torch.zeros((rows, blocks, filled), dtype=torch.int64, device=codes.device)
    for position in range(period):
        word, shift = divmod(position * bits, 32)
        value = padded[..., position].to(torch.int64) << shift
        words[..., word] |= value & _WORD
        if shift + bits > 32:
            words[..., word + 1] |= value >> 32
    return words.to(torch.int32).view(rows, -1)[:, : -(-count * bits // 32)].contiguous()


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 [R, count], of int32 words [R, W]."""
    rows, (period, filled) = words.shape[0], _period(bits)
    blocks = -(-count // period)
    padded = pad(words, (0, blocks * filled - words.shape[1])).view(rows, blocks, filled)
    codes = torch.empty((rows, blocks, period), dtype=torch.uint8, device=words.device)
    for position in range(period):
        word, shift = divmod(position * bits, 32)
        value = (padded[..., word].to(torch.int64) & _WORD) >> shift
        if shift + bits > 32:
            value |= padded[..., word + 1].to(torch.int64) << (32 - shift)
        codes[..., position] = value & (2**bits - 1)
    return codes.view(rows, -1)[:, :count].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and how many words."""
    shared = math.gcd(bits, 32)
    return 32 // shared, bits // shared
