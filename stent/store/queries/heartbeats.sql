-- name: write_heartbeats
-- One statement a second and worker, and one when an attempt fails: see 0004_heartbeats.sql.
select stent.write_heartbeats(:worker_id, :incarnation, :items)

-- name: load_heartbeats
-- Of tasks that were claimed before; of a page, of the calls that its items may become. Index: heartbeats_pkey.
select w.call_id as asked_id, h.call_id, h.payload
  from unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:are_pages as boolean[]))
       as w (execution_id, call_id, is_page)
 cross join lateral (
       (select x.call_id, x.payload from stent.heartbeats x
         where not w.is_page and x.execution_id = w.execution_id and x.call_id = w.call_id offset 0)
       union all
       (select x.call_id, x.payload from stent.heartbeats x
         where w.is_page and x.execution_id = w.execution_id and x.task_id = w.call_id offset 0)) h

-- name: load_execution_heartbeats
-- Of all calls of executions that are restored: some of them run inline again. Index: heartbeats_pkey.
select h.execution_id, h.call_id, h.payload
  from unnest(cast(:execution_ids as uuid[])) as w (execution_id)
 cross join lateral (
       select x.* from stent.heartbeats x
        where x.execution_id = w.execution_id and x.task_id = x.call_id offset 0) h

-- name: tidy_heartbeats
-- Delete what nobody will read: its call has a result, its execution has ended, or it was an item of a page that
-- is done and has not become a call of its own for a while. Index: heartbeats_pkey.
with done as (
    select h.ctid as tid from stent.heartbeats h
     where exists (select from stent.results r where r.execution_id = h.execution_id and r.call_id = h.call_id)
        or not exists (
           select from stent.executions e where e.execution_id = h.execution_id and e.finished_at is null)
        or (h.task_id <> h.call_id and h.recorded_at < clock_timestamp() - interval '10 minutes'
            and not exists (select from stent.tasks t
                             where t.execution_id = h.execution_id and t.call_id in (h.call_id, h.task_id)))
     order by h.execution_id, h.call_id limit :count for update of h skip locked),
deleted as (
    delete from stent.heartbeats h using done where h.ctid = done.tid returning 1)
select count(*) as count from deleted
