"""Durations on the command line: ``30s``, ``1h30m``, or a number of seconds."""

from __future__ import annotations

from datetime import timedelta

import click

from stent.duration import parse_duration
from stent.errors import DurationError


def read_duration(text: str) -> timedelta:
    """What ``stent.duration`` reads, and bare seconds; click's type of an option.

    Raises:
        click.BadParameter: It is no duration.
    """
    try:
        given: str | float = float(text)
    except ValueError:
        given = text
    try:
        return parse_duration(given)
    except DurationError as error:
        raise click.BadParameter(str(error)) from error
