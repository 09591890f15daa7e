"""Loss functions: `loss_fn(model, batch) -> (sum over targets, number of targets, sums to log)`.

Sums, not means: the loop divides by the number of targets of the whole step, over all micro-batches and processes, so
that neither accumulation nor padding nor the number of processes changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from trainer.datasets import Batch

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, int, dict[str, Tensor]]]


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Cross entropy of every target token given what stands before it in its document; pretraining, SFT and LoRA.

    While training a mixture of experts, the optimised sum holds the balance loss too; it is logged apart, so that "loss"
    means the same for dense models and for mixtures, in training and in validation.
    """
    # num_items_in_batch=1: the model is to return the sum.
    out = model(**batch.inputs, num_items_in_batch=1, loss_only=True, use_cache=False)
    n_targets = batch.n_targets
    if out.aux_loss is None:
        return out.loss, n_targets, {"loss": out.loss.detach()}
    balance = out.aux_loss.detach()
    language = out.loss.detach() - balance if model.training else out.loss.detach()
    return out.loss, n_targets, {"loss": language, "balance_loss": balance}
