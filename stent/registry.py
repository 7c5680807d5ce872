"""Durable functions: the decorator, the catalogue of names, and who answers a call.

``@durable`` records into one process-wide catalogue. Calling a durable function asks
the current *caller* what that means here: inside a workflow it is a journaled call,
inside an application a dispatch, without either a plain call.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import (
    Any,
    Generic,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    overload,
)

from stent.duration import parse_duration
from stent.errors import ConfigurationError, DuplicateNameError, UsageError
from stent.kinds import MARK, WORKFLOW, find_kind, uses_transaction
from stent.mapping import MapForm, MapMethods
from stent.model import Effects, Kind, Pool
from stent.rate import Rate, parse_rate
from stent.retry import RetryPolicy

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Items = Iterable[object] | AsyncIterable[object]

NAME_PATTERN = re.compile(r"^[\w.\-:/<>@]{1,200}$")
DISPATCH_OPTIONS = (
    "max_duration",
    "delay",
    "dispatch_key",
    "queue",
    "priority",
    "tags",
)
PRIORITY_MAX = 32_767
TAGS_MAX = 32
CONCURRENT_MAX = 1_000_000
KEY_CHARACTERS_MAX = 200
"""Of a concurrency key; longer ones are replaced by a digest."""
NOT_YET = {
    "cached": "cached results",
    "idempotency_key": "idempotent functions",
    "idempotent": "idempotent functions",
    "version": "pinned versions",
}
"""Options with a fixed name whose engine part is not there: refused, never ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything ``durable`` and ``f.options`` can say about a function.

    ``None`` means: not said, so the default of the layer below holds.
    """

    queue: str = "default"
    priority: int = 0
    tags: tuple[str, ...] = ()
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: timedelta | None = None
    max_duration: timedelta | None = None
    effects: Effects = Effects.AT_LEAST_ONCE
    pool: Pool | None = None
    delay: timedelta | None = None
    dispatch_key: str | None = None
    key: str | None = None
    detached: bool = False
    max_concurrent: int | None = None
    max_concurrent_per_worker: int | None = None
    concurrency_key: str | Callable[..., object] | None = None
    rate_limit: Rate | None = None
    limit_key: str | None = None
    """What ``concurrency_key`` gives for the arguments of one call."""

    def __post_init__(self) -> None:
        if not NAME_PATTERN.match(self.queue):
            message = f"queue {self.queue!r} is not a name of 1 to 200 characters"
            raise ConfigurationError(message)
        if not -PRIORITY_MAX <= self.priority <= PRIORITY_MAX:
            message = f"priority {self.priority} is not within ±{PRIORITY_MAX}"
            raise ConfigurationError(message)
        if len(self.tags) > TAGS_MAX:
            message = f"{len(self.tags)} tags; at most {TAGS_MAX}"
            raise ConfigurationError(message)
        if self.concurrency_key is not None and self.max_concurrent is None:
            message = "concurrency_key= needs max_concurrent=: how many of one key"
            raise ConfigurationError(message)


class Caller(Protocol):
    """What a call of a durable function means in the current context."""

    def call(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, R]:
        """The awaitable of one call."""
        ...

    def start(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, Any]:
        """The awaitable of a handle on a new execution."""
        ...

    def map(
        self, function: DurableFunction[Any, Any], items: Items, form: MapForm
    ) -> Coroutine[Any, Any, list[Any]]:
        """The awaitable of all results, in the order of ``items``."""
        ...


context_caller: ContextVar[Caller | None] = ContextVar("stent_caller", default=None)


class Process:
    """What holds for all code of this process.

    Attributes:
        caller: Who answers outside of any context; set by ``Stent.use``.
        importing: Module that a process of a pool imports right now.
    """

    caller: Caller | None = None
    importing: str | None = None


def current_caller() -> Caller | None:
    """Who answers durable calls here; None means plain calls."""
    return context_caller.get() or Process.caller


class DurableFunction(MapMethods, Generic[P, R]):
    """A function made durable by ``@durable``; call it as before.

    Attributes:
        name: Its durable name, ``module.qualname`` unless given.
        function: The undecorated function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        options: Options,
        kind: Kind | None,
    ) -> None:
        self.name = name
        self.function = function
        self.registered = self.settings = options
        self.given: frozenset[str] = frozenset()
        """Names of the options that were said, here or through ``options``."""
        self.explicit_kind = kind
        # Either the function or what it wraps: both sides may be written by decorators.
        self.is_async = inspect.iscoroutinefunction(
            function
        ) or inspect.iscoroutinefunction(inspect.unwrap(function))
        self.place = _place(function)
        self.code_digest = module_digest(function)
        self.needs_instance = False
        functools.update_wrapper(self, function, updated=())

    @functools.cached_property
    def kind(self) -> Kind:
        """Workflow or activity, found at first use from the byte code."""
        return self.explicit_kind or find_kind(self.function)

    @functools.cached_property
    def effects(self) -> Effects:
        """Transactional when declared, or when the code opens ``transaction()``."""
        if uses_transaction(self.function):
            return Effects.TRANSACTIONAL
        return self.settings.effects

    @property
    def in_process(self) -> bool:
        """Whether its attempts run in child processes of the worker."""
        return self.registered.pool is Pool.PROCESS

    @functools.cached_property
    def positional(self) -> tuple[int, int]:
        """Fewest and most positional arguments that need no closer look."""
        required = most = 0
        for parameter in inspect.signature(self.function).parameters.values():
            match parameter.kind:
                case parameter.POSITIONAL_ONLY | parameter.POSITIONAL_OR_KEYWORD:
                    most += 1
                    required += parameter.default is parameter.empty
                case parameter.VAR_POSITIONAL:
                    most = sys.maxsize
                case parameter.KEYWORD_ONLY if parameter.default is parameter.empty:
                    return sys.maxsize, 0
                case _:
                    continue
        return required, most

    @functools.cached_property
    def return_annotation(self) -> object:
        """The resolved return type, ``Any`` when there is none."""
        try:
            hints = inspect.get_annotations(
                inspect.unwrap(self.function), eval_str=True
            )
        except (NameError, AttributeError, TypeError, SyntaxError):
            return Any
        return hints.get("return", Any)

    def keyed(
        self, options: Options, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Options:
        """``options`` with the concurrency key of these arguments, if it has one.

        Raises:
            UsageError: The key cannot be found out, or is empty.
        """
        key = options.concurrency_key
        if key is None:
            return options
        try:
            value = (
                key(*args, **kwargs)
                if callable(key)
                else _argument(self.function, key, args, kwargs)
            )
        except Exception as error:
            message = f"{self.name}: its concurrency_key fails: {error!r}"
            raise UsageError(message) from error
        return replace(options, limit_key=_key_text(self.name, value))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        caller = current_caller()
        if caller is None:
            return self._plain(args, kwargs)
        self._refuse_unbound()
        return caller.call(self, args, kwargs)

    def start(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Any]:
        """Start it as an execution of its own and return a ``Handle[R]``.

        Inside an execution the new one is a child; outside it is a root.

        Raises:
            UsageError: There is no app: nothing could run it.
        """
        caller = current_caller()
        if caller is None:
            message = f"{self.name}.start needs an app: enter Stent(...) or call use()"
            raise UsageError(message)
        self._refuse_unbound()
        return caller.start(self, args, kwargs)

    def _map(self, items: Any, form: MapForm) -> Coroutine[Any, Any, list[Any]]:
        return map_items(self, items, form)

    def options(self, **overrides: object) -> DurableFunction[P, R]:
        """The same function with other options for the calls made through it.

        Args:
            **overrides: ``max_duration delay dispatch_key queue priority tags retry
                timeout key detached``.

        Raises:
            ConfigurationError: An option is unknown or not available.
        """
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.settings = replace(self.settings, **read_options(overrides, CALL_OPTIONS))
        view.given = self.given | frozenset(overrides)
        return view

    def refuse_activity_options(self) -> None:
        """A workflow has no attempts: options of attempts would be ignored.

        Raises:
            ConfigurationError: It is a workflow with ``retry``, ``timeout``,
                ``effects``, ``pool`` or ``max_concurrent_per_worker``.
        """
        wrong = self.given & ACTIVITY_OPTIONS
        if wrong and self.kind is Kind.WORKFLOW:
            option = min(wrong)
            why = (
                "executions are not bound to a process; bound them with max_concurrent="
                if option == "max_concurrent_per_worker"
                else "a workflow never runs again from the top; bound it with "
                "max_duration="
            )
            message = (
                f"{self.name} is a workflow, and {option}= belongs to activities: {why}"
            )
            raise ConfigurationError(message)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> DurableFunction[..., R]: ...
    def __get__(
        self, instance: object | None, owner: type
    ) -> Self | DurableFunction[..., R]:
        if instance is None or not self.needs_instance:
            return self
        return cast("DurableFunction[..., R]", catalogue.bind(self, instance))

    def __set_name__(self, owner: type, name: str) -> None:
        # A function from elsewhere kept in a class attribute is no method.
        own = f"{owner.__qualname__}.{name}"
        self.needs_instance = self.function.__qualname__ == own

    def __repr__(self) -> str:
        return f"<durable {self.name}>"

    def _plain(
        self, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Coroutine[Any, Any, R]:
        if self.is_async:
            return cast("Coroutine[Any, Any, R]", self.function(*args, **kwargs))
        return _call_later(self.function, args, kwargs)

    def _refuse_unbound(self) -> None:
        if self.needs_instance:
            message = (
                f"{self.name} is a method: register its instance with "
                "durable.register(name, instance) and call it on that instance"
            )
            raise UsageError(message)


setattr(DurableFunction, MARK, WORKFLOW)


class _StaticDurable(DurableFunction[P, R]):
    """A durable function made from a staticmethod: never takes the instance."""

    def __set_name__(self, owner: type, name: str) -> None:
        """A static method needs no instance."""


class _ClassDurable(DurableFunction[P, R]):
    """A durable function made from a classmethod: the class is not an argument."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.function = MethodType(self.function, owner)


async def _call_later(
    function: Callable[..., R], args: Sequence[object], kwargs: Mapping[str, object]
) -> R:
    return function(*args, **kwargs)


def map_items(
    function: object, items: Items, form: MapForm
) -> Coroutine[Any, Any, list[Any]]:
    """Ask the current caller for a map; without one, a plain loop.

    Raises:
        UsageError: The function is not durable.
    """
    if not isinstance(function, DurableFunction):
        message = f"map needs a durable function, not {function!r}: decorate it"
        raise UsageError(message)
    caller = current_caller()
    if caller is None:
        return _map_plainly(function, items, form)
    return caller.map(function, items, form)


async def _map_plainly(
    function: DurableFunction[Any, Any], items: Items, form: MapForm
) -> list[Any]:
    results: list[Any] = []
    async for item in each_item(items):
        args = tuple(cast("Iterable[object]", item)) if form.star else (item,)
        try:
            results.append(await function(*args))
        except Exception as error:
            if not form.return_exceptions:
                raise
            results.append(error)
    return results


async def each_item(items: Items) -> AsyncGenerator[object, None]:
    """The items, whatever they come from."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class Catalogue:
    """Every durable function of the process by name; the only global state."""

    def __init__(self) -> None:
        self._functions: dict[str, DurableFunction[Any, Any]] = {}
        self._instances: dict[int, tuple[object, str]] = {}

    def add(self, function: DurableFunction[Any, Any]) -> None:
        """Record ``function``; the same place again replaces it (a reload).

        Raises:
            DuplicateNameError: Another place already has the name.
        """
        known = self._functions.get(function.name)
        if known is not None and known.place != function.place:
            message = (
                f"durable name {function.name!r} is taken by {known.place}, so "
                f"{function.place} cannot have it: pass name= to one of them"
            )
            raise DuplicateNameError(message)
        self._functions[function.name] = function

    def find(self, name: str) -> DurableFunction[Any, Any] | None:
        """The function called ``name``, if this process has it."""
        return self._functions.get(name)

    def names(self) -> list[str]:
        """All names that can run here, sorted."""
        return sorted(n for n, f in self._functions.items() if not f.needs_instance)

    def register(self, name: str, instance: object) -> None:
        """Make the durable methods of ``instance`` callable; all workers do the same.

        Args:
            name: Stands for the instance in durable names (``Class.method@name``).
            instance: The object; it is never encoded.
        """
        self._instances[id(instance)] = (instance, name)
        for owner in reversed(type(instance).__mro__):
            for attribute in vars(owner).values():
                if isinstance(attribute, DurableFunction) and attribute.needs_instance:
                    self.add(_bound(attribute, instance, name))

    def bind(
        self, method: DurableFunction[Any, Any], instance: object
    ) -> DurableFunction[Any, Any]:
        """The durable function of ``method`` on ``instance``."""
        known = self._instances.get(id(instance))
        if known is None:
            return _bound(method, instance, "")
        return self._functions[f"{method.name}@{known[1]}"]


def _bound(
    method: DurableFunction[Any, Any], instance: object, name: str
) -> DurableFunction[Any, Any]:
    view = object.__new__(DurableFunction)
    view.__dict__.update(method.__dict__)
    view.function = MethodType(method.function, instance)
    view.__dict__.pop("positional", None)  # counted the instance
    if name:
        view.name = f"{method.name}@{name}"
        view.needs_instance = False
    return view


catalogue = Catalogue()


def module_digest(function: Callable[..., Any]) -> str:
    """Digest of the source file of ``function``'s module, as it was when imported."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return hashlib.blake2b(repr(function).encode(), digest_size=8).hexdigest()
    path = Path(code.co_filename)
    try:
        status = path.stat()
        return _file_digest(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return hashlib.blake2b(_code_bytes(code), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, _changed_ns: int, _size: int) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _code_bytes(code: CodeType) -> bytes:
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        nested = isinstance(constant, CodeType)
        parts.append(_code_bytes(constant) if nested else repr(constant).encode())
    return b"\0".join(parts)


def _place(function: Callable[..., Any]) -> str:
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__qualname__", repr(inner))
    return f"{code.co_filename if code else '?'}:{name}"


def durable_name(function: Callable[..., Any]) -> str:
    """``module.qualname``, with ``__main__`` replaced by how others import it."""
    module = function.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        if spec is not None:
            module = spec.name
        elif file is not None:
            module = Path(file).stem
    return f"{module}.{function.__qualname__}"


def _argument(
    function: Callable[..., Any],
    name: str,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> object:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def _key_text(name: str, value: object) -> str:
    """A key as the database holds it."""
    text = str(value)
    if value is None or not text:
        message = f"{name}: its concurrency_key is {value!r}; it must not be empty"
        raise UsageError(message)
    if len(text) <= KEY_CHARACTERS_MAX and _can_be_stored(text):
        return text
    return hashlib.blake2b(
        text.encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()


CALL_OPTIONS = frozenset(
    {*DISPATCH_OPTIONS, "retry", "timeout", "key", "detached"},
)
ACTIVITY_OPTIONS = frozenset(
    {"retry", "timeout", "effects", "pool", "max_concurrent_per_worker"}
)
DECORATOR_OPTIONS = frozenset(
    {
        "queue",
        "priority",
        "tags",
        "retry",
        "timeout",
        "max_duration",
        "effects",
        "max_concurrent",
        "max_concurrent_per_worker",
        "concurrency_key",
        "rate_limit",
        "pool",
    },
)


def read_options(
    given: Mapping[str, object], allowed: frozenset[str]
) -> dict[str, Any]:
    """Check options as users write them and bring them into ``Options``' types.

    Raises:
        ConfigurationError: Unknown, not available, or of the wrong type.
        DurationError: A duration cannot be read.
    """
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name in NOT_YET:
            message = f"{name}= is not available in this release ({NOT_YET[name]})"
            raise ConfigurationError(message)
        if name not in allowed:
            options = ", ".join(sorted(allowed))
            message = f"unknown option {name!r}; options here are: {options}"
            raise ConfigurationError(message)
        read[name] = _READERS[name](name, value)
    return read


def _read_duration(name: str, value: object) -> timedelta | None:
    return None if value is None else parse_duration(cast("str", value), name=name)


TEXT_CHARACTERS_MAX = 500


def _read_text(name: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and _can_be_stored(value)):
        return value
    message = (
        f"{name} is {ascii(value)[:100]}; it must be a text of 1 to "
        f"{TEXT_CHARACTERS_MAX} characters without NUL and lone surrogates"
    )
    raise ConfigurationError(message)


def _can_be_stored(text: str) -> bool:
    if not 0 < len(text) <= TEXT_CHARACTERS_MAX or "\0" in text:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_queue(name: str, value: object) -> str:
    return _read_text(name, value) or "default"


def _read_priority(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    message = f"{name} is {value!r}; it must be a whole number, higher runs first"
    raise ConfigurationError(message)


def _read_tags(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        message = f"{name} is {value!r}; it must be a list of texts"
        raise ConfigurationError(message)
    tags = tuple(_read_text(name, tag) for tag in value)
    if None in tags:
        message = f"{name} is {value!r}; a tag must be a non-empty text"
        raise ConfigurationError(message)
    return cast("tuple[str, ...]", tags)


def _read_retry(_name: str, value: object) -> RetryPolicy:
    return RetryPolicy.of(cast("int", value))


def _read_effects(name: str, value: object) -> Effects:
    if value == "at_most_once":
        message = f'{name}="at_most_once" is not available in this release'
        raise ConfigurationError(message)
    try:
        return Effects(cast("str", value))
    except ValueError:
        choices = ", ".join(Effects)
        message = f"{name} is {value!r}; it must be one of: {choices}"
        raise ConfigurationError(message) from None


def _read_count(name: str, value: object) -> int | None:
    if value is None or (
        isinstance(value, int)
        and not isinstance(value, bool)
        and 1 <= value <= CONCURRENT_MAX
    ):
        return value
    message = f"{name} is {value!r}; it must be a number from 1 to {CONCURRENT_MAX}"
    raise ConfigurationError(message)


def _read_rate(_name: str, value: object) -> Rate | None:
    return None if value is None else parse_rate(cast("str", value))


def _read_key(name: str, value: object) -> str | Callable[..., object] | None:
    if value is None or callable(value) or (isinstance(value, str) and value):
        return value
    message = (
        f"{name} is {value!r}; it must be the name of a parameter, or a function of "
        "the arguments"
    )
    raise ConfigurationError(message)


def _read_pool(name: str, value: object) -> Pool:
    try:
        return Pool(cast("str", value))
    except ValueError:
        choices = ", ".join(Pool)
        message = f"{name} is {value!r}; it must be one of: {choices}"
        raise ConfigurationError(message) from None


def _read_flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    message = f"{name} is {value!r}; it must be True or False"
    raise ConfigurationError(message)


_READERS: dict[str, Callable[[str, object], Any]] = {
    "queue": _read_queue,
    "priority": _read_priority,
    "tags": _read_tags,
    "retry": _read_retry,
    "timeout": _read_duration,
    "max_duration": _read_duration,
    "delay": _read_duration,
    "dispatch_key": _read_text,
    "key": _read_text,
    "effects": _read_effects,
    "pool": _read_pool,
    "detached": _read_flag,
    "max_concurrent": _read_count,
    "max_concurrent_per_worker": _read_count,
    "concurrency_key": _read_key,
    "rate_limit": _read_rate,
}


class Durable:
    """The type of ``durable``: one decorator, bare or called."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> DurableFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> DurableFunction[P, R]: ...
    @overload
    def __call__(
        self, *, name: str | None = None, kind: str | None = None, **options: Any
    ) -> _Decorator: ...
    def __call__(  # type: ignore[misc] # an option named "function" is refused below
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        kind: str | None = None,
        **options: Any,
    ) -> DurableFunction[..., Any] | _Decorator:
        """Make a function durable.

        Args:
            function: ``async def`` runs on the worker's loop, ``def`` in a thread.
            name: Durable name; default ``module.qualname``.
            kind: ``"workflow"`` or ``"activity"``; default found from the byte code.
            **options: ``queue priority tags retry timeout max_duration effects pool``.

        Raises:
            ConfigurationError: An option is unknown, wrong or not available.
            DuplicateNameError: Another function has the name.
            UsageError: It is not a function, or a parameter is named like a dispatch
                option.
        """
        decorator = _Decorator(name, kind, read_options(options, DECORATOR_OPTIONS))
        return decorator if function is None else decorator(function)

    def register(self, name: str, instance: object) -> None:
        """Register an instance whose methods are durable under ``name``."""
        catalogue.register(name, instance)


class _Decorator:
    def __init__(self, name: str | None, kind: str | None, options: Any) -> None:
        self._name = name
        self._kind = None if kind is None else _read_kind(kind)
        self._options = options

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> DurableFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> DurableFunction[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> DurableFunction[..., Any]:
        made: type[DurableFunction[..., Any]] = DurableFunction
        given: Any = function  # a static or class method when used inside a class
        if isinstance(given, staticmethod):
            made, given = _StaticDurable, given.__func__
        elif isinstance(given, classmethod):
            made, given = _ClassDurable, given.__func__
        if isinstance(given, DurableFunction):
            message = f"{given.name} is already durable"
            raise UsageError(message)
        function = given
        innermost: object = inspect.unwrap(function)
        if not isinstance(innermost, FunctionType):
            message = f"durable takes a function, not {function!r}"
            raise UsageError(message)
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(
            function
        ):
            message = f"{function.__qualname__} is a generator: return a list instead"
            raise UsageError(message)
        name = self._name or durable_name(function)
        if not NAME_PATTERN.match(name):
            message = f"durable name {name!r} does not match {NAME_PATTERN.pattern}"
            raise ConfigurationError(message)
        _refuse_option_names(name, function)
        _check_key(name, function, self._options.get("concurrency_key"))
        durable_function = made(function, name, Options(**self._options), self._kind)
        durable_function.given = frozenset(self._options)
        _refuse_pool(durable_function)
        catalogue.add(durable_function)
        return durable_function


def _read_kind(kind: str) -> Kind:
    try:
        return Kind(kind)
    except ValueError:
        message = f'kind is {kind!r}; it must be "workflow" or "activity"'
        raise ConfigurationError(message) from None


def _refuse_pool(function: DurableFunction[..., Any]) -> None:
    """Pools are for plain functions that another process can find."""
    pool, name = function.settings.pool, function.name
    if pool is None:
        return
    if function.is_async:
        message = (
            f"{name} is async def and runs on the worker's loop: pool={pool.value!r} "
            "is for def functions"
        )
    elif function.explicit_kind is Kind.WORKFLOW:
        message = f"{name} is a workflow, and pool= belongs to activities"
    elif pool is not Pool.PROCESS:
        return
    elif function.settings.effects is Effects.TRANSACTIONAL:
        message = (
            f'{name}: effects="transactional" needs the worker\'s own process, so it '
            'excludes pool="process"'
        )
    elif "<locals>" in function.function.__qualname__:
        message = (
            f"{name} is defined inside a function, where a child process cannot find "
            'it: pool="process" needs a function of a module'
        )
    else:
        return
    raise ConfigurationError(message)


def _refuse_option_names(name: str, function: Callable[..., Any]) -> None:
    taken = set(inspect.signature(function).parameters) & set(DISPATCH_OPTIONS)
    if taken:
        message = (
            f"{name}: parameter {min(taken)!r} is named like an option of dispatch; "
            "rename it"
        )
        raise UsageError(message)


def _check_key(name: str, function: Callable[..., Any], key: object) -> None:
    parameters = list(inspect.signature(function).parameters)
    if isinstance(key, str) and key not in parameters:
        known = ", ".join(parameters) or "none"
        message = (
            f"{name}: concurrency_key={key!r} is not one of its parameters ({known})"
        )
        raise ConfigurationError(message)


durable = Durable()
