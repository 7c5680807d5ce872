-- A claim that meets what ended executions have left looks again.
--
-- It deleted these rows and returned the others, fewer than it was asked for: the worker took that for all there was,
-- and what came after waited for the next look from the beginning, or for stent.tidy.

-- As in 0015, except for that: all that these executions have left goes with the first of it. Locks: workers, tasks.
-- Index: tasks_ready_idx, probed per (queue, function, priority) and per gap; tasks_pkey.
create or replace function stent.claim_tasks_between(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_functions text[], p_priorities smallint[], p_count integer, p_low timestamptz,
    p_above integer, p_waited double precision)
    returns table (execution_id uuid, call_id uuid, address text, function text, epoch bigint, attempt integer,
                   is_page boolean, arguments bytea, options bytea, owner uuid, key_seed uuid, root_id uuid,
                   parent_id uuid, tags text[], priority smallint, available_at timestamptz, queue text)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    ready tid[];
    ended uuid[];
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    for tries in 1..20 loop
        ready := array(
            with recursive others as (
                select q.queue, f.function, g.above, n.priority
                  from unnest(p_queues) q(queue) cross join unnest(p_functions) f(function)
                 cross join lateral (
                       select greatest(u.above, p_above) as above, u.below
                         from unnest(array[-32769] || p_priorities::integer[], p_priorities::integer[] || array[32768])
                              as u (above, below)
                        where u.below > p_above) g
                 cross join lateral (
                       select t.priority from stent.tasks t
                        where t.queue = q.queue and t.function = f.function
                          and t.priority > g.above and t.priority < g.below
                        order by t.priority desc limit 1) n
                union all
                select o.queue, o.function, o.above, n.priority
                  from others o
                 cross join lateral (
                       select t.priority from stent.tasks t
                        where t.queue = o.queue and t.function = o.function
                          and t.priority > o.above and t.priority < o.priority
                        order by t.priority desc limit 1) n),
            lines as (
                select q.queue, f.function, p.priority
                  from unnest(p_queues) q(queue) cross join unnest(p_functions) f(function)
                 cross join unnest(p_priorities) p(priority)
                 where p.priority > p_above
                union all
                select o.queue, o.function, o.priority from others o)
            select r.tid
              from lines l
             cross join lateral (
                  select t.ctid as tid, t.priority, t.available_at from stent.tasks t
                   where t.queue = l.queue and t.function = l.function and t.priority = l.priority
                     and t.worker_id is null and t.available_at between p_low and now() - make_interval(secs => p_waited)
                   order by t.available_at
                   limit p_count for update skip locked) r
             order by r.priority desc, r.available_at limit p_count);
        with dead as (
            delete from stent.tasks t
             where t.ctid = any (ready)
               and coalesce((select e.finished_at is not null from stent.executions e
                              where e.execution_id = t.execution_id), true)
            returning t.execution_id)
        select array_agg(distinct d.execution_id) into ended from dead d;
        exit when ended is null;
        delete from stent.tasks t
         where t.ctid = any (array(
               select x.ctid from stent.tasks x
                where x.execution_id = any (ended) and x.worker_id is null
                limit 5000 for update skip locked));
    end loop;
    return query
    with claimed as (
        update stent.tasks t
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = t.epoch + 1
         where t.ctid = any (ready)
        returning t.*)
    select c.execution_id, c.call_id, c.address, c.function, c.epoch, c.attempt, c.is_page,
           coalesce(c.arguments, (select p.payload from stent.payloads p
                                   where p.execution_id = c.execution_id and p.call_id = c.call_id)),
           c.options, e.worker_id, e.key_seed, e.root_id, e.parent_id, e.tags, c.priority, c.available_at, c.queue
      from claimed c
     cross join lateral (select x.* from stent.executions x where x.execution_id = c.execution_id offset 0) e;
end $$;
