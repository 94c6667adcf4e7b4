"""What every DDP communication hook must do, asked of all presets and of torch's own hooks as peers, among two real
workers (gloo). Run as a script, this file is the workers. A new preset is tested by existing."""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from trilobe.algorithms.parallel import EF_SIGN, PRESETS, SIGNUM, Choices, State, compressed_hook, majority_vote_hook

WORLD, STEPS = 2, 80
Hook = tuple[Any, Callable[..., Any]]


def power_sgd() -> Hook:
    state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    return state, powerSGD_hook.powerSGD_hook


HOOKS: dict[str, Callable[[], Hook]] = {
    "torch_allreduce": lambda: (None, default_hooks.allreduce_hook),
    "torch_fp16": lambda: (None, default_hooks.fp16_compress_hook),
    "torch_power_sgd": power_sgd,
    "majority_vote_hook": lambda: (State(SIGNUM), majority_vote_hook),
    "ties_zero": lambda: (State(Choices(ties="zero")), majority_vote_hook),
    "scale_per_message": lambda: (State(dataclasses.replace(EF_SIGN, scale_per="message")), compressed_hook),
    **{name: lambda c=c: (State(c), compressed_hook) for name, c in PRESETS.items()},
}


# Starts all-reduces from callbacks, in an order that differs between workers: hangs on gloo with several buckets.
ONE_BUCKET = {"torch_power_sgd"}


def learning_rate(state: Any) -> float:
    """A hook that answers with bare signs wants a small one."""
    bare = isinstance(state, State) and state.choices.aggregate == "vote" and not state.choices.scaled
    return 0.004 if bare else 0.03


def regression(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1000 * rank + step))
    return (model(x)[:, 0] - x.sum(dim=1)).square().mean()


def go(name: str, rank: int) -> dict[str, Any]:
    """Train; then accumulate two batches; note shapes, losses, buckets and where the parameters ended."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 50), torch.nn.Tanh(), torch.nn.Linear(50, 31), torch.nn.Linear(31, 1))
    model = DistributedDataParallel(net, bucket_cap_mb=25 if name in ONE_BUCKET else 0.004)
    state, hook = HOOKS[name]()
    buckets: list[tuple[int, bool]] = []

    def watched(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        size, dtype = bucket.buffer().shape, bucket.buffer().dtype

        def look(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            value = future.value()
            value = value[0] if isinstance(value, list) else value
            buckets.append((bucket.index(), value.shape == size and value.dtype == dtype))
            return value

        return hook(state, bucket).then(look)

    model.register_comm_hook(state, watched)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=learning_rate(state)), []
    for step in range(STEPS):
        optimizer.zero_grad()
        if step == STEPS // 2:
            with model.no_sync():
                regression(model, rank, step + 500).backward()
        loss = regression(model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "buckets": buckets, "end": [p.detach().clone() for p in net.parameters()]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save({name: go(name, rank) for name in HOOKS}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """By rank and hook, what ``go`` noted."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", HOOKS)
def test_every_bucket_comes_back_in_its_shape_and_dtype(runs: Any, name: str) -> None:
    for run in runs:
        assert name in ONE_BUCKET or {index for index, _ in run[name]["buckets"]} >= {0, 1}  # several buckets
        assert all(same for _, same in run[name]["buckets"])


@pytest.mark.parametrize("name", HOOKS)
def test_all_workers_end_with_the_same_parameters(runs: Any, name: str) -> None:
    assert all(map(torch.equal, runs[0][name]["end"], runs[1][name]["end"]))


@pytest.mark.parametrize("name", HOOKS)
def test_the_loss_goes_down(runs: Any, name: str) -> None:
    for run in runs:
        losses = run[name]["losses"]
        assert sum(losses[-10:]) < 0.4 * sum(losses[:10])


def test_no_compression_is_what_torch_does(runs: Any) -> None:
    ours, theirs = runs[0]["plain"]["end"], runs[0]["torch_allreduce"]["end"]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    torch.multiprocessing.start_processes(worker, (sys.argv[1],), nprocs=WORLD, start_method="fork")
