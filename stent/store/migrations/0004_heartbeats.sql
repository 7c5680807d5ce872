-- What activities last said of their progress, for their next attempt.
--
-- A row per call, or per item of a map, that has said something for longer than a
-- second. Written by the worker that runs it, read by whoever runs it next, deleted by
-- tidy_heartbeats once the call has its result. Not a column of tasks: inline attempts
-- have no row there, and what is claimed and settled stays small.
--
-- No index but the key, so that writing again is a HOT update.
create table stent.heartbeats (
    execution_id uuid not null,
    -- Of an item of a map: the call that it becomes when it fails and has attempts left.
    call_id      uuid not null,
    -- What was claimed: the call, or the page that has the item.
    task_id      uuid not null,
    attempt      integer not null,
    payload      bytea not null,
    recorded_at  timestamptz not null default clock_timestamp(),
    primary key (execution_id, call_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

create type stent.heartbeat_item as (
    execution_id uuid, call_id uuid, task_id uuid,
    -- Of the task; null: the attempt is inline, then the owner of its execution counts.
    epoch bigint,
    attempt integer, payload bytea);

-- Keep the details that this worker's attempts have given. What belongs to somebody else by now is left out.
-- Locks: workers, shared, so that a take-over comes before or after all of it; heartbeats, in the order given.
create function stent.write_heartbeats(p_worker_id uuid, p_incarnation bigint, p_items stent.heartbeat_item[])
    returns void language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    beat stent.heartbeat_item;
begin
    perform from stent.workers where worker_id = p_worker_id and incarnation = p_incarnation for share;
    if not found then
        return;
    end if;
    foreach beat in array p_items loop
        if beat.epoch is null then
            continue when not exists (
                select from stent.executions e
                 where e.execution_id = beat.execution_id and e.worker_id is not distinct from p_worker_id
                   and e.finished_at is null);
        else
            continue when not exists (
                select from stent.tasks t
                 where t.execution_id = beat.execution_id and t.call_id = beat.task_id
                   and t.epoch = beat.epoch and t.worker_id = p_worker_id);
        end if;
        insert into stent.heartbeats (execution_id, call_id, task_id, attempt, payload)
        values (beat.execution_id, beat.call_id, beat.task_id, beat.attempt, beat.payload)
        on conflict (execution_id, call_id) do update
           set task_id = excluded.task_id, attempt = excluded.attempt, payload = excluded.payload,
               recorded_at = excluded.recorded_at;
    end loop;
end $$;
