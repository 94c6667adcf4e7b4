"""A linear-chain conditional random field: tags that know their neighbors, with exact marginals and the best sequence.

    p(y | x)  ∝  exp( start[y_1] + Σ_t emission[t, y_t] + Σ_t transition[y_{t-1}, y_t] + end[y_T] )

(Lafferty, McCallum and Pereira 2001.) Sums over all sequences are done by the forward recursion in O(T K²). The loss
is the one of :func:`trilobe.algorithms.fit.belief_loss`, for sequences: with l_t(k) the likelihood of the answers when
token t has tag k, the probability of the answers under the model is Σ_y p(y) Π_t l_t(y_t). Its negative logarithm is

    loss  =  log Z(emission)  -  log Z(emission + log l)                                                        (1)

whose gradient in the emissions is the model's marginals minus the belief's: certain tags, sets of tags and noisy
beliefs are trained from alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilobe.errors import UsageError

NEVER = -1e4  # a score that no sequence survives, finite so that gradients stay so


def allowed_transitions(tags: Sequence[str]) -> Tensor:
    """Which tag may follow which in BIO or BIOES, ``(n_tags + 1, n_tags + 1)`` booleans; the last is start and end.

    >>> rule = allowed_transitions(["O", "B-X", "I-X"])
    >>> bool(rule[0, 2]), bool(rule[1, 2]), bool(rule[3, 2])
    (False, True, False)
    """
    k, closes = len(tags), any(t.startswith(("E-", "S-")) for t in tags)
    parts = [*(t.partition("-")[::2] for t in tags), ("edge", "")]
    allowed = torch.zeros(k + 1, k + 1, dtype=torch.bool)
    for i, (before, label_before) in enumerate(parts):
        for j, (after, label_after) in enumerate(parts):
            inside = after in ("I", "E")
            open_before = before in ("B", "I")
            if inside:
                allowed[i, j] = open_before and label_before == label_after
            else:
                allowed[i, j] = not (closes and open_before)
    return allowed


class CRF(nn.Module):
    """Transition scores between tags, and what follows from them and the emissions of a batch.

    ``emissions`` are ``(n, T, n_tags)``; ``mask`` ``(n, T)`` is True for tokens, the first of each text included, False
    for padding behind them.

    Args:
        n_tags: how many tags.
        tags: their names, where they follow BIO or BIOES: then sequences that break the scheme have probability 0.

    >>> crf = CRF(2)
    >>> crf.marginals(torch.zeros(1, 3, 2)).tolist()
    [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]
    """

    rule: Tensor

    def __init__(self, n_tags: int, tags: Sequence[str] | None = None) -> None:
        super().__init__()
        if tags is not None and len(tags) != n_tags:
            raise UsageError(f"{len(tags)} tag names for {n_tags} tags", expected="as many")
        self.transition = nn.Parameter(torch.zeros(n_tags, n_tags))
        self.start = nn.Parameter(torch.zeros(n_tags))
        self.end = nn.Parameter(torch.zeros(n_tags))
        allowed = torch.ones(n_tags + 1, n_tags + 1, dtype=torch.bool) if tags is None else allowed_transitions(tags)
        self.register_buffer("rule", (~allowed).float() * NEVER, persistent=False)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start + self.rule[-1, :-1], self.transition + self.rule[:-1, :-1], self.end + self.rule[:-1, -1]

    def log_partition(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """log Z of each text, ``(n,)``: the logarithm of the summed scores of all tag sequences."""
        emissions, mask = _checked(emissions, mask, self.transition.shape[0])
        start, transition, end = self._scores()
        alpha = start + emissions[:, 0]
        for t in range(1, emissions.shape[1]):
            step = torch.logsumexp(alpha[:, :, None] + transition, dim=1) + emissions[:, t]
            alpha = torch.where(mask[:, t, None], step, alpha)
        return torch.logsumexp(alpha + end, dim=1)

    def score(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        """The score of given sequences ``tags`` ``(n, T)``, ``(n,)``; minus :meth:`log_partition` it is log p."""
        emissions, mask = _checked(emissions, mask, self.transition.shape[0])
        start, transition, end = self._scores()
        each = emissions.gather(2, tags[:, :, None])[:, :, 0] * mask
        moves = transition[tags[:, :-1], tags[:, 1:]] * mask[:, 1:]
        last = tags.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
        return start[tags[:, 0]] + each.sum(1) + moves.sum(1) + end[last]

    def loss(self, emissions: Tensor, likelihood: Tensor, mask: Tensor | None = None) -> Tensor:
        """Equation (1), averaged over the tokens of the batch: a scalar.

        Args:
            emissions: ``(n, T, n_tags)``.
            likelihood: the same shape, at least 0, a positive entry for every token.
            mask: ``(n, T)``.
        """
        emissions, mask = _checked(emissions, mask, self.transition.shape[0])
        known = torch.where(likelihood > 0, torch.log(likelihood.clamp_min(1e-30)), NEVER)
        gap = self.log_partition(emissions, mask) - self.log_partition(emissions + known * mask[:, :, None], mask)
        return gap.sum() / mask.sum()

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """P(tag of token t | text), ``(n, T, n_tags)``, exact; zero on padding.

        They are the gradient of log Z in the emissions.
        """
        with torch.enable_grad():
            free = emissions.detach().requires_grad_()
            (marginal,) = torch.autograd.grad(self.log_partition(free, mask).sum(), free)
        return marginal

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most probable sequence of each text (Viterbi 1967): tags ``(n, T)``, 0 on padding, and log p ``(n,)``.

        The second is what MNLP divides by the length.
        """
        emissions, mask = _checked(emissions, mask, self.transition.shape[0])
        start, transition, end = self._scores()
        n, length, _ = emissions.shape
        best = start + emissions[:, 0]
        came: list[Tensor] = []
        for t in range(1, length):
            step, before = (best[:, :, None] + transition).max(dim=1)
            stay = torch.arange(best.shape[1], device=best.device).expand_as(before)
            came.append(torch.where(mask[:, t, None], before, stay))
            best = torch.where(mask[:, t, None], step + emissions[:, t], best)
        score, at = (best + end).max(dim=1)
        path = [at]
        for before in reversed(came):
            path.append(before.gather(1, path[-1][:, None])[:, 0])
        tags = torch.stack(path[::-1], dim=1) if length else at.new_zeros(n, 0)
        return tags * mask, score - self.log_partition(emissions, mask)


def _checked(emissions: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    if emissions.ndim != 3 or emissions.shape[2] != k or emissions.shape[1] == 0:
        raise UsageError(f"emissions of shape {tuple(emissions.shape)}", expected=f"(n, T, {k}) with T at least 1")
    if mask is None:
        mask = torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device)
    if mask.shape != emissions.shape[:2] or not bool(mask[:, 0].all()) or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UsageError(
            "a mask that does not fit", expected="(n, T), True for tokens and False behind them, no empty text"
        )
    return emissions, mask
