"""Globs, brace ranges and alternatives, matched against listed paths.

``bracex`` expands braces, ``wcmatch`` reads globs, both segment by segment: a range of
10,000 names is a table to look names up in, and two ranges in one path stay two tables.

A range names its files: each one has to be there. Alternatives such as ``{a,b}`` are a
glob, as to Spark: one of them is enough.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence

import bracex
from wcmatch import fnmatch

from spark_nsfw.errors import InputError

__all__ = ["PathPattern", "expand_braces", "expand_ranges", "is_pattern", "refuse_backwards"]

_PATTERN_CHARACTER = re.compile(r"[*?\[{]")
_GLOB_CHARACTER = re.compile(r"[*?\[\\]")
_RANGE_TEXT = r"\{-?\d+\.\.-?\d+(?:\.\.-?\d+)?\}"
_RANGE = re.compile(_RANGE_TEXT)

#: Which names are hidden is not for a glob to decide.
_GLOB_FLAGS = fnmatch.DOTMATCH | fnmatch.CASE | fnmatch.FORCEUNIX

#: Names that braces may stand for. More would fill the memory of the driver.
_MAX_NAMES = 1_000_000


def is_pattern(path: str) -> bool:
    """Whether a path has globs or braces in it."""
    return _PATTERN_CHARACTER.search(path) is not None


def refuse_backwards(pattern: str) -> None:
    """Refuse a range such as ``{5..3}``.

    Raises:
        InputError: names the range.
    """
    for piece in _RANGE.findall(pattern):
        first, last, *_ = piece[1:-1].split("..")
        if int(first) > int(last):
            raise InputError(f"{pattern}: the range {piece} runs backwards")


def expand_braces(pattern: str) -> list[str]:
    """Expand ranges and alternatives as WebDataset does: ``{08..10}`` → 08, 09, 10.

    Globs and escapes stay as they are.

    Raises:
        InputError: a range runs backwards, or stands for more names than memory holds.
    """
    refuse_backwards(pattern)
    try:
        return [str(name) for name in bracex.expand(pattern, keep_escapes=True, limit=_MAX_NAMES)]
    except bracex.ExpansionLimitException as exc:
        raise _too_many(pattern) from exc


def _too_many(pattern: str) -> InputError:
    return InputError(
        f"{pattern} stands for more than {_MAX_NAMES:,} names: give a directory or a glob"
    )


def expand_ranges(pattern: str) -> list[str]:
    """Expand ranges only: ``{a,b}/{08..10}`` → ``{a,b}/08``, ``{a,b}/09``, ``{a,b}/10``.

    Raises:
        InputError: as for `expand_braces`.
    """
    parts = [
        expand_braces(part) if _RANGE.fullmatch(part) else [part]
        for part in re.split(f"({_RANGE_TEXT})", pattern)
    ]
    if math.prod(map(len, parts)) > _MAX_NAMES:
        raise _too_many(pattern)
    return ["".join(choice) for choice in itertools.product(*parts)]


class PathPattern:
    """A pattern of paths; what lies below a path that it matches belongs to it, too.

    Args:
        pattern: relative, without a slash at its end. ``*``, ``?`` and ``[…]`` match within
            a segment, ``**`` matches any number of segments.

    Raises:
        InputError: as for `expand_braces`.
    """

    def __init__(self, pattern: str) -> None:
        segments = [segment for segment in _split_outside_braces(pattern) if segment]
        #: Ways through the segments, each with the expansion that it is of if it is of one.
        self._routes: list[tuple[str | None, list[_Segment]]] = [
            (None, [_Segment(segment) for segment in segments])
        ]
        if any("/" in segment for segment in segments):  # rare: {a/b,c}/d
            self._routes = [
                (expansion, [_Segment(name) for name in path.split("/")])
                for expansion in expand_ranges(pattern)
                for path in expand_braces(expansion)
            ]

    def matches(self, path: str) -> set[str]:
        """The expansions of the ranges that match a path or a directory above it."""
        names = path.split("/")
        return {
            expansion or "/".join(match)
            for expansion, route in self._routes
            for match in _walk(route, names)
        }

    def may_match_below(self, directory: str) -> bool:
        """Whether some path in this directory could match."""
        names = directory.split("/") if directory else []
        return any(_may_match(route, names) for _, route in self._routes)

    def first_missing(self, matched: Collection[str]) -> str | None:
        """The first expansion of the ranges that is not among those that matched."""
        for expansion, route in self._routes:
            choices = itertools.product(*(segment.expansions for segment in route))
            for text in [expansion] if expansion else map("/".join, choices):
                if text not in matched:
                    return text
        return None


class _Segment:
    """One segment of a path, in all expansions of its ranges and alternatives.

    Expansions share their tails: of ``part-{0000..9999}-*.tar`` only ``*.tar`` is matched as
    a glob, once, and what stands before it is looked up.
    """

    def __init__(self, segment: str) -> None:
        self.is_any_depth = segment == "**"
        self.expansions = expand_ranges(segment)
        plain: dict[str, list[str]] = {}
        heads_of: dict[str, dict[str, list[str]]] = {}
        for expansion in self.expansions:
            for text in expand_braces(expansion):
                match = _GLOB_CHARACTER.search(text)
                if match is None:
                    plain.setdefault(text, []).append(expansion)
                else:
                    heads = heads_of.setdefault(text[match.start() :], {})
                    heads.setdefault(text[: match.start()], []).append(expansion)
        self._plain = plain
        self._globs = [
            (_compiled(tail), heads, sorted({len(head) for head in heads}))
            for tail, heads in heads_of.items()
        ]

    def matches(self, name: str) -> Iterator[str]:
        """The expansions of the ranges that match a name."""
        yield from self._plain.get(name, ())
        for expression, heads, lengths in self._globs:
            for length in lengths:
                expansions = heads.get(name[:length])
                if expansions and expression.match(name[length:]):
                    yield from expansions


def _compiled(glob: str) -> re.Pattern[str]:
    (expression,), _ = fnmatch.translate(glob, flags=_GLOB_FLAGS)
    return re.compile(expression)


def _walk(route: Sequence[_Segment], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    if not route:
        yield ()
    elif route[0].is_any_depth:
        for start in range(len(names)):
            yield from (("**", *rest) for rest in _walk(route[1:], names[start:]))
    elif names:
        for text in route[0].matches(names[0]):
            yield from ((text, *rest) for rest in _walk(route[1:], names[1:]))


def _may_match(route: Sequence[_Segment], names: Sequence[str]) -> bool:
    if not route or not names or route[0].is_any_depth:
        return True
    return any(route[0].matches(names[0])) and _may_match(route[1:], names[1:])


def _split_outside_braces(pattern: str) -> list[str]:
    segments, depth, start = [], 0, 0
    for match in re.finditer(r"\\.|[{}/]", pattern, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "/" and depth <= 0:
            segments.append(pattern[start : match.start()])
            start = match.end()
    return [*segments, pattern[start:]]
