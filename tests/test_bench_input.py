"""bench/input.py on a small cache."""

from __future__ import annotations

from bench.input import cached_dataset, loader_rate, seconds_to_start


def test_a_synthetic_cache_is_opened_like_any_other(tmp_path):
    assert all(0 < seconds < 60 for seconds in seconds_to_start(tmp_path, 30_000))
    dataset = cached_dataset(tmp_path, 30_000, random_tokens=False)
    assert len(dataset) == 30_000 and dataset.lengths.min() == 2 and 100 < dataset.lengths.mean() < 160
    assert loader_rate(tmp_path, 30_000, seconds=0.01) > 0
