"""Quantiles → thresholds that a person can type, and numbers as a page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

__all__ = [
    "MAX_EXACT_SCORES",
    "SHARES_KEPT",
    "LabelThreshold",
    "ShareThreshold",
    "fewest_digits_that_keep",
    "significant",
    "thresholds_above",
    "thresholds_below",
]

#: Quantiles are exact up to so many scores; beyond, their ranks are off by 1e-5 of them.
MAX_EXACT_SCORES = 200_000

#: Shares of the scored images that the report gives a threshold for.
SHARES_KEPT = (0.5, 0.9, 0.95, 0.99, 0.999)

#: Significant digits of a threshold: as few as serve. float32 has no more than the last.
_DIGITS = (3, 4, 5, 6, 9)

#: What stands for the smallest number above 0 with so many digits.
_LEAST = Decimal("1e-12")


@dataclass(frozen=True)
class ShareThreshold:
    """A threshold that keeps a share of the images.

    Attributes:
        wanted: the share that was asked for.
        value: the threshold.
        num_kept: images whose score is below it, counted.
    """

    wanted: float
    value: float
    num_kept: int


@dataclass(frozen=True)
class LabelThreshold:
    """The highest threshold that removes a share of the samples labelled unsafe.

    Attributes:
        value: the threshold.
        recall: share of the unsafe that it removes.
        precision: share of what it removes that is unsafe.
        false_positive_rate: share of the safe that it removes.
    """

    value: float
    recall: float
    precision: float
    false_positive_rate: float


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, but not fewer than four decimals.

    ``0.5``, ``0.000123``, ``1.2e-08``; and ``0.9996``, which is not 1.
    """
    number = _decimal(value)
    exponent = number.adjusted() if number else 0
    text = f"{number:.{max(digits - 1, exponent + 4)}e}"
    mantissa, exponent_text = text.split("e")
    if exponent < -6:
        return f"{Decimal(mantissa).normalize()}e{int(exponent_text):03d}"
    return f"{Decimal(text).normalize():f}"


def thresholds_above(value: float) -> list[float]:
    """The numbers just above a score, with three and more significant digits.

    Whatever keeps what is below one of them keeps this score, too.
    """
    return [float(_floored(value, digits) + _step(value, digits)) for digits in _DIGITS]


def thresholds_below(value: float) -> list[float]:
    """The numbers at or just below a score, with three and more significant digits.

    Whatever removes what is at or above one of them removes this score, too.
    """
    return [float(_floored(value, digits)) for digits in _DIGITS]


def fewest_digits_that_keep(
    wanted: float, total: int, candidates: Sequence[tuple[float, int]]
) -> ShareThreshold:
    """Of thresholds that keep enough, the shortest that keeps hardly more than it must.

    Args:
        wanted: the share to keep.
        total: all scored images.
        candidates: thresholds from `thresholds_above`, fewest digits first, and how many
            images each keeps.
    """
    spare = (1 - wanted) / 50 * total
    fewest = max(wanted * total, min(num_kept for _, num_kept in candidates))
    for value, num_kept in candidates:
        if num_kept <= fewest + spare:
            return ShareThreshold(wanted, value, num_kept)
    return ShareThreshold(wanted, *candidates[-1])


def _decimal(value: float) -> Decimal:
    """The number that a person would type for it: 0.3, not 0.299999999999999988897769753748."""
    return Decimal(repr(float(value)))


def _step(value: float, digits: int) -> Decimal:
    number = _decimal(value)
    return Decimal(1).scaleb(number.adjusted() - digits + 1) if number else _LEAST


def _floored(value: float, digits: int) -> Decimal:
    step = _step(value, digits)
    return (_decimal(value) / step).to_integral_value(ROUND_FLOOR) * step
