-- How much waits where: what scalers, dashboards and people read. docs/reference/sql.md is its documentation.
--
-- A count of a million rows takes a tenth of a second and reads all of them, every few seconds, for somebody who
-- only wants to know that there are many. So counting stops: lines (queue, function, priority) are found by jumping
-- from one to the next in the ready indexes, and in each line the rows of one time range are adjacent, so that a
-- count of up to p_rows_max rows reads no others. Many lines share ten times that, but each gets 100 rows.
-- What the planner knows of these tables is not used: docs/decisions/0013.
--
-- Locks: none. Index: tasks_ready_idx, executions_ready_idx, executions_owner_idx, inbox_pkey, executions_pkey.
-- security definer: who may read the view needs no right on the tables, which hold payloads.
create function stent.count_queues(p_rows_max integer)
    returns table (queue text, function text, kind text, ready bigint, scheduled bigint, running bigint,
                   waiting bigint, oldest_ready_seconds double precision, capped boolean)
    language plpgsql stable security definer set search_path = pg_catalog
    set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    lines_max constant integer := 10000;
    returned_max constant integer := 100;
    at    timestamptz := clock_timestamp();
    -- What others hold will be taken over: it is ready.
    alive uuid[] := array(select l.worker_id from stent.leases l
                           where l.state in ('running', 'draining') and l.expires_at > at);
begin
    return query
    with recursive
    task_lines as (
        (select t.queue, t.function, t.priority from stent.tasks t
          order by t.queue, t.function, t.priority desc limit 1)
        union all
        select n.queue, n.function, n.priority from task_lines l cross join lateral (
            (select 1 as place, t.queue, t.function, t.priority from stent.tasks t
              where t.queue = l.queue and t.function = l.function and t.priority < l.priority
              order by t.queue, t.function, t.priority desc limit 1)
            union all
            (select 2, t.queue, t.function, t.priority from stent.tasks t
              where (t.queue, t.function) > (l.queue, l.function)
              order by t.queue, t.function, t.priority desc limit 1)
            order by place limit 1) n),
    execution_lines as (
        (select e.queue, e.function, e.priority from stent.executions e
          where e.worker_id is null and e.wake_at is not null
          order by e.queue, e.function, e.priority desc limit 1)
        union all
        select n.queue, n.function, n.priority from execution_lines l cross join lateral (
            (select 1 as place, e.queue, e.function, e.priority from stent.executions e
              where e.worker_id is null and e.wake_at is not null
                and e.queue = l.queue and e.function = l.function and e.priority < l.priority
              order by e.queue, e.function, e.priority desc limit 1)
            union all
            (select 2, e.queue, e.function, e.priority from stent.executions e
              where e.worker_id is null and e.wake_at is not null
                and (e.queue, e.function) > (l.queue, l.function)
              order by e.queue, e.function, e.priority desc limit 1)
            order by place limit 1) n),
    owners as (
        (select e.worker_id from stent.executions e where e.worker_id is not null order by e.worker_id limit 1)
        union all
        select n.worker_id from owners o cross join lateral (
            select e.worker_id from stent.executions e where e.worker_id > o.worker_id
             order by e.worker_id limit 1) n),
    task_limit as (
        select least(p_rows_max, greatest(100, 10 * p_rows_max / greatest(1, count(*)))) as rows from task_lines),
    execution_limit as (
        select least(p_rows_max, greatest(100, 10 * p_rows_max / greatest(1, count(*)))) as rows from execution_lines),
    owner_limit as (
        select least(p_rows_max, greatest(100, 10 * p_rows_max / greatest(1, count(*)))) as rows from owners),
    task_counts as (
        select l.queue, l.function, 'task' as kind, r.ready, s.scheduled, r.running, 0::bigint as waiting,
               r.oldest, r.looked_at >= m.rows or s.scheduled >= m.rows as capped
          from (select * from task_lines limit lines_max) l cross join task_limit m
         cross join lateral (
               select count(*) filter (where not t.held) as ready, count(*) filter (where t.held) as running,
                      count(*) as looked_at, min(t.available_at) filter (where not t.held) as oldest
                 from (select coalesce(x.worker_id = any (alive), false) as held, x.available_at
                         from stent.tasks x
                        where x.queue = l.queue and x.function = l.function and x.priority = l.priority
                          and x.available_at <= at
                        order by x.queue, x.function, x.priority desc, x.available_at limit m.rows) t) r
         cross join lateral (
               select count(*) as scheduled
                 from (select from stent.tasks x
                        where x.queue = l.queue and x.function = l.function and x.priority = l.priority
                          and x.available_at > at
                        order by x.queue, x.function, x.priority desc, x.available_at limit m.rows) t) s),
    free_counts as (
        select l.queue, l.function, 'execution', r.ready, s.scheduled, 0::bigint, 0::bigint,
               least(r.oldest, b.oldest), r.ready >= m.rows or s.scheduled >= m.rows
          from (select * from execution_lines limit lines_max) l cross join execution_limit m
         cross join lateral (
               select count(*) as ready, min(e.wake_at) filter (where e.wake_at > '-infinity') as oldest
                 from (select x.wake_at from stent.executions x
                        where x.worker_id is null and x.wake_at is not null
                          and x.queue = l.queue and x.function = l.function and x.priority = l.priority
                          and x.wake_at <= at
                        order by x.queue, x.function, x.priority desc, x.wake_at limit m.rows) e) r
         cross join lateral (
               select count(*) as scheduled
                 from (select from stent.executions x
                        where x.worker_id is null and x.wake_at is not null
                          and x.queue = l.queue and x.function = l.function and x.priority = l.priority
                          and x.wake_at > at
                        order by x.queue, x.function, x.priority desc, x.wake_at limit m.rows) e) s
         -- Those that a worker gave back or lost have no instant: they are as old as their last turn.
         cross join lateral (
               select min(coalesce(e.turned_at, e.created_at)) as oldest
                 from (select x.created_at, (select j.recorded_at from stent.journal j
                                              where j.execution_id = x.execution_id
                                              order by j.position desc limit 1) as turned_at
                         from stent.executions x
                        where x.worker_id is null and x.wake_at is not null
                          and x.queue = l.queue and x.function = l.function and x.priority = l.priority
                          and x.wake_at = '-infinity'
                        order by x.queue, x.function, x.priority desc, x.wake_at limit returned_max) e) b),
    -- Nobody owns them and their time has not come, but something is in their inbox.
    woken_counts as (
        select e.queue, e.function, 'execution', count(*), - count(*) filter (where e.wake_at is not null), 0::bigint,
               0::bigint, min(i.arrived_at), bool_or(i.capped)
          from (select n.execution_id, min(n.created_at) as arrived_at, sum(count(*)) over () >= p_rows_max as capped
                  from (select x.execution_id, x.created_at from stent.inbox x
                         order by x.inbox_id limit p_rows_max) n
                 group by n.execution_id) i
         cross join lateral (
               select x.* from stent.executions x where x.execution_id = i.execution_id offset 0) e
         where e.worker_id is null and e.finished_at is null and e.status <> 'blocked'
           and (e.wake_at is null or e.wake_at > at)
         group by e.queue, e.function),
    owned_counts as (
        select e.queue, e.function, 'execution',
               count(*) filter (where not o.is_alive and e.wake_at <= at),
               count(*) filter (where not o.is_alive and e.wake_at > at),
               count(*) filter (where o.is_alive and e.wake_at <= at),
               count(*) filter (where o.is_alive and coalesce(e.wake_at > at, true)),
               min(e.wake_at) filter (where not o.is_alive and e.wake_at <= at and e.wake_at > '-infinity'),
               bool_or(e.looked_at >= m.rows)
          from (select worker_id, worker_id = any (alive) as is_alive from owners limit lines_max) o
         cross join owner_limit m
         cross join lateral (
               select y.queue, y.function, y.wake_at, count(*) over () as looked_at
                 from (select x.queue, x.function, x.wake_at from stent.executions x
                        where x.worker_id = o.worker_id limit m.rows) y) e
         group by e.queue, e.function)
    select c.queue, c.function, c.kind, sum(c.ready)::bigint, greatest(0, sum(c.scheduled))::bigint,
           sum(c.running)::bigint, sum(c.waiting)::bigint,
           extract(epoch from at - min(c.oldest))::double precision, bool_or(c.capped)
      from (select * from task_counts union all select * from free_counts
            union all select * from woken_counts union all select * from owned_counts) c
     group by c.queue, c.function, c.kind
     order by c.queue, c.function, c.kind;
end $$;

create view stent.queue_depth as select * from stent.count_queues(10000);

comment on view stent.queue_depth is
    'How much waits and runs, per queue, function and kind; counts stop, see capped';
comment on column stent.queue_depth.kind is 'task: activities and pages of maps; execution: workflows and dispatched activities';
comment on column stent.queue_depth.ready is 'could be claimed now; held by a lost worker included';
comment on column stent.queue_depth.scheduled is 'will be ready later: retries, delays, sleeping executions that no worker holds';
comment on column stent.queue_depth.running is 'held by a live worker';
comment on column stent.queue_depth.waiting is 'executions in the memory of a live worker that wait for something';
comment on column stent.queue_depth.oldest_ready_seconds is 'for how long the oldest ready one has been ready; null: nothing is ready';
comment on column stent.queue_depth.capped is 'counting stopped: there are at least as many as the counts say';
