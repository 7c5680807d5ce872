"""Restate: W1, W3, W4, W5. It keeps its own log, in its own server, not in Postgres.

Set as its documentation advises:
- one server with its defaults, fsync of its log included;
- steps are `ctx.run_typed` in the service, gathered for W1; activities as calls of a
  second service would cost an invocation each;
- the service speaks HTTP/2 by hypercorn, so that it streams, one process;
- a client keeps its HTTP connections to the ingress.

Started with `server`: the program of the server, from its npm package.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import hypercorn.asyncio
import restate
from hypercorn.config import Config
from measure import Bench, check

START_SECONDS_MAX = 60
WAIT_SECONDS_MAX = 300
# What a client of that kind holds open at once; more only queue in the server.
CONNECTIONS = 100

service = restate.Service("bench")


async def no_op(number: int) -> int:
    return number


def step(ctx: restate.Context, number: int) -> Any:
    return ctx.run_typed("no_op", no_op, number=number)


@service.handler()
async def one_step(ctx: restate.Context, number: int) -> int:
    return int(await step(ctx, number))


@service.handler()
async def three_steps(ctx: restate.Context, number: int) -> int:
    return int(await step(ctx, await step(ctx, await step(ctx, number))))


@service.handler()
async def sequence(ctx: restate.Context, count: int) -> int:
    total = 0
    for number in range(count):
        total += await step(ctx, number)
    return total


@service.handler()
async def fan_out(ctx: restate.Context, count: int) -> int:
    steps = [step(ctx, number) for number in range(count)]
    await restate.gather(*steps)
    return sum([await one for one in steps])


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@asynccontextmanager
async def serving(program: str) -> AsyncIterator[str]:
    """The server and the service, registered: the URL of the ingress."""
    node, ingress, admin, own = free_ports(4)
    stop = asyncio.Event()
    config = Config()
    config.bind = [f"127.0.0.1:{own}"]
    service_task = asyncio.create_task(
        hypercorn.asyncio.serve(
            restate.app([service]), config, shutdown_trigger=stop.wait
        )
    )
    with tempfile.TemporaryDirectory(prefix="bench-restate-") as directory:
        process = await asyncio.create_subprocess_exec(
            program,
            "--base-dir",
            directory,
            "--listen-mode",
            "tcp",
            "--no-logo",
            stdout=sys.stderr,
            env={
                **os.environ,
                "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
                "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
                "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
                "RESTATE_DISABLE_TELEMETRY": "true",
                "RESTATE_LOG_FILTER": "error",
            },
        )
        try:
            await register(f"http://127.0.0.1:{admin}", f"http://127.0.0.1:{own}")
            yield f"http://127.0.0.1:{ingress}"
        finally:
            process.terminate()
            await process.wait()
            stop.set()
            await asyncio.wait([service_task])


async def register(admin: str, service_url: str) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                answer = await client.post(
                    f"{admin}/deployments", json={"uri": service_url}
                )
                if answer.is_success:
                    return
                found = answer.text
            except httpx.TransportError as error:
                found = repr(error)
            if time.monotonic() > deadline:
                message = f"the server does not answer: {found}"
                raise TimeoutError(message)
            await asyncio.sleep(0.1)


async def main() -> None:
    options = json.loads(sys.argv[2])
    program = options.pop("server")
    bench = Bench(sys.argv[1], **options)
    limits = httpx.Limits(
        max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS
    )
    async with (
        serving(program) as ingress,
        httpx.AsyncClient(
            base_url=ingress, limits=limits, timeout=WAIT_SECONDS_MAX, trust_env=False
        ) as client,
    ):

        async def call(handler: str, number: int) -> Any:
            answer = await client.post(f"/bench/{handler}", json=number)
            answer.raise_for_status()
            return answer.json()

        async def timed_sum(handler: str, count: int) -> float:
            began = time.perf_counter()
            total = await call(handler, count)
            seconds = time.perf_counter() - began
            check(total, count * (count - 1) // 2)
            return seconds

        async def many(count: int) -> float:
            began = time.perf_counter()
            results = await asyncio.gather(
                *[call("three_steps", number) for number in range(count)]
            )
            seconds = time.perf_counter() - began
            check(results, list(range(count)))
            return seconds

        async def one(number: int) -> None:
            check(await call("one_step", number), number)

        await bench.latency(one)
        await bench.sequence(lambda count: timed_sum("sequence", count))
        await bench.workflows(many)
        await bench.fan_out(lambda count: timed_sum("fan_out", count))


if __name__ == "__main__":
    asyncio.run(main())
