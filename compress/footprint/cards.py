"""Cards and machines by name: memory, bandwidth, and the number formats that they have kernels for.

Memory is what the driver reports of a card (less than the GB on the box where ECC takes some), and `share` the part of
it that a model may fill: vLLM's --gpu-memory-utilization 0.9 on a card of its own, less where a system shares it.
Bandwidth is the vendor's peak, so the speeds that follow from it are ceilings. Formats are those of vLLM's kernels
(https://docs.vllm.ai/en/latest/features/quantization/): 4-bit weights and int8 from Turing on, int8 to Hopper, fp8 from
Ada on. A card without fp8 unpacks such weights as it goes; one without bf16 runs such models in float16.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from compress.errors import UserError
from compress.recipe.messages import did_you_mean

_MIB, _GIB = 1 << 20, 1 << 30
_OWN, _SHARED = 0.9, 0.75
_TURING = frozenset({"int8", "int4"})
_AMPERE = _TURING | {"bf16"}
_ADA = _HOPPER = _AMPERE | {"fp8"}
_BLACKWELL = frozenset({"bf16", "fp8", "int4"})
_CDNA3 = frozenset({"bf16", "fp8"})
_NONE: frozenset[str] = frozenset()
ALL_FORMATS = _HOPPER


@dataclass(frozen=True)
class Card:
    """A card, or a machine whose processor and graphics share memory.

    Args:
        name: as sold.
        sold: GB as sold.
        memory: bytes that it reports.
        bandwidth: bytes a second, at most.
        formats: of bf16, int8, fp8 and int4 (weights alone), those that it has kernels for.
        share: part of the memory that a model may fill.
        joins: whether several can share a model (tensor parallelism).
        codes: whether a program that it runs keeps compressed-tensors codes as they are: vLLM does, on GPUs and CPUs.
    """

    name: str
    sold: int
    memory: int
    bandwidth: float
    formats: frozenset[str] = frozenset()
    share: float = _OWN
    joins: bool = True
    codes: bool = True

    @property
    def usable(self) -> int:
        """Bytes that a model may fill."""
        return int(self.memory * self.share)

    def keeps(self, codes: bool) -> bool:
        """Whether a model stays as small here as its file; `codes`: it is of compressed-tensors or gptq."""
        return self.codes or not codes


def _gpu(name: str, sold: int, mib: int, gigabytes: float, formats: frozenset[str]) -> Card:
    return Card(name, sold, mib * _MIB, gigabytes * 1e9, formats)


def _machine(name: str, sold: int, gigabytes: float, formats: frozenset[str], codes: bool = True) -> Card:
    return Card(name, sold, sold * _GIB, gigabytes * 1e9, formats, _SHARED, joins=False, codes=codes)


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        # https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/
        _gpu("RTX 3060 12GB", 12, 12288, 360, _AMPERE),
        _gpu("RTX 3090", 24, 24576, 936, _AMPERE),
        # https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/
        _gpu("RTX 4060 Ti 16GB", 16, 16380, 288, _ADA),
        _gpu("RTX 4070", 12, 12282, 504, _ADA),
        _gpu("RTX 4080", 16, 16376, 717, _ADA),
        _gpu("RTX 4090", 24, 24564, 1008, _ADA),
        # https://www.nvidia.com/en-us/geforce/graphics-cards/50-series/
        _gpu("RTX 5080", 16, 16303, 960, _BLACKWELL),
        _gpu("RTX 5090", 32, 32607, 1792, _BLACKWELL),
        # https://www.nvidia.com/en-us/design-visualization/rtx-6000/
        _gpu("RTX 6000 Ada", 48, 49140, 960, _ADA),
        _gpu("T4", 16, 15360, 320, _TURING),  # https://www.nvidia.com/en-us/data-center/tesla-t4/
        _gpu("V100 32GB", 32, 32768, 900, _NONE),  # https://www.nvidia.com/en-us/data-center/v100/
        _gpu("A10G", 24, 23028, 600, _AMPERE),  # https://aws.amazon.com/ec2/instance-types/g5/
        _gpu("L4", 24, 23034, 300, _ADA),  # https://www.nvidia.com/en-us/data-center/l4/
        _gpu("L40S", 48, 46068, 864, _ADA),  # https://www.nvidia.com/en-us/data-center/l40s/
        # https://www.nvidia.com/en-us/data-center/a100/
        _gpu("A100 40GB", 40, 40960, 1555, _AMPERE),
        _gpu("A100 80GB", 80, 81920, 2039, _AMPERE),
        _gpu("H100 80GB", 80, 81559, 3350, _HOPPER),  # SXM: https://www.nvidia.com/en-us/data-center/h100/
        _gpu("H200", 141, 143771, 4800, _HOPPER),  # https://www.nvidia.com/en-us/data-center/h200/
        _gpu("B200", 180, 183359, 8000, _BLACKWELL),  # https://www.nvidia.com/en-us/data-center/dgx-b200/
        # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
        _gpu("MI300X", 192, 196592, 5300, _CDNA3),
        # https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/
        _machine("Jetson Orin Nano 8GB", 8, 68, _AMPERE),
        _machine("Jetson Orin NX 16GB", 16, 102, _AMPERE),
        _machine("Jetson AGX Orin 64GB", 64, 205, _AMPERE),
        # https://support.apple.com/en-us/121553, /121554 and https://www.apple.com/mac-studio/specs/
        _machine("M4 Pro 48GB", 48, 273, frozenset({"bf16"}), codes=False),
        _machine("M4 Max 128GB", 128, 546, frozenset({"bf16"}), codes=False),
        _machine("M3 Ultra 512GB", 512, 819, frozenset({"bf16"}), codes=False),
        # https://www.raspberrypi.com/products/raspberry-pi-5/ (LPDDR4X-4267, 32 bits)
        _machine("Raspberry Pi 5 8GB", 8, 17, _NONE, codes=False),
        _machine("Laptop CPU DDR5 32GB", 32, 90, _AMPERE),  # two channels of DDR5-5600
    )
}


def find_card(name: str) -> Card:
    """The card that a user means: "4090", "rtx4090" and "RTX 4090" are one.

    Raises:
        UserError: none is meant, or several could be; with their names.
    """
    wanted = _plain(name)
    found = [card for card in CARDS.values() if wanted in _spellings(card.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--gpu {name}: could be {' or '.join(card.name for card in found)}; name one of them")
    raise UserError(f"--gpu {name}: is not known{did_you_mean(name, CARDS)}; use {', '.join(CARDS)}, or --memory 24GB")


def _plain(name: str) -> str:
    """A name without case, spaces and what vendors put around it."""
    text = re.sub(r"\b(nvidia|geforce|tesla|amd|instinct|apple|sxm\d?|pcie)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", text)


def _spellings(name: str) -> set[str]:
    """What a card may be called: any of its words that follow each other, but not the memory alone."""
    words = name.lower().split()
    starts = [at for at, word in enumerate(words) if not re.fullmatch(r"\d+gb", word)]
    found = {_plain(" ".join(words[at:end])) for at in starts for end in range(at + 1, len(words) + 1)}
    return {spelling for spelling in found if len(spelling) > 1}
