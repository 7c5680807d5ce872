-- The model.
--
-- An execution is one durable instance of a function. Its row is small and is claimed
-- by one worker, its owner; epoch counts changes of owner, so a stale owner's writes
-- match nothing. What an execution has seen is its journal, written by the owner alone;
-- what calls have produced is in results, written by whoever ran them; what others want
-- an execution to notice is in inbox, deleted by the flush that journals its delivery.
--
-- A task is a claimable row: an activity call, or a page of a map. From the commit that
-- inserts its result and deletes it, the call is done.
--
-- A worker writes through flush(): one call, one transaction. Its first statement moves
-- the worker's row from flush n - 1 to n under its incarnation. That one row fences the
-- whole worker: take_over() bumps the incarnation in it, so either the flush was first
-- and counts, or the take-over was and the flush changes nothing. A worker that does not
-- know whether its flush was committed reads the row. Claims have a row of their own, so
-- that claiming and writing do not wait for each other.
--
-- Every statement of a plpgsql function has a fresh snapshot under READ COMMITTED, so
-- what is read after a lock was taken is what the lock protects.
--
-- The functions on the hot path leave the planner no choice that could go wrong. What it knows of tables that
-- fill and empty within seconds is often wrong, and a plan made then is kept. So: rows are found by a LATERAL
-- probe of one index, with OFFSET 0 or a lock so that it is not flattened into a join; they are changed by
-- their ctid, under the lock, or one by one by key. There is no plain join between an array and a table.
--
-- Lock order: workers, executions, tasks, inbox; ascending id within each.
--
-- Indexes of tasks name no column that claim or settle changes: claims stay HOT.
-- Payloads, results, journal and the other append-only tables are partitioned by
-- execution id, which starts with a time (UUID v7), a week each.

create table stent.workers (
    worker_id   uuid primary key,
    incarnation bigint not null default 1 constraint workers_incarnation_positive check (incarnation > 0),
    flush       bigint not null default 0,
    -- What the last flush could not do, for a writer that lost the answer.
    skipped     jsonb
) with (fillfactor = 30);

create table stent.worker_claims (
    worker_id   uuid primary key,
    incarnation bigint not null default 1,
    claim       bigint not null default 0
) with (fillfactor = 30);

create table stent.leases (
    worker_id    uuid primary key,
    state        text not null default 'running'
                 constraint leases_state_known check (state in ('running', 'draining', 'stopped', 'lost')),
    expires_at   timestamptz not null,
    liveness_key bigint not null,
    -- Under which boot of the server the liveness lock was taken; null: not held.
    boot         text,
    host         text not null,
    pid          bigint not null,
    slots        bigint not null,
    queues       text[] not null,
    started_at   timestamptz not null default now(),
    renewed_at   timestamptz not null default now()
) with (fillfactor = 50);

-- Emptied by crash recovery: then all liveness locks are free and prove nothing.
create unlogged table stent.boots (
    boot_id    uuid not null default gen_random_uuid(),
    started_at timestamptz not null default clock_timestamp(),
    only_one   boolean primary key default true constraint boots_only_one check (only_one)
);

create table stent.executions (
    execution_id    uuid primary key,
    function        text not null,
    kind            text not null constraint executions_kind_known check (kind in ('workflow', 'activity')),
    status          text not null default 'pending'
                    constraint executions_status_known check (status in
                        ('pending', 'running', 'paused', 'blocked', 'cancelling',
                         'completed', 'failed', 'cancelled', 'timed_out')),
    queue           text not null,
    priority        smallint not null default 0,
    worker_id       uuid,
    incarnation     bigint,
    epoch           bigint not null default 0 constraint executions_epoch_positive check (epoch >= 0),
    -- When an unowned execution has something to do; '-infinity': now; null: only its inbox can tell.
    wake_at         timestamptz,
    deadline_at     timestamptz,
    cancel_reason   text,
    -- From then on anyone may end a cancelling execution.
    cancel_by       timestamptz,
    created_at      timestamptz not null default clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    seed            bytea not null,
    key_seed        uuid not null,
    root_id         uuid not null,
    parent_id       uuid,
    parent_address  text,
    detached        boolean not null default false,
    depth           smallint not null default 0,
    code_digest     text,
    blocked_digest  text,
    blocked_reason  text,
    tags            text[] not null default '{}',
    dispatch_key    text,
    options         bytea,
    -- The process that waits for the outcome, told by a hint.
    client_id       uuid,
    constraint executions_finished_is_terminal check
        ((finished_at is not null) = (status in ('completed', 'failed', 'cancelled', 'timed_out'))),
    constraint executions_finished_is_free check (finished_at is null or worker_id is null)
) with (fillfactor = 70);

-- claim_executions
create index executions_ready_idx on stent.executions (queue, function, priority desc, wake_at)
    where worker_id is null and wake_at is not null;
-- take_over, held_executions
create index executions_owner_idx on stent.executions (worker_id) where worker_id is not null;
-- claim_executions, the blocked branch
create index executions_blocked_idx on stent.executions (function) where status = 'blocked';
-- children of an execution
create index executions_parent_idx on stent.executions (parent_id) where parent_id is not null;
-- sweep_deadlines
create index executions_deadline_idx on stent.executions (deadline_at)
    where deadline_at is not null and finished_at is null;
create index executions_cancel_idx on stent.executions (cancel_by)
    where cancel_by is not null and finished_at is null;
-- list_executions by tag
create index executions_tags_idx on stent.executions using gin (tags) where tags <> '{}';

create table stent.tasks (
    execution_id uuid not null,
    call_id      uuid not null,
    address      text not null,
    function     text not null,
    queue        text not null,
    priority     smallint not null default 0,
    available_at timestamptz not null default clock_timestamp(),
    worker_id    uuid,
    incarnation  bigint,
    epoch        bigint not null default 0 constraint tasks_epoch_positive check (epoch >= 0),
    attempt      integer not null default 1 constraint tasks_attempt_positive check (attempt > 0),
    is_page      boolean not null default false,
    -- Null when they are larger than a hot row should be: then in payloads.
    arguments    bytea,
    options      bytea,
    primary key (execution_id, call_id)
-- Every row is claimed once: half a page is left for the new versions, so that they are HOT.
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

-- claim_tasks
-- Without the key: with it, the planner of PostgreSQL 18 may skip-scan this index to find a row by its key.
create index tasks_ready_idx on stent.tasks (queue, function, priority desc, available_at);

create table stent.inbox (
    inbox_id     bigint generated always as identity primary key,
    execution_id uuid not null,
    kind         text not null constraint inbox_kind_known check (kind in ('result', 'cancel')),
    call_id      uuid,
    reason       text,
    created_at   timestamptz not null default clock_timestamp()
) with (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);
create index inbox_execution_idx on stent.inbox (execution_id);
-- sweep_deadlines
create index inbox_cancel_idx on stent.inbox (created_at) where kind = 'cancel';

create table stent.dispatch_keys (
    dispatch_key text primary key,
    function     text not null,
    digest       text not null,
    execution_id uuid not null,
    created_at   timestamptz not null default now()
);

create table stent.payloads (
    execution_id uuid not null,
    call_id      uuid not null,
    payload      bytea not null,
    primary key (execution_id, call_id)
) partition by range (execution_id);

-- The result of the execution itself is under the nil call id.
create table stent.results (
    execution_id uuid not null,
    call_id      uuid not null,
    address      text not null,
    ok           boolean not null,
    payload      bytea not null,
    attempt      integer not null default 1,
    started_at   timestamptz,
    finished_at  timestamptz not null default clock_timestamp(),
    worker_id    uuid,
    primary key (execution_id, call_id)
) partition by range (execution_id);

create table stent.journal (
    execution_id uuid not null,
    position     integer not null constraint journal_position_positive check (position >= 0),
    payload      bytea not null,
    recorded_at  timestamptz not null default clock_timestamp(),
    primary key (execution_id, position)
) partition by range (execution_id);

-- Finished items of a page of a map whose page is not done.
create table stent.segments (
    execution_id uuid not null,
    call_id      uuid not null,
    segment      integer not null,
    payload      bytea not null,
    primary key (execution_id, call_id, segment)
) partition by range (execution_id);

-- Failed attempts; the last one is also the result.
create table stent.attempts (
    execution_id uuid not null,
    call_id      uuid not null,
    attempt      integer not null,
    address      text not null,
    payload      bytea not null,
    started_at   timestamptz,
    finished_at  timestamptz not null default clock_timestamp(),
    worker_id    uuid,
    primary key (execution_id, call_id, attempt)
) partition by range (execution_id);

create table stent.tells (
    execution_id uuid not null,
    call_id      uuid not null,
    address      text not null,
    payload      bytea not null,
    told_at      timestamptz not null default clock_timestamp(),
    primary key (execution_id, call_id)
) partition by range (execution_id);

-- The smallest UUID v7 of an instant.
create function stent.first_id(p_at timestamptz) returns uuid
    language sql immutable parallel safe set search_path = pg_catalog
    return (lpad(to_hex(floor(extract(epoch from p_at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- Create the partitions of the week that contains p_at, once.
create function stent.ensure_partitions(p_at timestamptz) returns void
    language plpgsql set search_path = pg_catalog as $$
declare
    week_start timestamptz := to_timestamp(floor(extract(epoch from p_at) / 604800) * 604800);
    suffix text := to_char(week_start at time zone 'UTC', 'YYYYMMDD');
    name text;
begin
    if to_regclass(format('stent.%I', 'tells_' || suffix)) is not null then
        return;
    end if;
    perform pg_advisory_xact_lock(hashtextextended('stent.ensure_partitions', 0));
    foreach name in array array['payloads', 'results', 'journal', 'segments', 'attempts', 'tells'] loop
        execute format(
            'create table if not exists stent.%I partition of stent.%I for values from (%L) to (%L)',
            name || '_' || suffix, name,
            stent.first_id(week_start), stent.first_id(week_start + interval '7 days'));
    end loop;
end $$;

select stent.ensure_partitions(now()), stent.ensure_partitions(now() + interval '7 days');

-- What flush() takes; an array that is null is empty. A field is the same thing under the same name everywhere.
create type stent.fence_item as (execution_id uuid, epoch bigint);
create type stent.turn_item as (execution_id uuid, "position" integer, payload bytea);
create type stent.result_item as (
    execution_id uuid, call_id uuid, address text, ok boolean, payload bytea, attempt integer,
    started_at timestamptz, finished_at timestamptz);
create type stent.mark_item as (
    execution_id uuid, status text, wake_at timestamptz, cancel_reason text, cancel_by timestamptz,
    code_digest text, blocked_digest text, blocked_reason text, release boolean);
create type stent.task_item as (
    execution_id uuid, call_id uuid, address text, function text, queue text, priority smallint,
    available_at timestamptz, attempt integer, is_page boolean, arguments bytea, options bytea,
    -- The worker runs it already: it was inline until its execution was handed over.
    own boolean);
create type stent.payload_item as (execution_id uuid, call_id uuid, payload bytea);
create type stent.call_item as (execution_id uuid, call_id uuid);
create type stent.child_item as (
    execution_id uuid, parent_id uuid, parent_address text, root_id uuid, function text, kind text,
    queue text, priority smallint, depth smallint, detached boolean, own boolean,
    wake_at timestamptz, started_at timestamptz, deadline_at timestamptz, seed bytea, tags text[], options bytea,
    arguments bytea, code_digest text);
create type stent.cancel_item as (execution_id uuid, target_id uuid, reason text);
create type stent.tell_item as (execution_id uuid, call_id uuid, address text, payload bytea);
create type stent.inbox_item as (execution_id uuid, inbox_id bigint);
create type stent.finish_item as (
    execution_id uuid, status text, ok boolean, payload bytea,
    parent_id uuid, parent_call_id uuid, parent_address text, parent_is_local boolean,
    -- It may have started executions that are still running.
    has_children boolean);
create type stent.settle_item as (
    execution_id uuid, call_id uuid, epoch bigint, address text, ok boolean, payload bytea,
    attempt integer, started_at timestamptz, finished_at timestamptz, is_local boolean);
create type stent.retry_item as (
    execution_id uuid, call_id uuid, epoch bigint, address text, attempt integer, payload bytea,
    started_at timestamptz, available_at timestamptz);
create type stent.segment_item as (
    execution_id uuid, call_id uuid, epoch bigint, segment integer, payload bytea);
create type stent.release_item as (execution_id uuid, call_id uuid, epoch bigint);
create type stent.flush_outcome as (
    fenced boolean, lost uuid[], busy uuid[], lost_tasks uuid[], busy_tasks uuid[],
    -- Owners with something new in an inbox; clients that wait for the execution at the same place of ended.
    workers uuid[], clients uuid[], ended uuid[]);

create function stent.flush(
    p_worker_id   uuid,
    p_incarnation bigint,
    p_flush       bigint,
    p_fences      stent.fence_item[],
    p_turns       stent.turn_item[],
    p_results     stent.result_item[],
    p_marks       stent.mark_item[],
    p_tasks       stent.task_item[],
    p_payloads    stent.payload_item[],
    p_drops       stent.call_item[],
    p_children    stent.child_item[],
    p_cancels     stent.cancel_item[],
    p_tells       stent.tell_item[],
    p_inbox       stent.inbox_item[],
    p_attempts    stent.retry_item[],
    p_finishes    stent.finish_item[],
    p_settles     stent.settle_item[],
    p_retries     stent.retry_item[],
    p_segments    stent.segment_item[],
    p_releases    stent.release_item[]
) returns stent.flush_outcome
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    held       uuid[] := '{}';
    held_tasks uuid[] := '{}';
    -- Nothing was lost or busy: spares a search of the held ids per row.
    all_held   boolean := true;
    all_tasks  boolean := true;
    settled    tid[] := '{}';
    settled_drops tid[];
    task_count integer;
    finished   uuid[] := '{}';
    client     uuid;
    mark       stent.mark_item;
    finish     stent.finish_item;
    retry      stent.retry_item;
    release    stent.release_item;
    woken      uuid[] := '{}';
    more       uuid[];
    outcome    stent.flush_outcome;
begin
    outcome := row(true, '{}', '{}', '{}', '{}', '{}', '{}', '{}');
    update stent.workers set flush = p_flush, skipped = null
     where worker_id = p_worker_id and incarnation = p_incarnation and flush = p_flush - 1;
    if not found then
        return outcome;
    end if;
    outcome.fenced := false;

    if cardinality(p_fences) > 0 then
        select coalesce(array_agg(s.execution_id), '{}') into held from (
            select e.execution_id
              from (select * from unnest(p_fences) order by execution_id) f
             cross join lateral (
                   select x.execution_id from stent.executions x
                    where x.execution_id = f.execution_id and x.epoch = f.epoch
                      -- Not an equation: the index on owners must not be chosen for it.
                      and x.worker_id is not distinct from p_worker_id and x.finished_at is null
                      -- Asked to stop and about to complete: its owner has to hear of it first.
                      and (x.cancel_reason is null or not exists (
                          select from unnest(p_finishes) d
                           where d.execution_id = x.execution_id and d.status in ('completed', 'failed')))
                      for no key update skip locked) e) s;
        all_held := cardinality(held) = cardinality(p_fences);
        if not all_held then
            select coalesce(array_agg(f.execution_id) filter (where e.execution_id is null), '{}'),
                   coalesce(array_agg(f.execution_id) filter (where e.execution_id is not null), '{}')
              into outcome.lost, outcome.busy
              from unnest(p_fences) f
              left join stent.executions e on e.execution_id = f.execution_id and e.epoch = f.epoch
                   and e.worker_id is not distinct from p_worker_id and e.finished_at is null
             where f.execution_id <> all (held);
        end if;
    end if;

    task_count := coalesce(cardinality(p_settles), 0) + coalesce(cardinality(p_retries), 0)
                  + coalesce(cardinality(p_segments), 0) + coalesce(cardinality(p_releases), 0);
    if task_count > 0 then
        select coalesce(array_agg(t.call_id), '{}'),
               coalesce(array_agg(t.tid) filter (where f.settles), '{}')
          into held_tasks, settled
          from (select execution_id, call_id, epoch, true as settles from unnest(p_settles)
                union all select execution_id, call_id, epoch, false from unnest(p_retries)
                union all select execution_id, call_id, epoch, false from unnest(p_releases)
                union all select execution_id, call_id, epoch, false from unnest(p_segments)
                order by execution_id, call_id) f
         cross join lateral (
               select x.call_id, x.ctid as tid from stent.tasks x
                where x.execution_id = f.execution_id and x.call_id = f.call_id
                  and x.epoch = f.epoch and x.worker_id = p_worker_id
                  for update skip locked) t;
        all_tasks := cardinality(held_tasks) = task_count;
        if not all_tasks then
            select coalesce(array_agg(f.call_id) filter (where t.call_id is null), '{}'),
                   coalesce(array_agg(f.call_id) filter (where t.call_id is not null), '{}')
              into outcome.lost_tasks, outcome.busy_tasks
              from (select execution_id, call_id, epoch from unnest(p_settles)
                    union all select execution_id, call_id, epoch from unnest(p_retries)
                    union all select execution_id, call_id, epoch from unnest(p_releases)
                    union all select execution_id, call_id, epoch from unnest(p_segments)) f
              left join stent.tasks t on t.execution_id = f.execution_id and t.call_id = f.call_id
                   and t.epoch = f.epoch and t.worker_id = p_worker_id
             where f.call_id <> all (held_tasks);
        end if;
    end if;

    if cardinality(p_turns) > 0 then
        insert into stent.journal (execution_id, position, payload)
        select execution_id, "position", payload from unnest(p_turns) where (all_held or execution_id = any (held));
    end if;
    if cardinality(p_results) > 0 then
        insert into stent.results
            (execution_id, call_id, address, ok, payload, attempt, started_at, finished_at, worker_id)
        select execution_id, call_id, address, ok, payload, attempt, started_at,
               coalesce(finished_at, clock_timestamp()), p_worker_id
          from unnest(p_results) where (all_held or execution_id = any (held))
        on conflict do nothing;
    end if;
    if cardinality(p_attempts) > 0 then
        insert into stent.attempts (execution_id, call_id, attempt, address, payload, started_at, worker_id)
        select execution_id, call_id, attempt, address, payload, started_at, p_worker_id
          from unnest(p_attempts) where (all_held or execution_id = any (held))
        on conflict do nothing;
    end if;
    if cardinality(p_tasks) > 0 then
        insert into stent.tasks
            (execution_id, call_id, address, function, queue, priority, available_at, worker_id, incarnation,
             epoch, attempt, is_page, arguments, options)
        select execution_id, call_id, address, function, queue, priority,
               coalesce(available_at, clock_timestamp()), case when own then p_worker_id end,
               case when own then p_incarnation end, case when own then 1 else 0 end, attempt, is_page,
               arguments, options
          from unnest(p_tasks) where (all_held or execution_id = any (held))
        on conflict do nothing;
    end if;
    if cardinality(p_payloads) > 0 then
        insert into stent.payloads (execution_id, call_id, payload)
        select execution_id, call_id, payload from unnest(p_payloads) where (all_held or execution_id = any (held))
        on conflict do nothing;
    end if;
    if cardinality(p_drops) > 0 then
        with found as (
            select t.tid, t.worker_id
              from (select * from unnest(p_drops) order by execution_id, call_id) d
             cross join lateral (
                   select x.ctid as tid, x.worker_id from stent.tasks x
                    where x.execution_id = d.execution_id and x.call_id = d.call_id for update) t
             where all_held or d.execution_id = any (held))
        select array_agg(tid),
               coalesce(array_agg(distinct worker_id) filter (where worker_id <> p_worker_id), '{}')
          into settled_drops, more from found;
        delete from stent.tasks where ctid = any (settled_drops);
        woken := woken || more;
    end if;
    if cardinality(p_children) > 0 then
        insert into stent.executions
            (execution_id, function, kind, status, queue, priority, worker_id, incarnation, epoch, wake_at,
             deadline_at, started_at, seed, key_seed, root_id, parent_id, parent_address, detached, depth,
             tags, options, code_digest)
        select execution_id, function, kind, case when own then 'running' else 'pending' end, queue,
               priority, case when own then p_worker_id end, case when own then p_incarnation end,
               case when own then 1 else 0 end,
               case when own then '-infinity' else coalesce(wake_at, clock_timestamp()) end,
               deadline_at, case when own then started_at end, seed, execution_id, root_id,
               parent_id, parent_address, detached, depth, tags, options, code_digest
          from unnest(p_children) where (all_held or parent_id = any (held))
        on conflict do nothing;
        insert into stent.payloads (execution_id, call_id, payload)
        select execution_id, '00000000-0000-0000-0000-000000000000', arguments
          from unnest(p_children) where (all_held or parent_id = any (held))
        on conflict do nothing;
    end if;
    if cardinality(p_cancels) > 0 then
        insert into stent.inbox (execution_id, kind, reason)
        select e.execution_id, 'cancel', c.reason
          from unnest(p_cancels) c
         cross join lateral (select x.* from stent.executions x where x.execution_id = c.target_id offset 0) e
         where (all_held or c.execution_id = any (held)) and e.finished_at is null;
        select coalesce(array_agg(distinct e.worker_id), '{}') into more
          from unnest(p_cancels) c
         cross join lateral (select x.* from stent.executions x where x.execution_id = c.target_id offset 0) e
         where e.worker_id is not null;
        woken := woken || more;
    end if;
    if cardinality(p_tells) > 0 then
        insert into stent.tells (execution_id, call_id, address, payload)
        select execution_id, call_id, address, payload from unnest(p_tells)
         where (all_held and all_tasks) or execution_id = any (held) or call_id = any (held_tasks)
        on conflict do nothing;
    end if;
    if cardinality(p_inbox) > 0 then
        delete from stent.inbox
         where inbox_id = any (array(select d.inbox_id from unnest(p_inbox) d
                                      where all_held or d.execution_id = any (held)));
    end if;
    if cardinality(p_marks) > 0 then
        foreach mark in array p_marks loop
            continue when not (all_held or mark.execution_id = any (held));
            update stent.executions e
               set status = coalesce(mark.status, e.status), wake_at = mark.wake_at,
                   cancel_reason = coalesce(e.cancel_reason, mark.cancel_reason),
                   cancel_by = coalesce(e.cancel_by, mark.cancel_by),
                   code_digest = coalesce(mark.code_digest, e.code_digest),
                   blocked_digest = mark.blocked_digest, blocked_reason = mark.blocked_reason,
                   worker_id = case when mark.release then null else e.worker_id end,
                   incarnation = case when mark.release then null else e.incarnation end,
                   epoch = e.epoch + case when mark.release then 1 else 0 end
             where e.execution_id = mark.execution_id;
        end loop;
    end if;
    if cardinality(p_finishes) > 0 then
        foreach finish in array p_finishes loop
            continue when not (all_held or finish.execution_id = any (held));
            update stent.executions e
               set status = finish.status, finished_at = clock_timestamp(), wake_at = null,
                   worker_id = null, incarnation = null, epoch = e.epoch + 1,
                   blocked_digest = null, blocked_reason = null
             where e.execution_id = finish.execution_id
            returning e.client_id into client;
            finished := finished || finish.execution_id;
            if client is not null then
                outcome.clients := outcome.clients || client;
                outcome.ended := outcome.ended || finish.execution_id;
            end if;
        end loop;
        insert into stent.results (execution_id, call_id, address, ok, payload, worker_id)
        select execution_id, '00000000-0000-0000-0000-000000000000', '', ok, payload, p_worker_id
          from unnest(p_finishes) where execution_id = any (finished) and payload is not null
        on conflict do nothing;
        if exists (select from unnest(p_finishes) where parent_call_id is not null) then
            perform stent.report_to_parents(p_finishes, finished, p_worker_id);
            select coalesce(array_agg(distinct e.worker_id), '{}') into more
              from unnest(p_finishes) f
             cross join lateral (select x.* from stent.executions x where x.execution_id = f.parent_id offset 0) e
             where not f.parent_is_local and e.worker_id is not null;
            woken := woken || more;
        end if;
        if exists (select from unnest(p_finishes) where has_children) then
            woken := woken || stent.cancel_children(finished);
        end if;
        delete from stent.inbox where execution_id = any (finished);
    end if;

    if cardinality(p_settles) > 0 then
        delete from stent.tasks where ctid = any (settled);
        insert into stent.results
            (execution_id, call_id, address, ok, payload, attempt, started_at, finished_at, worker_id)
        select execution_id, call_id, address, ok, payload, attempt, started_at, finished_at, p_worker_id
          from unnest(p_settles) where (all_tasks or call_id = any (held_tasks))
        on conflict do nothing;
        if exists (select from unnest(p_settles) where not is_local) then
            insert into stent.inbox (execution_id, kind, call_id)
            select s.execution_id, 'result', s.call_id
              from unnest(p_settles) s
             cross join lateral (select x.* from stent.executions x where x.execution_id = s.execution_id offset 0) e
             where (all_tasks or s.call_id = any (held_tasks)) and not s.is_local and e.finished_at is null;
            select coalesce(array_agg(distinct e.worker_id), '{}') into more
              from unnest(p_settles) s
             cross join lateral (select x.* from stent.executions x where x.execution_id = s.execution_id offset 0) e
             where not s.is_local and e.worker_id is not null;
            woken := woken || more;
        end if;
    end if;
    if cardinality(p_retries) > 0 then
        foreach retry in array p_retries loop
            continue when not (all_tasks or retry.call_id = any (held_tasks));
            update stent.tasks t
               set worker_id = null, incarnation = null, epoch = t.epoch + 1, attempt = retry.attempt + 1,
                   available_at = retry.available_at
             where t.execution_id = retry.execution_id and t.call_id = retry.call_id;
        end loop;
        insert into stent.attempts (execution_id, call_id, attempt, address, payload, started_at, worker_id)
        select execution_id, call_id, attempt, address, payload, started_at, p_worker_id
          from unnest(p_retries) where (all_tasks or call_id = any (held_tasks))
        on conflict do nothing;
    end if;
    if cardinality(p_segments) > 0 then
        insert into stent.segments (execution_id, call_id, segment, payload)
        select execution_id, call_id, segment, payload
          from unnest(p_segments) where (all_tasks or call_id = any (held_tasks))
        on conflict do nothing;
    end if;
    if cardinality(p_releases) > 0 then
        foreach release in array p_releases loop
            continue when not (all_tasks or release.call_id = any (held_tasks));
            update stent.tasks t
               set worker_id = null, incarnation = null, epoch = t.epoch + 1, available_at = clock_timestamp()
             where t.execution_id = release.execution_id and t.call_id = release.call_id;
        end loop;
    end if;

    outcome.workers := array(select distinct unnest(woken));
    if cardinality(outcome.lost) + cardinality(outcome.busy)
       + cardinality(outcome.lost_tasks) + cardinality(outcome.busy_tasks) > 0 then
        update stent.workers
           set skipped = jsonb_build_object('lost', outcome.lost, 'busy', outcome.busy,
                   'lost_tasks', outcome.lost_tasks, 'busy_tasks', outcome.busy_tasks)
         where worker_id = p_worker_id;
    end if;
    return outcome;
end $$;

-- A child's outcome is a result of its parent's call.
create function stent.report_to_parents(p_finishes stent.finish_item[], p_finished uuid[], p_worker_id uuid)
    returns void language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
begin
    insert into stent.results (execution_id, call_id, address, ok, payload, worker_id)
    select parent_id, parent_call_id, parent_address, ok, payload, p_worker_id
      from unnest(p_finishes)
     where execution_id = any (p_finished) and parent_call_id is not null and payload is not null
    on conflict do nothing;
    -- Its result may have been in the table before: the call of an activity execution.
    insert into stent.inbox (execution_id, kind, call_id)
    select f.parent_id, 'result', f.parent_call_id
      from unnest(p_finishes) f
     cross join lateral (select x.* from stent.executions x where x.execution_id = f.parent_id offset 0) e
     where f.execution_id = any (p_finished) and f.parent_call_id is not null
       and not f.parent_is_local and e.finished_at is null;
end $$;

-- What finished executions started and did not see finish is asked to stop; returns its owners. What has
-- not begun ends here: a claim that was first has committed, and is seen by the second statement.
create function stent.cancel_children(p_finished uuid[]) returns uuid[]
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    owners    uuid[];
    unstarted tid[];
begin
    unstarted := array(
        select ctid from stent.executions
         where parent_id = any (p_finished) and not detached and finished_at is null
           and worker_id is null and started_at is null
         order by execution_id for no key update);
    update stent.executions
       set status = 'cancelled', finished_at = clock_timestamp(), wake_at = null, cancel_reason = 'parent',
           epoch = epoch + 1
     where ctid = any (unstarted);
    with children as (
        select execution_id, worker_id from stent.executions
         where parent_id = any (p_finished) and not detached and finished_at is null),
    asked as (
        insert into stent.inbox (execution_id, kind, reason)
        select execution_id, 'cancel', 'parent' from children)
    select coalesce(array_agg(distinct worker_id), '{}') into owners
      from children where worker_id is not null;
    return owners;
end $$;

-- Free what a lost worker held. Only who bumps the incarnation from p_incarnation does it.
create function stent.take_over(p_worker_id uuid, p_incarnation bigint, p_state text)
    returns table (executions bigint, tasks bigint)
    language plpgsql set search_path = pg_catalog as $$
begin
    update stent.workers set incarnation = incarnation + 1, skipped = null
     where worker_id = p_worker_id and incarnation = p_incarnation;
    if not found then
        return;
    end if;
    update stent.worker_claims set incarnation = p_incarnation + 1 where worker_id = p_worker_id;
    update stent.executions e
       set worker_id = null, incarnation = null, epoch = e.epoch + 1
     where e.worker_id = p_worker_id;
    get diagnostics executions = row_count;
    update stent.tasks t
       set worker_id = null, incarnation = null, epoch = t.epoch + 1, available_at = clock_timestamp()
     where t.worker_id = p_worker_id;
    get diagnostics tasks = row_count;
    update stent.leases set state = p_state where worker_id = p_worker_id;
    return next;
end $$;

-- Delete what outlived its execution: inbox rows that came while it ended, tasks that nobody holds.
create function stent.tidy(p_count integer) returns bigint
    language plpgsql set search_path = pg_catalog as $$
declare
    rows  bigint;
    tasks bigint;
begin
    delete from stent.inbox where inbox_id in (
        select i.inbox_id from stent.inbox i join stent.executions e on e.execution_id = i.execution_id
         where e.finished_at is not null limit p_count);
    get diagnostics rows = row_count;
    delete from stent.tasks t using (
        select x.execution_id, x.call_id from stent.tasks x join stent.executions e on e.execution_id = x.execution_id
         where e.finished_at is not null and x.worker_id is null
         order by x.execution_id, x.call_id limit p_count for update of x skip locked) d
     where t.execution_id = d.execution_id and t.call_id = d.call_id;
    get diagnostics tasks = row_count;
    return rows + tasks;
end $$;

-- Names a call within its execution; the worker computes the same.
create function stent.call_id(p_execution_id uuid, p_address text) returns uuid
    language sql immutable parallel safe set search_path = pg_catalog
    return md5(p_execution_id::text || p_address)::uuid;

-- End executions whose time is over and that nobody ends; returns what was ended.
create function stent.sweep(p_count integer, p_grace interval, p_cancelled bytea, p_timed_out bytea)
    returns table (ended_id uuid, ended_status text, ended_client uuid, ended_workers uuid[])
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    due     record;
    reason  text;
    outcome bytea;
    reached uuid[];
begin
    for due in
        select e.* from stent.executions e
         where e.finished_at is null and e.execution_id in (
               (select d.execution_id from stent.executions d
                 where d.cancel_by < clock_timestamp() and d.finished_at is null
                 order by d.cancel_by limit p_count)
               union all
               (select d.execution_id from stent.executions d
                 where d.deadline_at < clock_timestamp()
                   and (d.started_at is null or d.deadline_at < clock_timestamp() - p_grace)
                   and d.finished_at is null order by d.deadline_at limit p_count)
               union all
               (select i.execution_id from stent.inbox i
                 where i.kind = 'cancel' and i.created_at < clock_timestamp() - p_grace
                 order by i.created_at limit p_count))
         order by e.execution_id limit p_count
         for no key update of e skip locked
    loop
        reason := coalesce(due.cancel_reason, case when due.deadline_at < clock_timestamp()
                                                   then 'timeout' else 'cancel' end);
        outcome := case reason when 'timeout' then p_timed_out else p_cancelled end;
        ended_id := due.execution_id;
        ended_status := case reason when 'timeout' then 'timed_out' else 'cancelled' end;
        ended_client := due.client_id;
        update stent.executions e
           set status = ended_status, finished_at = clock_timestamp(), wake_at = null, worker_id = null,
               incarnation = null, epoch = e.epoch + 1, cancel_reason = reason
         where e.execution_id = ended_id;
        insert into stent.results (execution_id, call_id, address, ok, payload)
        values (ended_id, '00000000-0000-0000-0000-000000000000', '', false, outcome)
        on conflict do nothing;
        reached := stent.cancel_children(array[ended_id]);
        if due.parent_id is not null and not due.detached then
            perform stent.report_to_parents(array[row(
                ended_id, ended_status, false, outcome, due.parent_id,
                stent.call_id(due.parent_id, due.parent_address), due.parent_address, false, true
                )::stent.finish_item], array[ended_id], null);
        end if;
        delete from stent.inbox i where i.execution_id = ended_id;
        select coalesce(array_agg(distinct w), '{}') into ended_workers from (
            select unnest(reached) as w union all select due.worker_id
            union all select p.worker_id from stent.executions p where p.execution_id = due.parent_id) o
         where w is not null;
        return next;
    end loop;
end $$;

-- Up to p_count ready tasks, at most p_share of one (queue, function), highest priority first.
-- Tasks of finished executions are dropped instead. p_low: no task that became available earlier is looked
-- at, so that a claim does not walk over what earlier ones have taken. Index: tasks_ready_idx, probed per (queue, function).
create function stent.claim_tasks(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_functions text[], p_count integer, p_low timestamptz)
    returns table (execution_id uuid, call_id uuid, address text, function text, epoch bigint, attempt integer,
                   is_page boolean, arguments bytea, options bytea, owner uuid, key_seed uuid, root_id uuid,
                   parent_id uuid, tags text[], priority smallint, available_at timestamptz)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    ready tid[];
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    ready := array(
        select r.tid
          from unnest(p_queues) q(queue) cross join unnest(p_functions) f(function)
          cross join lateral (
              select t.ctid as tid, t.priority, t.available_at from stent.tasks t
               where t.queue = q.queue and t.function = f.function and t.worker_id is null
                 and t.available_at between p_low and now()
               order by t.priority desc, t.available_at
               limit p_count for update skip locked) r
         order by r.priority desc, r.available_at limit p_count);
    delete from stent.tasks t
     where t.ctid = any (ready)
       and coalesce((select e.finished_at is not null from stent.executions e
                      where e.execution_id = t.execution_id), true);
    return query
    with claimed as (
        update stent.tasks t
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = t.epoch + 1
         where t.ctid = any (ready)
        returning t.*)
    select c.execution_id, c.call_id, c.address, c.function, c.epoch, c.attempt, c.is_page,
           coalesce(c.arguments, (select p.payload from stent.payloads p
                                   where p.execution_id = c.execution_id and p.call_id = c.call_id)),
           c.options, e.worker_id, e.key_seed, e.root_id, e.parent_id, e.tags, c.priority, c.available_at
      from claimed c
     cross join lateral (select x.* from stent.executions x where x.execution_id = c.execution_id offset 0) e;
end $$;

-- Up to p_count executions that have something to do and no owner. p_thorough looks at those, too, that
-- only their inbox wakes, and at those that other code has blocked.
-- Index: executions_ready_idx, executions_blocked_idx, inbox_execution_idx.
create function stent.claim_executions(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_functions text[], p_digests text[], p_count integer, p_thorough boolean)
    returns table (execution_id uuid, function text, kind text, status text, queue text, priority smallint,
                   epoch bigint, created_at timestamptz, started_at timestamptz, deadline_at timestamptz,
                   cancel_by timestamptz, cancel_reason text, seed bytea, key_seed uuid, root_id uuid,
                   parent_id uuid, parent_address text, detached boolean, depth smallint, code_digest text,
                   blocked_digest text, tags text[], options bytea, arguments bytea)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    ready  uuid[];
    locked tid[];
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    ready := array(
        select r.execution_id
          from unnest(p_queues) q(queue) cross join unnest(p_functions) f(function)
          cross join lateral (
              select e.execution_id, e.priority, e.wake_at from stent.executions e
               where e.queue = q.queue and e.function = f.function and e.worker_id is null
                 and e.wake_at <= now()
               order by e.priority desc, e.wake_at
               limit p_count for no key update skip locked) r
         order by r.priority desc, r.wake_at limit p_count);
    if p_thorough then
        ready := ready || array(
            select e.execution_id
              from (select distinct execution_id from stent.inbox) i
             cross join lateral (
                  select x.* from stent.executions x where x.execution_id = i.execution_id offset 0) e
             where e.worker_id is null and e.finished_at is null and e.status <> 'blocked'
               and e.queue = any (p_queues) and e.function = any (p_functions)
             limit p_count)
        || array(
            select e.execution_id
              from unnest(p_functions, p_digests) d(function, digest)
             cross join lateral (
                  select x.* from stent.executions x
                   where x.function = d.function and x.status = 'blocked' offset 0) e
             where e.worker_id is null and e.queue = any (p_queues)
               and (e.blocked_digest <> d.digest
                    or exists (select from stent.inbox i
                                where i.execution_id = e.execution_id and i.kind = 'cancel'))
             limit p_count);
    end if;
    locked := array(
        select e.tid
          from (select distinct r.execution_id from unnest(ready) r(execution_id) order by 1) r
         cross join lateral (
              select x.ctid as tid from stent.executions x
               where x.execution_id = r.execution_id and x.worker_id is null and x.finished_at is null
                 for no key update skip locked) e
         limit p_count);
    return query
    with claimed as (
        update stent.executions e
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = e.epoch + 1,
               status = case e.status when 'pending' then 'running' else e.status end,
               started_at = coalesce(e.started_at, clock_timestamp()), wake_at = '-infinity',
               code_digest = coalesce(e.code_digest, p_digests[array_position(p_functions, e.function)])
         where e.ctid = any (locked)
        returning e.*)
    select c.execution_id, c.function, c.kind, c.status, c.queue, c.priority, c.epoch, c.created_at,
           c.started_at, c.deadline_at, c.cancel_by,
           case c.status when 'blocked' then coalesce(c.cancel_reason,
               (select i.reason from stent.inbox i
                 where i.execution_id = c.execution_id and i.kind = 'cancel' limit 1))
                else c.cancel_reason end, c.seed, c.key_seed, c.root_id,
           c.parent_id, c.parent_address, c.detached, c.depth, c.code_digest, c.blocked_digest, c.tags,
           c.options, p.payload
      from claimed c
     cross join lateral (
           select x.payload from stent.payloads x
            where x.execution_id = c.execution_id and x.call_id = '00000000-0000-0000-0000-000000000000'
           offset 0) p
     order by c.priority desc, c.execution_id;
end $$;

-- Plain payloads for people: codec id 1 is JSON in UTF-8.
create function stent.plain(p_payload bytea) returns text
    language sql immutable parallel safe set search_path = pg_catalog
    return case when get_byte(p_payload, 0) = 1 then convert_from(substring(p_payload from 2), 'UTF8') end;
create view stent.plain_results as
    select execution_id, address, ok, attempt, started_at, finished_at, worker_id, stent.plain(payload) as payload
      from stent.results;
create view stent.plain_journal as
    select execution_id, position, recorded_at, convert_from(payload, 'UTF8') as payload from stent.journal;
