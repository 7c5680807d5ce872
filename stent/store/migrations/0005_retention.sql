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
