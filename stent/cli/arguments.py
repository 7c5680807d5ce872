"""Words of the command line as arguments of a durable function."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from stent.codec import convert_plain
from stent.errors import PayloadError, UsageError


def read_arguments(
    function: Callable[..., Any], words: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, converted by the function's annotations.

    A word is JSON; one that is not, or whose JSON does not fit where its text does, is
    a text. ``NAME=VALUE`` is a keyword if the function takes one of that name.

    Raises:
        PayloadError: A value does not fit its annotation.
        UsageError: There are too many arguments, or some are missing.
    """
    signature = inspect.signature(function)
    annotations = _annotations(function)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if separator and _takes_keyword(signature, name):
            if name in kwargs:
                message = f"{name} is given twice"
                raise UsageError(message)
            kwargs[name] = _read(
                value, _keyword_type(signature, annotations, name), name
            )
            continue
        if kwargs:
            message = (
                f"{word!r} stands behind a keyword: positional arguments come first"
            )
            raise UsageError(message)
        parameter = _positional(signature, len(args))
        annotation = Any if parameter is None else annotations.get(parameter, Any)
        args.append(_read(word, annotation, parameter or f"args[{len(args)}]"))
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        message = f"{error}; its parameters are {signature}"
        raise UsageError(message) from error
    return args, kwargs


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return {}


def _takes_keyword(signature: inspect.Signature, name: str) -> bool:
    if not name.isidentifier():
        return False
    parameter = signature.parameters.get(name)
    if parameter is None or parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    ):
        kinds = {p.kind for p in signature.parameters.values()}
        return parameter is None and inspect.Parameter.VAR_KEYWORD in kinds
    return True


def _keyword_type(
    signature: inspect.Signature, annotations: dict[str, Any], name: str
) -> object:
    if name in signature.parameters:
        return annotations.get(name, Any)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            return annotations.get(parameter.name, Any)
    return Any


def _positional(signature: inspect.Signature, index: int) -> str | None:
    """Name of the parameter that takes the positional argument at ``index``."""
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return parameter.name
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            return None
        if position == index:
            return parameter.name
    return None


def _read(word: str, annotation: object, path: str) -> object:
    try:
        plain = json.loads(word, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return convert_plain(word, annotation, path=path)
    try:
        return convert_plain(plain, annotation, path=path)
    except PayloadError:
        # 2013 for a text, or a version such as 1.0: what was typed fits.
        try:
            return convert_plain(word, annotation, path=path)
        except PayloadError:
            pass
        raise


def _refuse_constant(constant: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise ValueError(constant)
