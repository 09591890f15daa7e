"""Look inside a model: its tokens, its next-token probabilities, its attention, its layers and its experts.

    ids = [BOS_ID, *encode_text(tokenizer, "The capital of France is")]
    lens = logit_lens(model, ids, k=5)
    print(lens.ids[-1, -1])              # the five most probable next tokens, the best first

Each function reads one text in one forward pass, and returns tensors on the CPU. What `forward` does not return is read with
forward hooks, which are removed afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from inference.detokenizer import token_bytes
from inference.options import SamplingParams
from inference.sampling import BatchedSamplingParams, sampling_weights
from model.model import Transformer, TransformerOutput
from model.moe import MoEFeedForward


@dataclass(frozen=True)
class Token:
    """A token as a reader sees it.

    text: its characters; bytes that are no whole character are written as \\xe4. raw: its bytes; none for a special token.
    """

    id: int
    text: str
    raw: bytes


def describe_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[Token]:
    """Return the text and the bytes of each token id."""
    special, vocabulary = set(tokenizer.all_special_ids), tokenizer.backend_tokenizer
    found = []
    for id in ids:
        name = vocabulary.id_to_token(id)
        raw = b"" if id in special else token_bytes(name)
        found.append(Token(id, raw.decode("utf-8", errors="backslashreplace") or name or "", raw))
    return found


def byte_tokens(text: str) -> list[Token]:
    """Return the UTF-8 bytes of a text as tokens: what a model without a trained tokenizer would have to read."""
    raw = (bytes([byte]) for byte in text.encode("utf-8", errors="replace"))
    return [Token(byte[0], byte.decode("utf-8", errors="backslashreplace"), byte) for byte in raw]


def _forward(model: Transformer, ids: Sequence[int], **settings: bool | int) -> TransformerOutput:
    return model(torch.tensor([list(ids)], device=model.device), use_cache=False, return_dict=True, **settings)


@torch.inference_mode()
def next_token_logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Return the logits of the token after `ids`, (vocab,) float32."""
    logits = _forward(model, ids, logits_to_keep=1).logits
    assert logits is not None
    return logits[0, -1].float().cpu()


def sampling_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the probability with which sampling draws each token, (vocab,): after temperature, top_k, top_p and min_p.

    Penalties depend on the tokens before and are not applied.

    logits: (vocab,).
    """
    if sampling.greedy:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    weights, ids = sampling_weights(logits[None], BatchedSamplingParams([sampling]))
    if ids is not None:
        weights = torch.zeros_like(logits)[None].scatter(1, ids, weights)
    return weights[0] / weights.sum()


@torch.inference_mode()
def attention_weights(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Return how much each token looks at each earlier one, (layers, heads, time, time) float32: rows sum to 1."""
    attentions = _forward(model, ids, output_attentions=True, logits_to_keep=1).attentions
    assert attentions is not None
    return torch.cat(list(attentions)).float().cpu()


@dataclass(frozen=True)
class LogitLens:
    """What every layer would predict as the next token if the model ended there.

    Row 0 is the embedding, row i is the output of layer i; the last row is the model's own prediction.

    ids: (layers + 1, time, k) the most probable tokens, the best first; probabilities: of these tokens, the same shape.
    final: (layers + 1, time) the probability that each layer gives to the model's own first choice.
    """

    ids: Tensor
    probabilities: Tensor
    final: Tensor


@torch.inference_mode()
def logit_lens(model: Transformer, ids: Sequence[int], k: int = 5) -> LogitLens:
    """Apply the final norm and the output matrix to the hidden state after every layer.

    The method is nostalgebraist's "interpreting GPT: the logit lens" (2020). It works because every layer adds to the same
    residual stream (`model.model.TransformerBlock`).
    """
    states = _forward(model, ids, output_hidden_states=True, logits_to_keep=1).hidden_states
    assert states is not None
    normed = [*(model.norm(state) for state in states[:-1]), states[-1]]  # forward returns the last one with the norm
    best = model.output(normed[-1]).argmax(-1, keepdim=True)  # (1, time, 1)
    tokens, probabilities, final = [], [], []
    for state in normed:  # one layer at a time: the logits of all would be large
        p = model.output(state).float().softmax(-1)  # (1, time, vocab)
        top = p.topk(k)
        tokens.append(top.indices)
        probabilities.append(top.values)
        final.append(p.gather(-1, best).squeeze(-1))
    return LogitLens(torch.cat(tokens).cpu(), torch.cat(probabilities).cpu(), torch.cat(final).cpu())


@dataclass(frozen=True)
class ExpertRouting:
    """Where the routers of a mixture of experts send each token.

    experts: (layers, time, k) indices, the most probable first; weights: (layers, time, k) with which their outputs are
    mixed; n_experts: how many routed experts each layer has.
    """

    experts: Tensor
    weights: Tensor
    n_experts: int

    @property
    def load(self) -> Tensor:
        """Return how many tokens each expert of each layer got, (layers, experts)."""
        layers = self.experts.flatten(1)
        return torch.stack([layer.bincount(minlength=self.n_experts) for layer in layers])


@torch.inference_mode()
def expert_routing(model: Transformer, ids: Sequence[int]) -> ExpertRouting:
    """Return which experts each token goes to. Raises UserError for a model without experts."""
    if not model.config.use_moe:
        raise UserError("this model has no experts; choose a mixture of experts, which --use_moe trains")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    gates = [layer.feed_forward.gate for layer in model.layers if isinstance(layer.feed_forward, MoEFeedForward)]
    hooks = [gate.register_forward_hook(lambda module, given, output: seen.append(output)) for gate in gates]
    try:
        _forward(model, ids, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    weights, experts, _ = (torch.stack(list(each)).cpu() for each in zip(*seen, strict=True))
    return ExpertRouting(experts, weights.float(), model.config.n_routed_experts)
