-- Claims that do not walk over what earlier ones have taken, while an old transaction keeps it from being removed.
--
-- In the ready index the rows of one priority are ordered by when they became available, so that a low mark skips
-- all that was taken before it, but only within a priority that is named: before PostgreSQL 18 an index scan reads
-- the entries of all of them. A row of a priority that the worker does not name is found by the claims that look
-- at everything, a few seconds apart at most.
--
-- Otherwise both functions are claim_tasks of 0001.

-- Up to p_count ready tasks, highest priority first, of the priorities named. p_low: no task that became available
-- earlier is looked at. Locks: workers, tasks. Index: tasks_ready_idx, probed per (queue, function, priority).
create function stent.claim_tasks_above(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_functions text[], p_priorities smallint[], p_count integer, p_low timestamptz)
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
          cross join unnest(p_priorities) p(priority)
          cross join lateral (
              select t.ctid as tid, t.priority, t.available_at from stent.tasks t
               where t.queue = q.queue and t.function = f.function and t.priority = p.priority
                 and t.worker_id is null and t.available_at between p_low and now()
               order by t.available_at
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

-- The same for all priorities, found by jumping from one to the next: a million tasks that are not ready yet are no
-- obstacle. Index: tasks_ready_idx.
create or replace function stent.claim_tasks(
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
        with recursive lines as (
            select q.queue, f.function, n.priority
              from unnest(p_queues) q(queue) cross join unnest(p_functions) f(function)
             cross join lateral (
                   select t.priority from stent.tasks t
                    where t.queue = q.queue and t.function = f.function
                    order by t.priority desc limit 1) n
            union all
            select l.queue, l.function, n.priority
              from lines l
             cross join lateral (
                   select t.priority from stent.tasks t
                    where t.queue = l.queue and t.function = l.function and t.priority < l.priority
                    order by t.priority desc limit 1) n)
        select r.tid
          from lines l
          cross join lateral (
              select t.ctid as tid, t.priority, t.available_at from stent.tasks t
               where t.queue = l.queue and t.function = l.function and t.priority = l.priority
                 and t.worker_id is null and t.available_at between p_low and now()
               order by t.available_at
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
