"""Names of cards as people write them, and how many of one a model needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.footprint.activations import activation_bytes
from compress.footprint.cache import Cache, Layer
from compress.footprint.cards import CARDS, Card, find_card
from compress.footprint.load import Load


class Config:
    """As much of a config as memory hangs on."""

    hidden_size, intermediate_size, vocab_size = 1024, 4096, 32000
    num_attention_heads, num_key_value_heads, head_dim = 28, 4, 64


@pytest.mark.parametrize("name", CARDS)
def test_each_is_found_by_its_name(name: str) -> None:
    assert find_card(name).name == find_card(name.upper().replace(" ", "-")).name == name


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("3060", "RTX 3060 12GB"),
        ("4060 ti", "RTX 4060 Ti 16GB"), ("a100-80gb", "A100 80GB"), ("H100 SXM5", "H100 80GB"), ("h200", "H200"),
        ("Tesla T4", "T4"), ("v100", "V100 32GB"), ("mi300x", "MI300X"), ("AGX Orin", "Jetson AGX Orin 64GB"),
        ("m4 max", "M4 Max 128GB"), ("Apple M3 Ultra", "M3 Ultra 512GB"), ("pi 5", "Raspberry Pi 5 8GB"),
        ("l40s", "L40S"), ("l4", "L4"),
    ],
)  # fmt: skip
def test_loose_spellings(said: str, meant: str) -> None:
    assert find_card(said).name == meant


@pytest.mark.parametrize("said", ["l40", "a10", "4091", "409", "rtx 4070 ti", "H20", "16gb", "5", "", "gpu"])
def test_a_card_that_is_not_there_is_no_other(said: str) -> None:
    with pytest.raises(UserError) as error:
        find_card(said)
    assert all(name in str(error.value) for name in CARDS) or "could be" in str(error.value)


def test_several_are_asked_about() -> None:
    with pytest.raises(UserError, match="--gpu a100: could be A100 40GB or A100 80GB; name one of them"):
        find_card("a100")


def test_the_nearest_is_named() -> None:
    with pytest.raises(UserError, match=r"--gpu RTX 4900: is not known; did you mean RTX \d+"):
        find_card("RTX 4900")


def test_what_cards_are() -> None:
    for card in CARDS.values():
        assert 0.85 * card.sold * 1e9 < card.memory < 1.08 * card.sold * 1e9
        assert 0.5 * card.memory < card.usable < card.memory
        assert 10e9 < card.bandwidth < 10e12
        assert card.formats <= {"bf16", "int8", "fp8", "int4"}


def load(weights: int) -> Load:
    return Load(weights, weights, Cache([Layer(2 * 4 * 64)] * 10, 4), Config())


def test_heads_decide_how_many_cards_can_share() -> None:
    assert [count for count in (1, 2, 4, 8) if load(1).splits(count)] == [1, 2, 4]  # 28 query heads


def test_so_many_cards_as_it_takes() -> None:
    card = Card("x", 10, 10_000_000_000, 1e12, share=1.0)
    needed = [load(int(weights * 1e9)).cards(card, 1000, 1) for weights in (9, 19, 39, 49)]
    assert needed == [1, 2, 4, None]
    alone = Card("x", 10, 10_000_000_000, 1e12, share=1.0, joins=False)
    assert load(19_000_000_000).cards(alone, 1000, 1) is None


@given(st.integers(1, 10**10), st.integers(1, 64), st.integers(1, 40_000))
def test_the_longest_context_fits_and_one_more_does_not(usable: int, batch: int, positions: int) -> None:
    found = load(10**6).longest(usable, batch, positions)
    assert found == 0 or load(10**6).bytes(found, batch) <= usable
    assert found == positions or load(10**6).bytes(found + 1, batch) > usable


@given(st.integers(10**7, 10**10), st.integers(1, 40_000))
def test_the_largest_batch_fits_and_one_more_does_not(usable: int, context: int) -> None:
    found = load(10**6).largest(usable, context)
    assert found == 0 or load(10**6).bytes(context, found) <= usable
    assert found == 4096 or load(10**6).bytes(context, found + 1) > usable


def test_a_token_takes_what_it_reads() -> None:
    read = Load(10**9, 6 * 10**8, Cache([Layer(100)], 1), Config())
    assert read.seconds(1000, 1e9) == pytest.approx((6e8 + 2 * 100 * 1000) / 1e9)


def test_logits_count_where_there_are_many() -> None:
    few, many = (activation_bytes(Config(), 64, rows) for rows in (1, 64))
    assert few == 2 * 64 * (2 * 1024 + 3 * 4096)
    assert many == 2 * 64 * 2 * 1024 + 64 * 32000 * 6
