"""Measure the time for each new token with a KV cache and without one, and the size of the cache.

    python docs/experiments/attention.py

docs/attention.md explains what it shows.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

LENGTHS = (32, 64, 128, 256, 512, 1024)
REPEATS = 7


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import torch

    from inference.kv_cache import KVCache
    from model.LMConfig import preset

    model = tiny.new_model(dim=192, n_layers=4, n_heads=6, n_kv_heads=3, max_seq_len=2048).eval()  # the preset toy
    ids = torch.arange(LENGTHS[-1] + 1)[None] % 6000 + 100
    cache = KVCache(model.config, 1, LENGTHS[-1] + 1)

    def seconds(call) -> float:
        """Return the shortest of a few times: other work on the machine only makes a call slower."""
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)  # fills the cache
        results = []
        for length in LENGTHS:

            def with_cache(length=length):
                cache.select(slice(0, 1), length)
                return model(ids[:, length : length + 1], past_key_values=cache, use_cache=True).logits[:, -1]

            def without(length=length):
                return model(ids[:, : length + 1], use_cache=False, logits_to_keep=1).logits[:, -1]

            difference = float((with_cache() - without()).abs().max())
            results.append((length, 1000 * seconds(without), 1000 * seconds(with_cache), f"{difference:.1e}"))
    tiny.table("tokens before, ms without cache, ms with cache, largest difference of a logit", results)
    config = preset("minimind-v1-small")
    sizes = {n: 2 * config.n_layers * n * config.head_dim * 2 for n in (16, 8, 4, 1)}
    tiny.table("key/value heads of minimind-v1-small, bytes per token in bfloat16", list(sizes.items()))

    def draw(times, size) -> None:
        x = [row[0] for row in results]
        times.plot(x, [row[1] for row in results], "o-", label="without a cache")
        times.plot(x, [row[2] for row in results], "o-", label="with a cache")
        times.set(xlabel="tokens before", ylabel="ms for one more token", xscale="log", yscale="log")
        times.set_xticks(x, map(str, x), minor=False)
        times.legend(frameon=False)
        for n, n_bytes in sizes.items():
            size.plot([0, 2048], [0, 2048 * n_bytes / 1e6], label=f"{n} key/value heads")
        size.set(xlabel="tokens in the cache", ylabel="MB for each sequence, bfloat16")
        size.legend(frameon=False)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
