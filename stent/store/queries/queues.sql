-- name: queue_depth
-- What waits and runs per line; the function bounds itself, see 0007_queue_depth.sql.
select queue, function, kind, ready, scheduled, running, waiting, oldest_ready_seconds, capped
  from stent.count_queues(:rows_max)
 where cast(:queue as text) is null or queue = :queue
