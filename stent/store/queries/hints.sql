-- name: notify
-- After the commit, in a statement of its own: a commit that carries NOTIFY takes a database-wide lock.
select pg_notify(channel, payload)
  from unnest(cast(:channels as text[]), cast(:payloads as text[])) as h (channel, payload)
