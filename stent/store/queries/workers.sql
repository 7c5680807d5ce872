-- name: current_boot
-- Which life of the server this is. Whoever finds the unlogged table empty after a crash starts a new one.
with new as (
    insert into stent.boots default values on conflict do nothing returning boot_id, started_at)
select pg_postmaster_start_time()::text || ' ' || boot_id::text as boot,
       greatest(pg_postmaster_start_time(), started_at) as booted_at, clock_timestamp() as now
  from (select * from new union all select boot_id, started_at from stent.boots) b limit 1

-- name: register_worker
-- Both fence rows, the lease and what it can run, in one statement: a worker exists entirely or not at all.
with fence as (
    insert into stent.workers (worker_id) values (:worker_id)),
claims as (
    insert into stent.worker_claims (worker_id) values (:worker_id)),
names as (
    insert into stent.worker_functions (worker_id, functions) values (:worker_id, cast(:functions as text[]))
    on conflict (worker_id) do update set functions = excluded.functions)
insert into stent.leases (worker_id, expires_at, liveness_key, host, pid, version, app_version, slots, queues)
values (:worker_id, clock_timestamp() + cast(:lease as interval), :liveness_key, :host, :pid, :version,
        :app_version, :slots, cast(:queues as text[]))
returning expires_at, clock_timestamp() as now

-- name: take_liveness_lock
-- Shared: both connections of a worker hold it. Waits only for a prober's short exclusive try.
select pg_advisory_lock_shared(cast(:liveness_key as bigint))

-- name: record_boot
-- The lock is held now; from here on a free lock under this boot proves death.
update stent.leases set boot = :boot where worker_id = :worker_id

-- name: renew_lease
-- No row: the worker was taken over. No index has any of these columns: the update stays HOT.
update stent.leases l
   set expires_at = clock_timestamp() + cast(:lease as interval), renewed_at = clock_timestamp(),
       running = :running, residents = :residents, lag_ms = :lag_ms
  from stent.workers w
 where l.worker_id = :worker_id and w.worker_id = l.worker_id and w.incarnation = :incarnation
returning l.expires_at, clock_timestamp() as now

-- name: fence_state
select w.incarnation, w.flush, w.skipped, c.claim
  from stent.workers w join stent.worker_claims c using (worker_id)
 where w.worker_id = :worker_id

-- name: set_worker_state
update stent.leases set state = :state where worker_id = :worker_id

-- name: suspects
-- Workers whose lease has run out, or whose liveness lock is free although they took it under this boot.
-- The try is exclusive and ends with the statement. Nobody is judged by a lease before one lease after a boot;
-- if nobody else can be using the server, who has not been heard of in this boot is dead.
select l.worker_id, w.incarnation,
       (l.expires_at < clock_timestamp()
         and (:alone or clock_timestamp() > cast(:booted_at as timestamptz) + cast(:lease as interval)))
       or (:alone and l.boot is distinct from :boot
           and l.renewed_at < clock_timestamp() - cast(:lease as interval) / 3) as expired,
       l.boot is not distinct from :boot and pg_try_advisory_xact_lock(l.liveness_key) as unlocked,
       l.renewed_at
  from stent.leases l join stent.workers w using (worker_id)
 where l.state in ('running', 'draining') and l.worker_id <> :worker_id

-- name: take_over
select executions, tasks from stent.take_over(:worker_id, :incarnation, :state)

-- name: forget_workers
-- Rows of workers that ended long ago.
with gone as (
    delete from stent.leases
     where state in ('stopped', 'lost') and renewed_at < clock_timestamp() - interval '1 day'
    returning worker_id),
fences as (
    delete from stent.workers w using gone where w.worker_id = gone.worker_id),
names as (
    -- Also what a worker of the version before, which knows no such row, has left.
    delete from stent.worker_functions f
     where f.worker_id in (select worker_id from gone)
        or not exists (select from stent.leases l where l.worker_id = f.worker_id))
delete from stent.worker_claims c using gone where c.worker_id = gone.worker_id

-- name: tell_functions
-- Names that were defined after the worker had registered.
insert into stent.worker_functions (worker_id, functions) values (:worker_id, cast(:functions as text[]))
on conflict (worker_id) do update set functions = excluded.functions

-- name: ask_worker
-- Only a living worker can be asked; who is to stop at once is not asked for less.
update stent.leases
   set asked = case when asked = 'stop' then asked else :asked end
 where worker_id = :worker_id and state in ('running', 'draining') and expires_at > clock_timestamp()
returning worker_id

-- name: asked_of
select asked from stent.leases where worker_id = :worker_id

-- name: worker_exists
select true from stent.leases where worker_id = :worker_id

-- name: list_workers
-- Newest last; :ended also those that stopped or were lost within about a day.
select l.worker_id, l.state, l.host, l.pid, l.version, l.app_version, l.slots, l.running, l.residents, l.lag_ms,
       l.queues, f.functions, l.asked, l.started_at, l.renewed_at, l.expires_at, clock_timestamp() as now
  from stent.leases l left join stent.worker_functions f using (worker_id)
 where (:ended or l.state in ('running', 'draining'))
   and (cast(:host as text) is null or l.host = :host)
 order by l.started_at, l.worker_id limit :count
