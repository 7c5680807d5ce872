-- name: dispatch
-- New root executions with their arguments; a dispatch key that is taken leaves its execution out.
with given as (
    select * from unnest(
        cast(:execution_ids as uuid[]), cast(:functions as text[]), cast(:kinds as text[]), cast(:queues as text[]),
        cast(:priorities as smallint[]), cast(:delays as interval[]), cast(:durations as interval[]),
        cast(:seeds as bytea[]), cast(:dispatch_keys as text[]), cast(:digests as text[]),
        cast(:options as bytea[]), cast(:arguments as bytea[]))
        as g (execution_id, function, kind, queue, priority, delay, duration, seed, dispatch_key, digest,
              options, arguments)),
keys as (
    insert into stent.dispatch_keys (dispatch_key, function, digest, execution_id)
    select dispatch_key, function, digest, execution_id from given where dispatch_key is not null
    on conflict do nothing
    returning execution_id),
new as (
    select given.* from given
     where dispatch_key is null or execution_id in (select execution_id from keys)),
arguments_stored as (
    insert into stent.payloads (execution_id, call_id, payload)
    select execution_id, '00000000-0000-0000-0000-000000000000', arguments from new)
insert into stent.executions
    (execution_id, function, kind, queue, priority, wake_at, deadline_at, seed, key_seed, root_id,
     dispatch_key, options, client_id)
select execution_id, function, kind, queue, priority, clock_timestamp() + delay,
       clock_timestamp() + delay + duration, seed, execution_id, execution_id, dispatch_key, options,
       cast(:client_id as uuid)
  from new
returning execution_id

-- name: set_tags
-- Arrays of different lengths do not fit unnest, so tags of a dispatch are set beside it, in its transaction.
update stent.executions set tags = cast(:tags as text[]) where execution_id = :execution_id

-- name: find_dispatch_keys
select dispatch_key, function, digest, execution_id from stent.dispatch_keys
 where dispatch_key = any (cast(:dispatch_keys as text[]))

-- name: ensure_partitions
select stent.ensure_partitions(at) from unnest(cast(:instants as timestamptz[])) as g (at)

-- name: claim_executions
with c as materialized (select * from stent.claim_executions(
    :worker_id, :incarnation, :claim, cast(:queues as text[]), cast(:functions as text[]),
    cast(:digests as text[]), :count, :thorough)),
s as materialized (select stent.any_suspects() as suspects from (select count(*) from c) as claimed)
select c.*, s.suspects from c cross join s

-- name: held_executions
-- What a claim whose answer was lost has brought.
select e.execution_id, e.function, e.kind, e.status, e.queue, e.priority, e.epoch, e.created_at, e.started_at,
       e.deadline_at, e.cancel_by, case e.status when 'blocked' then coalesce(e.cancel_reason,
           (select i.reason from stent.inbox i where i.execution_id = e.execution_id and i.kind = 'cancel' limit 1))
           else e.cancel_reason end as cancel_reason,
       e.seed, e.key_seed, e.root_id, e.parent_id, e.parent_address, e.detached, e.depth, e.code_digest,
       e.blocked_digest, e.tags, e.options, p.payload as arguments, true as suspects
  from stent.executions e
  join stent.payloads p on p.execution_id = e.execution_id
       and p.call_id = '00000000-0000-0000-0000-000000000000'
 where e.worker_id = :worker_id and e.incarnation = :incarnation

-- name: load_turns
select g.execution_id, j.payload
  from unnest(cast(:execution_ids as uuid[])) as g (execution_id)
 cross join lateral (
       select x.position, x.payload from stent.journal x where x.execution_id = g.execution_id offset 0) j
 order by g.execution_id, j.position

-- name: load_results
-- Pages of a map come in parts: those of the segments first, the last part is the result.
select g.execution_id, r.call_id, r.address, r.ok, r.payload,
       (select array_agg(s.payload order by s.segment) from stent.segments s
         where s.execution_id = g.execution_id and s.call_id = r.call_id) as segments
  from unnest(cast(:execution_ids as uuid[])) as g (execution_id)
 cross join lateral (
       select x.call_id, x.address, x.ok, x.payload from stent.results x
        where x.execution_id = g.execution_id and x.address <> '' offset 0) r

-- name: load_issued
select g.execution_id, i.address
  from unnest(cast(:execution_ids as uuid[])) as g (execution_id)
 cross join lateral (
       select t.address from stent.tasks t where t.execution_id = g.execution_id
       union all
       select e.parent_address from stent.executions e
        where e.parent_id = g.execution_id and e.parent_address is not null
       offset 0) i

-- name: load_blocked_reasons
select execution_id, blocked_reason from stent.executions
 where execution_id = any (cast(:execution_ids as uuid[]))

-- name: load_inbox
select inbox_id, execution_id, kind, call_id, reason from stent.inbox where execution_id = :execution_id

-- name: undelivered
-- Inbox rows of executions this worker owns, with the results they announce. By the inbox, which is short: what is
-- resident may be long. The known are hashed; compared one by one they took four times as long as all the rest.
select i.inbox_id, i.execution_id, i.kind, i.call_id, i.reason, r.address, r.ok, r.payload,
       r.started_at, r.finished_at,
       (select array_agg(s.payload order by s.segment) from stent.segments s
         where s.execution_id = i.execution_id and s.call_id = i.call_id) as segments
  from (select x.inbox_id, x.execution_id, x.kind, x.call_id, x.reason
          from stent.inbox x
         where x.inbox_id not in (select unnest(cast(:known as bigint[]))) order by x.inbox_id offset 0) i
 cross join lateral (
       select from stent.executions x where x.execution_id = i.execution_id and x.worker_id = :worker_id offset 0) e
  left join lateral (
       select x.address, x.ok, x.payload, x.started_at, x.finished_at from stent.results x
        where x.execution_id = i.execution_id and x.call_id = i.call_id offset 0) r on true
 order by i.inbox_id limit :count

-- name: end_unstarted
-- Cancel what never started, at once: nothing has to be cleaned up.
with ended as (
    update stent.executions e
       set status = 'cancelled', finished_at = clock_timestamp(), wake_at = null, cancel_reason = 'cancel',
           epoch = epoch + 1
     where execution_id = :execution_id and worker_id is null and started_at is null and finished_at is null
    returning execution_id, client_id, parent_id, parent_address, detached),
outcome as (
    insert into stent.results (execution_id, call_id, address, ok, payload)
    select execution_id, '00000000-0000-0000-0000-000000000000', '', false, :payload from ended
    on conflict do nothing),
reported as (
    insert into stent.results (execution_id, call_id, address, ok, payload)
    select parent_id, stent.call_id(parent_id, parent_address), parent_address, false, :payload from ended
     where parent_id is not null and not detached
    on conflict do nothing),
announced as (
    insert into stent.inbox (execution_id, kind, call_id)
    select parent_id, 'result', stent.call_id(parent_id, parent_address) from ended
     where parent_id is not null and not detached)
select client_id from ended

-- name: ask_to_stop
-- The inbox row is what counts; the status shows it before the owner has heard.
with asked as (
    update stent.executions
       set status = case status when 'pending' then status else 'cancelling' end,
           cancel_reason = coalesce(cancel_reason, 'cancel'),
           cancel_by = coalesce(cancel_by, clock_timestamp() + cast(:grace as interval))
     where execution_id = :execution_id and finished_at is null
    returning execution_id, worker_id, queue),
told as (
    insert into stent.inbox (execution_id, kind, reason)
    select execution_id, 'cancel', 'cancel' from asked)
select execution_id, worker_id, queue from asked

-- name: tidy
select stent.tidy(:count) as count

-- name: status_of
select status, finished_at is not null as finished, started_at is not null as started, worker_id
  from stent.executions where execution_id = :execution_id

-- name: outcomes
-- Status and outcome of those that have one; the others come back without.
select e.execution_id, e.function, e.status, e.blocked_reason, r.ok, r.payload
  from (select distinct g.execution_id from unnest(cast(:execution_ids as uuid[])) g (execution_id)) g
 cross join lateral (
       select x.execution_id, x.function, x.status, x.blocked_reason, x.finished_at from stent.executions x
        where x.execution_id = g.execution_id offset 0) e
  left join lateral (
       select x.ok, x.payload from stent.results x
        where x.execution_id = e.execution_id and x.call_id = '00000000-0000-0000-0000-000000000000'
          and e.finished_at is not null offset 0) r on true

-- name: sweep
select ended_id, ended_status, ended_client, ended_workers
  from stent.sweep(:count, cast(:grace as interval), :cancelled, :timed_out)

-- name: take_duty
select stent.take_duty(:duty, cast(:every as interval)) as taken

-- name: forget
select forgotten, next_after from stent.forget(
    clock_timestamp() - cast(:older_than as interval), cast(:after as uuid), :count)

-- name: erase
select stent.erase(:count) as erased

-- name: drop_partition
select stent.drop_partition(clock_timestamp() - cast(:older_than as interval)) as dropped
