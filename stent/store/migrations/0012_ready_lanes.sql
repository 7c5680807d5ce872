-- Whether a limited function has something to claim is found out as its claims find it: above a mark.
--
-- The question was asked from the beginning of the index each time, and walked over what an old transaction keeps
-- there, and over whatever is not ready yet.

-- Whether there is a ready task of a function in a queue. p_low, p_priorities: as of claim_tasks_above in 0010.
-- Index: tasks_ready_idx, probed per priority and per gap.
create function stent.is_ready(p_queue text, p_function text, p_low timestamptz, p_priorities smallint[])
    returns boolean language plpgsql stable set search_path = pg_catalog
    set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
    set plan_cache_mode = force_generic_plan set jit = off as $$
begin
    return exists (
        with recursive others as (
            select g.above, n.priority
              from unnest(array[-32769] || p_priorities::integer[], p_priorities::integer[] || array[32768])
                   as g (above, below)
             cross join lateral (
                   select t.priority from stent.tasks t
                    where t.queue = p_queue and t.function = p_function
                      and t.priority > g.above and t.priority < g.below
                    order by t.priority desc limit 1) n
            union all
            select o.above, n.priority
              from others o
             cross join lateral (
                   select t.priority from stent.tasks t
                    where t.queue = p_queue and t.function = p_function
                      and t.priority > o.above and t.priority < o.priority
                    order by t.priority desc limit 1) n),
        priorities as (
            select p.priority from unnest(p_priorities) p(priority)
            union all
            select o.priority from others o)
        select from priorities p
         cross join lateral (
               select from stent.tasks t
                where t.queue = p_queue and t.function = p_function and t.priority = p.priority
                  and t.worker_id is null and t.available_at between p_low and clock_timestamp()
                limit 1) r);
end $$;
