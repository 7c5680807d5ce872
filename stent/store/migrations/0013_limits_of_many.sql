-- Limits of workflows and of keys, as they are met by many.
--
-- claim_limited_executions of 0002 knew an execution that had begun before its function was limited only by its slot,
-- which it never had: its inbox woke nobody. Keys were looked at from the first one each time, so that a thousand full
-- ones hid the others; tokens that come soon were not told of. Both claims locked five hundred rows to find those
-- that have no key.

-- Executions of one limited function: those that have begun and have something to do, and new ones as far as there
-- are slots and tokens. An execution keeps its slot until it ends; one that began while there was no limit needs none.
-- Keys in turn: the first is the one after p_after. p_thorough: look at inboxes.
-- Always with a last row without an execution: the key that was reached, or '' after all of them, and the seconds
-- until there is a token if that is what is missing.
create function stent.claim_limited_executions_after(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_function text, p_digest text, p_count integer, p_after text, p_thorough boolean)
    returns table (execution_id uuid, function text, kind text, status text, queue text, priority smallint,
                   epoch bigint, created_at timestamptz, started_at timestamptz, deadline_at timestamptz,
                   cancel_by timestamptz, cancel_reason text, seed bytea, key_seed uuid, root_id uuid,
                   parent_id uuid, parent_address text, detached boolean, depth smallint, code_digest text,
                   blocked_digest text, tags text[], options bytea, arguments bytea,
                   reached text, tokens_in double precision)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    lim      stent.limits;
    nil      constant uuid := '00000000-0000-0000-0000-000000000000';
    ready    uuid[];
    fresh    uuid[] := '{}';
    room     bigint;
    this_key text;
    last_key text := p_after;
    visited  integer := 0;
    held     bigint;
    locked   tid[];
    bucket   record;
    pause    double precision;
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    select * into lim from stent.limits l where l.name = 'function:' || p_function for update;
    if lim.paused then
        return;
    end if;
    delete from stent.slots s
     where s.limit_name = lim.name and s.call_id = nil
       and not exists (select from stent.executions e
                        where e.execution_id = s.execution_id and e.finished_at is null);
    ready := array(
        select e.execution_id
          from stent.slots s
         cross join lateral (
              select x.* from stent.executions x where x.execution_id = s.execution_id offset 0) e
         where s.limit_name = lim.name and s.call_id = nil and e.worker_id is null and e.finished_at is null
           and e.queue = any (p_queues)
           and case when e.status = 'blocked'
                    then e.blocked_digest <> p_digest
                         or exists (select from stent.inbox i
                                     where i.execution_id = e.execution_id and i.kind = 'cancel')
                    else e.wake_at <= now()
                         or exists (select from stent.inbox i where i.execution_id = e.execution_id) end
         limit p_count);
    if p_thorough then
        -- Those that began before the limit was set.
        ready := ready || array(
            select e.execution_id
              from (select distinct execution_id from stent.inbox) i
             cross join lateral (
                  select x.* from stent.executions x where x.execution_id = i.execution_id offset 0) e
             where e.worker_id is null and e.finished_at is null and e.started_at is not null
               and e.status <> 'blocked' and e.queue = any (p_queues) and e.function = p_function
             limit p_count)
        || array(
            select e.execution_id
              from (select x.* from stent.executions x
                     where x.function = p_function and x.status = 'blocked' offset 0) e
             where e.worker_id is null and e.queue = any (p_queues)
               and (e.blocked_digest <> p_digest
                    or exists (select from stent.inbox i
                                where i.execution_id = e.execution_id and i.kind = 'cancel'))
             limit p_count);
    end if;
    select greatest(0, least(p_count - cardinality(ready),
                             case when lim.keyed or lim.max_concurrent is null then p_count
                                  else lim.max_concurrent - count(*) end))
      into room from stent.slots s where s.limit_name = lim.name and s.call_id = nil;
    -- Neither slot nor token is needed by what has begun.
    ready := ready || array(
        select r.execution_id
          from unnest(p_queues) q(queue)
         cross join lateral (
              select e.execution_id from stent.executions e
               where e.queue = q.queue and e.function = p_function and e.worker_id is null
                 and e.wake_at <= now() and e.finished_at is null and e.started_at is not null
                 and e.status <> 'blocked'
               order by e.priority desc, e.wake_at
               limit p_count) r
         limit p_count);
    if room > 0 and not lim.keyed then
        fresh := array(
            select r.execution_id
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.execution_id, e.priority, e.wake_at from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.worker_id is null
                     and e.wake_at <= now() and e.finished_at is null and e.started_at is null
                   order by e.priority desc, e.wake_at
                   limit room for no key update skip locked) r
             order by r.priority desc, r.wake_at limit room);
    elsif room > 0 then
        -- From before the function had a key, as in claim_keyed_tasks_after.
        fresh := array(
            select l.execution_id
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.ctid as tid, e.limit_key from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.worker_id is null
                     and e.wake_at <= now() and e.finished_at is null and e.started_at is null
                   order by e.priority desc, e.wake_at
                   limit 500) o
             cross join lateral (
                  select e.execution_id from stent.executions e
                   where e.ctid = o.tid and e.worker_id is null for no key update skip locked) l
             where o.limit_key is null limit room);
        while cardinality(fresh) < room loop
            select min(k.limit_key) into this_key
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.limit_key from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.limit_key > last_key
                     and e.worker_id is null and e.wake_at is not null
                   order by e.limit_key limit 1) k;
            if this_key is null then
                last_key := '';
                exit;
            end if;
            exit when visited = 1000;
            visited := visited + 1;
            last_key := this_key;
            select count(*) into held from stent.slots s where s.limit_name = lim.name and s.key = this_key;
            continue when lim.max_concurrent is not null and held >= lim.max_concurrent;
            fresh := fresh || array(
                select r.execution_id
                  from unnest(p_queues) q(queue)
                 cross join lateral (
                      select e.execution_id, e.priority, e.wake_at from stent.executions e
                       where e.queue = q.queue and e.function = p_function and e.limit_key = this_key
                         and e.worker_id is null and e.wake_at <= now() and e.started_at is null
                       order by e.priority desc, e.wake_at
                       limit room for no key update skip locked) r
                 order by r.priority desc, r.wake_at
                 -- With tokens only so many may start: then one of each key at a time.
                 limit least(room - cardinality(fresh),
                             case when lim.rate_per_second is not null then 1
                                  else coalesce(lim.max_concurrent - held, room) end));
        end loop;
    end if;
    if cardinality(fresh) > 0 then
        select * into bucket from stent.take_tokens(lim.name, cardinality(fresh)) t;
        if bucket.taken < cardinality(fresh) then
            pause := bucket.tokens_in;
            fresh := fresh[1:bucket.taken];
            -- The keys behind what was paid for wait for the next look.
            last_key := coalesce((select e.limit_key from stent.executions e
                                   where e.execution_id = fresh[cardinality(fresh)]), p_after);
        end if;
        insert into stent.slots (limit_name, key, execution_id, call_id, epoch)
        select lim.name, case when lim.keyed then coalesce(e.limit_key, '') else '' end, e.execution_id, nil, 0
          from unnest(fresh) f(execution_id)
         cross join lateral (
              select x.* from stent.executions x where x.execution_id = f.execution_id offset 0) e
        on conflict do nothing;
        ready := ready || fresh;
    end if;
    locked := array(
        select e.tid
          from (select distinct r.execution_id from unnest(ready) r(execution_id) order by 1) r
         cross join lateral (
              select x.ctid as tid from stent.executions x
               where x.execution_id = r.execution_id and x.worker_id is null and x.finished_at is null
                 for no key update skip locked) e
         limit p_count + cardinality(fresh));
    return query
    with claimed as (
        update stent.executions e
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = e.epoch + 1,
               status = case e.status when 'pending' then 'running' else e.status end,
               started_at = coalesce(e.started_at, clock_timestamp()), wake_at = '-infinity',
               code_digest = coalesce(e.code_digest, p_digest)
         where e.ctid = any (locked)
        returning e.*)
    select c.execution_id, c.function, c.kind, c.status, c.queue, c.priority, c.epoch, c.created_at,
           c.started_at, c.deadline_at, c.cancel_by,
           case c.status when 'blocked' then coalesce(c.cancel_reason,
               (select i.reason from stent.inbox i
                 where i.execution_id = c.execution_id and i.kind = 'cancel' limit 1))
                else c.cancel_reason end, c.seed, c.key_seed, c.root_id,
           c.parent_id, c.parent_address, c.detached, c.depth, c.code_digest, c.blocked_digest, c.tags,
           c.options, p.payload, null::text, null::double precision
      from claimed c
     cross join lateral (
           select x.payload from stent.payloads x where x.execution_id = c.execution_id and x.call_id = nil
           offset 0) p
     order by c.priority desc, c.execution_id;
    reached := last_key;
    tokens_in := pause;
    return next;
end $$;

-- Up to p_count ready tasks of one (queue, function), no more of any key than its limit allows, keys in turn: the
-- first is the one after p_after. Always with a last row without a task: the key that was reached, or '' after all of
-- them. Index: tasks_keyed_idx.
create function stent.claim_keyed_tasks_after(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint, p_queue text, p_function text, p_count integer,
    p_after text)
    returns table (execution_id uuid, call_id uuid, address text, function text, epoch bigint, attempt integer,
                   is_page boolean, arguments bytea, options bytea, owner uuid, key_seed uuid, root_id uuid,
                   parent_id uuid, tags text[], priority smallint, available_at timestamptz, limit_key text,
                   reached text)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    lim      stent.limits;
    this_key text;
    last_key text := p_after;
    wrapped  boolean := p_after = '';
    visited  integer := 0;
    found_at tid[];
    ready    tid[] := '{}';
    held     bigint;
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    select * into lim from stent.limits l where l.name = 'function:' || p_function for update;
    if lim.paused then
        return;
    end if;
    delete from stent.slots s
     where s.limit_name = lim.name and s.call_id <> '00000000-0000-0000-0000-000000000000'
       and not exists (select from stent.tasks t
                        where t.execution_id = s.execution_id and t.call_id = s.call_id and t.epoch = s.epoch
                          and t.worker_id is not null);
    -- Calls from before the function had a key have none and no limit. They are the oldest: only there they are
    -- looked for, so that this does not walk over what has keys.
    ready := array(
        select o.tid
          from (select t.ctid as tid, t.limit_key from stent.tasks t
                 where t.queue = p_queue and t.function = p_function and t.worker_id is null
                   and t.available_at <= now()
                 order by t.priority desc, t.available_at
                 limit 500) o
         cross join lateral (
               select t.ctid from stent.tasks t
                where t.ctid = o.tid and t.worker_id is null for update skip locked) l
         where o.limit_key is null limit p_count);
    while cardinality(ready) < p_count loop
        select t.limit_key into this_key from stent.tasks t
         where t.queue = p_queue and t.function = p_function and t.limit_key > last_key
         order by t.limit_key limit 1;
        if this_key is null and not wrapped then
            wrapped := true;
            last_key := '';
            continue;
        end if;
        if this_key is null or (wrapped and p_after <> '' and this_key > p_after) then
            last_key := '';  -- all of them were visited
            exit;
        end if;
        exit when visited = 1000;
        visited := visited + 1;
        last_key := this_key;
        select count(*) into held from stent.slots s where s.limit_name = lim.name and s.key = this_key;
        continue when lim.max_concurrent is not null and held >= lim.max_concurrent;
        found_at := array(
            select t.ctid from stent.tasks t
             where t.queue = p_queue and t.function = p_function and t.limit_key = this_key
               and t.worker_id is null and t.available_at <= now()
             order by t.priority desc, t.available_at
             limit least(p_count - cardinality(ready), coalesce(lim.max_concurrent - held, p_count))
               for update skip locked);
        ready := ready || found_at;
    end loop;
    delete from stent.tasks t
     where t.ctid = any (ready)
       and coalesce((select e.finished_at is not null from stent.executions e
                      where e.execution_id = t.execution_id), true);
    return query
    with claimed as (
        update stent.tasks t
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = t.epoch + 1
         where t.ctid = any (ready)
        returning t.*),
    taken as (
        insert into stent.slots (limit_name, key, execution_id, call_id, epoch)
        select lim.name, c.limit_key, c.execution_id, c.call_id, c.epoch from claimed c
         where c.limit_key is not null
        on conflict (limit_name, key, execution_id, call_id) do update
           set epoch = excluded.epoch, taken_at = clock_timestamp())
    select c.execution_id, c.call_id, c.address, c.function, c.epoch, c.attempt, c.is_page,
           coalesce(c.arguments, (select p.payload from stent.payloads p
                                   where p.execution_id = c.execution_id and p.call_id = c.call_id)),
           c.options, e.worker_id, e.key_seed, e.root_id, e.parent_id, e.tags, c.priority, c.available_at, c.limit_key,
           null::text
      from claimed c
     cross join lateral (select x.* from stent.executions x where x.execution_id = c.execution_id offset 0) e;
    reached := last_key;
    return next;
end $$;

-- Executions that have begun, have no owner and were asked to stop, or whose time is over, although their queue or
-- their function is paused: they may clean up. Index: inbox_cancel_idx, executions_deadline_idx.
create function stent.claim_stopping_executions(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_functions text[], p_digests text[], p_count integer)
    returns table (execution_id uuid, function text, kind text, status text, queue text, priority smallint,
                   epoch bigint, created_at timestamptz, started_at timestamptz, deadline_at timestamptz,
                   cancel_by timestamptz, cancel_reason text, seed bytea, key_seed uuid, root_id uuid,
                   parent_id uuid, parent_address text, detached boolean, depth smallint, code_digest text,
                   blocked_digest text, tags text[], options bytea, arguments bytea)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    locked tid[];
begin
    update stent.worker_claims set claim = p_claim
     where worker_id = p_worker_id and incarnation = p_incarnation and claim = p_claim - 1;
    if not found then
        raise exception using errcode = 'ST001', message = 'claim fenced';
    end if;
    locked := array(
        select e.tid
          from (select i.execution_id from stent.inbox i where i.kind = 'cancel'
                union
                select d.execution_id from stent.executions d
                 where d.deadline_at <= now() and d.finished_at is null
                order by 1) r
         cross join lateral (
              select x.ctid as tid from stent.executions x
               where x.execution_id = r.execution_id and x.worker_id is null and x.finished_at is null
                 and x.started_at is not null and x.queue = any (p_queues) and x.function = any (p_functions)
                 for no key update skip locked) e
         limit p_count);
    return query
    with claimed as (
        update stent.executions e
           set worker_id = p_worker_id, incarnation = p_incarnation, epoch = e.epoch + 1, wake_at = '-infinity',
               code_digest = coalesce(e.code_digest, p_digests[array_position(p_functions, e.function)])
         where e.ctid = any (locked)
        returning e.*)
    select c.execution_id, c.function, c.kind, c.status, c.queue, c.priority, c.epoch, c.created_at,
           c.started_at, c.deadline_at, c.cancel_by,
           case c.status when 'blocked' then coalesce(c.cancel_reason,
               (select i.reason from stent.inbox i
                 where i.execution_id = c.execution_id and i.kind = 'cancel' limit 1))
                else c.cancel_reason end, c.seed, c.key_seed, c.root_id,
           c.parent_id, c.parent_address, c.detached, c.depth, c.code_digest, c.blocked_digest, c.tags,
           c.options, p.payload
      from claimed c
     cross join lateral (
           select x.payload from stent.payloads x
            where x.execution_id = c.execution_id and x.call_id = '00000000-0000-0000-0000-000000000000'
           offset 0) p
     order by c.priority desc, c.execution_id;
end $$;

-- What the code of each worker says. While versions differ, as in a deploy, the strictest of those that live holds.
create table stent.limit_declarations (
    worker_id       uuid not null,
    name            text not null,
    max_concurrent  integer,
    rate_per_second double precision,
    burst           integer,
    keyed           boolean not null,
    primary key (name, worker_id)
);

-- Make the limits of the code what the living workers say; an operator's stay. A function that living workers have
-- and none of them limits has no limit; one that nobody has keeps what it had. Locks: limits. Returns how many have
-- changed.
create function stent.settle_declared_limits() returns bigint
    language plpgsql set search_path = pg_catalog as $$
declare
    changed bigint;
begin
    with living as (
        select l.worker_id, f.functions
          from stent.leases l left join stent.worker_functions f using (worker_id)
         where l.state in ('running', 'draining') and l.expires_at > clock_timestamp()),
    said as (
        select d.name, min(d.max_concurrent) as max_concurrent,
               (array_agg(d.rate_per_second order by d.rate_per_second) filter (where d.rate_per_second is not null))[1]
                   as rate_per_second,
               (array_agg(d.burst order by d.rate_per_second) filter (where d.rate_per_second is not null))[1] as burst,
               bool_or(d.keyed) as keyed
          from stent.limit_declarations d join living using (worker_id)
         group by d.name),
    wanted as (
        select s.name, s.max_concurrent, s.rate_per_second, s.burst, s.keyed from said s
        union all
        select m.name, null, null, null, false
          from stent.limits m
         where (m.declared_max_concurrent is not null or m.declared_rate_per_second is not null)
           and not exists (select from said s where s.name = m.name)
           and exists (select from living v where m.name = any (
                       select 'function:' || one from unnest(v.functions) as u (one)))),
    written as (
        insert into stent.limits as l
            (name, max_concurrent, rate_per_second, burst, keyed,
             declared_max_concurrent, declared_rate_per_second, declared_burst)
        select w.name, w.max_concurrent, w.rate_per_second, w.burst, w.keyed,
               w.max_concurrent, w.rate_per_second, w.burst
          from wanted w
         where not exists (
               select from stent.limits m
                where m.name = w.name
                  and (m.declared_max_concurrent, m.declared_rate_per_second, m.declared_burst, m.keyed)
                      is not distinct from (w.max_concurrent, w.rate_per_second, w.burst, w.keyed))
         order by w.name
        on conflict (name) do update
           set declared_max_concurrent = excluded.declared_max_concurrent,
               declared_rate_per_second = excluded.declared_rate_per_second,
               declared_burst = excluded.declared_burst,
               max_concurrent = case when l.is_set then l.max_concurrent else excluded.max_concurrent end,
               rate_per_second = case when l.is_set then l.rate_per_second else excluded.rate_per_second end,
               burst = case when l.is_set then l.burst else excluded.burst end,
               keyed = excluded.keyed, updated_at = now()
         where (l.declared_max_concurrent, l.declared_rate_per_second, l.declared_burst, l.keyed)
               is distinct from (excluded.declared_max_concurrent, excluded.declared_rate_per_second,
                                 excluded.declared_burst, excluded.keyed)
        returning 1)
    select count(*) into changed from written;
    return changed;
end $$;

-- What the code of a starting worker says. Locks: limits.
create function stent.declare_limits_of(
    p_worker_id uuid, p_names text[], p_max_concurrent integer[], p_rates double precision[], p_bursts integer[],
    p_keyed boolean[]) returns bigint
    language plpgsql set search_path = pg_catalog as $$
begin
    delete from stent.limit_declarations d
     where d.worker_id = p_worker_id
        or not exists (select from stent.leases l
                        where l.worker_id = d.worker_id and l.state in ('running', 'draining'));
    insert into stent.limit_declarations (worker_id, name, max_concurrent, rate_per_second, burst, keyed)
    select p_worker_id, d.name, d.max_concurrent, d.rate, d.burst, d.keyed
      from unnest(p_names, p_max_concurrent, p_rates, p_bursts, p_keyed)
           as d (name, max_concurrent, rate, burst, keyed);
    return stent.settle_declared_limits();
end $$;
