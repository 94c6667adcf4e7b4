"""Gradient compression for DDP, in two lines: ``state = State().attach(model)`` and
``model.register_comm_hook(state, majority_vote_hook)``. A hook is compressor x memory x communicator, chosen in one
frozen ``Choices``. The bits are made in ``codec`` and ``compressors``; here they are exchanged and put together.

A message is one row of bytes: an int32 flag, float32 scales (of signs, one for each parameter in it), what the
compressor wrote; each of the two parts with zeros up to a multiple of eight. The flag tells whether the sender votes,
abstains (its vector is all zero), or met a number that is not finite, and in which parameter: so every worker stops
with the same message instead of waiting for one that stopped.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from trilobe.algorithms.parallel.codec import at_least, majority
from trilobe.algorithms.parallel.compressors import COMPRESSORS, SIGNS, Encoding
from trilobe.algorithms.parallel.lane import Lane
from trilobe.algorithms.parallel.memory import Memory
from trilobe.errors import TrainingError, UsageError

HEADER = 8  # bytes: flag and one scale; more scales take four each
VOTES, ABSTAINS = 0, -1  # flags; k > 0: the bucket's k-th parameter has a gradient that is not finite
FORMAT = "trilobe.parallel.v1"

CompressorName = Literal["none", "sign", "stochastic_sign", "quantize", "top_k"]
MemoryName = Literal["none", "error_feedback", "momentum", "momentum+error_feedback"]
CommunicatorName = Literal["all_reduce", "all_gather", "two_phase"]


@dataclass(frozen=True, slots=True)
class Choices:
    """How gradients are compressed, what is remembered, how it travels, and what is made of it. The default is the
    majority vote.

    compressor
        ``sign``, ``stochastic_sign``: one bit a coordinate. ``quantize``: 4 or 8 bits (``levels`` up to 7, or up to
        127). ``top_k``: 32 bits for each of the ``ratio`` largest (value and place). ``none``: 32 bits.
    scaled
        Send scales with the signs, so that the result has the size of a gradient. Without them the result is -1 or 1.
    scale_per
        ``parameter``: a scale (or bound of noise) for every parameter, four bytes each, so that layers with gradients
        of different size keep them. ``message``: one for all that a worker sends another of a bucket.
    memory
        ``error_feedback``: what compression lost is added to the next gradient (Seide et al. 2014; Karimireddy et al.
        2019, algorithm 1, with the learning rate left to the optimizer). ``momentum``: an exponential average of
        gradients (``beta``) is sent in their place (Signum: Bernstein et al. 2018, algorithm 2).
        ``momentum+error_feedback``: errors are added to the average (Zheng, Huang and Kwok 2019, arXiv 1905.10936,
        algorithm 2 times ``1 - beta``; errors stay as they are when the learning rate changes). The optimizer is then
        SGD without momentum, with ``1 / (1 - beta)`` times the learning rate of SGD with momentum.
    nu
        Of momentum: the share of the average in what is sent; the rest is the gradient (quasi-hyperbolic momentum: Ma
        and Yarats 2019, arXiv 1810.06801, equations 3 and 4). 1 is plain momentum, ``beta`` is Nesterov's. Less makes
        up for the age of errors.
    communicator
        ``two_phase``: every worker collects one chunk from all, puts it together and sends the outcome to all: what
        a worker receives does not grow with their number (two workers send each other everything at once: the same
        bytes). ``all_gather``: everybody sends everything to everybody.
        ``all_reduce``: the sum as DDP makes it, for ``compressor="none"``.
    aggregate
        ``vote``: each coordinate takes the sign of most workers, times the median of their scales; a minority may lie
        about its gradients (in ``two_phase`` each worker is trusted to count its chunk). A tie goes to the worker that
        counts (``all_gather``: to each in turn, step by step), so it is as unbiased as that worker's gradient.
        With ``ties="zero"`` it becomes 0: the mean of signs with two workers; with more, ``two_phase`` then takes two
        bits a coordinate for the outcome.
        ``mean``: the average, compressed again when ``two_phase`` sends it out (with a second error memory at the
        worker that averages: Tang et al. 2019, arXiv 1905.05957, algorithm 1).

    >>> Choices(memory="momentum").aggregate
    'vote'
    """

    compressor: CompressorName = "sign"
    memory: MemoryName = "none"
    communicator: CommunicatorName = "two_phase"
    aggregate: Literal["vote", "mean"] = "vote"
    ties: Literal["counter", "zero"] = "counter"
    scaled: bool = False
    scale_per: Literal["parameter", "message"] = "parameter"
    beta: float = 0.9
    nu: float = 1.0
    levels: int = 7
    ratio: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (
            ("compressor", get_args(CompressorName)),
            ("memory", get_args(MemoryName)),
            ("communicator", get_args(CommunicatorName)),
            ("aggregate", ("vote", "mean")),
            ("ties", ("counter", "zero")),
            ("scale_per", ("parameter", "message")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r}", expected=f"one of {', '.join(known)}")
        for name, low, high in (("beta", 0, 0.9999), ("nu", 0, 1), ("levels", 1, 127), ("ratio", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} {getattr(self, name)}", expected=f"{low} to {high}")
        signs = self.compressor in SIGNS
        if self.aggregate == "vote" and not signs:
            raise UsageError(f"a vote on {self.compressor!r}", expected="signs", hint='aggregate="mean"')
        if self.ties == "zero" and self.aggregate != "vote":
            raise UsageError("ties without a vote", expected='aggregate="vote"')
        if self.nu != 1 and not self.has_momentum:
            raise UsageError(f"nu with memory {self.memory!r}", expected="momentum", hint='memory="momentum"')
        if self.has_errors and signs and not self.scaled:
            raise UsageError(
                "error feedback on signs without a scale", expected="what is sent to be near it", hint="scaled=True"
            )
        if self.has_errors and self.compressor == "none":
            raise UsageError("error feedback without compression", expected="a compressor that loses something")
        if self.communicator == "all_reduce" and self.compressor != "none":
            raise UsageError(
                f"an all-reduce of {self.compressor!r}", expected="numbers that add up", hint='communicator="two_phase"'
            )

    @property
    def has_momentum(self) -> bool:
        """Whether workers average their gradients over time, so that the optimizer need not."""
        return "momentum" in self.memory.split("+")

    @property
    def has_errors(self) -> bool:
        """Whether what compression lost is sent later."""
        return "error_feedback" in self.memory.split("+")


MAJORITY_VOTE = Choices()
SIGNUM = Choices(memory="momentum")
EF_VOTE = Choices(memory="momentum+error_feedback", nu=0.7, scaled=True)
EF_SIGN = Choices(memory="momentum+error_feedback", nu=0.7, scaled=True, aggregate="mean")
STOCHASTIC_VOTE = Choices(compressor="stochastic_sign", memory="momentum", nu=0.7)
# Means that a second compression would spoil are gathered: two to four points of accuracy, benchmarks/train-accuracy.
QSGD = Choices(compressor="quantize", memory="momentum", nu=0.7, communicator="all_gather", aggregate="mean")
EF_TOP_K = replace(QSGD, compressor="top_k", memory="momentum+error_feedback", ratio=1 / 32)
PLAIN = Choices(compressor="none", communicator="all_reduce", aggregate="mean")
_CHOSEN = asdict(MAJORITY_VOTE)  # what a saved state means by choices that were added after it was written
PRESETS: Mapping[str, Choices] = {
    "plain": PLAIN,
    "majority_vote": MAJORITY_VOTE,
    "signum": SIGNUM,
    "ef_vote": EF_VOTE,
    "ef_sign": EF_SIGN,
    "stochastic_vote": STOCHASTIC_VOTE,
    "qsgd": QSGD,
    "ef_top_k": EF_TOP_K,
}


@dataclass(slots=True)
class Meter:
    """Bytes that this worker's hook handed to the network and took from it, and the steps it ran; without the
    headers of the transport. An all-reduce is counted as a ring."""

    sent: int = 0
    received: int = 0
    steps: int = 0

    def per_step(self) -> float:
        """Bytes sent in a step.

        >>> Meter(sent=300, received=300, steps=2).per_step()
        150.0
        """
        return self.sent / max(self.steps, 1)


class State:
    """What one worker's hook keeps between calls: its choices, memory, random generator and byte meter.

    With ``overlap`` buckets are exchanged on a thread and a process group of their own while backward goes on (on the
    CPU, in the group of all processes); the numbers are the same without.

    >>> state = State(EF_SIGN).attach(torch.nn.Linear(2, 1))
    >>> state.meter.sent
    0
    """

    def __init__(
        self,
        choices: Choices = MAJORITY_VOTE,
        group: "dist.ProcessGroup | None" = None,
        seed: int = 0,
        overlap: bool = True,
    ):
        self.choices, self.group, self.seed, self.overlap = choices, group, seed, overlap
        self.meter = Meter()
        self.step = 0
        self.parameters: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.average = Memory()  # of gradients over time
        self.worker, self.owner = Memory(), Memory()  # errors of what was sent, and of what was averaged and sent out
        self._generator: torch.Generator | None = None
        self._lane: Lane | None = None

    def attach(self, model: torch.nn.Module) -> "State":
        """Learn the names of ``model``'s parameters (a DDP module or what it wraps), for errors and checkpoints."""
        self.parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        self.names = {id(p): name for name, p in self.parameters.items()}
        return self

    def encoding(self, device: torch.device) -> Encoding:
        """What a compressor needs to know at this step."""
        if self._generator is None:
            rank = dist.get_rank(self.group)
            self._generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + rank)
        c = self.choices
        return Encoding(self._generator, self.step % 2 == 1, c.scaled, c.levels, c.ratio)

    def overlaps(self, buffer: Tensor) -> bool:
        """Whether ``buffer`` may be exchanged while backward goes on."""
        all_processes = self.group is None or self.group is dist.group.WORLD
        return self.overlap and all_processes and buffer.device.type == "cpu" and dist.get_world_size() > 1

    def lane(self) -> Lane:
        """Where buckets are exchanged beside backward; opened at first use, by all workers at once."""
        if self._lane is None:
            self._lane = Lane()
            weakref.finalize(self, self._lane.close)
        return self._lane

    def wait(self) -> None:
        """Until nothing is under way in the lane; raise what an exchange there raised."""
        if self._lane is not None:
            self._lane.drain()

    def state_dict(self) -> dict[str, Any]:
        """All that a later :meth:`load_state_dict` needs to go on as if nothing had happened: tensors by parameter
        name, on the CPU. Every worker keeps its own. Resuming is exact where DDP's buckets are those of the
        interrupted run; elsewhere nothing is lost, but ties and scales fall differently."""
        self._require_names()
        generator = None if self._generator is None else self._generator.get_state()
        return {
            "format": FORMAT,
            "choices": asdict(self.choices),
            "step": self.step,
            "generator": generator,
            "average": self.average.named(self.names),
            "worker": self.worker.named(self.names),
            "owner": self.owner.named(self.names),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from ``saved``. Raises UsageError for other choices, TrainingError for another model."""
        self._require_names()
        if saved.get("format") != FORMAT or _CHOSEN | saved["choices"] != asdict(self.choices):
            came = saved.get("choices") if saved.get("format") == FORMAT else f"format {saved.get('format')!r}"
            raise UsageError(f"a saved state with {came}", expected=f"{FORMAT} with {asdict(self.choices)}")
        if "average" not in saved and self.choices.has_momentum:  # written when a worker had one memory for either
            saved = {**saved, "average": saved["worker"], "worker": {}}
        self.average.load(saved.get("average", {}), self.parameters)
        self.worker.load(saved["worker"], self.parameters)
        self.owner.load(saved["owner"], self.parameters)
        self.step = saved["step"]
        if saved["generator"] is not None:
            device = next(iter(self.parameters.values())).device
            self._generator = torch.Generator(device)
            self._generator.set_state(saved["generator"])

    def _require_names(self) -> None:
        if not self.names:
            raise UsageError("a state that knows no parameter names", expected="names", hint="state.attach(model)")


def majority_vote_hook(state: State, bucket: GradBucket) -> Future[Tensor]:
    """DDP hook: every coordinate becomes the sign of most workers' gradients, -1 or 1 (Bernstein et al. 2018, 2019:
    arXiv 1802.04434 algorithm 3, arXiv 1810.05291 algorithm 1). Choose a learning rate as for Adam, and plain SGD.

    Raises TrainingError on every worker, with the parameter's name, where a gradient is not finite.

    >>> import torch.distributed as dist, tempfile
    >>> from torch.nn.parallel import DistributedDataParallel
    >>> where = tempfile.NamedTemporaryFile()
    >>> dist.init_process_group("gloo", init_method=f"file://{where.name}", rank=0, world_size=1)
    >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
    >>> state = State().attach(model)
    >>> model.register_comm_hook(state, majority_vote_hook)
    >>> model(torch.tensor([[5.0, -0.1]])).sum().backward()
    >>> model.module.weight.grad.tolist()
    [[1.0, -1.0]]
    >>> dist.destroy_process_group()
    """
    if state.choices.aggregate != "vote":
        raise UsageError(f"a majority vote with {state.choices}", expected='aggregate="vote"', hint="compressed_hook")
    return compressed_hook(state, bucket)


def compressed_hook(state: State, bucket: GradBucket) -> Future[Tensor]:
    """DDP hook for any :class:`Choices`: ``model.register_comm_hook(State(QSGD).attach(model), compressed_hook)``.

    The result stands in the bucket's own buffer, in its dtype; all computing is in float32. Every bucket but the last
    of a step is exchanged while backward computes the next ones (:class:`State`, ``overlap``); the last waits for
    all, so that an error is raised by ``backward()`` as what it is. Works on every backend with ``all_to_all`` and
    ``all_gather`` (gloo, nccl); on a GPU reading scales and flags waits for the device some times for each bucket.
    """
    buffer, parameters, index = bucket.buffer(), bucket.parameters(), bucket.index()
    if buffer.is_sparse:
        raise UsageError("a sparse gradient", expected="dense gradients", hint="Embedding(..., sparse=False)")

    def work(group: "dist.ProcessGroup | None") -> None:
        flat = buffer if buffer.dtype == torch.float32 else buffer.float()
        _exchange(_Call(state, flat, parameters, index, group))
        if flat is not buffer:
            buffer.copy_(flat)

    if not bucket.is_last() and state.overlaps(buffer):
        lane = state.lane()
        return lane.submit(lambda: work(lane.group), buffer)
    state.wait()
    work(state.group)
    if bucket.is_last():
        state.step += 1
        state.meter.steps += 1
    future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future


def exchange(state: State, flat: Tensor, parameters: Sequence[Tensor], index: int = 0) -> None:
    """Replace ``flat`` ``(n,)`` float32, the gradient of ``parameters`` one after another, by what all workers make
    of theirs. The hook without DDP: call it with the same shapes in the same order on every worker."""
    _exchange(_Call(state, flat, parameters, index, state.group))


class _Call:
    """One bucket at one step: the vector to send, cut into ``chunk`` coordinates for each message."""

    def __init__(
        self,
        state: State,
        flat: Tensor,
        parameters: Sequence[Tensor],
        index: int,
        group: "dist.ProcessGroup | None",
    ):
        self.state, self.flat, self.parameters, self.index, self.group = state, flat, parameters, index, group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        c = state.choices
        split = self.world if c.communicator == "two_phase" else 1
        self.chunk = -(-len(flat) // (64 * split)) * 64  # whole 64-bit words of signs
        self.chunks = [flat[i * self.chunk : (i + 1) * self.chunk] for i in range(split)]
        alone = c.scale_per == "message" or c.compressor not in SIGNS
        sizes = (len(flat),) if alone else tuple(p.numel() for p in parameters)
        self.pieces = _pieces(sizes, self.chunk, split)
        self.encoding = state.encoding(flat.device)
        self.compressor = COMPRESSORS[c.compressor]
        self.scaled = c.scaled and c.compressor in SIGNS
        scales = max(map(len, self.pieces)) if self.scaled else 0
        self.header = -(-4 * (1 + scales) // 8) * 8
        self.written = -(-self.compressor.size(self.chunk, self.encoding) // 8) * 8
        self.planes = 2 if c.aggregate == "vote" and c.ties == "zero" else 1

    def rows(self, n: int, planes: int = 1) -> Tensor:
        size = self.header + planes * self.written
        return torch.zeros(n, size, dtype=torch.uint8, device=self.flat.device)

    def encode(self, x: Tensor, row: Tensor, chunk: int) -> None:
        """``x``, the chunk of that number, into ``row``."""
        if not len(x) or _is_zero(x):
            _write_header(row, [], ABSTAINS)
        else:
            scales = self.compressor.encode(x, row[self.header :], self.pieces[chunk], self.encoding)
            _write_header(row, scales, VOTES)

    def decode(self, row: Tensor, out: Tensor, chunk: int, planes: int = 1) -> None:
        flag, scales = self.read_header(row[None], chunk)[0]
        if flag != VOTES or not len(out):
            out.zero_()
            return
        written = row[self.header :]
        self.compressor.decode(written, scales, out, self.pieces[chunk], self.encoding)
        if planes == 2:  # the two differ where there was a tie
            other = torch.empty_like(out)
            self.compressor.decode(written[self.written :], scales, other, self.pieces[chunk], self.encoding)
            out.add_(other).mul_(0.5)

    def read_header(self, rows: Tensor, chunk: int) -> list[tuple[int, list[float]]]:
        """Flag and scales of each row."""
        head = rows[:, : self.header].contiguous()
        scales = head.view(torch.float32)[:, 1 : 1 + len(self.pieces[chunk])].tolist() if self.scaled else []
        flags = head.view(torch.int32)[:, 0].tolist()
        return list(zip(flags, scales or [[]] * len(flags), strict=True))

    def messages(self) -> Tensor:
        """This worker's rows ``(chunks, row)``: memory added, compressed, what was lost remembered."""
        rows = self.rows(len(self.chunks))
        broken = _not_finite(self.flat, self.parameters)
        if broken:
            for row in rows:
                _write_header(row, [], broken)
            return rows
        kept = self._remember()
        for i, row in enumerate(rows):
            own = kept[i * self.chunk : (i + 1) * self.chunk]
            self.encode(own, row, i)
            if self.state.choices.has_errors:
                self._subtract(row, own, i)
        return rows

    def _remember(self) -> Tensor:
        """The vector to compress: the gradient or its running average, plus old errors."""
        c, x = self.state.choices, self.flat
        if c.has_momentum:
            average = self.state.average.of(self.parameters)[0].lerp_(x, 1 - c.beta)
            x = average if c.nu == 1 else torch.lerp(x, average, c.nu)
        if not c.has_errors:
            return x
        errors, new = self.state.worker.of(self.parameters)
        if new and c.communicator == "two_phase" and c.aggregate == "mean":
            self._move_strays(errors)
        return errors.add_(x)

    def _move_strays(self, kept: Tensor) -> None:
        """Errors of averaging that this worker remembers for coordinates that are no longer its own, after buckets
        were rearranged, go into what it sends: `world` times, since the mean divides by it."""
        averaged, _ = self.state.owner.of(self.parameters)
        strays = averaged.clone()
        strays[self.rank * self.chunk : (self.rank + 1) * self.chunk] = 0
        kept.add_(strays, alpha=self.world)
        averaged.sub_(strays)

    def _subtract(self, row: Tensor, own: Tensor, chunk: int) -> None:
        decoded = torch.empty_like(own)
        self.decode(row, decoded, chunk)
        own.sub_(decoded)

    def check(self, headers: list[tuple[int, list[float]]]) -> None:
        """Stop, on every worker alike, where one of them met a number that is not finite."""
        for worker, (flag, _) in enumerate(headers):
            if flag > VOTES:
                self.fail(flag, f" of worker {worker}")

    def fail(self, broken: int, whose: str) -> None:
        known = 0 < broken <= len(self.parameters)
        name = self.state.names.get(id(self.parameters[broken - 1]), "") if known else ""
        where = repr(name) if name else f"parameter {broken - 1} of bucket {self.index}"
        raise TrainingError(
            f"the gradient{whose} in {where} is not finite at step {self.state.step}",
            expected="no NaN and no infinity",
            hint="lower the learning rate, clip gradients, or look for bad values in that worker's batch",
        )

    def combine(self, rows: Tensor, first: int, chunk: int, out: Tensor) -> None:
        """Make one row of everybody's ``rows`` of a chunk by vote; ``first`` decides ties."""
        headers = self.read_header(rows, chunk)
        self.check(headers)
        order = [(first + i) % self.world for i in range(self.world)]
        voters = [i for i in order if headers[i][0] == VOTES]
        if not voters:
            _write_header(out, [], ABSTAINS)
            return
        votes = [rows[i, self.header :].view(torch.int64) for i in voters]
        written = out[self.header :].view(torch.int64)
        if self.planes == 1:
            written.copy_(majority(votes if len(votes) % 2 else [*votes, votes[0]]))
        else:  # more than half are negative; half or more are
            half = written[: self.written // 8], written[self.written // 8 :]
            half[0].copy_(at_least(votes, len(votes) // 2 + 1))
            half[1].copy_(at_least(votes, (len(votes) + 1) // 2))
        _write_header(out, [_median(scales) for scales in zip(*(headers[i][1] for i in voters), strict=True)], VOTES)

    def average(self, rows: Tensor, out: Tensor, chunk: int) -> None:
        """The mean of everybody's rows of a chunk, into ``out``."""
        self.check(self.read_header(rows, chunk))
        decoded = torch.empty_like(out)
        out.zero_()
        for row in rows:
            self.decode(row, decoded, chunk)
            out.add_(decoded, alpha=1 / self.world)


def _exchange(call: _Call) -> None:
    communicate = {"all_reduce": _all_reduce, "all_gather": _all_gather, "two_phase": _two_phase}
    communicate[call.state.choices.communicator](call)


def _all_reduce(call: _Call) -> None:
    kept = call._remember()
    if kept is not call.flat:
        call.flat.copy_(kept)
    call.flat.div_(call.world)
    dist.all_reduce(call.flat, group=call.group)
    broken = _not_finite(call.flat, call.parameters)
    if broken:
        call.fail(broken, "")
    _count(call, round(2 * (call.world - 1) / call.world * 4 * len(call.flat)))


def _all_gather(call: _Call) -> None:
    """Everybody gets all rows and makes the outcome of every chunk alone."""
    c, mine = call.state.choices, call.messages()
    rows = torch.empty(call.world, *mine.shape, dtype=torch.uint8, device=mine.device)
    _gather(call, mine.view(-1), rows.view(call.world, -1))
    for i, chunk in enumerate(call.chunks):
        if c.aggregate == "vote":
            outcome = call.rows(1, call.planes)[0]
            call.combine(rows[:, i], i if c.communicator == "two_phase" else call.state.step % call.world, i, outcome)
            call.decode(outcome, chunk, i, call.planes)
        else:
            call.average(rows[:, i], chunk, i)


def _two_phase(call: _Call) -> None:
    if call.world <= 2:  # the same bytes in one phase, and a mean is not compressed a second time
        _all_gather(call)
        return
    sent = call.messages()
    rows = torch.empty_like(sent)
    dist.all_to_all_single(rows, sent, group=call.group)
    _count(call, (call.world - 1) * rows.shape[1])
    outcome = call.rows(1, call.planes)[0]
    if call.state.choices.aggregate == "vote":
        call.combine(rows, call.rank, call.rank, outcome)
    else:
        _average_chunk(call, rows, outcome)
    outcomes = call.rows(call.world, call.planes)
    _gather(call, outcome, outcomes)
    for i, chunk in enumerate(call.chunks):
        call.decode(outcomes[i], chunk, i, call.planes)


def _average_chunk(call: _Call, rows: Tensor, outcome: Tensor) -> None:
    """The mean of this worker's chunk, compressed again; with error feedback what that loses is remembered too."""
    i = call.rank
    mean = torch.empty_like(call.chunks[i])
    call.average(rows, mean, i)
    if not call.state.choices.has_errors:
        call.encode(mean, outcome, i)
        return
    averaged, _ = call.state.owner.of(call.parameters)
    error = averaged[i * call.chunk : (i + 1) * call.chunk]
    call.encode(error.add_(mean), outcome, i)
    call._subtract(outcome, error, i)


def _gather(call: _Call, mine: Tensor, rows: Tensor) -> None:
    if call.world == 1:
        rows[0].copy_(mine)
    else:
        dist.all_gather(list(rows), mine, group=call.group)
        _count(call, (call.world - 1) * len(mine))


def _count(call: _Call, n: int) -> None:
    call.state.meter.sent += n
    call.state.meter.received += n


@lru_cache(256)
def _pieces(sizes: tuple[int, ...], chunk: int, split: int) -> tuple[tuple[int, ...], ...]:
    """The lengths of the parameters' parts in each of ``split`` chunks.

    >>> _pieces((100, 50, 30), 64, 3)
    ((64,), (36, 28), (22, 30))
    """
    cuts = sorted({0, *accumulate(sizes), *range(chunk, sum(sizes), chunk)})
    pieces: list[list[int]] = [[] for _ in range(split)]
    for start, stop in pairwise(cuts):
        pieces[start // chunk].append(stop - start)
    return tuple(map(tuple, pieces))


def _is_zero(x: Tensor) -> bool:
    """Whether all of ``x`` is zero; the square is only the quick look, since tiny numbers vanish in it."""
    return float(torch.dot(x, x)) == 0 and not bool(x.any())


def _not_finite(flat: Tensor, parameters: Sequence[Tensor]) -> int:
    """0, or k where the k-th parameter is the first with a number that is not finite."""
    if math.isfinite(float(torch.dot(flat, flat))):
        return 0
    for k, piece in enumerate(torch.split(flat, [p.numel() for p in parameters]), start=1):
        if not bool(torch.isfinite(piece).all()):
            return k
    return 0  # finite numbers with an infinite square


def _median(scales: Sequence[float]) -> float:
    """The lower median; what is not finite counts as too large, so a minority of liars cannot choose the result."""
    return sorted(s if math.isfinite(s) else math.inf for s in scales)[(len(scales) - 1) // 2]


def _write_header(row: Tensor, scales: Sequence[float], flag: int) -> None:
    row[:4].view(torch.int32).fill_(flag)
    if scales:
        row[4 : 4 + 4 * len(scales)].view(torch.float32).copy_(torch.tensor(scales))
