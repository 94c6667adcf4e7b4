"""Hooks among real processes: run as a script, this file is the workers (gloo, five of them); under pytest it starts
them once and looks at what each wrote down."""

import copy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trilobe.algorithms import parallel
from trilobe.algorithms.parallel import Choices, State, compressed_hook, exchange, hook, majority_vote_hook
from trilobe.algorithms.parallel.planner import traffic
from trilobe.errors import TrilobeError, UsageError

WORLD = 5
SIZES = (1, 63, 64, 257, 2000)  # one chunk holds all, chunks that are empty, uneven last chunks
Group = Any


def gradient(rank: int, n: int, step: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * rank + 10 * n + step))


def caught(work: Callable[[], object]) -> str:
    try:
        work()
    except TrilobeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def votes(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """The outcome of one exchange, for 1 to 5 workers, both communicators and several lengths."""
    seen = {}
    for world, group in groups.items():
        for communicator in ("two_phase", "all_gather"):
            for n in SIZES:
                if rank < world:
                    x = gradient(rank, n)
                    exchange(State(Choices(communicator=communicator), group), x, [torch.empty(n)])
                    seen[world, communicator, n] = x
                    state = State(Choices(communicator=communicator, ties="zero"), group)
                    x = gradient(rank, n)
                    exchange(state, x, [torch.empty(n)])
                    seen[world, communicator, n, "ties"] = x, state.meter.sent
    return seen


def scales(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Three parameters whose gradients differ a thousandfold, cut across chunks; the outcome of one exchange."""
    pieces, seen = (130, 300, 7), {}
    parameters = [torch.empty(n) for n in pieces]
    for name in ("ef_sign", "ef_vote"):
        x = torch.cat([f * gradient(rank, n) for f, n in zip((1.0, 1000.0, 0.001), pieces, strict=True)])
        exchange(State(parallel.PRESETS[name]), x, parameters)
        seen[name] = x.split(pieces)
    return seen


def overlaps(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Several buckets with and without exchanging beside backward: where they end, and which thread exchanged what."""
    seen: dict[str, Any] = {}
    for name in ("signum", "ef_sign", "stochastic_vote"):
        for overlap in (True, False):
            net, state = network(), State(parallel.PRESETS[name], overlap=overlap)
            model = wrapped(net, None)
            model.register_comm_hook(state, compressed_hook)
            train(model, rank, range(6), lr=0.01)
            seen[name, overlap] = [p.detach().clone() for p in net.parameters()], state.step
    threads: list[tuple[int, str]] = []
    plain = hook._exchange

    def watched(call: Any) -> None:
        threads.append((call.index, threading.current_thread().name))
        plain(call)

    hook._exchange = watched
    model = wrapped(network(), None)
    state = State().attach(model)
    model.register_comm_hook(state, majority_vote_hook)
    train(model, rank, range(3), lr=0.01)
    hook._exchange = plain
    seen["threads"] = threads
    return seen


def zeros(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Zero coordinates over two steps; a worker that is all zero; everybody all zero."""
    state, p, seen = State(), [torch.empty(100)], []
    for _ in range(2):
        x = torch.ones(100)
        x[50:] = 0
        exchange(state, x, p)
        seen.append(x)
        state.step += 1
    lazy = gradient(rank, 100) if rank < 3 else torch.zeros(100)
    exchange(state, lazy, p)
    nothing = torch.zeros(100)
    exchange(state, nothing, p)
    return {"half": seen, "lazy": lazy, "nothing": nothing}


def feedback(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Twelve steps with error feedback; after six the bucket is rearranged. What came out, what was left."""
    seen = {}
    for name in ("ef_sign", "ef_top_k"):
        state = State(replace(parallel.PRESETS[name], communicator="two_phase"))  # both memories
        a, b = torch.nn.Parameter(torch.empty(200)), torch.nn.Parameter(torch.empty(301))
        state.parameters = {"a": a, "b": b}
        state.names = {id(a): "a", id(b): "b"}
        went_in, came_out = torch.zeros(501), torch.zeros(501)
        for step in range(12):
            x = gradient(rank, 501, step)
            went_in += x
            if step < 6:
                exchange(state, x, [a, b])
                came_out += x
            else:
                x = torch.cat([x[200:], x[:200]])
                exchange(state, x, [b, a])
                came_out += torch.cat([x[301:], x[:301]])
        saved = state.state_dict()
        left = {k: torch.cat([saved[k].get(p, torch.zeros(0)) for p in "ab"]) for k in ("average", "worker", "owner")}
        seen[name] = {"in": went_in, "out": came_out, **left}
    return seen


TRANSCRIBED = {
    "ef_vote": parallel.EF_VOTE,
    "ef_sign": parallel.EF_SIGN,
    "plain momentum": replace(parallel.EF_SIGN, nu=1.0),
    "errors alone": replace(parallel.EF_SIGN, memory="error_feedback", nu=1.0),
    "momentum alone": Choices(memory="momentum", nu=0.9, scaled=True),
}
LENGTHS = (150, 40, 210)  # of three parameters, cut across chunks


def transcribed(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """What came out of eight steps among three workers."""
    seen: dict[str, Any] = {}
    parameters = [torch.empty(n) for n in LENGTHS]
    for name, choices in TRANSCRIBED.items():
        if rank < 3:
            state, seen[name] = State(choices, groups[3]), []
            for step in range(8):
                seen[name].append(gradient(rank, sum(LENGTHS), step))
                exchange(state, seen[name][-1], parameters)
    return seen


def by_the_paper(choices: Choices) -> list[Any]:
    """The same in numpy: Zheng, Huang and Kwok 2019, algorithm 2, its momentum by Ma and Yarats 2019, equations 3 and
    4; a block is a parameter's part in a chunk, and the server of a chunk is the worker of its number."""
    n, workers = sum(LENGTHS), 3
    chunk = -(-n // (64 * workers)) * 64
    cuts = sorted({0, *accumulate(LENGTHS), *range(chunk, n, chunk)})
    blocks = [slice(a, b) for a, b in pairwise(cuts)]

    def compress(p: Any) -> tuple[Any, Any]:
        size = np.concatenate([np.full(b.stop - b.start, np.abs(p[b]).mean()) for b in blocks])
        return np.where(p < 0, -1.0, 1.0), size

    m, errors, error, out = np.zeros((workers, n)), np.zeros((workers, n)), np.zeros(n), []
    beta = choices.beta if "momentum" in choices.memory else 0.0
    for step in range(8):
        g = np.stack([gradient(rank, n, step).double().numpy() for rank in range(workers)])
        m = beta * m + (1 - beta) * g
        p = errors + choices.nu * m + (1 - choices.nu) * g
        sent = [compress(row) for row in p]
        if "error_feedback" in choices.memory:
            errors = p - np.stack([signs * size for signs, size in sent])
        if choices.aggregate == "vote":
            signs, sizes = (np.stack(part) for part in zip(*sent, strict=True))
            out.append(np.sign(signs.sum(axis=0)) * np.median(sizes, axis=0))
        else:
            mean = error + np.mean([signs * size for signs, size in sent], axis=0)
            signs, size = compress(mean)
            error = mean - signs * size
            out.append(signs * size)
    return out


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 60), torch.nn.Tanh(), torch.nn.Linear(60, 40), torch.nn.Linear(40, 1)
    )


def wrapped(net: torch.nn.Module, group: Group, cap: float = 0.002, **more: Any) -> DistributedDataParallel:
    return DistributedDataParallel(net, process_group=group, bucket_cap_mb=cap, **more)


def loss_of(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(16, 10, generator=torch.Generator().manual_seed(100 * rank + step))
    return (model(x)[:, 0] - x.sum(dim=1)).square().mean()


def train(model: Any, rank: int, steps: range, lr: float) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def lies(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Two of five workers lie; the honest workers' loss at the end, by vote and by mean."""
    seen = {}
    for lie in ("flip", "random", "scaled"):
        model = wrapped(network(), None)
        hook = parallel.with_adversaries(majority_vote_hook, lie, {1, 3})
        model.register_comm_hook(State(), hook)
        seen["vote", lie] = train(model, rank, range(60), lr=0.006)
    model = wrapped(network(), None)
    model.register_comm_hook(State(parallel.PLAIN), parallel.with_adversaries(compressed_hook, "scaled", {1, 3}, 3.0))
    seen["mean", "scaled"] = train(model, rank, range(10), lr=0.05)
    return seen


def resumed(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """Ten steps at once, and five, saved, loaded into new objects, five more; one bucket, so DDP keeps its layout."""
    seen = {}
    for name in ("ef_sign", "signum", "stochastic_vote", "qsgd", "ef_top_k"):
        ends, choices = [], replace(parallel.PRESETS[name], communicator="two_phase")
        for pause in (False, True):
            net = torch.nn.Sequential(torch.nn.Linear(10, 7, bias=False))
            torch.nn.init.constant_(net[0].weight, 0.1)
            state = State(choices).attach(net)
            model = wrapped(net, None)
            model.register_comm_hook(state, compressed_hook)
            train(model, rank, range(5), lr=0.01)
            if pause:
                net2, saved = copy.deepcopy(net), state.state_dict()
                state2 = State(choices).attach(net2)
                state2.load_state_dict(saved)
                net, model = net2, wrapped(net2, None)
                model.register_comm_hook(state2, compressed_hook)
            train(model, rank, range(5, 10), lr=0.01)
            ends.append(net[0].weight.detach().clone())
        seen[name] = ends
    return seen


def oddities(rank: int, groups: dict[int, Group]) -> dict[str, Any]:
    """What DDP can hand to a hook beside plain buckets."""
    seen: dict[str, Any] = {}
    model = wrapped(network(), None)
    state = State().attach(model)
    model.register_comm_hook(state, majority_vote_hook)
    train(model, rank, range(2), lr=0.001)
    if rank == 2:
        bad = loss_of(model, rank, 9) * float("nan")
    else:
        bad = loss_of(model, rank, 9)
    seen["nan"] = caught(bad.backward)

    for name, number in (
        ("signum", "inf"),
        ("ef_sign", "nan"),
        ("qsgd", "-inf"),
        ("ef_top_k", "nan"),
        ("plain", "inf"),
    ):
        for layer in (0, 3):  # in the last bucket, and in one that is exchanged beside backward
            model = wrapped(network(), None)
            model.register_comm_hook(State(parallel.PRESETS[name]).attach(model), compressed_hook)
            train(model, rank, range(2), lr=0.001)
            if rank == 3:
                model.module[layer].weight.register_hook(lambda g, number=number: g * float(number))
            seen["broken", name, layer] = caught(loss_of(model, rank, 9).backward)

    model = wrapped(network(), None)
    state = State(parallel.SIGNUM).attach(model)
    layouts: list[tuple[int, tuple[str, ...]]] = []

    def watching(s: State, bucket):  # type: ignore[no-untyped-def]
        layouts.append((s.step, tuple(s.names[id(p)] for p in bucket.parameters())))
        return compressed_hook(s, bucket)

    model.register_comm_hook(state, watching)
    train(model, rank, range(3), lr=0.001)
    seen["layouts"] = layouts
    seen["meter"] = (state.meter.sent, state.meter.received, state.meter.steps)
    before = [p.grad.clone() for p in model.parameters()]
    with model.no_sync():
        loss_of(model, rank, 20).backward()
    local = [p.grad - b for p, b in zip(model.parameters(), before, strict=True)]
    seen["no_sync"] = all(set(b.unique().tolist()) <= {-1.0, 1.0} for b in before), float(local[0].abs().sum())

    net = torch.nn.ModuleDict({"a": torch.nn.Linear(10, 8), "b": torch.nn.Linear(8, 1).to(torch.bfloat16)})
    net["c"], net["unused"] = torch.nn.Linear(8, 1).half(), torch.nn.Linear(3, 3)

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.parts["a"](x)
            return self.parts["b"](h.bfloat16()).float() + self.parts["c"](h.half()).float()

    torch.manual_seed(0)
    model = wrapped(Mixed(), None, find_unused_parameters=True)
    model.register_comm_hook(State(parallel.EF_SIGN).attach(model), compressed_hook)
    train(model, rank, range(3), lr=0.01)
    seen["dtypes"] = [(p.grad.dtype if p.grad is not None else None, p.dtype) for p in model.parameters()]
    seen["mixed"] = [p.detach().clone() for p in model.parameters()]

    model = wrapped(network(), None)
    model.register_comm_hook(State(), majority_vote_hook)
    with model.join():  # worker 0 has no data at all, the others one batch each more
        train(model, rank, range(2 * rank), lr=0.01)
    seen["joined"] = [p.detach().clone() for p in model.parameters()]

    for name, choices in parallel.PRESETS.items():
        model = wrapped(torch.nn.Embedding(5, 3, sparse=True), None)
        model.register_comm_hook(State(choices), compressed_hook)
        seen["sparse", name] = caught(lambda model=model: model(torch.tensor([1])).sum().backward())
        model = wrapped(network(), groups[1]) if rank == 0 else None  # a world of one, several buckets
        if model is not None:
            model.register_comm_hook(State(choices, groups[1]).attach(model), compressed_hook)
            seen["alone", name] = train(
                model, rank, range(40), lr=0.02 if choices.scaled or choices.aggregate == "mean" else 0.004
            )
    return seen


SCENARIOS = {f.__name__: f for f in (votes, scales, overlaps, zeros, feedback, transcribed, lies, resumed, oddities)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, WORLD + 1)}
    seen = {name: scenario(rank, groups) for name, scenario in SCENARIOS.items()}
    torch.save(seen, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What each scenario wrote down, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        wrote = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [w[name] for w in wrote] for name in SCENARIOS}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("world", range(1, WORLD + 1))
@pytest.mark.parametrize("communicator", ["two_phase", "all_gather"])
def test_the_vote_is_what_counting_gives(seen: Any, world: int, communicator: str, n: int) -> None:
    signs = torch.stack([gradient(rank, n).sign() for rank in range(world)])
    if communicator == "two_phase":  # a tie goes to the owner of the coordinate's chunk
        chunk = -(-n // (64 * world)) * 64
        tie = signs[torch.arange(n) // chunk, torch.arange(n)]
    else:
        tie = signs[0]
    wanted = torch.where(signs.sum(dim=0) == 0, tie, signs.sum(dim=0).sign())
    for rank in range(world):
        assert torch.equal(seen["votes"][rank][world, communicator, n], wanted)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("world", range(1, WORLD + 1))
@pytest.mark.parametrize("communicator", ["two_phase", "all_gather"])
def test_ties_become_zero_where_asked(seen: Any, world: int, communicator: str, n: int) -> None:
    wanted = torch.stack([gradient(rank, n).sign() for rank in range(world)]).sum(dim=0).sign()
    choices = Choices(communicator=communicator, ties="zero")  # type: ignore[arg-type]
    for rank in range(world):
        got, sent = seen["votes"][rank][world, communicator, n, "ties"]
        assert torch.equal(got, wanted)
        assert sent == traffic(choices, n, world)[0]


@pytest.mark.parametrize("name", ["ef_sign", "ef_vote"])
def test_every_parameter_has_its_own_scale(seen: Any, name: str) -> None:
    for one in seen["scales"]:
        sizes = [piece.abs().mean() for piece in one[name]]
        assert 300 < sizes[1] / sizes[0] < 3000
        assert 300 < sizes[0] / sizes[2] < 30000  # seven numbers, and the scale is one of a few


@pytest.mark.parametrize("name", ["signum", "ef_sign", "stochastic_vote"])
def test_exchanging_beside_backward_changes_no_number(seen: Any, name: str) -> None:
    for one in seen["overlaps"]:
        (beside, steps), (after, same) = one[name, True], one[name, False]
        assert steps == same == 6
        assert all(map(torch.equal, beside, after))
        assert all(map(torch.equal, beside, seen["overlaps"][0][name, True][0]))


def test_all_buckets_but_the_last_are_exchanged_beside_backward(seen: Any) -> None:
    for one in seen["overlaps"]:
        threads = one["threads"]
        assert threads == seen["overlaps"][0]["threads"]  # the same order everywhere
        last = max(index for index, _ in threads)
        third = threads[-(last + 1) :]  # the third step
        assert last > 0
        assert [index for index, _ in third] == list(range(last + 1))
        assert [name == "trilobe-exchange" for _, name in third] == [True] * last + [False]


def test_zeros_move_nothing_away(seen: Any) -> None:
    for one in seen["zeros"]:
        even, odd = one["half"]
        assert (even[:50] == 1).all() and (odd[:50] == 1).all()
        assert (even[50:] + odd[50:] == 0).all()
        assert (one["nothing"] == 0).all()


def test_a_worker_without_gradient_abstains(seen: Any) -> None:
    wanted = torch.stack([gradient(rank, 100).sign() for rank in range(3)]).sum(dim=0).sign()
    for one in seen["zeros"]:
        assert torch.equal(one["lazy"], wanted)


@pytest.mark.parametrize("name", ["ef_sign", "ef_top_k"])
def test_error_feedback_loses_nothing_even_when_buckets_are_rearranged(seen: Any, name: str) -> None:
    """Sum of what came out = mean of what went in - what is still remembered: exact, but for rounding. Of an average
    ``m`` that is ``nu * beta / (1 - beta) * m``, by summing its equation over steps."""
    runs = [one[name] for one in seen["feedback"]]
    went_in = torch.stack([r["in"] for r in runs]).mean(dim=0)
    if parallel.PRESETS[name].has_momentum:
        went_in = went_in - 0.7 * 0.9 / 0.1 * torch.stack([r["average"] for r in runs]).mean(dim=0)
    remembered = torch.stack([r["worker"] for r in runs]).mean(dim=0) + torch.stack([r["owner"] for r in runs]).sum(
        dim=0
    )
    assert remembered.abs().max() > 0.1
    for r in runs:
        assert torch.allclose(r["out"], went_in - remembered, atol=1e-4)


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_what_is_remembered_is_what_the_paper_says(seen: Any, name: str) -> None:
    wanted = by_the_paper(TRANSCRIBED[name])
    assert len({tuple(np.sign(step)) for step in wanted}) == len(wanted)
    for one in seen["transcribed"][:3]:
        for got, step in zip(one[name], wanted, strict=True):
            assert np.abs(got.numpy() - step).max() < 1e-6


@pytest.mark.parametrize("lie", ["flip", "random", "scaled"])
def test_a_vote_survives_two_liars_of_five(seen: Any, lie: str) -> None:
    losses = [one["vote", lie] for rank, one in enumerate(seen["lies"]) if rank not in (1, 3)]
    for run in losses:
        assert sum(run[-10:]) < 0.3 * sum(run[:10])


def test_a_mean_does_not(seen: Any) -> None:
    for run in (one["mean", "scaled"] for one in seen["lies"]):
        assert not run[-1] < 10 * run[0]  # grows without end, or is NaN


@pytest.mark.parametrize("name", ["ef_sign", "signum", "stochastic_vote", "qsgd", "ef_top_k"])
def test_resuming_changes_nothing(seen: Any, name: str) -> None:
    for one in seen["resumed"]:
        at_once, paused = one[name]
        assert torch.equal(at_once, paused)
        assert not torch.equal(at_once, torch.full_like(at_once, 0.1))


def test_a_gradient_that_is_not_finite_stops_every_worker_and_names_the_parameter(seen: Any) -> None:
    for one in seen["oddities"]:
        assert one["nan"].startswith("TrainingError: the gradient of worker 2 in '3.")
        assert "step 2" in one["nan"]


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", ["signum", "ef_sign", "qsgd", "ef_top_k", "plain"])
def test_every_hook_names_what_is_not_finite(seen: Any, name: str, layer: int) -> None:
    whose = "" if name == "plain" else " of worker 3"  # a sum does not tell
    for one in seen["oddities"]:
        assert one["broken", name, layer].startswith(f"TrainingError: the gradient{whose} in '{layer}.weight' is not")


@pytest.mark.parametrize("name", parallel.PRESETS)
def test_a_world_of_one_trains(seen: Any, name: str) -> None:
    losses = seen["oddities"][0]["alone", name]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_buckets_are_several_and_rearranged_and_memory_survives(seen: Any) -> None:
    layouts = seen["oddities"][0]["layouts"]
    first, second, third = ([names for step, names in layouts if step == i] for i in range(3))
    assert first != second == third
    assert len(second) > 1


def test_the_meter_counts_both_phases(seen: Any) -> None:
    n, rows = 10 * 60 + 60 + 60 * 40 + 40 + 41, 0
    for one in seen["oddities"]:
        sent, received, steps = one["meter"]
        rows = sent / 3
        assert (sent, steps) == (received, 3)
        assert 2 * (WORLD - 1) / WORLD * n / 8 <= rows < 2 * (WORLD - 1) / WORLD * n / 8 + 4 * 8 * 16 * 4


def test_accumulation_stays_local_until_synchronized(seen: Any) -> None:
    grown = [one["no_sync"] for one in seen["oddities"]]
    assert all(voted for voted, _ in grown)
    assert len({local for _, local in grown}) == WORLD


def test_mixed_dtypes_and_unused_parameters(seen: Any) -> None:
    for one in seen["oddities"]:
        assert {dtype for _, dtype in one["dtypes"]} == {torch.float32, torch.bfloat16, torch.float16}
        assert all(grad in (None, dtype) for grad, dtype in one["dtypes"])
        assert all(map(torch.equal, one["mixed"], seen["oddities"][0]["mixed"]))


def test_workers_may_run_out_of_data(seen: Any) -> None:
    start = [p.detach() for p in network().parameters()]
    last = seen["oddities"][-1]["joined"]
    assert not torch.equal(last[0], start[0])
    for one in seen["oddities"][1:]:
        assert all(map(torch.equal, one["joined"], last))


def test_sparse_gradients_are_refused(seen: Any) -> None:
    for one in seen["oddities"]:
        assert all(one["sparse", name].startswith("UsageError: a sparse gradient") for name in parallel.PRESETS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"compressor": "zip"},
        {"compressor": "top_k"},
        {"memory": "error_feedback"},
        {"compressor": "none", "aggregate": "mean", "memory": "error_feedback"},
        {"communicator": "all_reduce"},
        {"beta": 2.0},
        {"levels": 0},
        {"ties": "draw"},
        {"nu": 0.7},
        {"nu": 1.1, "memory": "momentum"},
        {"memory": "momentum+error_feedback"},
        {"scale_per": "layer"},
        {"compressor": "quantize", "aggregate": "mean", "ties": "zero"},
    ],
    ids=str,
)
def test_choices_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Choices(**wrong)


def test_a_saved_state_must_fit() -> None:
    here, other = State(parallel.EF_SIGN).attach(network()), State(parallel.QSGD).attach(network())
    with pytest.raises(UsageError, match="a saved state with"):
        here.load_state_dict(other.state_dict())
    with pytest.raises(UsageError, match="attach"):
        State().state_dict()
    saved = here.state_dict() | {"worker": {"0.weight": torch.zeros(3)}}
    with pytest.raises(TrilobeError, match=r"'0.weight' has 3 numbers, the model 600"):
        here.load_state_dict(saved)


def test_a_state_saved_before_a_choice_existed_is_read_as_its_default() -> None:
    saved = State(parallel.EF_SIGN).attach(network()).state_dict()
    del saved["choices"]["scale_per"], saved["choices"]["ties"]
    State(parallel.EF_SIGN).attach(network()).load_state_dict(saved)


def test_a_state_saved_when_a_worker_had_one_memory_is_read() -> None:
    net, average = network(), {"0.weight": torch.arange(600.0)}
    saved = State(parallel.SIGNUM).attach(net).state_dict() | {"worker": average}
    del saved["average"], saved["choices"]["nu"]
    here = State(parallel.SIGNUM).attach(net)
    here.load_state_dict(saved)
    now = here.state_dict()
    assert now["average"]["0.weight"].tolist() == average["0.weight"].tolist()
    assert now["worker"] == {}


def test_only_votes_go_by_that_name() -> None:
    with pytest.raises(UsageError, match="compressed_hook"):
        majority_vote_hook(State(parallel.QSGD), None)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.multiprocessing.start_processes(worker, (sys.argv[1],), nprocs=WORLD, start_method="fork")
