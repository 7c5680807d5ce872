-- name: doctor_server
-- Settings as this session has them: those of the database and of the role count.
select current_setting('server_version_num')::integer as version_number,
       current_setting('server_version') as version,
       current_setting('server_encoding') as encoding,
       current_setting('fsync') as fsync, current_setting('full_page_writes') as full_page_writes,
       current_setting('synchronous_commit') as synchronous_commit,
       current_setting('autovacuum') as autovacuum, current_setting('track_counts') as track_counts,
       current_setting('default_transaction_read_only') as read_only,
       pg_is_in_recovery() as in_recovery,
       current_setting('max_connections')::bigint
         - current_setting('superuser_reserved_connections')::bigint as connections_max,
       (select count(*) from pg_stat_activity where backend_type = 'client backend') as connections,
       pg_notification_queue_usage() as notify_usage,
       exists (select from pg_extension where extname = 'plpgsql') as has_plpgsql,
       has_database_privilege(current_database(), 'create') as may_create,
       exists (select from pg_namespace where nspname = 'stent') as has_schema,
       exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                where n.nspname = 'stent' and c.relname = 'migrations'
                  and not (has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')))
         as is_shut_out,
       (select nspowner::regrole::text from pg_namespace where nspname = 'stent') as schema_owner,
       (select pg_has_role(current_user, nspowner, 'usage') from pg_namespace where nspname = 'stent') as owns_schema,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_all,
       current_user::text as role, current_database()::text as database,
       pg_postmaster_start_time() as started_at, clock_timestamp() as now

-- name: doctor_rights
-- What of the schema this role could not use; an owner may do everything.
select n.nspname || '.' || c.relname as name,
       pg_has_role(current_user, c.relowner, 'usage') as owned,
       has_schema_privilege(n.oid, 'usage')
         and has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')
         and has_table_privilege(c.oid, 'update') and has_table_privilege(c.oid, 'delete') as usable
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname = 'stent' and c.relkind in ('r', 'p')
   and not pg_has_role(current_user, c.relowner, 'usage')
 order by 1

-- name: doctor_objects
-- What the schema has, by the words of the migrations.
select case c.relkind when 'v' then 'view' when 'i' then 'index' when 'I' then 'index' when 'c' then 'type'
                      else 'table' end as kind, c.relname::text as name
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'stent'
union all
select 'function', p.proname::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname = 'stent'

-- name: doctor_transactions
-- What keeps old row versions alive, oldest first: sessions, prepared transactions, standbys and their slots.
select * from (
    select 'session' as kind, coalesce(nullif(application_name, ''), 'pid ' || pid) as name, pid,
           datname::text as database, state, extract(epoch from clock_timestamp() - xact_start) as seconds,
           greatest(age(backend_xid), age(backend_xmin)) as transactions, true as active
      from pg_stat_activity
     where pid <> pg_backend_pid() and xact_start is not null and backend_type = 'client backend'
    union all
    select 'prepared', gid, null, database::text, 'prepared', extract(epoch from clock_timestamp() - prepared),
           age(transaction), true
      from pg_prepared_xacts
    union all
    select 'slot', slot_name::text, active_pid, database::text, slot_type::text, null,
           greatest(age(xmin), age(catalog_xmin)), active
      from pg_replication_slots
     where xmin is not null or catalog_xmin is not null or not active) h
 order by seconds desc nulls last, name limit 100

-- name: doctor_tables
select s.relname::text as name, s.n_live_tup as live, s.n_dead_tup as dead,
       pg_total_relation_size(s.relid) as bytes,
       coalesce('autovacuum_enabled=off' = any (c.reloptions)
                or 'autovacuum_enabled=false' = any (c.reloptions), false) as vacuum_off
  from pg_stat_user_tables s join pg_class c on c.oid = s.relid
 where s.schemaname = 'stent' order by 1

-- name: doctor_partitions
-- Weeks, this one and the next, whose partitions are not there.
select to_char(week.starts at time zone 'UTC', 'YYYY-MM-DD') as week
  from (select to_timestamp(floor(extract(epoch from now()) / 604800 + n) * 604800) as starts
          from generate_series(0, 1) n) week
 where exists (
       select from unnest(array['payloads', 'results', 'journal', 'segments', 'attempts', 'tells']) t (name)
        where to_regclass(format('stent.%I', t.name || '_' ||
                                 to_char(week.starts at time zone 'UTC', 'YYYYMMDD'))) is null)
 order by 1

-- name: doctor_workers
select l.worker_id, l.host, l.pid, l.state, l.boot is null as without_lock,
       extract(epoch from clock_timestamp() - l.expires_at) as overdue_seconds
  from stent.leases l
 where l.state in ('running', 'draining') order by l.started_at, l.worker_id

-- name: doctor_blocked
select count(*) over () as count, cast(execution_id as text) as oldest, blocked_reason as reason
  from stent.executions where status = 'blocked' order by execution_id limit 1

-- name: doctor_dead_letters
-- Those of a day. Index: dead_letters_parked_idx.
select count(*) over () as count, cast(execution_id as text) as latest, function
  from stent.dead_letters where parked_at > now() - interval '1 day' order by parked_at desc limit 1

-- name: doctor_unserved
-- Ready work that no living worker has said it can run.
select d.queue, d.function, d.ready, d.capped, d.oldest_ready_seconds
  from stent.queue_depth d
 where d.ready > 0 and d.oldest_ready_seconds > :seconds
   and not exists (
       select from stent.leases l left join stent.worker_functions f using (worker_id)
        where l.state = 'running' and l.expires_at > clock_timestamp() and d.queue = any (l.queues)
          -- One of an earlier version does not say what it can run.
          and (f.functions is null or d.function = any (f.functions)))
 order by d.oldest_ready_seconds desc, d.queue, d.function limit 20
