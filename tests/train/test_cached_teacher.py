"""Draws from a teacher's predictions against dense float64 ones, and their cache against what was put into it."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import NumericalError, OutputError
from compress.train.losses.inputs import Head, Sampled
from compress.train.teacher import cached
from compress.train.teacher.cached import SequenceName, TeacherCache, fill
from compress.train.teacher.draws import Draws, draw, offsets

INF = float("inf")
LAST = 1 - 2.0**-53  # the largest offset
FIELDS = ("ids", "counts", "numbers", "entropy")


def _logits(rows: int, vocabulary: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def _prediction(logits: Tensor) -> np.ndarray:
    """Softmax in numpy's float64."""
    powers = np.exp(logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _evenly(points: int) -> Tensor:
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def _dense(drawn: Draws, vocabulary: int) -> np.ndarray:
    """How often each token was drawn, [n, V], one id at a time."""
    counts = np.zeros((len(drawn.numbers), vocabulary), dtype=np.int64)
    at = 0
    for row, number in enumerate(drawn.numbers.tolist()):
        for _ in range(number):
            assert counts[row, int(drawn.ids[at])] == 0 < int(drawn.counts[at])
            counts[row, int(drawn.ids[at])] = int(drawn.counts[at])
            at += 1
    assert at == len(drawn.ids) == len(drawn.counts)
    return counts


def _assert_same(found: Draws, expected: Draws) -> None:
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0, msg=field)


def _assert_sampled(found: Sampled, expected: Sampled) -> None:
    for field in ("ids", "shares", "entropy"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0, msg=field)


# Draws


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]),
    draws=st.sampled_from([1, 2, 7, 64, 255]),
    offset=st.one_of(st.just(0.0), st.just(LAST), st.floats(0, LAST)),
    absent=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_a_token_is_drawn_its_share_of_times_rounded_down_or_up(
    vocabulary: int, spread: float, draws: int, offset: float, absent: int, seed: int
) -> None:
    logits = _logits(3, vocabulary, spread, seed)
    logits[:, vocabulary - min(absent, vocabulary - 1) :] = -INF
    counts = _dense(draw(logits, torch.full((3,), offset, dtype=torch.float64), draws), vocabulary)
    expected = draws * _prediction(logits)
    assert (counts.sum(axis=1) == draws).all()
    assert (counts >= np.floor(expected - 1e-9)).all() and (counts <= np.ceil(expected + 1e-9)).all()
    assert not counts[np.isneginf(logits.numpy())].any()


@pytest.mark.parametrize("draws", [1, 16, 200])
def test_the_mean_of_shares_is_the_prediction(draws: int) -> None:
    """Offsets at even distances make M D points of even distance: no share can then be off by more than 1 / (M D)."""
    logits, many = _logits(1, 500), 400
    counts = _dense(draw(logits.expand(many, -1), _evenly(many), draws), 500)
    assert abs(counts.mean(axis=0) / draws - _prediction(logits)[0]).max() <= (1 + 1e-9) / (many * draws)


def test_shares_vary_less_than_those_of_independent_draws() -> None:
    logits, many, draws = _logits(1, 500), 4000, 64
    p = _prediction(logits)[0]
    variance = (_dense(draw(logits.expand(many, -1), _evenly(many), draws), 500) / draws).var(axis=0)
    independent = p * (1 - p) / draws
    assert (variance <= independent * 1.02 + 1 / (many * draws**2)).all()
    assert variance.sum() < 0.5 * independent.sum()


def test_draws_from_the_largest_vocabulary_are_those_of_a_wider_sum() -> None:
    vocabulary, draws = 262_144, 255
    logits = torch.cat([_logits(2, vocabulary, 2.0), torch.zeros(1, vocabulary), _logits(1, vocabulary, 0.01)])
    uniform = torch.tensor([0.1, LAST, 0.3, 0.77], dtype=torch.float64)
    drawn = draw(logits, uniform, draws)
    counts = [part.tolist() for part in drawn.counts.split(drawn.numbers.tolist())]
    ids = [part.tolist() for part in drawn.ids.split(drawn.numbers.tolist())]
    for row in range(4):
        wide = logits[row].numpy().astype(np.longdouble)
        sums = np.exp(wide - wide.max()).cumsum()
        points = (np.arange(draws) + np.longdouble(uniform[row].item())) / draws * sums[-1]
        expected = np.unique(np.searchsorted(sums, points, side="right"), return_counts=True)
        assert (ids[row], counts[row]) == (expected[0].tolist(), expected[1].tolist())


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 50.0])
def test_entropy_is_that_of_the_whole_prediction(spread: float) -> None:
    logits = _logits(20, 3000, spread)
    logits[:, 2900:] = -INF
    p = _prediction(logits)
    expected = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    found = draw(logits, torch.zeros(20, dtype=torch.float64), 4).entropy
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-12)


def _cached_kl(teacher: Sampled, student: np.ndarray) -> np.ndarray:
    """-sum share ln q - entropy of each row, [N]."""
    log_q = np.log(np.take_along_axis(student, teacher.ids.numpy(), axis=1))
    return -(teacher.shares.double().numpy() * log_q).sum(axis=1) - teacher.entropy.double().numpy()


@pytest.mark.parametrize("draws", [4, 32, 255])
def test_the_cached_divergence_errs_by_less_than_one_over_draws(draws: int) -> None:
    """And not at all on average. The bound is Koksma's: variation of ln q / number of points, at any offset."""
    teacher, student, many = _logits(1, 400), _logits(1, 400, 1.0, seed=1), 3000
    p, q = _prediction(teacher), _prediction(student)
    exact = float((p * (np.log(p) - np.log(q))).sum())
    drawn = draw(teacher.expand(many, -1), offsets(0, ("text", draws), many), draws).sampled()
    estimates = _cached_kl(drawn, np.broadcast_to(q, (many, 400)))
    assert abs(estimates - exact).max() <= abs(np.diff(np.log(q[0]))).sum() / draws
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / many**0.5 + 1e-6
    independent = float((p * np.log(q) ** 2).sum() - (p * np.log(q)).sum() ** 2) / draws
    assert estimates.var() < independent


def test_a_cache_of_the_largest_probabilities_would_be_biased() -> None:
    """What the draws are for: at the teacher itself KL is 0, which the renormalised largest miss and draws do not."""
    teacher, many = _logits(1, 400, 1.5), 2000
    p = _prediction(teacher)[0]
    largest = np.sort(p)[-32:]
    wrong = float((largest / largest.sum() * np.log(1 / largest)).sum() + (p * np.log(p)).sum())
    drawn = draw(teacher.expand(many, -1), _evenly(many), 32).sampled()
    assert abs(_cached_kl(drawn, np.broadcast_to(p, (many, 400))).mean()) < 1e-3 < 0.1 < abs(wrong)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_row_is_drawn_the_same_in_any_batch(rows: int) -> None:
    logits, uniform = _logits(41, 1003), offsets(5, ("text", 0), 41)
    whole = draw(logits, uniform, 64)
    parts = [draw(*part, 64) for part in zip(logits.split(rows), uniform.split(rows), strict=True)]
    _assert_same(Draws.cat(parts), whole)


def test_extreme_rows() -> None:
    rows = torch.stack([torch.zeros(255), torch.full((255,), -INF), torch.full((255,), -80.0), torch.zeros(255)])
    rows[1, 254] = rows[2, 7] = 3e38
    rows[3, 2:] = -INF
    for offset in (0.0, 0.5, LAST):
        drawn = draw(rows, torch.full((4,), offset, dtype=torch.float64), 255)
        counts = _dense(drawn, 255)
        assert (counts[0] == 1).all()
        assert counts[1, 254] == counts[2, 7] == 255
        assert sorted(counts[3, :2]) == [127, 128]
        np.testing.assert_allclose(drawn.entropy, [np.log(255), 0, 0, np.log(2)], rtol=1e-7)
    one = draw(torch.zeros(2, 1), torch.tensor([0.0, LAST], dtype=torch.float64), 9)
    assert one.ids.tolist() == [0, 0] and one.counts.tolist() == [9, 9]


@pytest.mark.parametrize("wrong", [[0.0, float("nan")], [INF, 0.0], [-INF, -INF]])
def test_logits_that_are_no_prediction_are_refused(wrong: list[float]) -> None:
    with pytest.raises(NumericalError, match="NaN or inf"):
        draw(torch.tensor([[0.0, 0.0], wrong]), torch.zeros(2, dtype=torch.float64), 4)


def test_offsets_hang_on_seed_sequence_and_row_alone() -> None:
    found = offsets(0, ("text", 3), 50_000)
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() < 1
    assert torch.equal(offsets(0, ("text", 3), 7), found[:7]) and len(offsets(0, ("text", 3), 0)) == 0
    others = [offsets(1, ("text", 3), 7), offsets(0, ("text", 4), 7), offsets(0, ("other", 3), 7)]
    assert not any(torch.isin(other, found).any() for other in others)
    distance = (found.sort().values - _evenly(50_000)).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / 50_000**0.5  # 1 in 1000
    # A cache that is continued by a later version needs the same ones.
    torch.testing.assert_close(
        found[:2], torch.tensor([0.2717017131811976, 0.35719950525446376], dtype=torch.float64), rtol=0, atol=0
    )


def test_sampled_is_the_draws_filled_up() -> None:
    logits = torch.cat([_logits(6, 90, 1.0), _logits(6, 90, 30.0)])
    drawn = draw(logits, offsets(0, ("text", 0), 12), 20)
    sampled = drawn.sampled()
    assert sampled.ids.dtype == torch.int64 and sampled.shares.dtype == torch.float32
    assert sampled.ids.shape == sampled.shares.shape == (12, int(drawn.numbers.max()))
    summed = np.zeros((12, 90))
    np.add.at(summed, (np.arange(12)[:, None], sampled.ids.numpy()), sampled.shares.double().numpy())
    np.testing.assert_allclose(summed, _dense(drawn, 90) / 20, atol=1e-7)


# The cache


def _targets(rows: int, vocabulary: int = 90, draws: int = 16, seed: int = 0) -> Draws:
    return draw(_logits(rows, vocabulary, 2.0, seed), offsets(seed, ("text", seed), rows), draws)


def _names(count: int) -> list[SequenceName]:
    return [("text", n) for n in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "targets", 16, "key")


def _again(cache: TeacherCache) -> TeacherCache:
    return TeacherCache(cache.folder, cache.draws, cache.key)


def test_what_is_read_is_what_was_written(cache: TeacherCache) -> None:
    names = [("a", 5), ("a", 0), ("b", 5), ("c", 2), ("a", 7)]
    targets = {name: _targets(rows, seed=rows) for name, rows in zip(names, [4, 0, 30, 1, 9], strict=True)}
    for some in (names[:3], names[3:]):
        cache.write(some, [targets[name] for name in some])
    for opened in (cache, _again(cache)):
        assert opened.missing(names) == [] and opened.torn == []
        for asked in (names, names[::-1], [names[2], names[4], names[2]], [names[1]]):
            _assert_sampled(opened.read(asked), Draws.cat([targets[name] for name in asked]).sampled())


@pytest.mark.parametrize(("vocabulary", "stored"), [(65_536, "U16"), (65_537, "I32"), (200_000, "I32")])
def test_ids_take_two_bytes_where_they_fit(cache: TeacherCache, vocabulary: int, stored: str) -> None:
    logits = torch.zeros(1, vocabulary)
    logits[0, [3, vocabulary - 1]] = 50.0
    targets = draw(logits, torch.zeros(1, dtype=torch.float64), 16)
    assert targets.ids.tolist() == [3, vocabulary - 1]
    cache.write([("text", 0)], [targets])
    (file,) = cache.folder.iterdir()
    with safe_open(file, framework="np") as opened:
        assert opened.get_slice("ids").get_dtype() == stored
    assert _again(cache).read([("text", 0)]).ids.tolist() == [[3, vocabulary - 1]]


def test_bytes_per_token_are_those_of_the_files(cache: TeacherCache) -> None:
    assert cache.bytes_per_token is None
    cache.write(_names(2), [_targets(400), _targets(600, seed=1)])
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert cache.bytes_per_token == _again(cache).bytes_per_token == size / 1000
    assert size / 1000 < 3 * 16 + 5 + 1


def test_an_unfinished_shard_is_no_shard(cache: TeacherCache) -> None:
    cache.write(_names(2), [_targets(3), _targets(3)])
    (file,) = cache.folder.iterdir()
    file.with_name("targets-0.tmp").write_bytes(file.read_bytes()[:100])
    opened = _again(cache)
    assert opened.missing(_names(3)) == [("text", 2)] and opened.torn == []


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_shard_that_is_cut_off_is_named_and_asked_for_again(cache: TeacherCache, length: int) -> None:
    cache.write(_names(1), [_targets(3)])
    (file,) = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:length])
    opened = _again(cache)
    assert opened.torn == [file] and opened.missing(_names(1)) == _names(1)
    opened.write(_names(1), [_targets(3)])
    _assert_sampled(_again(cache).read(_names(1)), _targets(3).sampled())


def test_a_shard_that_was_removed_is_missed(cache: TeacherCache) -> None:
    cache.write(_names(2), [_targets(3), _targets(3)])
    (first,) = cache.folder.iterdir()
    cache.write([("text", 2), ("text", 0)], [_targets(5), _targets(3)])
    first.unlink()
    with pytest.raises(OutputError, match="no targets of sequence 1 of text"):
        cache.read([("text", 1)])
    assert cache.missing(_names(3)) == [("text", 1)]
    _assert_sampled(cache.read([("text", 0)]), _targets(3).sampled())
    with pytest.raises(OutputError, match="no targets of sequence 1 of text"):
        cache.read([("text", 1)])


def test_two_processes_fill_one_folder(cache: TeacherCache) -> None:
    other = _again(cache)
    cache.write(_names(2), [_targets(3, seed=n) for n in range(2)])
    other.write(_names(3)[1:], [_targets(3, seed=n) for n in range(1, 3)])
    expected = Draws.cat([_targets(3, seed=n) for n in range(3)]).sampled()
    _assert_sampled(other.read(_names(3)), expected)  # sees the other's shard when it looks for it
    assert cache.missing(_names(4)) == other.missing(_names(4)) == [("text", 3)]
    for opened in (cache, other, _again(cache)):
        _assert_sampled(opened.read(_names(3)), expected)


def test_what_belongs_to_another_run_is_refused_by_name(cache: TeacherCache) -> None:
    cache.write(_names(1), [_targets(3)])
    (file,) = cache.folder.iterdir()
    with pytest.raises(OutputError, match=f"{file.name}.*another teacher or text.*key, and not other"):
        TeacherCache(cache.folder, 16, "other")
    with pytest.raises(OutputError, match=f"{file.name}.*16 draws.*not 8"):
        TeacherCache(cache.folder, 8, "key")
    save_file({"weight": torch.zeros(3)}, cache.folder / "model.safetensors")
    with pytest.raises(OutputError, match=r"model\.safetensors: is no shard of teacher targets"):
        cache.missing(_names(1))


def test_a_shard_that_can_not_be_written_leaves_nothing(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="no space left"):
        patch.setattr(Path, "replace", full)
        cache.write(_names(1), [_targets(3)])
    assert list(cache.folder.iterdir()) == [] and cache.missing(_names(1)) == _names(1)


# Filling it

ROWS = [5, 0, 12, 7, 1, 9, 3]
VOCABULARY, PADDED, WIDTH = 70, 80, 16


def _whole(*shape: int, seed: int) -> Tensor:
    """Whole numbers: their products are exact in any order, so that logits don't hang on how many rows there are."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def _hidden(name: SequenceName) -> Tensor:
    return _whole(ROWS[name[1]], WIDTH, seed=name[1])


BIAS = _whole(PADDED, seed=101)
BIAS[VOCABULARY:] = 1e4  # what pads the vocabulary would be drawn first
HEAD = Head(_whole(PADDED, WIDTH, seed=100), BIAS, scale=0.25, softcap=8.0)


class Teacher:
    """Answers from `_hidden`, and remembers what it was asked. Asked too often, it fails."""

    def __init__(
        self, head: Head, answers: int = 1000, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.answers, self.dtype, self.device = answers, dtype, device
        bias = None if head.bias is None else head.bias.to(device)
        self.head = Head(head.weight.to(device, dtype), bias, head.scale, head.softcap)
        self.asked: list[list[SequenceName]] = []

    def __call__(self, names: list[SequenceName]) -> tuple[Tensor, Head, list[int]]:
        if len(self.asked) == self.answers:
            raise KeyboardInterrupt
        self.asked.append(names)
        hidden = torch.cat([_hidden(name) for name in names])
        return hidden.to(self.device, self.dtype), self.head, [ROWS[name[1]] for name in names]


def _fill(cache: TeacherCache, teacher: Teacher, names: list[SequenceName], at_once: int = 2) -> int:
    """Returns how often it advanced."""
    steps = count()
    fill(
        cache,
        cache.missing(names),
        teacher,
        vocabulary=VOCABULARY,
        seed=0,
        at_once=at_once,
        advance=lambda: next(steps),
    )
    return next(steps)


def _expected(names: list[SequenceName]) -> Sampled:
    """All logits at once in float64, then drawn."""
    parts = []
    for name in names:
        z = (_hidden(name).double() @ HEAD.weight.double().t() + BIAS.double()) * 0.25
        logits = (8.0 * torch.tanh(z / 8.0))[:, :VOCABULARY]
        parts.append(draw(logits.float(), offsets(0, name, ROWS[name[1]]), 16))
    return Draws.cat(parts).sampled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_a_filled_cache_has_the_draws_of_the_teachers_logits(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    monkeypatch.setitem(cached._CHUNK_BYTES, "cpu", rows * cached._LOGIT_BYTES * VOCABULARY)
    monkeypatch.setattr(cached, "_BLOCK", 11 * WIDTH)
    teacher = Teacher(HEAD, dtype=dtype)
    assert _fill(cache, teacher, _names(7)) == 7
    assert teacher.asked == [_names(7)[n : n + 2] for n in (0, 2, 4, 6)]
    found, expected = _again(cache).read(_names(7)), _expected(_names(7))
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.shares, expected.shares)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-6, atol=0)


def test_draws_do_not_hang_on_what_is_asked_together(cache: TeacherCache, tmp_path: Path) -> None:
    other = TeacherCache(tmp_path / "other", 16, "key")
    _fill(cache, Teacher(HEAD), _names(7), at_once=7)
    _fill(other, Teacher(HEAD), _names(7)[::-1], at_once=3)
    _assert_sampled(cache.read(_names(7)), other.read(_names(7)))


def test_filling_continues_where_it_stopped(cache: TeacherCache) -> None:
    stopped = Teacher(HEAD, answers=2)
    with pytest.raises(KeyboardInterrupt):
        _fill(cache, stopped, _names(7))
    assert _again(cache).missing(_names(7)) == _names(7)[4:]
    resumed, whole = Teacher(HEAD), Teacher(HEAD)
    assert _fill(_again(cache), resumed, _names(7)) == 3
    _fill(TeacherCache(cache.folder / "whole", 16, "key"), whole, _names(7))
    assert stopped.asked + resumed.asked == whole.asked
    _assert_sampled(_again(cache).read(_names(7)), _expected(_names(7)))
    assert _fill(_again(cache), Teacher(HEAD, answers=0), _names(7)) == 0


@pytest.mark.parametrize(("limit", "value"), [("_SHARD_BYTES", 1), ("_SHARD_SECONDS", 0.0)])
def test_a_shard_is_written_when_it_is_large_or_late(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    _fill(cache, Teacher(HEAD), _names(4))
    assert len(list(cache.folder.iterdir())) == 1
    monkeypatch.setattr(cached, limit, value)
    _fill(cache, Teacher(HEAD), _names(7))
    assert len(list(cache.folder.iterdir())) == 1 + 2


def test_logits_of_nan_name_the_sequence(cache: TeacherCache) -> None:
    damaged = Head(HEAD.weight.clone())
    damaged.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="sequence 2 of text: the teacher's logits hold NaN or inf"):
        _fill(cache, Teacher(damaged), _names(7)[2:])
    assert cache.missing(_names(7)) == _names(7)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [1, 1000, 151_936, 262_144])
def test_draws_on_the_gpu_are_those_of_the_cpu_in_any_batch(vocabulary: int) -> None:
    logits, uniform = _logits(40, vocabulary), offsets(0, ("text", 0), 40)
    whole, expected = draw(logits.cuda(), uniform.cuda(), 64), draw(logits, uniform, 64)
    for rows in (1, 3, 40):
        parts = zip(logits.cuda().split(rows), uniform.cuda().split(rows), strict=True)
        found = Draws.cat([draw(*part, 64) for part in parts])
        for field in FIELDS[:3]:
            assert torch.equal(getattr(found, field), getattr(whole, field))
            assert torch.equal(getattr(found, field).cpu(), getattr(expected, field))
        torch.testing.assert_close(found.entropy.cpu(), expected.entropy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_filled_on_the_gpu_is_that_of_the_cpu(cache: TeacherCache, dtype: torch.dtype) -> None:
    _fill(cache, Teacher(HEAD, dtype=dtype, device="cuda"), _names(7))
    found, expected = cache.read(_names(7)), _expected(_names(7))
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.shares, expected.shares)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-6, atol=0)
