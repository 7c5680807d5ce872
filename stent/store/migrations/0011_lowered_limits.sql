-- A lowered limit holds in workers that never run out of work.
--
-- adjust_grants of 0002 answered with at least what the worker used, and so a busy worker, which starts the next
-- when one has ended, kept what it had for as long as there was work. And what was granted before a limit was
-- lifted stayed, and counted again when it was reset.

-- Say what a worker uses and wants of some limits, and learn how many slots it may use. When a limit was lowered
-- that may be fewer than it uses: it starts nothing until so many have ended, and what still runs is counted until
-- the worker says that it uses less. Limits that do not exist are left out of the answer.
-- waiters: workers that want more than they have, when there is something free again.
create or replace function stent.adjust_grants(
    p_worker_id uuid, p_incarnation bigint, p_names text[], p_used integer[], p_wanted integer[], p_tokens integer[])
    returns table (name text, slots integer, tokens integer, tokens_in double precision, waiters uuid[])
    language plpgsql set search_path = pg_catalog as $$
#variable_conflict use_variable
declare
    ask    record;
    lim    stent.limits;
    others bigint;
    kept   integer;
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
            select coalesce(sum(g.slots), 0) into others
              from stent.grants g where g.limit_name = lim.name and g.worker_id <> p_worker_id;
            slots := case when lim.paused then 0
                          else greatest(0, least(ask.wanted, lim.max_concurrent - others)) end;
            kept := greatest(ask.used, slots);
            if kept = 0 and ask.wanted = 0 then
                delete from stent.grants g where g.limit_name = lim.name and g.worker_id = p_worker_id;
            else
                insert into stent.grants as g (limit_name, worker_id, incarnation, slots, wanted)
                values (lim.name, p_worker_id, p_incarnation, kept, ask.wanted)
                on conflict (limit_name, worker_id) do update
                   set incarnation = excluded.incarnation, slots = excluded.slots, wanted = excluded.wanted,
                       asked_at = clock_timestamp();
            end if;
            if others + kept < lim.max_concurrent then
                waiters := array(select g.worker_id from stent.grants g
                                  where g.limit_name = lim.name and g.worker_id <> p_worker_id
                                    and g.wanted > g.slots);
            end if;
        else
            delete from stent.grants g where g.limit_name = lim.name and g.worker_id = p_worker_id;
        end if;
        if lim.rate_per_second is not null and ask.tokens > 0 and not lim.paused then
            select t.taken, t.tokens_in into tokens, tokens_in from stent.take_tokens(lim.name, ask.tokens) t;
        end if;
        return next;
    end loop;
end $$;
