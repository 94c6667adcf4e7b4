"""The planner's arithmetic and its decision; its figures against a real link are in benchmarks/train-bytes."""

import pytest

from trilobe.algorithms.parallel import PLAIN, PRESETS, Choices, Link, plan
from trilobe.algorithms.parallel.planner import traffic
from trilobe.errors import UsageError

N = 1_000_000


def test_two_phases_do_not_grow_with_the_workers_and_gathering_does() -> None:
    vote, gather = Choices(), Choices(communicator="all_gather")
    assert traffic(vote, N, 16)[0] < 2 * N / 8 * 1.01
    assert traffic(gather, N, 16)[0] == pytest.approx(15 * N / 8, rel=0.01)
    assert traffic(PLAIN, N, 2)[0] / traffic(vote, N, 2)[0] > 31


def test_a_slow_link_compresses_and_a_fast_one_does_not() -> None:
    slow = plan(N, Link.of(100), workers=2, compute_s=0.02)
    assert slow.best.choices.compressor != "none"
    assert slow.best.step_s == min(p.step_s for p in slow.predictions)
    fast = plan(N, Link.of(1_000_000, latency_s=1e-6), workers=2, compute_s=0.5)
    assert fast.best.choices == PLAIN
    assert "do not compress" in str(fast)


def test_what_travels_beside_backward_counts_once() -> None:
    link, compute_s = Link(0.0, 4 * N / 0.2), 0.3  # plain all-reduce takes 0.2 s, as long as backward
    for buckets, step_s in ((1, 0.5), (2, 0.4), (100, 0.302)):
        steps = {p.name: p for p in plan(N, link, 2, compute_s, buckets=buckets).predictions}
        assert steps["plain"].step_s == pytest.approx(step_s)
        vote = steps["majority_vote"]
        assert vote.step_s == pytest.approx(compute_s + vote.codec_s + vote.link_s / buckets)
    assert plan(N, link, 2, compute_s).best.choices != PLAIN
    slow = Link(0.001, 4 * N / 0.2)  # two messages, and every bucket waits for its own
    one, ten = (plan(N, slow, 2, candidates={"plain": PLAIN}, buckets=b).best for b in (1, 10))
    assert (one.link_s, ten.link_s) == (pytest.approx(0.202), pytest.approx(0.22))


def test_one_worker_sends_nothing() -> None:
    assert plan(N, Link.of(1), workers=1).reason == "do not compress: one worker sends nothing"


@pytest.mark.parametrize(("n", "link", "workers"), [(0, Link.of(1), 2), (9, Link(0, 0), 2), (9, Link.of(1), 0)])
def test_impossible_settings_are_refused(n: int, link: Link, workers: int) -> None:
    with pytest.raises(UsageError, match="positive"):
        plan(n, link, workers)


def test_there_must_be_something_to_compare_with() -> None:
    with pytest.raises(UsageError, match="all-reduce"):
        plan(9, Link.of(1), 2, candidates={"majority_vote": PRESETS["majority_vote"]})
