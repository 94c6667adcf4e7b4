"""Optimizers that need only the sign of a gradient: SignSGD, Signum, EFSignSGD and Lion, as ``torch.optim.Optimizer``.

They drop into any PyTorch training in two lines, and are what :mod:`torch.optim` has no counterpart for. Each moves a
weight by a step whose size does not depend on the size of the gradient, which is why a worker may send one bit per
weight. Exchanging those bits between workers is not done here.

Rules that hold for all four:

- sign(0) = 0: where the gradient (or momentum) is exactly zero, a weight stays.
- Weight decay is decoupled (Loshchilov and Hutter 2019): x <- (1 - lr wd) x before the step, never mixed into the
  gradient, where the sign would drown it.
- Parameters without a gradient are left alone, and not decayed either, as in :mod:`torch.optim`.
- A gradient with NaN or infinity raises :class:`~trilobe.errors.TrainingError` before any weight has changed; it names
  the parameter if the optimizer was given ``model.named_parameters()``. ``check_finite=False`` saves the check.
- The state has the type and device of its parameter and is saved by ``state_dict()``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from trilobe.errors import TrainingError, UsageError

__all__ = ["EFSignSGD", "Lion", "SignSGD", "Signum"]

_Group = dict[str, Any]
_Tensors = list[Tensor]
_LAUNCHES_COST = {"cuda", "xpu"}  # devices where few kernels over many tensors are faster, whatever their size
_CACHED = 1 << 17  # entries; on a CPU, what is written next should still be in the cache, and temporaries small


@dataclass(frozen=True, slots=True)
class _Batch:
    """Parameters of one group, type and device that have a gradient; ``indices`` count over all groups."""

    group: _Group
    indices: list[int] = field(default_factory=list)
    params: _Tensors = field(default_factory=list)
    grads: _Tensors = field(default_factory=list)

    def chunks(self, size: float) -> Iterator[tuple[_Tensors, _Tensors]]:
        """Parameters and gradients in turn, as many as have ``size`` entries together, but at least one tensor."""
        begin, held = 0, 0
        for i, p in enumerate(self.params):
            held += p.numel()
            if held > size and i > begin:
                yield self.params[begin:i], self.grads[begin:i]
                begin, held = i, p.numel()
        yield self.params[begin:], self.grads[begin:]


class _SignOptimizer(Optimizer, ABC):
    """What the four share: the closure, who has a usable gradient, weight decay, batching; not the update itself."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float,
        foreach: bool | None,
        check_finite: bool,
        **own: float | tuple[float, float],
    ) -> None:
        shared = {"lr": lr, "weight_decay": weight_decay, "foreach": foreach, "check_finite": check_finite}
        super().__init__(params, shared | own)

    @abstractmethod
    def _update(self, params: _Tensors, grads: _Tensors, group: _Group) -> None:
        """Change ``params`` (same type and device, weight decay done) by one step of the method."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            UsageError: a learning rate, weight decay or momentum out of range.
        """
        _check_settings(self.defaults | param_group)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            TrainingError: NaN or infinity in a gradient. No parameter was changed.
            UsageError: a sparse gradient or a complex parameter. No parameter was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            batches = _batches(self.param_groups)
            for batch in batches:
                _require_usable(batch, self.param_groups)
            for batch in batches:
                self._step(batch)
        return loss

    def _step(self, batch: _Batch) -> None:
        group, together = batch.group, batch.group["foreach"]
        if together is None:
            size = float("inf") if batch.params[0].device.type in _LAUNCHES_COST else _CACHED
        else:
            size = float("inf") if together else 0
        for params, grads in batch.chunks(size):
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            self._update(params, grads, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, as in :meth:`torch.optim.Optimizer.load_state_dict`.

        Raises:
            UsageError: the state of another kind of optimizer, or of parameters of other shapes. Nothing was loaded.
        """
        _require_own_state(state_dict, self.param_groups, {*self.defaults})
        super().load_state_dict(state_dict)

    def _buffers(self, params: _Tensors, name: str) -> _Tensors:
        """The state ``name`` of each parameter, zeros at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


class SignSGD(_SignOptimizer):
    """Step by the sign of the gradient (Bernstein et al. 2018, algorithm 1).

        x <- x - lr sign(g)                                                                                      (1)

    **Convergence** (theorem 1). Let f be bounded below by f*; let f(y) differ from its tangent at x by at most
    1/2 sum_i L_i (y_i - x_i)^2, for all x and y; let the gradient of a sample be unbiased with variance at
    most sigma_i^2 in coordinate i. After K steps with lr = 1 / sqrt(‖L‖_1 K) and **batches of K samples**, so N = K^2
    samples in all, with g_k the true gradient at step k = 0 .. K - 1:

        (E[ 1/K sum_k ‖g_k‖_1 ])^2  <=  1/sqrt(N) [ sqrt(‖L‖_1) (f_0 - f* + 1/2) + 2 ‖sigma‖_1 ]^2               (2)

    The growing batch is needed: with small batches and skewed noise the method may not converge at all (Karimireddy et
    al. 2019, section 3), see :class:`EFSignSGD`. ``benchmarks/train-signs`` measures (2).

    **Advice.** Every weight moves by ``lr`` at every step, so only a schedule that brings ``lr`` to 0 ends the dance
    around the optimum; start near a good learning rate of Adam. Scaling the loss changes nothing.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as for any torch optimizer.
        lr: how far a weight moves per step, at least 0.
        weight_decay: at least 0; a weight shrinks by the share ``lr * weight_decay`` per step.
        foreach: update all tensors of one type at once (True), or one by one, in less memory (False); the result is
            the same. None chooses what is faster: at once on accelerators, as many as fit the cache on a CPU.
        check_finite: look for NaN and infinity in the gradients, which reads them once more.

    Raises:
        UsageError: a setting out of range.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> optimizer = SignSGD(model.named_parameters(), lr=0.1)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> model(torch.tensor([[250.0]])).sum().backward()
    >>> optimizer.step()
    >>> round(model.weight.item(), 6)
    0.9
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(params, lr, weight_decay, foreach, check_finite)

    def _update(self, params: _Tensors, grads: _Tensors, group: _Group) -> None:
        _move(params, torch._foreach_sign(grads), group["lr"])


class Signum(_SignOptimizer):
    """Step by the sign of the momentum (Bernstein et al. 2018, algorithm 2).

        m <- beta m + (1 - beta) g                                                                               (1)
        x <- x - lr sign(m)                                                                                      (2)

    with beta = ``momentum`` and m = 0 at first. ``momentum`` = 0 is :class:`SignSGD`.

    **Convergence** (theorem 3). Under the assumptions of :class:`SignSGD`'s theorem, noise that is moreover unimodal
    and symmetric in every coordinate, lr_k = a / sqrt(k + 1) and batches of k + 1 samples, N samples in K steps in all:

        (E[ 1/(K - C) sum_{k=C}^{K-1} ‖g_k‖_1 ])^2
            =  O( 1/sqrt(N) [ (f_C - f*) / a + (1 + log N) (a ‖L‖_1 / (1 - beta) + sqrt(1 - beta) ‖sigma‖_1) ]^2 )   (3)

    where C only depends on beta (54 for 0.9) and counts first steps taken by the sign of g while m warms up; here m is
    used from the first step. Beta trades noise for curvature: averaging over some 1 / (1 - beta) batches stands in for
    a larger one.

    **Advice.** ``momentum`` 0.9 with ``lr`` near Adam's, or a few times smaller; 0.99 for small batches.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as for any torch optimizer.
        lr: how far a weight moves per step, at least 0.
        momentum: beta above, at least 0 and below 1; schedules that cycle ``momentum`` find it.
        weight_decay, foreach, check_finite: as in :class:`SignSGD`.

    Raises:
        UsageError: a setting out of range.

    >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = Signum([x], lr=0.25, momentum=0.5)
    >>> x.grad = torch.tensor([2.0, 0.0])
    >>> optimizer.step()
    >>> x.tolist(), optimizer.state[x]["momentum_buffer"].tolist()
    ([0.75, -1.0], [1.0, 0.0])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(params, lr, weight_decay, foreach, check_finite, momentum=momentum)

    def _update(self, params: _Tensors, grads: _Tensors, group: _Group) -> None:
        momenta = self._buffers(params, "momentum_buffer")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        _move(params, torch._foreach_sign(momenta), group["lr"])


class EFSignSGD(_SignOptimizer):
    """Step by signs, and carry over what the signs left out (error feedback; Karimireddy et al. 2019, EF-SignSGD).

        p     = lr g + e                                                                                         (1)
        delta = (‖p‖_1 / d) sign(p)                                                                              (2)
        x    <- x - delta                                                                                        (3)
        e    <- p - delta                                                                                        (4)

    with e = 0 at first and d the number of weights. One deviation: (2) is taken for each tensor, not for all weights
    as one vector, so that a layer with small gradients keeps its scale (and a worker sends one number per tensor
    beside the signs). From (1) to (4), x - e is exactly where SGD would be with the same gradients.

    **Convergence** (theorem II). Let f have an L-Lipschitz gradient and the lower bound f*, the stochastic gradients be
    unbiased with E ‖g‖^2 <= sigma^2, and the signs keep a share q of every p: ‖p - delta‖^2 <= (1 - q) ‖p‖^2. By (2)
    q = ‖p‖_1^2 / (d ‖p‖_2^2), at least 1/d. With a constant lr, T steps, and **any batch size**:

        1/T sum_t E ‖∇f(x_t)‖^2  <=  2 (f_0 - f*) / (lr T)  +  lr L sigma^2  +  4 lr^2 L^2 sigma^2 (1 - q) / q^2   (5)

    so lr = 1 / sqrt(T) gives the rate 1/sqrt(T) of SGD, and compression costs only in a term of order 1/T. The
    derivation of (5) stands in the documentation, under "Optimizers".

    **Advice.** ``lr`` as for SGD *without* momentum (the step scales with the gradient here, unlike in the other
    three). Weight decay acts on x alone and is not part of the error. Keep the state when resuming: e holds updates
    that have not been made yet.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as for any torch optimizer.
        lr: factor of the gradient, at least 0.
        weight_decay, foreach, check_finite: as in :class:`SignSGD`.

    Raises:
        UsageError: a setting out of range.

    >>> x = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    >>> optimizer = EFSignSGD([x], lr=0.5)
    >>> x.grad = torch.tensor([3.0, -1.0])
    >>> optimizer.step()
    >>> x.tolist(), optimizer.state[x]["error"].tolist()
    ([-1.0, 1.0], [0.5, 0.5])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(params, lr, weight_decay, foreach, check_finite)

    def _update(self, params: _Tensors, grads: _Tensors, group: _Group) -> None:
        errors = self._buffers(params, "error")
        torch._foreach_add_(errors, grads, alpha=group["lr"])  # now p
        scales = [size.mean() for size in torch._foreach_abs(errors)]
        deltas = torch._foreach_sign(errors)
        torch._foreach_mul_(deltas, scales)
        torch._foreach_sub_(params, deltas)
        torch._foreach_sub_(errors, deltas)


class Lion(_SignOptimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2).

        c  = beta_1 m + (1 - beta_1) g                                                                           (1)
        x <- x - lr (sign(c) + wd x)                                                                             (2)
        m <- beta_2 m + (1 - beta_2) g                                                                           (3)

    with m = 0 at first: the step looks at the newest gradient more than the memory does. ``betas`` = (b, b) is
    :class:`Signum` with momentum b.

    **Convergence.** None is claimed here: the method was found by program search and published with experiments.

    **Advice** (section 5 there). ``lr`` 3 to 10 times smaller than AdamW's and ``weight_decay`` 3 to 10 times larger,
    so that their product stays; batches of 64 or more. Half of AdamW's state.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as for any torch optimizer.
        lr: how far a weight moves per step, at least 0.
        betas: beta_1 and beta_2 above, each at least 0 and below 1; schedules that cycle momentum change beta_1.
        weight_decay, foreach, check_finite: as in :class:`SignSGD`.

    Raises:
        UsageError: a setting out of range.

    >>> x = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Lion([x], lr=0.1, weight_decay=0.5)
    >>> x.grad = torch.tensor([-4.0])
    >>> optimizer.step()
    >>> round(x.item(), 6), round(optimizer.state[x]["exp_avg"].item(), 6)
    (1.05, -0.04)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(params, lr, weight_decay, foreach, check_finite, betas=betas)

    def _update(self, params: _Tensors, grads: _Tensors, group: _Group) -> None:
        newest, memory = group["betas"]
        averages = self._buffers(params, "exp_avg")
        steps = torch._foreach_lerp(averages, grads, 1 - newest)
        torch._foreach_sign_(steps)
        _move(params, steps, group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - memory)


def _move(params: _Tensors, steps: tuple[Tensor, ...] | _Tensors, lr: float) -> None:
    torch._foreach_add_(params, steps, alpha=-lr)


def _check_settings(settings: _Group) -> None:
    """Raise UsageError for the first setting that is out of its range (NaN is out of any)."""
    for name in ("lr", "weight_decay"):
        value = settings[name]
        if isinstance(value, Tensor) or not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value!r}", expected="a finite number, at least 0")
    for beta in (*settings.get("betas", ()), *([settings["momentum"]] if "momentum" in settings else [])):
        if not 0 <= beta < 1:
            raise UsageError(f"a momentum of {beta!r}", expected="at least 0, below 1", hint="0.9 is usual")


def _batches(groups: list[_Group]) -> list[_Batch]:
    found: dict[tuple[int, torch.device, torch.dtype], _Batch] = {}
    index = -1
    for n, group in enumerate(groups):
        for p in group["params"]:
            index += 1
            grad = p.grad
            if grad is None or not p.numel():
                continue
            key = (n, p.device, p.dtype)
            batch = found.get(key)
            if batch is None:
                batch = found[key] = _Batch(group)
            if grad.dtype != p.dtype:  # where grad_dtype was set
                grad = grad.to(p.dtype)
            batch.indices.append(index)
            batch.params.append(p)
            batch.grads.append(grad)
    return list(found.values())


def _require_usable(batch: _Batch, groups: list[_Group]) -> None:
    """Raise UsageError for gradients that have no sign, and TrainingError for the first with NaN or infinity.

    The norms of all gradients settle the usual case with one pass and one transfer. A norm may also overflow where
    every entry is finite, so a bad one is looked into before it is called an error.
    """
    for index, grad in zip(batch.indices, batch.grads, strict=True):
        if grad.layout != torch.strided:
            raise UsageError(
                f"the gradient of {_name(groups, index)} is sparse",
                expected="dense gradients: momentum and errors would be dense anyway",
                hint="use sparse=False in torch.nn.Embedding, or give this parameter to torch.optim.SparseAdam",
            )
    if batch.params[0].is_complex():
        raise UsageError(
            f"{_name(groups, batch.indices[0])} is complex",
            expected="real parameters: a complex number has no sign",
            hint="keep real and imaginary parts, and join them by torch.view_as_complex in the model",
        )
    if not batch.group["check_finite"] or bool(torch.isfinite(torch.stack(torch._foreach_norm(batch.grads))).all()):
        return
    for index, grad in zip(batch.indices, batch.grads, strict=True):
        if bad := int((~torch.isfinite(grad)).sum()):
            raise TrainingError(
                f"NaN or infinity in {bad} of the {grad.numel()} gradients of {_name(groups, index)}; "
                "nothing was updated",
                expected="finite gradients",
                hint="lower lr, look for extreme values in the batch, or clip with torch.nn.utils.clip_grad_norm_",
            )


def _name(groups: list[_Group], index: int) -> str:
    """How to call the parameter ``index``, counted over all groups: its name where it was given."""
    params = [p for group in groups for p in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    if names:
        return repr(names[index])
    return f"parameter {index} of shape {tuple(params[index].shape)} (pass named_parameters() to see its name)"


def _require_own_state(saved: _Group, groups: list[_Group], settings: set[str]) -> None:
    """Raise UsageError unless ``saved`` was written by this kind of optimizer for parameters of these shapes."""
    for group in saved["param_groups"]:
        if missing := sorted(settings - group.keys()):
            raise UsageError(
                f"the saved state has no {', '.join(missing)}", expected="the state of the same kind of optimizer"
            )
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    for i, p in zip(ids, params, strict=False):  # torch itself compares how many there are
        for name, value in saved["state"].get(i, {}).items():
            if value.shape != p.shape:
                raise UsageError(
                    f"the saved {name} of parameter {i} has shape {tuple(value.shape)}",
                    expected=f"{tuple(p.shape)}, the shape of the parameter",
                    hint="this is the state of another model",
                )
