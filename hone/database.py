"""The store's database: SQLite (WAL) in the home, or whatever `HONE_STORE` names, through SQLAlchemy.

What is kept there is said beside who keeps it: jobs (`hone.store`), API keys (`hone.keys`), usage (`hone.usage`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Column, create_engine, event, inspect
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.schema import CreateColumn

from hone.errors import ResourceError

UNREACHABLE_AFTER = {"connect_timeout": "5", "tcp_user_timeout": "10000"}
"""What libpq is told, in seconds and in milliseconds: a host that has vanished must not hold a thread for minutes."""


class Table(DeclarativeBase):
    """Base of everything that is kept."""


class Database:
    """Opens the database at a SQLAlchemy URL, making the tables, and columns of older tables, that are not there yet."""

    def __init__(self, url: str) -> None:
        """Raises ResourceError where the database cannot be reached, or not be written as it must be."""
        parsed = make_url(url)
        if parsed.drivername.startswith("sqlite") and parsed.database:
            try:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResourceError(f"{parsed.database}: the store cannot be opened ({error.strerror})") from None
        self._engine = _engine(parsed)
        try:
            _make_tables(self._engine)
            _add_columns(self._engine)
        except DBAPIError as error:
            self._engine.dispose()
            raise ResourceError(f"{parsed.render_as_string()}: the store cannot be opened ({str(error.orig).splitlines()[0]})") from None

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        url = url.set(query={**UNREACHABLE_AFTER, **url.query})
    try:
        # Asked before each use, so that a database which was restarted is not met with a dead connection.
        engine = create_engine(url, pool_pre_ping=True)
    except (ImportError, NoSuchModuleError) as error:
        raise ResourceError(
            f"{url.render_as_string()}: no driver for it here ({error}); pip install 'hone[postgres]' brings the one of postgresql+psycopg://"
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _use_wal)
    return engine


def _make_tables(engine: Engine) -> None:
    # Another process may make a table between our look and our making of it, once for each table. What else it is happens every time.
    for _ in Table.metadata.tables:
        with suppress(DBAPIError):
            Table.metadata.create_all(engine)
            return
    Table.metadata.create_all(engine)


def _add_columns(engine: Engine) -> None:
    """Bring tables that an older version made up to date; what has come since has a default."""
    for column in _lacking(engine):
        try:
            with engine.begin() as connection:
                added = CreateColumn(column).compile(dialect=engine.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {added}")
        except DBAPIError:
            # Another process may have added it between our look and our adding.
            if column in _lacking(engine):
                raise


def _lacking(engine: Engine) -> list[Column[Any]]:
    """Columns that are not in the database."""
    known = inspect(engine)
    there = {(name, column["name"]) for name in Table.metadata.tables for column in known.get_columns(name)}
    return [column for table in Table.metadata.tables.values() for column in table.columns if (table.name, column.name) not in there]


def _use_wal(connection: Any, _record: Any) -> None:
    """Readers do not wait for the writer, and a writer waits up to 10 s for another."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
