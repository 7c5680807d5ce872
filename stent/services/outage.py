"""One service's view of a database that is away: told once a reason, and when over."""

from __future__ import annotations

from stent.errors import StoreError
from stent.log import DATABASE_LOST, DATABASE_RETURNED, get_logger

log = get_logger(__name__)


class Outage:
    """Logs the beginning, every new reason, and the end."""

    def __init__(self, service: str) -> None:
        """Create it; ``service`` is who cannot reach the database."""
        self._service = service
        self._reason: type[BaseException] | None = None

    @property
    def lasts(self) -> bool:
        """Whether the database is away."""
        return self._reason is not None

    def note(self, error: StoreError) -> None:
        """It is away, or still is: a server that restarts says several things."""
        reason = type(error.__cause__ or error)
        if reason is not self._reason:
            self._reason = reason
            log.warning(DATABASE_LOST, service=self._service, error=str(error))

    def end(self) -> None:
        """It answered."""
        if self.lasts:
            self._reason = None
            log.info(DATABASE_RETURNED, service=self._service)
