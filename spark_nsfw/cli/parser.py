"""An argument parser that suggests what a person may have meant, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = ["Parser", "at_least_one", "device", "seconds", "share"]

#: What torch computes on; a number may follow.
_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")


class Parser(argparse.ArgumentParser):
    """Names the closest option or choice where one is mistyped.

    Python 3.14 does so for choices (``suggest_on_error``), and no Python for options.
    """

    # Typed as argparse's overloads would have it, which differ between versions.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Refuse what is unknown here, where the command's own options are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = (text.partition("=")[0] for text in unknown if text.startswith("-"))
            suggestions = [_suggestion(option, self._option_string_actions) for option in options]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(suggestions)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as exc:
            exc.message += _suggestion(str(value), map(str, action.choices or ()))
            raise


def _suggestion(given: str, known: Iterable[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def seconds(text: str) -> float:
    """A number of at least 0."""
    return _number(text, lambda number: 0 <= number < float("inf"), "a number of seconds")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, lambda number: 0 < number <= 1, "a share above 0 and at most 1")


def device(text: str) -> str:
    """A torch device."""
    name, colon, number = text.partition(":")
    if name not in _DEVICES or (colon and not number.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a torch device such as cpu, cuda or cuda:1"
            + _suggestion(name, _DEVICES)
        )
    return text


def _number(text: str, fits: Any, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not fits(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number
