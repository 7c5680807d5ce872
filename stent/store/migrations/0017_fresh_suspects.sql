-- A claim that waited for a takeover learns of the suspects that this has left.
--
-- The claims asked in their own snapshot, which is older than that in which they look for what is ready: what a
-- takeover freed in between began unmarked, and when it killed its worker again, that was not counted.

-- Whether anything is suspected, in a snapshot taken now.
create function stent.any_suspects() returns boolean
    language plpgsql volatile set search_path = pg_catalog as $$
begin
    return exists (select from stent.suspects);
end $$;
