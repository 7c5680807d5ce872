"""The 2013 New York flights: CSV to Postgres in exactly-once chunks, then a report."""
