"""Loads ``queries/*.sql``: named statements with named binds, found by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_BIND = re.compile(r"(?<![:\w]):([a-z_]\w*)")
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    """One statement.

    Attributes:
        name: As in the file.
        sql: With ``$1``, ``$2`` ... for the binds.
        binds: Names of the binds, in that order.
    """

    name: str
    sql: str
    binds: tuple[str, ...]

    def arguments(self, values: dict[str, object]) -> list[object]:
        """Put named values in the order of the placeholders.

        Raises:
            KeyError: A bind has no value.
        """
        return [values[name] for name in self.binds]


def parse(text: str) -> list[Query]:
    """The statements of one file."""
    parts = _NAME.split(text)
    return [_query(parts[i], parts[i + 1]) for i in range(1, len(parts), 2)]


def _query(name: str, body: str) -> Query:
    binds: list[str] = []

    def place(match: re.Match[str]) -> str:
        bind = match.group(1)
        if bind not in binds:
            binds.append(bind)
        return f"${binds.index(bind) + 1}"

    sql = _BIND.sub(place, _COMMENT.sub("", body)).strip()
    return Query(name, sql, tuple(binds))


@cache
def load() -> dict[str, Query]:
    """Every named statement of the package."""
    folder = resources.files("stent.store") / "queries"
    found: dict[str, Query] = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            for query in parse(file.read_text("utf-8")):
                if query.name in found:
                    message = f"query {query.name} is defined twice"
                    raise ValueError(message)
                found[query.name] = query
    return found
