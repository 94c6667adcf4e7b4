"""The CRF against brute force: every tag sequence of short texts, counted one by one."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilobe.algorithms.crf import CRF, allowed_transitions
from trilobe.algorithms.fit import belief_loss
from trilobe.errors import UsageError


def random_crf(k: int, seed: int, tags: list[str] | None = None) -> CRF:
    torch.manual_seed(seed)
    crf = CRF(k, tags).double()
    for p in crf.parameters():
        torch.nn.init.normal_(p)
    return crf


@torch.no_grad()
def enumerate_scores(crf: CRF, emission: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The unnormalized log score of every sequence of one text, by the definition."""
    length, k = emission.shape
    scores = {}
    for y in product(range(k), repeat=length):
        total = crf.start[y[0]] + crf.rule[-1, y[0]] + crf.end[y[-1]] + crf.rule[y[-1], -1] + emission[0, y[0]]
        for t in range(1, length):
            total = total + crf.transition[y[t - 1], y[t]] + crf.rule[y[t - 1], y[t]] + emission[t, y[t]]
        scores[y] = float(total)
    return scores


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 4), length=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_against_every_sequence(k: int, length: int, seed: int) -> None:
    crf = random_crf(k, seed)
    emission = torch.randn(length, k, dtype=torch.float64)
    scores = enumerate_scores(crf, emission)
    all_scores = torch.tensor(list(scores.values()), dtype=torch.float64)
    log_z = torch.logsumexp(all_scores, 0)
    assert crf.log_partition(emission[None])[0].item() == pytest.approx(log_z.item())

    weight = torch.exp(all_scores - log_z)
    marginal = torch.zeros(length, k, dtype=torch.float64)
    for y, w in zip(scores, weight, strict=True):
        marginal[range(length), list(y)] += w
    assert torch.allclose(crf.marginals(emission[None])[0], marginal)

    tags, log_p = crf.decode(emission[None])
    best = max(scores, key=lambda y: scores[y])
    assert tags[0].tolist() == list(best)
    assert log_p.item() == pytest.approx(scores[best] - log_z.item())
    assert crf.score(emission[None], tags).item() == pytest.approx(scores[best])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_loss_is_the_surprise_of_the_answers(seed: int) -> None:
    """-log of the summed probability of sequences, each weighted by the likelihood of the answers."""
    crf = random_crf(3, seed)
    emission = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    likelihood = torch.rand(4, 3, dtype=torch.float64)
    likelihood[1] = torch.tensor([1.0, 0.0, 1.0])  # a set
    likelihood[2] = torch.tensor([0.0, 1.0, 0.0])  # a certain tag
    scores = enumerate_scores(crf, emission.detach())
    log_z = torch.logsumexp(torch.tensor(list(scores.values()), dtype=torch.float64), 0).item()
    heard = sum(
        torch.tensor(s - log_z).exp().item() * torch.stack([likelihood[t, y[t]] for t in range(4)]).prod().item()
        for y, s in scores.items()
    )
    loss = crf.loss(emission[None], likelihood[None])
    assert loss.item() * 4 == pytest.approx(-torch.log(torch.tensor(heard, dtype=torch.float64)).item())
    (gradient,) = torch.autograd.grad(loss * 4, emission)
    posterior = crf.marginals((emission.detach() + torch.log(likelihood.clamp_min(1e-30)).clamp_min(-1e4))[None])[0]
    assert torch.allclose(gradient, crf.marginals(emission[None].detach())[0] - posterior, atol=1e-9)


def test_without_transitions_it_is_the_loss_for_single_labels() -> None:
    torch.manual_seed(0)
    logits, likelihood = torch.randn(1, 6, 4), torch.rand(1, 6, 4)
    free = logits.clone().requires_grad_()
    other = logits.clone().requires_grad_()
    (of_crf,) = torch.autograd.grad(CRF(4).loss(free, likelihood), free)
    (of_rows,) = torch.autograd.grad(belief_loss(other, likelihood), other)
    assert torch.allclose(of_crf, of_rows, atol=1e-6)


def test_padding_changes_nothing() -> None:
    crf = random_crf(3, 1)
    short, long = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    batch = torch.stack([torch.cat([short, torch.full((3, 3), 7.0, dtype=torch.float64)]), long])
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    assert torch.allclose(
        crf.log_partition(batch, mask), torch.cat([crf.log_partition(short[None]), crf.log_partition(long[None])])
    )
    tags, log_p = crf.decode(batch, mask)
    alone, log_p_alone = crf.decode(short[None])
    assert tags[0].tolist() == [*alone[0].tolist(), 0, 0, 0]
    assert log_p[0].item() == pytest.approx(log_p_alone[0].item())
    assert torch.allclose(crf.score(batch, tags, mask)[0], crf.score(short[None], alone)[0])
    assert torch.allclose(crf.marginals(batch, mask)[0, :2], crf.marginals(short[None])[0])
    assert not crf.marginals(batch, mask)[0, 2:].any()


@pytest.mark.parametrize("tags", [["O", "B-X", "I-X", "B-Y", "I-Y"], ["O", "B-X", "I-X", "E-X", "S-X"]])
def test_broken_sequences_are_impossible(tags: list[str]) -> None:
    """Decoding obeys the scheme whatever the emissions shout, and broken sequences have no probability."""
    crf, rule = random_crf(5, 2, tags), allowed_transitions(tags)
    for seed in range(20):
        torch.manual_seed(seed)
        (path,), _ = crf.decode(10 * torch.randn(1, 6, 5, dtype=torch.float64))
        steps = [5, *path.tolist(), 5]
        assert all(rule[a, b] for a, b in pairwise(steps))
    lone_inside = torch.full((1, 1, 5), 0.0, dtype=torch.float64)
    lone_inside[..., 2] = 50.0
    assert crf.marginals(lone_inside)[0, 0, 2] < 1e-12


def test_it_learns_what_follows_what() -> None:
    """Tags that emissions do not tell apart but the order does: the transitions find it."""
    torch.manual_seed(0)
    y = torch.arange(8)[None].repeat(16, 1) % 2
    crf, emissions = CRF(2), torch.zeros(16, 8, 2)
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        crf.loss(emissions, torch.nn.functional.one_hot(y, 2).float()).backward()
        optimizer.step()
    assert crf.decode(emissions[:1])[0][0].tolist() == y[0].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CRF(2, ["O"]), "1 tag names for 2"),
        (lambda: CRF(2).log_partition(torch.zeros(1, 0, 2)), "emissions of shape"),
        (lambda: CRF(2).log_partition(torch.zeros(1, 3, 3)), "emissions of shape"),
        (lambda: CRF(2).log_partition(torch.zeros(1, 2, 2), torch.tensor([[False, True]])), "mask"),
        (lambda: CRF(2).log_partition(torch.zeros(1, 3, 2), torch.tensor([[True, False, True]])), "mask"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
