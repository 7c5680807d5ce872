-- name: suspects_among
select execution_id, call_id, lost
  from stent.suspects_among(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]))

-- name: mark_suspects
-- They begin now: what is lost under this epoch counts.
update stent.suspects s set started_epoch = g.epoch
  from unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:epochs as bigint[]))
       as g (execution_id, call_id, epoch)
 where s.execution_id = g.execution_id and s.call_id = g.call_id
   and (s.started_epoch is null or s.started_epoch < g.epoch)

-- name: withdraw_marks
-- They run, but something else begins beside them: what is lost now was probably that.
update stent.suspects s set started_epoch = null
  from unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[]), cast(:epochs as bigint[]))
       as g (execution_id, call_id, epoch)
 where s.execution_id = g.execution_id and s.call_id = g.call_id and s.started_epoch = g.epoch

-- name: clear_suspects
delete from stent.suspects s
 using unnest(cast(:execution_ids as uuid[]), cast(:call_ids as uuid[])) as g (execution_id, call_id)
 where s.execution_id = g.execution_id and s.call_id = g.call_id

-- name: tidy_suspects
select stent.tidy_suspects(:count) as count
