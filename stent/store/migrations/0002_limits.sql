-- Limits: how much of a function or a queue may run at the same time, and how much may start in a time.
--
-- A limit has one row. Its slots are granted to workers in bulk: a row of grants says how many a worker may use,
-- and counts only while the worker's incarnation is that of the row. So what a lost worker held is free from the
-- take-over on, whatever happened to it: there is no counter that could leak. Tokens of a rate are spent when they
-- are granted. Whoever changes grants of a limit holds the limit's row.
--
-- Slots of a key, and slots of workflows, belong to a task or an execution: rows of slots. One counts while the
-- task is claimed under the same epoch, or while the execution has not ended; the others are deleted by the next
-- claim. Nothing on the hot path writes them.
--
-- The key travels in the options of a task or an execution, so flush() need not know of it.
--
-- Lock order: workers, limits, executions, tasks.

create table stent.limits (
    -- function:NAME or queue:NAME
    name                     text primary key,
    max_concurrent           integer constraint limits_max_concurrent_positive check (max_concurrent > 0),
    rate_per_second          double precision constraint limits_rate_positive check (rate_per_second > 0),
    burst                    integer constraint limits_burst_positive check (burst > 0),
    -- max_concurrent holds for each key.
    keyed                    boolean not null default false,
    paused                   boolean not null default false,
    -- By an operator: what the code declares is kept for later.
    is_set                   boolean not null default false,
    declared_max_concurrent  integer,
    declared_rate_per_second double precision,
    declared_burst           integer,
    tokens                   double precision not null default 0,
    refilled_at              timestamptz,
    -- Somebody was told to come back later.
    closed_until             timestamptz,
    updated_at               timestamptz not null default now(),
    constraint limits_rate_has_burst check ((rate_per_second is null) = (burst is null))
) with (fillfactor = 50);

create table stent.grants (
    limit_name  text not null,
    worker_id   uuid not null,
    incarnation bigint not null,
    slots       integer not null constraint grants_slots_positive check (slots >= 0),
    -- With those it has.
    wanted      integer not null,
    asked_at    timestamptz not null default clock_timestamp(),
    primary key (limit_name, worker_id)
) with (fillfactor = 50);

create table stent.slots (
    limit_name   text not null,
    key          text not null,
    execution_id uuid not null,
    -- Nil: the execution's own.
    call_id      uuid not null,
    epoch        bigint not null,
    taken_at     timestamptz not null default clock_timestamp(),
    primary key (limit_name, key, execution_id, call_id)
);

-- Options are JSON; what is none has no key, and is refused by whoever reads it.
create function stent.limit_key(p_options bytea) returns text
    language plpgsql immutable parallel safe set search_path = pg_catalog as $$
begin
    return convert_from(p_options, 'UTF8')::json ->> 'limit_key';
exception when data_exception then
    return null;
end $$;

-- The bytes are "limit_key" in quotes: few options have one, and only those are parsed.
alter table stent.tasks add column limit_key text generated always as (
    case when position('\x226c696d69745f6b657922'::bytea in options) > 0 then stent.limit_key(options) end) stored;
alter table stent.executions add column limit_key text generated always as (
    case when position('\x226c696d69745f6b657922'::bytea in options) > 0 then stent.limit_key(options) end) stored;
-- claim_keyed_tasks
create index tasks_keyed_idx on stent.tasks (queue, function, limit_key, priority desc, available_at)
    where limit_key is not null;
-- claim_limited_executions
create index executions_keyed_idx on stent.executions (queue, function, limit_key, priority desc, wake_at)
    where limit_key is not null and worker_id is null and wake_at is not null;

-- What the code of a starting worker says; p_plain: its functions without a limit.
create function stent.declare_limits(
    p_names text[], p_max_concurrent integer[], p_rates double precision[], p_bursts integer[], p_keyed boolean[],
    p_plain text[]) returns void
    language sql set search_path = pg_catalog
begin atomic
    insert into stent.limits as l
        (name, max_concurrent, rate_per_second, burst, keyed,
         declared_max_concurrent, declared_rate_per_second, declared_burst)
    select d.name, d.max_concurrent, d.rate, d.burst, d.keyed, d.max_concurrent, d.rate, d.burst
      from unnest(p_names, p_max_concurrent, p_rates, p_bursts, p_keyed)
           as d (name, max_concurrent, rate, burst, keyed)
     order by d.name
    on conflict (name) do update
       set declared_max_concurrent = excluded.max_concurrent,
           declared_rate_per_second = excluded.rate_per_second, declared_burst = excluded.burst,
           max_concurrent = case when l.is_set then l.max_concurrent else excluded.max_concurrent end,
           rate_per_second = case when l.is_set then l.rate_per_second else excluded.rate_per_second end,
           burst = case when l.is_set then l.burst else excluded.burst end,
           keyed = excluded.keyed, updated_at = now()
     where (l.declared_max_concurrent, l.declared_rate_per_second, l.declared_burst, l.keyed)
           is distinct from (excluded.max_concurrent, excluded.rate_per_second, excluded.burst, excluded.keyed);
    update stent.limits l
       set declared_max_concurrent = null, declared_rate_per_second = null, declared_burst = null, keyed = false,
           max_concurrent = case when is_set then max_concurrent end,
           rate_per_second = case when is_set then rate_per_second end,
           burst = case when is_set then burst end, updated_at = now()
     where l.name = any (p_plain)
       and (l.declared_max_concurrent is not null or l.declared_rate_per_second is not null);
end;

-- Refill the bucket of a limit and take up to p_count tokens; under the lock of its row. tokens_in: seconds until
-- the next one is there.
create function stent.take_tokens(p_name text, p_count integer, out taken integer, out tokens_in double precision)
    language plpgsql set search_path = pg_catalog as $$
declare
    bucket stent.limits;
    level  double precision;
    at     timestamptz := clock_timestamp();
begin
    select * into bucket from stent.limits l where l.name = p_name;
    if bucket.rate_per_second is null then
        taken := p_count;
        tokens_in := 0;
        return;
    end if;
    level := case when bucket.refilled_at is null then bucket.burst
                  else least(bucket.burst, bucket.tokens
                       + greatest(extract(epoch from at - bucket.refilled_at), 0) * bucket.rate_per_second) end;
    if bucket.closed_until > at then
        -- What dripped in before it opens again is not to come out at once.
        taken := 0;
        tokens_in := extract(epoch from bucket.closed_until - at);
        level := 0;
        at := bucket.closed_until;
    else
        taken := least(p_count, floor(level)::integer);
        level := level - taken;
        tokens_in := greatest(1 - level, 0) / bucket.rate_per_second;
    end if;
    update stent.limits l set tokens = level, refilled_at = at where l.name = p_name;
end $$;

-- Say what a worker uses and wants of some limits, and learn what it may use. A worker that asks for less must
-- have stopped using the rest before. Limits that do not exist are left out of the answer.
-- waiters: workers that want more than they have, when there is something free again.
create function stent.adjust_grants(
    p_worker_id uuid, p_incarnation bigint, p_names text[], p_used integer[], p_wanted integer[], p_tokens integer[])
    returns table (name text, slots integer, tokens integer, tokens_in double precision, waiters uuid[])
    language plpgsql set search_path = pg_catalog as $$
#variable_conflict use_variable
declare
    ask    record;
    lim    stent.limits;
    others bigint;
    before integer;
begin
    if not exists (select from stent.workers w where w.worker_id = p_worker_id and w.incarnation = p_incarnation) then
        raise exception using errcode = 'ST001', message = 'limits fenced';
    end if;
    for ask in
        select * from unnest(p_names, p_used, p_wanted, p_tokens) as a (limit_name, used, wanted, tokens)
         order by a.limit_name
    loop
        select * into lim from stent.limits l where l.name = ask.limit_name for update;
        continue when not found;
        name := ask.limit_name;
        slots := null;
        tokens := 0;
        tokens_in := 0;
        waiters := '{}';
        if lim.max_concurrent is not null and not lim.keyed then
            delete from stent.grants g
             where g.limit_name = lim.name
               and not exists (select from stent.workers w
                                where w.worker_id = g.worker_id and w.incarnation = g.incarnation);
            select coalesce(sum(g.slots) filter (where g.worker_id <> p_worker_id), 0),
                   coalesce(max(g.slots) filter (where g.worker_id = p_worker_id), 0)
              into others, before
              from stent.grants g where g.limit_name = lim.name;
            slots := greatest(ask.used, least(ask.wanted, lim.max_concurrent - others));
            if lim.paused then
                slots := ask.used;
            end if;
            if slots = 0 and ask.wanted = 0 then
                delete from stent.grants g where g.limit_name = lim.name and g.worker_id = p_worker_id;
            else
                insert into stent.grants as g (limit_name, worker_id, incarnation, slots, wanted)
                values (lim.name, p_worker_id, p_incarnation, slots, ask.wanted)
                on conflict (limit_name, worker_id) do update
                   set incarnation = excluded.incarnation, slots = excluded.slots, wanted = excluded.wanted,
                       asked_at = clock_timestamp();
            end if;
            if others + slots < lim.max_concurrent then
                waiters := array(select g.worker_id from stent.grants g
                                  where g.limit_name = lim.name and g.worker_id <> p_worker_id
                                    and g.wanted > g.slots);
            end if;
        end if;
        if lim.rate_per_second is not null and ask.tokens > 0 and not lim.paused then
            select t.taken, t.tokens_in into tokens, tokens_in from stent.take_tokens(lim.name, ask.tokens) t;
        end if;
        return next;
    end loop;
end $$;

-- Up to p_count ready tasks of one (queue, function), no more of any key than its limit allows, keys in turn: the
-- first is the one after p_after. Index: tasks_keyed_idx.
create function stent.claim_keyed_tasks(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint, p_queue text, p_function text, p_count integer,
    p_after text)
    returns table (execution_id uuid, call_id uuid, address text, function text, epoch bigint, attempt integer,
                   is_page boolean, arguments bytea, options bytea, owner uuid, key_seed uuid, root_id uuid,
                   parent_id uuid, tags text[], priority smallint, available_at timestamptz, limit_key text)
    language plpgsql set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
#variable_conflict use_column
declare
    lim      stent.limits;
    this_key text := p_after;
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
                 limit 500 for update skip locked) o
         where o.limit_key is null limit p_count);
    while cardinality(ready) < p_count and visited < 1000 loop
        select t.limit_key into this_key from stent.tasks t
         where t.queue = p_queue and t.function = p_function and t.limit_key > this_key
         order by t.limit_key limit 1;
        if this_key is null then
            exit when wrapped;
            wrapped := true;
            this_key := '';
            continue;
        end if;
        exit when wrapped and p_after <> '' and this_key > p_after;
        visited := visited + 1;
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
           c.options, e.worker_id, e.key_seed, e.root_id, e.parent_id, e.tags, c.priority, c.available_at, c.limit_key
      from claimed c
     cross join lateral (select x.* from stent.executions x where x.execution_id = c.execution_id offset 0) e;
end $$;

-- Executions of one limited function: those that have their slot and something to do, and new ones as far as
-- there are slots and tokens. An execution keeps its slot until it ends.
create function stent.claim_limited_executions(
    p_worker_id uuid, p_incarnation bigint, p_claim bigint,
    p_queues text[], p_function text, p_digest text, p_count integer)
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
    lim      stent.limits;
    nil      constant uuid := '00000000-0000-0000-0000-000000000000';
    ready    uuid[];
    fresh    uuid[] := '{}';
    room     bigint;
    this_key text := '';
    visited  integer := 0;
    held     bigint;
    locked   tid[];
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
    select greatest(0, least(p_count - cardinality(ready),
                             case when lim.keyed or lim.max_concurrent is null then p_count
                                  else lim.max_concurrent - count(*) end))
      into room from stent.slots s where s.limit_name = lim.name and s.call_id = nil;
    if room > 0 and not lim.keyed then
        fresh := array(
            select r.execution_id
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.execution_id, e.priority, e.wake_at from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.worker_id is null
                     and e.wake_at <= now() and e.finished_at is null
                     and not exists (select from stent.slots s
                                      where s.limit_name = lim.name and s.key = '' and s.call_id = nil
                                        and s.execution_id = e.execution_id)
                   order by e.priority desc, e.wake_at
                   limit room for no key update skip locked) r
             order by r.priority desc, r.wake_at limit room);
    elsif room > 0 then
        -- From before the function had a key, as in claim_keyed_tasks.
        fresh := array(
            select o.execution_id
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.execution_id, e.limit_key from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.worker_id is null
                     and e.wake_at <= now() and e.finished_at is null
                   order by e.priority desc, e.wake_at
                   limit 500 for no key update skip locked) o
             where o.limit_key is null limit room);
        while cardinality(fresh) < room and visited < 1000 loop
            select min(k.limit_key) into this_key
              from unnest(p_queues) q(queue)
             cross join lateral (
                  select e.limit_key from stent.executions e
                   where e.queue = q.queue and e.function = p_function and e.limit_key > this_key
                     and e.worker_id is null and e.wake_at is not null
                   order by e.limit_key limit 1) k;
            exit when this_key is null;
            visited := visited + 1;
            select count(*) into held from stent.slots s where s.limit_name = lim.name and s.key = this_key;
            continue when lim.max_concurrent is not null and held >= lim.max_concurrent;
            fresh := fresh || array(
                select r.execution_id
                  from unnest(p_queues) q(queue)
                 cross join lateral (
                      select e.execution_id, e.priority, e.wake_at from stent.executions e
                       where e.queue = q.queue and e.function = p_function and e.limit_key = this_key
                         and e.worker_id is null and e.wake_at <= now()
                         and not exists (select from stent.slots s
                                          where s.limit_name = lim.name and s.key = this_key and s.call_id = nil
                                            and s.execution_id = e.execution_id)
                       order by e.priority desc, e.wake_at
                       limit room for no key update skip locked) r
                 order by r.priority desc, r.wake_at
                 limit least(room - cardinality(fresh), coalesce(lim.max_concurrent - held, room)));
        end loop;
    end if;
    if cardinality(fresh) > 0 then
        fresh := fresh[1:(select t.taken from stent.take_tokens(lim.name, cardinality(fresh)) t)];
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
         limit p_count);
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
           c.options, p.payload
      from claimed c
     cross join lateral (
           select x.payload from stent.payloads x where x.execution_id = c.execution_id and x.call_id = nil
           offset 0) p
     order by c.priority desc, c.execution_id;
end $$;
