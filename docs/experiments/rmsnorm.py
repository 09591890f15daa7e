"""Train a deep narrow model with and without its norms: loss, and the size of the residual stream in every layer.

    python docs/experiments/rmsnorm.py

docs/rmsnorm.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

RATES = (2e-3, 8e-3)


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(60, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch

    rows, val = tiny.text_rows()

    def new_model(norms: bool):
        model = tiny.new_model(n_layers=8)
        if not norms:
            for block in model.layers:
                block.attention_norm = block.ffn_norm = torch.nn.Identity()
        return model

    def stream(model) -> list[float]:
        """Return the root mean square of the residual stream before every layer and after the last one."""
        sizes = []
        hooks = [block.register_forward_pre_hook(lambda _, args: sizes.append(rms(args[0]))) for block in model.layers]
        hooks.append(model.norm.register_forward_pre_hook(lambda _, args: sizes.append(rms(args[0]))))
        tiny.evaluate(model, val, n_rows=8)
        for hook in hooks:
            hook.remove()
        return sizes

    def rms(x) -> float:
        return float(x.float().square().mean().sqrt())

    curves, sizes, results = {}, {}, []
    for norms in (True, False):
        name = "RMSNorm" if norms else "no norms"
        sizes[f"{name}, before training"] = stream(new_model(norms))
        for rate in RATES:
            model = new_model(norms)
            history = tiny.train(model, rows, options.steps, rate)
            curves[name, rate] = tiny.losses(history)
            results.append((name, f"{rate:g}", tiny.evaluate(model, val), max(line["grad_norm"] for line in history)))
            if rate == RATES[1]:
                sizes[f"{name}, after it"] = stream(model)
    tiny.table("blocks, learning rate, validation loss, largest gradient norm", results)
    tiny.table("stream, RMS before the first layer, after the last", [(n, s[0], s[-1]) for n, s in sizes.items()])

    def draw(loss, stream) -> None:
        for (name, rate), curve in curves.items():
            style, colour = ("-", "C0") if name == "RMSNorm" else ("--", "C1")
            alpha = 0.5 + 0.5 * RATES.index(rate)
            loss.plot(range(1, len(curve) + 1), curve, style, color=colour, alpha=alpha, label=f"{name}, {rate:g}")
        loss.set(xlabel="optimizer step", ylabel="training loss")
        loss.legend(frameon=False, fontsize=8)
        for name, values in sizes.items():
            stream.plot(values, "o-" if "RMSNorm" in name else "s--", label=name)
        stream.set(xlabel="layers passed", ylabel="RMS of the residual stream", yscale="log")
        stream.legend(frameon=False, fontsize=8)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
