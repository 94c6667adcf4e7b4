"""One worker, measured before there are more of them: where its time goes, and what others would bring."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from trilobe.algorithms.fit.batches import Batches, checked
from trilobe.algorithms.fit.measuring import rehearsal, settle
from trilobe.algorithms.fit.plan import Plan
from trilobe.algorithms.fit.team import together
from trilobe.algorithms.fit.training import Augment, Training, conditions
from trilobe.algorithms.parallel.planner import Link, measure_link
from trilobe.algorithms.parallel.planner import plan as choose_hook
from trilobe.algorithms.workers import Place, available_cores, run
from trilobe.types import FloatArray

PAYS = 1.2  # how many times as fast something must be to be advised
WORKERS = (2, 4, 8)
QUIET = 0.2  # the quantile of timed steps that counts: what others do on a busy machine is left out
NETWORK = Link.of(1000)  # what is assumed to join machines: 1 Gbit/s, half a millisecond


@dataclass(frozen=True)
class Forecast:
    """What ``workers`` are expected to bring, as ratios to one worker's speed.

    ``side_by_side``: whole networks, each worker some of them, in processes of this machine. ``here``: one network, its
    batches shared among processes of this machine, by the hook ``here_by``. ``elsewhere``: among as many machines like
    this one, joined by 1 Gbit/s.
    """

    workers: int
    side_by_side: float
    here: float
    here_by: str
    elsewhere: float
    elsewhere_by: str


@dataclass(frozen=True)
class Profile:
    """Where one worker's time goes, and what more of them would bring. Seconds are those of one step, when others leave
    the machine alone.

    Args:
        data_s, forward_s, backward_s, update_s: reading and varying a batch, the loss, gradients, the optimizer.
        samples_per_s: examples a second.
        cores, cores_used: of this machine, and how many one worker keeps busy.
        parallel_fraction: the share of a step that more cores make faster, by Amdahl's law, 0 to 1; of one core 0.
        larger_batch: how many times as many examples a second batches of twice the size bring.
        parameters: numbers that are trained; a gradient has four bytes for each.
        link_s, link_bytes_per_s: of the loopback interface, between two processes.
        encode_s: what was spent once on making input of the examples, 0 where that is not known.
        forecasts: for some numbers of workers.
        advice: what follows, in words.
    """

    data_s: float
    forward_s: float
    backward_s: float
    update_s: float
    samples_per_s: float
    cores: int
    cores_used: float
    parallel_fraction: float
    larger_batch: float
    parameters: int
    link_s: float
    link_bytes_per_s: float
    encode_s: float = 0.0
    forecasts: tuple[Forecast, ...] = ()
    advice: tuple[str, ...] = field(default=())

    @property
    def step_s(self) -> float:
        """A whole step."""
        return self.data_s + self.forward_s + self.backward_s + self.update_s

    def __str__(self) -> str:
        parts = {"data": self.data_s, "forward": self.forward_s, "backward": self.backward_s, "update": self.update_s}
        lines = [f"{name:<10}{1e3 * s:9.2f} ms a step{s / self.step_s:7.0%}" for name, s in parts.items()]
        lines += [
            f"{self.samples_per_s:.0f} examples a second, {self.cores_used:.1f} of {self.cores} cores busy, "
            f"{self.parallel_fraction:.0%} of a step is faster on more cores",
            f"{self.parameters:,} parameters; between processes here {1e3 * self.link_s:.2f} ms and "
            f"{self.link_bytes_per_s / 1e6:.0f} MB/s",
            "workers   side by side   one network here   one network on machines at 1 Gbit/s",
        ]
        lines += [
            f"{f.workers:>7}{f.side_by_side:>14.1f}x{f.here:>17.1f}x {f.here_by:<17}{f.elsewhere:.1f}x {f.elsewhere_by}"
            for f in self.forecasts
        ]
        return "\n".join([*lines, *self.advice])


def profile(
    module: nn.Module,
    X: FloatArray,
    likelihood: FloatArray,
    plan: Plan = Plan(),  # noqa: B008  # it is frozen
    augment: Augment | None = None,
    networks: int = 1,
    encode_s: float = 0.0,
    link: Link | None = None,
) -> Profile:
    """Measure one worker before scaling out: where its time goes, and whether more workers can help.

    Steps are timed at the plan's batch size and at the shares that workers would get, on all cores and on one; then two
    processes time the link between them and a step that they share. Predictions add up computing, codec and link (see
    :mod:`trilobe.algorithms.parallel.planner`), the messages of batch normalization, and what the two took beyond that.

    Args:
        module: stays as it is; copies are trained.
        X, likelihood, plan, augment: see :func:`~trilobe.algorithms.fit.fit`.
        networks: how many networks of this kind are to be trained (folds and the last one).
        encode_s: what making ``X`` took.
        link: between processes of this machine; where it is given, no two processes are started.

    >>> seen = profile(nn.Linear(2, 2), np.eye(2, dtype=np.float32), np.eye(2), link=Link(1e-4, 1e9))
    >>> [f.workers for f in seen.forecasts]
    [2, 4, 8]
    """
    X, likelihood = checked(X, likelihood)
    plan = settle(module, X, likelihood, plan, augment)
    cores, size = available_cores(), min(plan.batch_size, len(X))

    def timed(batch: int, threads: int | None) -> "_Timed":
        return _timed(module, X, likelihood, replace(plan, batch_size=max(batch, 2)), augment, threads)

    one, whole = timed(size, None), timed(size, cores)
    single = one if one.threads == 1 else timed(size, 1)
    parts = {w: (timed(size // w, max(1, cores // w)), timed(size // w, cores)) for w in WORKERS}
    pair = _Pair(module, X, likelihood, _short(plan), augment)
    near, shared_s = (link, 0.0) if link else run(pair, 2)[0]
    far = Link(NETWORK.latency_s, min(NETWORK.bytes_per_s, near.bytes_per_s))
    waits = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def predicted(w: int, by: Link, part: "_Timed", crowded: float, more_s: float) -> tuple[float, str]:
        compute = crowded * (one.parts[0] + part.step_s - part.parts[0])  # everybody varies the whole batch
        best = choose_hook(parameters, by, w, compute + 4 * waits * (w - 1) * by.latency_s + more_s).best
        return best.step_s, best.name

    more_s = max(0.0, shared_s - predicted(2, near, parts[2][0], max(1.0, 2 / cores), 0.0)[0])
    forecasts = []
    for w, (here, there) in parts.items():
        rounds = max(networks / min(w, cores), -(-networks // w))
        here_s, here_by = predicted(w, near, here, max(1.0, w / cores), more_s)
        there_s, there_by = predicted(w, far, there, 1.0, more_s)
        side = networks * one.step_s / (rounds * single.step_s)
        forecasts.append(Forecast(w, side, one.step_s / here_s, here_by, one.step_s / there_s, there_by))
    twice = timed(2 * size, None) if len(X) >= 2 * size else one
    amdahl = (1 - whole.step_s / single.step_s) / (1 - 1 / cores) if cores > 1 else 0.0
    found = Profile(
        *one.parts,
        samples_per_s=one.n / one.step_s,
        cores=cores,
        cores_used=one.busy,
        parallel_fraction=min(1.0, max(0.0, amdahl)),
        larger_batch=twice.n / twice.step_s / (one.n / one.step_s),
        parameters=parameters,
        link_s=near.latency_s,
        link_bytes_per_s=near.bytes_per_s,
        encode_s=encode_s,
        forecasts=tuple(forecasts),
    )
    return replace(
        found, advice=tuple(_advice(found, plan, networks, one.step_s * plan.total_steps(len(X)) * networks))
    )


def _short(plan: Plan) -> Plan:
    """The plan for no more steps than it takes to time one."""
    return replace(plan, steps=100, epochs=0, hook="plain")


@dataclass(frozen=True)
class _Timed:
    """Seconds of the four parts of a step, cores kept busy, examples in a batch, threads."""

    parts: tuple[float, float, float, float]
    busy: float
    n: float
    threads: int

    @property
    def step_s(self) -> float:
        return sum(self.parts)


def _timed(
    module: nn.Module, X: FloatArray, likelihood: FloatArray, plan: Plan, augment: Augment | None, threads: int | None
) -> _Timed:
    """Steps of a copy, timed part by part for about half a second."""
    training = rehearsal(module, X, likelihood, _short(plan), augment)
    rows: list[list[float]] = []
    with conditions(plan, training.x), _threads(threads):
        clocks, used = (0.0, 0.0), torch.get_num_threads()
        for step in range(60):
            if step == 2:  # after warming up
                clocks = (time.perf_counter(), time.process_time())
            at = [time.perf_counter()]
            batch = training.batch(step)
            at.append(time.perf_counter())
            loss = training.loss(*batch)
            at.append(time.perf_counter())
            training.backward(loss)
            at.append(time.perf_counter())
            training.update(float(loss.detach()), step)
            at.append(time.perf_counter())
            rows.append(np.diff(at).tolist())
            if step > 5 and at[-1] - clocks[0] > 0.5:
                break
        wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    data, forward, backward, update = np.quantile(rows[2:], QUIET, axis=0).tolist()
    return _Timed((data, forward, backward, update), cpu / wall, len(X) / training.batches, used)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """So many threads inside; None leaves them as they are. What was before comes back with ``conditions``."""
    if n:
        torch.set_num_threads(n)
    yield


@dataclass(frozen=True)
class _Pair:
    """What two workers measure together: the link between them, and a step that they share."""

    module: nn.Module
    X: FloatArray
    likelihood: FloatArray
    plan: Plan
    augment: Augment | None

    def __call__(self, place: Place) -> tuple[Link, float]:
        seconds: list[float] = []
        x, told = Batches(self.X, 0.0), Batches(self.likelihood, 1.0)
        with together(place) as team, conditions(self.plan, x):
            link = measure_link()
            training = Training(self.module.train(), x, told, self.plan, self.augment, team)
            for step in range(20):
                began = time.perf_counter()
                loss = training.loss(*training.batch(step))
                promise = team.total(loss, False)
                training.backward(loss)
                training.update(promise()[0], step)
                seconds.append(time.perf_counter() - began)
        return link, float(np.quantile(seconds[5:], QUIET))


def _advice(p: Profile, plan: Plan, networks: int, seconds: float) -> list[str]:
    """What follows, utilization first: one machine is to be busy before there are several."""
    said = [f"one worker keeps {p.cores_used:.1f} of {p.cores} cores busy; all of the training takes {seconds:.0f} s"]
    if p.encode_s > seconds:
        said.append(f"reading the examples took {p.encode_s:.0f} s, longer than training: workers change nothing there")
    if p.data_s > 0.4 * p.step_s:
        said.append("much of a step goes into making batches, which every worker does whole: vary them less, first")
    if p.larger_batch > PAYS:
        bring = f"batches of {2 * plan.batch_size} bring {p.larger_batch:.1f} times as many examples a second here"
        said.append(f"{bring}: where they train as well, that comes before more workers")
    side, here, away = (max(p.forecasts, key=key) for key in (_side_by_side, _here, _elsewhere))
    if networks > 1 and side.side_by_side > PAYS:
        said.append(f"{side.workers} workers train the {networks} networks side by side {side.side_by_side:.1f} times "
                    f"as fast: train.workers = {side.workers}")  # fmt: skip
    elif networks > 1:
        said.append("networks side by side gain nothing here: one worker uses the machine already")
    if here.here > PAYS:
        said.append(
            f"{here.workers} processes share one network's batches {here.here:.1f} times as fast ({here.here_by})"
        )
    else:
        said.append(f"sharing one network's batches here does not pay: its step takes {1e3 * p.step_s:.1f} ms")
    if away.elsewhere > PAYS * max(1.0, here.here, side.side_by_side):
        said.append(f"{away.workers} machines at 1 Gbit/s would be {away.elsewhere:.1f} times as fast "
                    f"({away.elsewhere_by})")  # fmt: skip
    else:
        said.append("more machines would bring no more than that")
    return said


def _side_by_side(f: Forecast) -> float:
    return f.side_by_side


def _here(f: Forecast) -> float:
    return f.here


def _elsewhere(f: Forecast) -> float:
    return f.elsewhere
