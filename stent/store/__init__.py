"""Postgres: the one place where durable state lives and changes."""
