-- name: flush
-- Everything a worker writes, in one transaction: see 0001_initial.sql. One round trip. Then, in a snapshot of its own,
-- in which queues somebody has to be told: what was reached may have lost its owner in this very flush.
select fenced, lost, busy, lost_tasks, busy_tasks, workers, clients, ended,
       case when fenced then '{}' else stent.waking_queues(cast(:reached as uuid[]), cast(:orphaning as uuid[])) end as queues,
       case when not fenced then stent.suspect(cast(:suspected as stent.call_item[])) end
  from stent.flush(
    :worker_id, :incarnation, :flush, :fences, :turns, :results, :marks, :tasks, :payloads, :drops, :children,
    :cancels, :tells, :inbox, :attempts, :finishes, :settles, :retries, :segments, :releases)

-- name: claim_tasks
with c as materialized (select * from stent.claim_tasks_between(
    :worker_id, :incarnation, :claim, cast(:queues as text[]), cast(:functions as text[]),
    cast(:priorities as smallint[]), :count, :low, :above, :waited)),
s as materialized (select stent.any_suspects() as suspects from (select count(*) from c) as claimed)
select c.*, s.suspects from c cross join s

-- name: held_tasks
-- What a claim whose answer was lost has brought.
select t.execution_id, t.call_id, t.address, t.function, t.queue, t.epoch, t.attempt, t.is_page,
       coalesce(t.arguments, p.payload) as arguments, t.options, e.worker_id as owner, e.key_seed, e.root_id,
       e.parent_id, e.tags, t.priority, t.available_at, true as suspects
  from stent.tasks t
  join stent.executions e on e.execution_id = t.execution_id
  left join stent.payloads p on p.execution_id = t.execution_id and p.call_id = t.call_id
 where t.worker_id = :worker_id and t.incarnation = :incarnation

-- name: tasks_gone
-- Which of these are not this worker's any more: dropped by their execution, which may have finished.
select g.call_id, g.epoch
  from unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:epochs as bigint[]))
       as g (execution_id, call_id, epoch)
  left join stent.tasks t on t.execution_id = g.execution_id and t.call_id = g.call_id and t.epoch = g.epoch
       and t.worker_id = :worker_id
  left join stent.executions e on e.execution_id = g.execution_id
 where t.call_id is null or e.finished_at is not null

-- name: give_back
-- What has not begun may be claimed by others; it keeps its place in the line.
update stent.tasks t set worker_id = null, incarnation = null, epoch = t.epoch + 1
  from unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:epochs as bigint[]))
       as g (execution_id, call_id, epoch)
 where t.execution_id = g.execution_id and t.call_id = g.call_id and t.epoch = g.epoch and t.worker_id = :worker_id

-- name: drop_ended_tasks
-- Those among these that this worker holds and whose execution has ended: nobody else deletes what is held.
delete from stent.tasks t
 using unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:epochs as bigint[]))
       as g (execution_id, call_id, epoch), stent.executions e
 where t.execution_id = g.execution_id and t.call_id = g.call_id and t.epoch = g.epoch and t.worker_id = :worker_id
   and e.execution_id = t.execution_id and e.finished_at is not null

-- name: drop_tasks_of
-- What an execution that has ended left to be claimed.
delete from stent.tasks t using (
    select x.execution_id, x.call_id from stent.tasks x join stent.executions e using (execution_id)
     where x.execution_id = :execution_id and e.finished_at is not null and x.worker_id is null
     order by x.call_id limit :count for update of x skip locked) d
 where t.execution_id = d.execution_id and t.call_id = d.call_id

-- name: load_segments
select payload from stent.segments where execution_id = :execution_id and call_id = :call_id order by segment

-- name: settle_in_transaction
-- Last statements of an activity's own transaction: its task row, with its epoch, is the fence.
-- Returns the worker that owns the execution, to be told, or the queue in which it waits for an owner.
with settled as (
    delete from stent.tasks
     where execution_id = :execution_id and call_id = :call_id and epoch = :epoch and worker_id = :worker_id
    returning execution_id),
announced as (
    insert into stent.inbox (execution_id, kind, call_id) select execution_id, 'result', :call_id from settled),
told as (
    insert into stent.tells (execution_id, call_id, address, payload)
    select settled.execution_id, t.call_id, t.address, t.payload
      from settled, unnest(cast(:tell_ids as uuid[]), cast(:tell_addresses as text[]), cast(:tell_payloads as bytea[]))
           as t (call_id, address, payload)
    on conflict do nothing)
insert into stent.results (execution_id, call_id, address, ok, payload, attempt, started_at, worker_id)
select execution_id, :call_id, :address, true, :payload, :attempt, :started_at, :worker_id from settled
returning (select owned.worker_id from stent.executions owned
            where owned.execution_id = results.execution_id) as owner,
          (select unowned.queue from stent.executions unowned
            where unowned.execution_id = results.execution_id and unowned.worker_id is null) as queue,
          -- A worker that is frozen before its COMMIT must not hold up who takes it over.
          set_config('idle_in_transaction_session_timeout', '3s', true)

-- name: result_of_call
select ok, payload, attempt from stent.results where execution_id = :execution_id and call_id = :call_id

-- name: transaction_identity
-- By its id a transaction is found again whatever became of its connection, a pooler's included.
select cast(pg_current_xact_id() as text)

-- name: transaction_ended
-- Whether a COMMIT whose answer was lost has taken effect or never will: a transaction locks its own id until
-- then. On a server that was promoted and does not know the id, nobody does.
select not exists (
    select from pg_locks
     where locktype = 'transactionid'
       and transactionid = cast(cast(cast(:transaction_id as text) as xid8) as xid)) as ended
