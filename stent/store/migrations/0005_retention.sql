-- Executions that wait can lose their owner; what is finished does not stay for ever.

-- The queues of those among p_reached, and of the children of p_orphaning, that have something in their inbox
-- and no owner who would read it. Index: executions_parent_idx, inbox_execution_idx.
create function stent.waking_queues(p_reached uuid[], p_orphaning uuid[]) returns text[]
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    reached uuid[] := coalesce(p_reached, '{}');
begin
    if cardinality(p_orphaning) > 0 then
        reached := reached || array(
            select c.execution_id
              from unnest(p_orphaning) p(execution_id)
             cross join lateral (
                   select x.execution_id from stent.executions x
                    where x.parent_id = p.execution_id and x.finished_at is null and x.worker_id is null offset 0) c);
    end if;
    if cardinality(reached) = 0 then
        return '{}';
    end if;
    return array(
        select distinct e.queue
          from unnest(reached) r(execution_id)
         cross join lateral (
               select x.queue from stent.executions x
                where x.execution_id = r.execution_id and x.worker_id is null and x.finished_at is null
                  and exists (select from stent.inbox i where i.execution_id = x.execution_id) offset 0) e);
end $$;

-- What one worker at a time does for all.
create table stent.duties (
    duty   text primary key,
    due_at timestamptz not null
) with (fillfactor = 50);

-- Forgotten executions whose rows in the append-only tables are still there.
create table stent.erasures (
    execution_id uuid primary key
);

-- True for one caller every p_every.
create function stent.take_duty(p_duty text, p_every interval) returns boolean
    language plpgsql set search_path = pg_catalog as $$
begin
    insert into stent.duties (duty, due_at) values (p_duty, '-infinity') on conflict do nothing;
    update stent.duties set due_at = clock_timestamp() + p_every
     where duty = p_duty and due_at <= clock_timestamp();
    return found;
end $$;

-- Forget what finished before p_before: whole trees of executions, found among p_count executions after p_after,
-- oldest first. Ids begin with a time that is no later than the end, so no index on the end is needed. Who reads
-- meanwhile sees an execution entirely or not at all; its other rows are erased afterwards. A tree is an execution
-- without a parent that could still ask for it, and what it started; a detached child is a tree of its own. One
-- that is larger than a batch goes in several, children before parents. Locks: executions.
-- next_after: where to go on; null: there are no more. Index: executions_pkey, executions_parent_idx.
create function stent.forget(
    p_before timestamptz, p_after uuid, p_count integer, out forgotten bigint, out next_after uuid)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
declare
    tree_max constant integer := 5000;
    page     uuid[];
    doomed   uuid[];
    rest     boolean;
begin
    page := array(
        select e.execution_id from stent.executions e
         where e.execution_id > p_after and e.execution_id < stent.first_id(p_before)
         order by e.execution_id limit p_count);
    forgotten := 0;
    if cardinality(page) = 0 then
        return;
    end if;
    with recursive tree as (
        select r.execution_id as root, r.execution_id, 0 as depth, true as over
          from unnest(page) g(execution_id)
         cross join lateral (
               select x.* from stent.executions x where x.execution_id = g.execution_id offset 0) r
         where r.finished_at < p_before
           and (r.parent_id is null
                or coalesce((select r.detached and p.finished_at < p_before from stent.executions p
                              where p.execution_id = r.parent_id), not exists (
                            select from stent.executions p where p.execution_id = r.parent_id)))
        union all
        select t.root, c.execution_id, t.depth + 1, c.over
          from tree t
         cross join lateral (
               select x.execution_id, coalesce(x.finished_at < p_before, false) as over from stent.executions x
                where x.parent_id = t.execution_id and not x.detached offset 0) c),
    trees as (
        select t.root, count(*) as size, sum(count(*)) over (order by t.root) as total
          from tree t group by t.root having bool_and(t.over)),
    taken as (
        -- Always one, however large it is.
        select s.root, s.size from trees s where s.total <= p_count or s.total = s.size),
    chosen as (
        select t.execution_id from tree t
         where t.root in (select root from taken)
         order by t.depth desc, t.execution_id limit greatest(p_count, tree_max))
    select array(select execution_id from chosen order by execution_id),
           (select count(*) from trees) > (select count(*) from taken)
           or (select coalesce(sum(size), 0) from taken) > greatest(p_count, tree_max)
      into doomed, rest;
    doomed := array(
        select e.execution_id
          from unnest(doomed) d(execution_id)
         cross join lateral (
               select x.execution_id from stent.executions x
                where x.execution_id = d.execution_id and x.finished_at is not null
                  for update skip locked) e);
    insert into stent.erasures (execution_id) select unnest(doomed) on conflict do nothing;
    delete from stent.executions e where e.execution_id = any (doomed);
    forgotten := cardinality(doomed);
    next_after := case when rest and forgotten > 0 then p_after else page[cardinality(page)] end;
end $$;

-- Delete up to about p_count rows of forgotten executions; null: there are none. Tasks are deleted whoever holds
-- them: their attempts are stopped, and their results go nowhere.
create function stent.erase(p_count integer) returns bigint
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
        ['payloads', 'call_id'], ['results', 'call_id'], ['journal', 'position'],
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

-- Drop one partition of a week before p_before without executions; null: there is none, or somebody uses its
-- table. Whoever writes waits for it no longer than a tenth of a second. The last weeks stay in any case, and tells
-- go first: ensure_partitions() looks for them.
create function stent.drop_partition(p_before timestamptz) returns text
    language plpgsql set search_path = pg_catalog as $$
declare
    parent     text;
    partition  text;
    week_start timestamptz;
begin
    perform set_config('lock_timeout', '100ms', true);
    foreach parent in array array['tells', 'attempts', 'segments', 'journal', 'results', 'payloads'] loop
        for partition in
            select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = to_regclass('stent.' || parent) order by c.relname
        loop
            week_start := to_date(right(partition, 8), 'YYYYMMDD')::timestamp at time zone 'UTC';
            exit when week_start + interval '7 days' > least(p_before, now() - interval '7 days');
            continue when exists (
                select from stent.executions e
                 where e.execution_id >= stent.first_id(week_start)
                   and e.execution_id < stent.first_id(week_start + interval '7 days'));
            begin
                execute format('drop table stent.%I', partition);
                return partition;
            exception when lock_not_available then
                return null;
            end;
        end loop;
    end loop;
    return null;
end $$;
