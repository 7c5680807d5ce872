"""Whom we are measured beside, and what it takes to run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One of them.

    Attributes:
        key: Names it on the command line, in files and in JSON.
        name: As people read it, with its version.
        program: In ``programs``.
        requirements: What pip installs into its environment.
        python: The oldest Python it runs on.
        npm: Package of the server it needs, and that package's program.
        note: What a reader of the table must know.
    """

    key: str
    name: str
    program: str
    requirements: tuple[str, ...] = ()
    python: tuple[int, int] = (3, 11)
    npm: tuple[str, str] | None = None
    note: str = ""


OWN: Final = Peer(key="own", name="stent (this project)", program="own_stent.py")
JOBS_ONLY: Final = "a job queue: no workflows"

# Pinned, so that two calls measure the same; a new version is a change of this file.
PEERS: Final = (
    Peer(
        key="dbos",
        name="DBOS 3.4.0",
        program="peer_dbos.py",
        requirements=("dbos==3.4.0",),
    ),
    Peer(
        key="absurd",
        name="Absurd 0.5.1",
        program="peer_absurd.py",
        requirements=("absurd-sdk==0.5.1", "absurdctl==0.5.1"),
    ),
    Peer(
        key="restate",
        name="Restate 1.7.12",
        program="peer_restate.py",
        requirements=("restate-sdk[serde]==1.2.0", "hypercorn>=0.17", "httpx>=0.27"),
        npm=("@restatedev/restate-server@1.7.12", "restate-server"),
        note="its own server and log, not Postgres",
    ),
    Peer(
        key="stent-1",
        name="stent 1.1.2 (other project)",
        program="peer_stent_1.py",
        requirements=("stent==1.1.2",),
        python=(3, 12),
        note="another project of the same name",
    ),
    Peer(
        key="procrastinate",
        name="Procrastinate 3.10.0",
        program="peer_procrastinate.py",
        requirements=("procrastinate==3.10.0", "psycopg[binary]>=3.2"),
        note=JOBS_ONLY,
    ),
    Peer(
        key="pgqueuer",
        name="PgQueuer 1.6.0",
        program="peer_pgqueuer.py",
        requirements=("pgqueuer[asyncpg]==1.6.0",),
        note=JOBS_ONLY,
    ),
    Peer(
        key="oban",
        name="Oban 0.7.0",
        program="peer_oban.py",
        requirements=("oban==0.7.0",),
        python=(3, 12),
        note=JOBS_ONLY,
    ),
)
