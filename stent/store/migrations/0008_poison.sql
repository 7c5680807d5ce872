-- Poison: what kills its worker each time is found, runs alone, and is parked before it has killed them all.
--
-- What a lost worker held is suspected: it has a row here. Before it runs again its worker marks it, and runs it at
-- once. What is lost while it is marked counts one; the mark is the epoch of that claim, so it is over with it.
-- There are none of these rows while no worker is lost.

create table stent.suspects (
    execution_id  uuid not null,
    -- Nil: the replay of the execution itself.
    call_id       uuid not null,
    -- With the first time, which does not count.
    lost          smallint not null constraint suspects_lost_positive check (lost > 0),
    started_epoch bigint,
    primary key (execution_id, call_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 100);

-- Calls that are out of attempts because they lost their worker too often.
create table stent.dead_letters (
    execution_id uuid not null,
    call_id      uuid not null,
    address      text not null,
    function     text not null,
    queue        text not null,
    reason       text not null,
    parked_at    timestamptz not null default clock_timestamp(),
    primary key (execution_id, call_id)
);
create index dead_letters_parked_idx on stent.dead_letters (parked_at);

-- As before; what a lost worker held is suspected from now on. Executions that only waited are not.
create or replace function stent.take_over(p_worker_id uuid, p_incarnation bigint, p_state text)
    returns table (executions bigint, tasks bigint)
    language plpgsql set search_path = pg_catalog as $$
declare
    nil      constant uuid := '00000000-0000-0000-0000-000000000000';
    lost_max constant smallint := 4;
begin
    update stent.workers set incarnation = incarnation + 1, skipped = null
     where worker_id = p_worker_id and incarnation = p_incarnation;
    if not found then
        return;
    end if;
    update stent.worker_claims set incarnation = p_incarnation + 1 where worker_id = p_worker_id;
    if p_state = 'lost' then
        insert into stent.suspects as s (execution_id, call_id, lost)
        select e.execution_id, nil, 1 from stent.executions e
         where e.worker_id = p_worker_id and e.wake_at = '-infinity'
         order by e.execution_id
        on conflict (execution_id, call_id) do update
           set lost = s.lost + coalesce(s.started_epoch = (
                   select e.epoch from stent.executions e where e.execution_id = s.execution_id), false)::integer;
        insert into stent.suspects as s (execution_id, call_id, lost)
        select t.execution_id, t.call_id, 1 from stent.tasks t
         where t.worker_id = p_worker_id
         order by t.execution_id, t.call_id
        on conflict (execution_id, call_id) do update
           set lost = s.lost + coalesce(s.started_epoch = (
                   select t.epoch from stent.tasks t
                    where t.execution_id = s.execution_id and t.call_id = s.call_id), false)::integer;
        insert into stent.dead_letters (execution_id, call_id, address, function, queue, reason)
        select t.execution_id, t.call_id, t.address, t.function, t.queue, 'worker_lost'
          from stent.tasks t
          join stent.suspects s on s.execution_id = t.execution_id and s.call_id = t.call_id
         where t.worker_id = p_worker_id and s.lost >= lost_max
        on conflict do nothing;
    end if;
    update stent.executions e
       set worker_id = null, incarnation = null, epoch = e.epoch + 1
     where e.worker_id = p_worker_id;
    get diagnostics executions = row_count;
    update stent.tasks t
       set worker_id = null, incarnation = null, epoch = t.epoch + 1, available_at = clock_timestamp()
     where t.worker_id = p_worker_id;
    get diagnostics tasks = row_count;
    update stent.leases set state = p_state where worker_id = p_worker_id;
    return next;
end $$;

-- Which of these are suspected, and how often they were lost. Index: suspects_pkey.
create function stent.suspects_among(p_execution_ids uuid[], p_call_ids uuid[])
    returns table (execution_id uuid, call_id uuid, lost smallint)
    language plpgsql stable set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
    return query
    select s.execution_id, s.call_id, s.lost
      from unnest(p_execution_ids, p_call_ids) g(execution_id, call_id)
     cross join lateral (
           select x.* from stent.suspects x
            where x.execution_id = g.execution_id and x.call_id = g.call_id offset 0) s;
end $$;

-- Calls that may have been running inside a lost worker without a task are suspected like its tasks.
create function stent.suspect(p_calls stent.call_item[]) returns void
    language plpgsql set search_path = pg_catalog as $$
begin
    if cardinality(p_calls) > 0 then
        insert into stent.suspects (execution_id, call_id, lost)
        select c.execution_id, c.call_id, 1 from unnest(p_calls) c on conflict do nothing;
    end if;
end $$;

-- Rows whose task or execution is not there any more.
create function stent.tidy_suspects(p_count integer) returns bigint
    language plpgsql set search_path = pg_catalog as $$
declare
    nil     constant uuid := '00000000-0000-0000-0000-000000000000';
    rows    bigint;
    letters bigint;
begin
    delete from stent.suspects s using (
        select x.execution_id, x.call_id from stent.suspects x
         where case when x.call_id = nil
                    then not exists (select from stent.executions e
                                      where e.execution_id = x.execution_id and e.finished_at is null)
                    else not exists (select from stent.tasks t
                                      where t.execution_id = x.execution_id and t.call_id = x.call_id) end
         order by x.execution_id, x.call_id limit p_count for update skip locked) d
     where s.execution_id = d.execution_id and s.call_id = d.call_id;
    get diagnostics rows = row_count;
    delete from stent.dead_letters l using (
        select x.execution_id, x.call_id from stent.dead_letters x
         where not exists (select from stent.executions e where e.execution_id = x.execution_id)
         order by x.execution_id, x.call_id limit p_count for update skip locked) d
     where l.execution_id = d.execution_id and l.call_id = d.call_id;
    get diagnostics letters = row_count;
    return rows + letters;
end $$;
