-- The history says what was lost with a worker.

-- What a worker held when it was lost. There are none of these rows while no worker is lost.
create table stent.losses (
    execution_id uuid not null,
    -- Nil: the execution itself.
    call_id      uuid not null,
    epoch        bigint not null,
    address      text,
    attempt      integer,
    worker_id    uuid not null,
    lost_at      timestamptz not null default clock_timestamp(),
    primary key (execution_id, call_id, epoch)
);

-- As before, and what was lost is noted. Locks: workers, executions, tasks.
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
        insert into stent.losses (execution_id, call_id, epoch, worker_id)
        select e.execution_id, nil, e.epoch, p_worker_id from stent.executions e
         where e.worker_id = p_worker_id and e.wake_at = '-infinity'
        on conflict do nothing;
        insert into stent.losses (execution_id, call_id, epoch, address, attempt, worker_id)
        select t.execution_id, t.call_id, t.epoch, t.address, t.attempt, p_worker_id from stent.tasks t
         where t.worker_id = p_worker_id
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

-- As before, and what is noted of losses goes, too.
create or replace function stent.erase(p_count integer) returns bigint
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
    ids    uuid[];
    target text[];
    erased bigint := 0;
    count  bigint;
begin
    ids := array(select x.execution_id from stent.erasures x order by x.execution_id limit 200 for update skip locked);
    if cardinality(ids) = 0 then
        return null;
    end if;
    delete from stent.tasks t where t.execution_id = any (ids);
    delete from stent.inbox i where i.execution_id = any (ids);
    foreach target slice 1 in array array[
        ['losses', 'call_id'], ['payloads', 'call_id'], ['results', 'call_id'], ['journal', 'position'],
        ['segments', 'call_id'], ['attempts', 'call_id'], ['tells', 'call_id']]
    loop
        execute format(
            'delete from stent.%1$I t using ('
            ' select x.execution_id, x.%2$I from stent.%1$I x'
            '  where x.execution_id = any ($1) and x.execution_id between $2 and $3 limit $4) d'
            ' where t.execution_id = d.execution_id and t.%2$I = d.%2$I and t.execution_id between $2 and $3',
            target[1], target[2])
          using ids, ids[1], ids[cardinality(ids)], p_count - erased;
        get diagnostics count = row_count;
        erased := erased + count;
        if erased >= p_count then
            return erased;
        end if;
    end loop;
    delete from stent.erasures x where x.execution_id = any (ids);
    return erased;
end $$;
