"""What is the same for the code of an activity wherever it runs."""

from __future__ import annotations

import random as random_module
import uuid as uuid_module
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from stent.mapping import MapForm
from stent.registry import DurableFunction, Items


class ActivityCode(ABC):
    """It makes no durable calls, and need not repeat itself; see ``context.Scope``."""

    def call(
        self,
        function: DurableFunction[Any, Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> NoReturn:
        """An activity makes no durable calls."""
        del args, kwargs
        self._refuse(f"calls {function.name}")

    def map(
        self, function: DurableFunction[Any, Any], items: Items, form: MapForm
    ) -> NoReturn:
        """An activity makes no durable calls."""
        del items, form
        self._refuse(f"maps {function.name}")

    def random(self) -> random_module.Random:
        """A real generator: activities need not repeat themselves."""
        return random_module.SystemRandom()

    def uuid(self) -> uuid_module.UUID:
        """A real UUID."""
        return uuid_module.uuid4()

    @abstractmethod
    def _refuse(self, what: str) -> NoReturn:
        """Raise a UsageError that says what the code does, and what to do instead."""
