-- What a worker tells about itself, and what an operator asks of it.
--
-- Only adds: workers of the version before neither write nor read any of this, and who
-- has no row in worker_functions has not said what it can run.

alter table stent.leases
    add column version     text not null default '',
    add column app_version text not null default '',
    -- As of the last renewal.
    add column running     bigint not null default 0,
    add column residents   bigint not null default 0,
    add column lag_ms      bigint not null default 0,
    add column asked       text constraint leases_asked_known check (asked in ('drain', 'stop'));

-- Beside the lease: names are many and hardly ever change, and a lease is written every two seconds and read by
-- every worker five times a second.
create table stent.worker_functions (
    worker_id uuid primary key,
    functions text[] not null
);
