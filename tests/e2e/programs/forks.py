"""A process that forks while it serves; prints what parent and child went through."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection

from stent import Stent, UsageError, durable


@durable
async def double(x: int) -> int:
    return 2 * x


def child(app: Stent, url: str, line: Connection) -> None:
    """Try the parent's app, then one of its own."""
    line.send(asyncio.run(_child(app, url)))
    line.close()


async def _child(app: Stent, url: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, attempt in (
        ("dispatch", lambda: app.dispatch(double, 2)),
        ("call", lambda: double(2)),
        ("serve", app.serve),
        ("list", app.list_executions),
    ):
        try:
            await attempt()
        except UsageError as error:
            found[name] = str(error)
    await app.close()
    async with Stent(url) as own:
        found["own"] = (await own.wait_for(await own.dispatch(double, 4))).unwrap()
    return found


async def main(url: str) -> None:
    async with Stent.bootstrap(url, serve=True) as app:
        (worker,) = app._workers
        before = (await app.wait_for(await app.dispatch(double, 1))).unwrap()
        ours, theirs = multiprocessing.Pipe()
        forked = multiprocessing.get_context("fork").Process(
            target=child, args=(app, url, theirs)
        )
        forked.start()
        theirs.close()
        found = await asyncio.to_thread(ours.recv)
        await asyncio.to_thread(forked.join)
        after = (await app.wait_for(await app.dispatch(double, 3))).unwrap()
        sessions = worker._sessions
        made = {
            session.connections_made
            for session in (
                sessions.writer,
                sessions.claimer,
                sessions.listener,
                sessions.lease,
                app._session,
            )
            if session is not None
        }
    facts = {"exit_code": forked.exitcode, "made": sorted(made), "child": found}
    sys.stdout.write(json.dumps({"before": before, "after": after, **facts}) + "\n")


if __name__ == "__main__":
    if sys.argv[2] == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(sys.argv[1]))
    else:
        asyncio.run(main(sys.argv[1]))
