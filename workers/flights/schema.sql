-- Table flights: one row per flight that arrived, as workers/flights/clean.py makes it.
-- No primary key, on purpose: nothing in the table forbids a row twice, so that
-- counting distinct row_number proves the engine wrote each row exactly once.
-- flight_date and scheduled_departure are local to New York: an aware timestamp would
-- cost a third of the whole COPY on the client, and nobody here asks for it.
create table if not exists flights (
    row_number               integer     not null,
    flight_date              date        not null,
    carrier                  text        not null,
    carrier_name             text,
    flight_number            smallint    not null,
    scheduled_departure      time        not null,
    departure_delay_minutes  smallint    not null,
    arrival_delay_minutes    smallint    not null,
    air_time_minutes         smallint    not null,
    tail_number              text,
    plane_manufacturer       text,
    plane_model              text,
    plane_year               smallint,
    plane_seats              smallint,
    origin                   text        not null,
    origin_name              text,
    destination              text        not null,
    destination_name         text,
    distance_miles           smallint    not null,
    distance_is_plausible    boolean,
    constraint flights_row_number_from_zero check (row_number >= 0),
    constraint flights_distance_positive    check (distance_miles > 0),
    constraint flights_air_time_positive    check (air_time_minutes > 0)
);
