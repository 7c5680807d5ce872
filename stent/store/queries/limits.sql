-- name: declare_limits
select stent.declare_limits_of(
    :worker_id, cast(:names as text[]), cast(:max_concurrent as integer[]), cast(:rates as double precision[]),
    cast(:bursts as integer[]), cast(:keyed as boolean[]))

-- name: settle_declared_limits
select stent.settle_declared_limits()

-- name: load_limits
-- All of them: a fleet has dozens, not thousands.
select name, max_concurrent, rate_per_second, burst, keyed, paused
  from stent.limits
 where max_concurrent is not null or rate_per_second is not null or paused
 order by name limit 10000

-- name: adjust_grants
select name, slots, tokens, tokens_in, waiters from stent.adjust_grants(
    :worker_id, :incarnation, cast(:names as text[]), cast(:used as integer[]), cast(:wanted as integer[]),
    cast(:tokens as integer[]))

-- name: release_later
-- Give back a task whose attempt asked to be made again: it keeps its number.
update stent.tasks
   set worker_id = null, incarnation = null, epoch = epoch + 1,
       available_at = clock_timestamp() + cast(:delay as interval)
 where execution_id = :execution_id and call_id = :call_id and epoch = :epoch and worker_id = :worker_id
returning call_id

-- name: close_buckets
-- Somebody was told to come back later.
update stent.limits set closed_until = greatest(closed_until, clock_timestamp() + cast(:delay as interval))
 where name = any (cast(:names as text[])) and rate_per_second is not null

-- name: ready_lanes
-- Which of these pairs have a task that could be claimed.
select l.queue, l.function
  from unnest(cast(:queues as text[]), cast(:functions as text[]), cast(:lows as timestamptz[]))
       as l (queue, function, low)
 where stent.is_ready(l.queue, l.function, l.low, cast(:priorities as smallint[]))

-- name: claim_keyed_tasks
with c as materialized (select * from stent.claim_keyed_tasks_after(
    :worker_id, :incarnation, :claim, :queue, :function, :count, :after)),
s as materialized (select stent.any_suspects() as suspects from (select count(*) from c) as claimed)
select c.*, s.suspects from c cross join s

-- name: claim_limited_executions
with c as materialized (select * from stent.claim_limited_executions_after(
    :worker_id, :incarnation, :claim, cast(:queues as text[]), :function, :digest, :count, :after, :thorough)),
s as materialized (select stent.any_suspects() as suspects from (select count(*) from c) as claimed)
select c.*, s.suspects from c cross join s

-- name: claim_stopping_executions
with c as materialized (select * from stent.claim_stopping_executions(
    :worker_id, :incarnation, :claim, cast(:queues as text[]), cast(:functions as text[]),
    cast(:digests as text[]), :count)),
s as materialized (select stent.any_suspects() as suspects from (select count(*) from c) as claimed)
select c.*, s.suspects from c cross join s

-- name: set_limit
-- Null: no such limit; what is kept stays as it is. What the code declares is kept for reset_limit.
insert into stent.limits as l (name, max_concurrent, rate_per_second, burst, is_set)
values (:limit_name, cast(:max_concurrent as integer), cast(:rate as double precision), cast(:burst as integer), true)
on conflict (name) do update
   set max_concurrent = case when :keep_slots then l.max_concurrent else excluded.max_concurrent end,
       rate_per_second = case when :keep_rate then l.rate_per_second else excluded.rate_per_second end,
       burst = case when :keep_rate then l.burst else excluded.burst end,
       tokens = case when :keep_rate then l.tokens else least(l.tokens, excluded.burst) end,
       is_set = true, updated_at = now()

-- name: reset_limit
update stent.limits
   set max_concurrent = declared_max_concurrent, rate_per_second = declared_rate_per_second,
       burst = declared_burst, is_set = false, updated_at = now()
 where name = :limit_name
returning name

-- name: set_paused
insert into stent.limits as l (name, paused) values (:limit_name, :paused)
on conflict (name) do update set paused = excluded.paused, updated_at = now()

-- name: list_limits
select l.name, l.max_concurrent, l.rate_per_second, l.burst, l.keyed, l.paused, l.is_set,
       coalesce(g.granted, 0) + coalesce(s.held, 0) as held, coalesce(g.waiting, 0) as waiting,
       case when l.refilled_at is null then l.burst
            when l.rate_per_second is not null then least(l.burst, l.tokens
            + greatest(extract(epoch from clock_timestamp() - l.refilled_at), 0) * l.rate_per_second) end as tokens,
       case when l.closed_until > clock_timestamp() then l.closed_until end as closed_until,
       l.updated_at
  from stent.limits l
  left join lateral (
       select sum(x.slots) as granted, sum(greatest(x.wanted - x.slots, 0)) as waiting
         from stent.grants x
         join stent.workers w on w.worker_id = x.worker_id and w.incarnation = x.incarnation
        where x.limit_name = l.name) g on true
  left join lateral (
       select count(*) as held from stent.slots x
        where x.limit_name = l.name
          and case when x.call_id = '00000000-0000-0000-0000-000000000000'
                   then exists (select from stent.executions e
                                 where e.execution_id = x.execution_id and e.finished_at is null)
                   else exists (select from stent.tasks t
                                 where t.execution_id = x.execution_id and t.call_id = x.call_id
                                   and t.epoch = x.epoch and t.worker_id is not null) end) s on true
 order by l.name limit :count
