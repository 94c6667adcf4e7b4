"""What Alembic runs around the migrations: in the caller's connection and in the caller's transaction."""

from alembic import context

from trilobe.infrastructure.store.schema import metadata


def migrate() -> None:
    """Run the migrations that Alembic's command chose; it only works when Alembic loads this file."""
    context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
    context.run_migrations()


if __name__ == "env_py":  # the name Alembic loads it under: importing it in a test or a doctest runs nothing
    migrate()
