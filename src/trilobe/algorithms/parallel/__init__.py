"""Data-parallel training that sends few bits: communication hooks for PyTorch's DistributedDataParallel.

>>> from trilobe.algorithms.parallel import State, majority_vote_hook  # then, on every worker:
>>> # model.register_comm_hook(State().attach(model), majority_vote_hook)
"""

from trilobe.algorithms.parallel.adversary import corrupt, with_adversaries
from trilobe.algorithms.parallel.hook import (
    EF_SIGN,
    EF_TOP_K,
    EF_VOTE,
    MAJORITY_VOTE,
    PLAIN,
    PRESETS,
    QSGD,
    SIGNUM,
    STOCHASTIC_VOTE,
    Choices,
    Meter,
    State,
    compressed_hook,
    exchange,
    majority_vote_hook,
)
from trilobe.algorithms.parallel.planner import Link, Plan, Prediction, measure_link, plan, time_step

__all__ = [
    "EF_SIGN",
    "EF_TOP_K",
    "EF_VOTE",
    "MAJORITY_VOTE",
    "PLAIN",
    "PRESETS",
    "QSGD",
    "SIGNUM",
    "STOCHASTIC_VOTE",
    "Choices",
    "Link",
    "Meter",
    "Plan",
    "Prediction",
    "State",
    "compressed_hook",
    "corrupt",
    "exchange",
    "majority_vote_hook",
    "measure_link",
    "plan",
    "time_step",
    "with_adversaries",
]
