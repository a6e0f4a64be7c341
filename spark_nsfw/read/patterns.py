"""Globs, brace ranges and alternatives, matched against listed paths.

``bracex`` expands braces, ``wcmatch`` reads globs, both segment by segment: a range of
10,000 names is a set to look names up in, and two ranges in one path stay two sets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence

import bracex
from wcmatch import fnmatch

from spark_nsfw.errors import InputError

__all__ = ["PathPattern", "expand_braces", "is_pattern", "refuse_backwards"]

_PATTERN_CHARACTER = re.compile(r"[*?\[{]")
_GLOB_CHARACTER = re.compile(r"[*?\[\\]")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?\}")

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
    for match in _RANGE.finditer(pattern):
        if int(match[1]) > int(match[2]):
            raise InputError(f"{pattern}: the range {match[0]} runs backwards")


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
        raise InputError(
            f"{pattern} stands for more than {_MAX_NAMES:,} names: give a directory or a glob"
        ) from exc


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
        if any("/" in segment for segment in segments):  # rare: {a/b,c}/d
            expansions = [[[name] for name in path.split("/")] for path in expand_braces(pattern)]
        else:
            expansions = [[expand_braces(segment) for segment in segments]]
        self._routes = [[_Segment(names) for names in route] for route in expansions]

    def matches(self, path: str) -> list[str]:
        """The expansions of the braces that match a path or a directory above it."""
        names = path.split("/")
        return ["/".join(match) for route in self._routes for match in _walk(route, names)]

    def may_match_below(self, directory: str) -> bool:
        """Whether some path in this directory could match."""
        names = directory.split("/") if directory else []
        return any(_may_match(route, names) for route in self._routes)

    def first_missing(self, matched: Collection[str]) -> str | None:
        """The first expansion of the braces that is not among those that matched."""
        choices = (itertools.product(*(each.texts for each in route)) for route in self._routes)
        expansions = ("/".join(names) for names in itertools.chain.from_iterable(choices))
        return next((text for text in expansions if text not in matched), None)


class _Segment:
    """One segment of a path, in all expansions of its braces.

    Expansions share their tails: of ``part-{0000..9999}-*.tar`` only ``*.tar`` is matched as
    a glob, once, and what stands before it is looked up.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.is_any_depth = list(texts) == ["**"]
        self._plain: set[str] = set()
        self._heads_by_tail: dict[str, set[str]] = {}
        for text in texts:
            match = _GLOB_CHARACTER.search(text)
            if match is None:
                self._plain.add(text)
            else:
                head, tail = text[: match.start()], text[match.start() :]
                self._heads_by_tail.setdefault(tail, set()).add(head)
        self._globs = [
            (tail, _compiled(tail), heads, sorted({len(head) for head in heads}))
            for tail, heads in self._heads_by_tail.items()
        ]

    def matches(self, name: str) -> Iterator[str]:
        """The expansions that match a name."""
        if name in self._plain:
            yield name
        for tail, expression, heads, lengths in self._globs:
            for length in lengths:
                if name[:length] in heads and expression.match(name[length:]):
                    yield name[:length] + tail


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
