"""Which answers of a bundle are left to people: thresholds that were worked out when it was packaged.

``deferral.json`` (format ``deferral.v1``) holds them, so a server needs neither data nor statistics to keep a promise:
it reads the threshold that belongs to a wanted error, or to a wanted share of reviews. A row whose confidence (its
largest probability) is below the threshold is left to a person. How thresholds are found is the business of
:mod:`trilobe.trust.deferral`.
"""

from collections.abc import Callable, Sequence

import msgspec

from trilobe.errors import BundleError, UsageError
from trilobe.infrastructure.bundle import read_bytes
from trilobe.types import Bundle

FILE, FORMAT = "deferral.json", "deferral.v1"


class Promise(msgspec.Struct, frozen=True):
    """A threshold on the confidence, and what it promises (with the table's ``certainty``).

    ``at_most`` is the largest error of what is answered, or the largest share of what is left to people. Measured on
    the held-out examples were the share ``answered`` and its ``error``, which is at most ``error_high`` (with the same
    certainty, for this threshold alone). All are shares, 0 to 1.
    """

    at_most: float
    threshold: float
    answered: float
    error: float
    error_high: float


class Table(msgspec.Struct, frozen=True):
    """What a bundle can promise, the strictest first, each with as much ``certainty`` over the draw of the examples.

    Of ``errors`` each leaves less to people than the one before, of ``shares`` more. ``n`` held-out examples are behind
    it; ``on`` says which.
    """

    format: str
    on: str
    n: int
    certainty: float
    errors: tuple[Promise, ...] = ()
    shares: tuple[Promise, ...] = ()


def read_table(bundle: Bundle) -> Table:
    """The table of a bundle. Raises :class:`~trilobe.errors.BundleError` where it has none, or one of another format.

    >>> from pathlib import Path
    >>> read_table(Bundle("b1", Path("b1"), "m1", {"files": {}}))
    Traceback (most recent call last):
    trilobe.errors.BundleError: bundle b1 does not say whom to trust when; expected deferral.json in it
      next: package its model again
    """
    if FILE not in bundle.manifest.get("files", {}):
        raise BundleError(
            f"bundle {bundle.id} does not say whom to trust when",
            expected=f"{FILE} in it",
            hint="package its model again",
        )
    try:
        table = msgspec.json.decode(read_bytes(bundle, FILE), type=Table)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"bundle {bundle.id}: {FILE} cannot be used ({error})", expected=FORMAT) from error
    if table.format != FORMAT:
        raise BundleError(
            f"bundle {bundle.id}: {FILE} has the format {table.format!r}", expected=FORMAT, hint="update Trilobe"
        )
    return table


def chooser(error: float = 0.0, share: float = 0.0) -> Callable[[Bundle], float] | None:
    """What gives the threshold of a bundle for a wanted ``error``, or for a wanted ``share``; None where neither is.

    It raises :class:`~trilobe.errors.BundleError` for a bundle that cannot promise that.

    >>> chooser() is None
    True
    >>> chooser(error=0.05, share=0.1)
    Traceback (most recent call last):
    trilobe.errors.UsageError: defer_error = 0.05 and defer_share = 0.1; expected one of them: ...
    """
    if error and share:
        raise UsageError(
            f"defer_error = {error:g} and defer_share = {share:g}",
            expected="one of them: each gives a threshold of its own",
        )
    if not error and not share:
        return None

    def choose(bundle: Bundle) -> float:
        table = read_table(bundle)
        promises, wanted = (table.errors, error) if error else (table.shares, share)
        what = f"at most {wanted:g} of {'what it answers are wrong' if error else 'the traffic goes to people'}"
        return pick(promises, wanted, f"bundle {bundle.id} cannot promise that {what}", f"{table.n} {table.on}")

    return choose


def pick(promises: Sequence[Promise], wanted: float, problem: str = "no promise", on: str = "") -> float:
    """The threshold of the least strict promise that is at most ``wanted``.

    Raises :class:`~trilobe.errors.BundleError` with the ``problem`` where none is so strict.

    >>> pick([Promise(0.05, 0.9, 0.7, 0.01, 0.03), Promise(0.1, 0.6, 0.9, 0.05, 0.09)], 0.07)
    0.9
    """
    kept = [promise for promise in promises if promise.at_most <= wanted + 1e-12]
    if not kept:
        best = f"{promises[0].at_most:g} or more" if promises else "a bundle that can promise anything"
        raise BundleError(
            problem,
            expected=f"{best} (from {on})" if on else best,
            hint="hold out more labeled examples and package again, or ask for less",
        )
    return kept[-1].threshold
