"""Packing: every target exactly once, no row overfull, deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import _best_fit, mix, pack, sample_order

LENGTHS = st.lists(st.integers(2, 90), min_size=0, max_size=60)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 40), st.integers(0, 5))
def test_every_target_stands_in_exactly_one_piece(lengths, seq_len, seed):
    packing = pack(np.arange(len(lengths)), np.array(lengths, np.int64), seq_len, seed)
    seen = [[] for _ in lengths]
    for document, start, length in zip(packing.document, packing.start, packing.length, strict=True):
        assert 2 <= length <= seq_len
        seen[document] += range(start + 1, start + length)  # the first token of a piece is read, not predicted
    assert [sorted(tokens) for tokens in seen] == [list(range(1, n)) for n in lengths]
    assert packing.bounds[0] == 0 and packing.bounds[-1] == len(packing.document)
    for begin, end in zip(packing.bounds, packing.bounds[1:], strict=False):
        assert 0 < packing.length[begin:end].sum() <= seq_len


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 24), min_size=1, max_size=80), st.integers(24, 60))
def test_pieces_go_where_the_definition_puts_them(lengths, seq_len):
    """Longest first, each into the row with the least room that has enough; of several the one that got it last."""
    expected, rooms, changed = {}, [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[i]]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(seq_len)
            changed.append(0)
        expected[i] = row = min(fitting, key=lambda row: (rooms[row], -changed[row]))
        rooms[row] -= lengths[i]
        changed[row] = len(expected)
    found, used = _best_fit(np.array(lengths, np.int32), seq_len)
    assert found.tolist() == [expected[i] for i in range(len(lengths))] and used == len(rooms)


def test_packing_is_a_pure_function_of_its_arguments():
    lengths = np.random.default_rng(0).integers(2, 300, 1000)
    one, two = (pack(np.arange(1000), lengths, 128, seed=3) for _ in range(2))
    other = pack(np.arange(1000), lengths, 128, seed=4)
    assert all(np.array_equal(getattr(one, f), getattr(two, f)) for f in ("document", "start", "length", "bounds"))
    assert not np.array_equal(one.document, other.document)


def test_rows_are_nearly_full_on_short_documents():
    lengths = np.random.default_rng(0).integers(20, 260, 5000)
    assert pack(np.arange(5000), lengths, 512, seed=0).fill > 0.99


def test_windows_join_without_losing_a_row(monkeypatch):
    monkeypatch.setattr("data_pipeline.packing.WINDOW", 7)
    lengths = np.random.default_rng(0).integers(2, 30, 50)
    packing = pack(np.arange(50), lengths, 32, seed=0)
    assert packing.length.sum() == lengths.sum()
    assert sorted(packing.document) == list(range(50))
    rows = [packing.length[a:b].sum() for a, b in zip(packing.bounds, packing.bounds[1:], strict=False)]
    assert max(rows) <= 32 and min(rows) > 0


@pytest.mark.parametrize(("lengths", "seq_len"), [([5, 1], 8), ([5], 1)])
def test_what_cannot_be_packed_is_refused(lengths, seq_len):
    with pytest.raises(ValueError, match="nothing to predict"):
        pack(np.arange(len(lengths)), np.array(lengths), seq_len, seed=0)


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    first, second = sample_order(100, 1, 0), sample_order(100, 1, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, sample_order(100, 1, 0))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(LENGTHS.filter(bool), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 2**40),
)
def test_a_mix_has_the_shares_and_the_whole_first_file(files, seed):
    lengths = np.array([n for some, _ in files for n in some], np.int64)
    ends = np.cumsum([len(some) for some, _ in files])
    shares = [share for _, share in files]
    documents = np.arange(len(lengths))
    mixed, passes = mix(documents, lengths, ends, shares, seed)
    assert np.array_equal(mixed, mix(documents, lengths, ends, shares, seed)[0])
    counts = np.bincount(mixed, minlength=len(lengths))
    assert (counts[: ends[0]] == 1).all() and passes[0] == 1
    for i, times in enumerate(passes):
        own = counts[ends[i - 1] if i else 0 : ends[i]]
        assert set(own) <= {int(times), int(times) + 1}  # each as often as any other, or once more
        assert 0 <= own.sum() - times * len(own) < 1 + 1e-6 * len(own)
        n_tokens = lengths[ends[i - 1] if i else 0 : ends[i]].sum()
        assert times * n_tokens / shares[i] == pytest.approx(lengths[: ends[0]].sum() / shares[0])


def test_a_mix_draws_with_the_seed_and_needs_documents_of_every_file():
    lengths, ends = np.full(300, 10), np.array([100, 300])
    one, two = (mix(np.arange(300), lengths, ends, [0.5, 0.5], seed)[0] for seed in (1, 2))
    assert len(one) == len(two) == 200 and not np.array_equal(one, two)
    with pytest.raises(ValueError, match="file 2 has no documents"):
        mix(np.arange(100), lengths, ends, [0.5, 0.5], 0)
