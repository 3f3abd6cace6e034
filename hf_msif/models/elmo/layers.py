"""The parts of ELMo: a character CNN for words, LSTMs with projection, a scalar mix, a softmax over many words.

All parts are made of plain differentiable operations, so that forward mode, reverse mode and their combinations are
exact (cuDNN's LSTM has no second derivative).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional

from ...errors import InputError
from .configuration import ElmoConfig

# Logits held at a time if only the losses are wanted: 256 MiB in float32.
CHUNK = 2**26


@dataclass(frozen=True)
class Packing:
    """The N real tokens of a batch (B, T), ordered by step, and within a step by sentence length, longest first.

    Attributes:
        order: (B,) the sentences, longest first.
        sizes: number of sentences that have a token at step t.
        forward: (N,) index of each packed token in the flattened batch (B·T), sentences read from their first token.
        backward: (N,) the same, sentences read backwards from their last real token.
        place: (B·T,) index in `forward` of each token of the batch; N for padding.
        turned: (N,) index in `forward` of each token of `backward`; this permutation is its own inverse.
    """

    order: Tensor
    sizes: list[int]
    forward: Tensor
    backward: Tensor
    place: Tensor
    turned: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """The packing of a batch with the right-padded boolean attention mask (B, T).

        Raises:
            InputError: a sentence has padding before or between its tokens.
        """
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError(
                "the attention mask has padding before or inside a sentence; ELMo expects padding at the end."
            )
        rows, width = mask.shape
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        steps = torch.arange(width, device=mask.device).unsqueeze(1)
        real = steps < lengths
        start = order * width
        forward = (start + steps)[real]
        backward = (start + lengths - 1 - steps)[real]
        place = torch.full((rows * width,), len(forward), device=mask.device)
        place[forward] = torch.arange(len(forward), device=mask.device)
        sizes = [size for size in real.sum(1).tolist() if size]
        return cls(order, sizes, forward, backward, place, place[backward])


class Highway(nn.Module):
    """y = c · relu(W_t x + b_t) + (1 − c) · x with c = sigmoid(W_c x + b_c) (Srivastava et al., 2015)."""

    def __init__(self, width: int):
        super().__init__()
        self.transform, self.carry = nn.Linear(width, width), nn.Linear(width, width)
        # At first the output is mostly the input.
        self.carry.initial_bias = (slice(None), -2.0)  # type: ignore[assignment]  # nn.Module knows tensors and modules alone

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.carry(x))
        return x + gate * (torch.relu(self.transform(x)) - x)


class CharacterEncoder(nn.Module):
    """Character ids (N, 50) → word vectors (N, projection): embedding, convolutions with a maximum over the positions,
    highway layers, projection. Each distinct word is computed only once."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.n_characters, config.character_size, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.character_size, number, width) for width, number in config.filters
        )
        self.activation = torch.relu if config.activation == "relu" else torch.tanh
        self.highways = nn.ModuleList(Highway(config.n_filters) for _ in range(config.num_highway_layers))
        self.projection = nn.Linear(config.n_filters, config.projection_size)

    def forward(self, ids: Tensor) -> Tensor:
        words, word_of_token = torch.unique(ids, dim=0, return_inverse=True)
        characters = self.embedding(words).transpose(1, 2)
        # The activation is monotone, so it commutes with the maximum, and there is less to compute after it.
        features = [self.activation(convolution(characters).max(-1).values) for convolution in self.convolutions]
        x = torch.cat(features, 1)
        for highway in self.highways:
            x = highway(x)
        return self.projection(x)[word_of_token]


class LstmLayer(nn.Module):
    """One direction of one LSTM layer with projection (Sak et al., 2014).

    gates (i, j, f, o) = W_x x + b + W_h h; c ← clip(σ(f) c + σ(i) tanh(j)); h ← clip(P (σ(o) tanh(c))).

    TensorFlow adds 1 to the forget gate f; here that is part of the bias b.
    """

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.cell_clip, self.projection_clip = config.cell_clip, config.projection_clip
        self.input = nn.Linear(config.projection_size, 4 * config.cell_size)
        forget_gate = slice(2 * config.cell_size, 3 * config.cell_size)  # at first it remembers
        self.input.initial_bias = (forget_gate, 1.0)  # type: ignore[assignment]  # nn.Module knows tensors and modules alone
        self.state = nn.Linear(config.projection_size, 4 * config.cell_size, bias=False)
        self.projection = nn.Linear(config.cell_size, config.projection_size, bias=False)

    def forward(
        self, x: Tensor, sizes: list[int], start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Packed input (N, projection) → packed output (N, projection), and the last (h, c) of every sentence.

        One product with W_x serves all steps. The derivative of `split` is one concatenation, which keeps the backward
        pass linear in the length.

        Args:
            x: packed input.
            sizes: `Packing.sizes`.
            start: (h, c) of every sentence before its first token; None: zeros.
        """
        h, c = start if start is not None else (None, None)
        outputs: list[Tensor] = []
        ended: list[tuple[Tensor, Tensor]] = []
        for gates in self.input(x).split(sizes):
            if h is not None and c is not None:
                if len(h) > len(gates):
                    ended.append((h[len(gates) :], c[len(gates) :]))
                    h, c = h[: len(gates)], c[: len(gates)]
                gates = gates + self.state(h)
            i, j, f, o = gates.chunk(4, 1)
            written = torch.sigmoid(i) * torch.tanh(j)
            c = written if c is None else torch.sigmoid(f) * c + written
            if self.cell_clip is not None:
                c = c.clamp(-self.cell_clip, self.cell_clip)
            h = self.projection(torch.sigmoid(o) * torch.tanh(c))
            if self.projection_clip is not None:
                h = h.clamp(-self.projection_clip, self.projection_clip)
            outputs.append(h)
        assert h is not None
        assert c is not None
        ended.append((h, c))
        last_h, last_c = (torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
        return torch.cat(outputs), (last_h, last_c)


class ScalarMix(nn.Module):
    """γ Σ_l softmax(s)_l h_l over the word vectors and the LSTM layers (Peters et al., 2018, eq. (1))."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, layers: tuple[Tensor, ...]) -> Tensor:
        weights = self.scores.softmax(0)
        return self.gamma * sum(w * h for w, h in zip(weights, layers, strict=True))


def exact_losses(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) under the exact softmax over all words, shape (M,); the logits exist only in chunks.

    Args:
        head: the layer that makes V logits of a state.
        states: (M, projection).
        targets: (M,) word ids.
    """
    rows = max(1, CHUNK // head.out_features)
    chunks = list(zip(states.split(rows), targets.split(rows), strict=True))
    # A layer with an adapter is not a plain product; and a backward pass needs the graph.
    if type(head) is nn.Linear and not torch.is_grad_enabled():
        return torch.cat([_losses_with_tangent(s, head.weight, head.bias, t) for s, t in chunks])
    return torch.cat([functional.cross_entropy(head(s), t, reduction="none") for s, t in chunks])


def _losses_with_tangent(states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """`exact_losses` of one chunk, with the forward-mode tangent written out.

    With the residual r = p − 1_target, dℓ = Σ_v r_v dz_v = ⟨rW, ds⟩ + ⟨r dW, s⟩ + ⟨r, db⟩: three products and one pass
    over p, without a tangent of the logits z.
    """
    (s, ds), (w, dw), (b, db) = (forward_ad.unpack_dual(x) for x in (states, weight, bias))
    log_p = functional.linear(s, w, b).log_softmax(1)
    losses = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    if ds is None and dw is None and db is None:
        return losses
    r = log_p.exp_()
    r[torch.arange(len(r), device=r.device), targets] -= 1
    tangent = torch.zeros_like(losses)
    if ds is not None:
        tangent += ((r @ w) * ds).sum(1)
    if dw is not None:
        tangent += ((r @ dw) * s).sum(1)
    if db is not None:
        tangent += r @ db
    return forward_ad.make_dual(losses, tangent)


def sampled_losses(head: nn.Linear, states: Tensor, targets: Tensor, samples: int) -> Tensor:
    """−log p(target), shape (M,), with the softmax's denominator estimated from random words (Jean et al., 2015).

    Words are drawn with replacement, word k with probability q_k = log((k + 2)/(k + 1)) / log(V + 1). This falls like
    a frequency if the vocabulary is sorted by frequency. The estimate of the denominator is unbiased:
    Σ_k exp(s_k) ≈ exp(s_target) + Σ_{drawn k ≠ target} exp(s_k) / (samples · q_k).

    Args:
        head: the layer that makes V logits s of a state.
        states: (M, projection).
        targets: (M,) word ids.
        samples: number of words drawn, the same ones for all M states.
    """
    size = head.out_features
    drawn = torch.rand(samples, device=states.device, dtype=torch.float64)
    drawn = ((size + 1) ** drawn).long().sub(1).clamp(0, size - 1)
    ranks = drawn.double()
    log_q = (torch.log((ranks + 2) / (ranks + 1)) / torch.log(torch.tensor(size + 1.0))).log().to(states)
    scores = (
        functional.linear(states, head.weight[drawn], head.bias[drawn])
        - log_q
        - torch.log(torch.tensor(float(samples))).to(states)
    )
    scores = scores.masked_fill(drawn == targets.unsqueeze(1), -torch.inf)
    target_scores = (states * head.weight[targets]).sum(1) + head.bias[targets]
    return torch.cat([target_scores.unsqueeze(1), scores], 1).logsumexp(1) - target_scores
