"""The catalogue: names, their versions and which one is live, in SQLite; and the base that they all are for.

Every change is one transaction. A removed name keeps its row, without versions, so that its numbers never come again
and `name@version` never changes its meaning. It knows digests, but neither files nor what is in them.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    bindparam,
    create_engine,
    event,
    func,
    or_,
    select,
)
from sqlalchemy.exc import DatabaseError

from .adapter import Adapter
from .base_layout import BaseLayout
from .errors import AdapterNotFound, StoreError, VersionNotFound
from .layout_json import describe_layout, parse_layout
from .tokenizer_form import TokenizerForm

SCHEMA_VERSION = 6
UPGRADES = {
    "1": "ALTER TABLE versions ADD COLUMN num_virtual_tokens INTEGER NOT NULL DEFAULT 0",
    "2": "ALTER TABLE versions ADD COLUMN invocation_tokens VARCHAR NOT NULL DEFAULT ''",
    "3": "ALTER TABLE versions ADD COLUMN vocab_size INTEGER",
    "4": "ALTER TABLE versions ADD COLUMN tokenizer_digest VARCHAR",
    "5": "ALTER TABLE versions ADD COLUMN tokenizer_parts VARCHAR NOT NULL DEFAULT ''",
}
"""What makes the next schema of each earlier one; the first knew no prefixes, the second no aLoRA, the third no
vocabularies, the fourth and fifth no tokenizers."""
BUSY_SECONDS = 30
LARGEST_INTEGER = 2**63 - 1
"""SQLite's; a version beyond it cannot even be asked for."""

_schema = MetaData()
_meta = Table("meta", _schema, Column("key", String, primary_key=True), Column("value", String, nullable=False))
_adapters = Table(
    "adapters",
    _schema,
    Column("name", String, primary_key=True),
    Column("last_version", Integer, nullable=False),  # the highest number ever given
    Column("live_version", Integer),  # null once removed
)
_versions = Table(
    "versions",
    _schema,
    Column("name", String, ForeignKey("adapters.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", String, nullable=False, index=True),
    Column("source_sha256", String, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("targets", String, nullable=False),  # separated by commas
    Column("nbytes", Integer, nullable=False),
    Column("num_parameters", Integer, nullable=False),
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
    Column("num_virtual_tokens", Integer, nullable=False, server_default="0"),
    Column("invocation_tokens", String, nullable=False, server_default=""),  # separated by commas
    Column("vocab_size", Integer),  # null for the base's
    Column("tokenizer_digest", String),  # null where the base's tokenizer is used
    Column("tokenizer_parts", String, nullable=False, server_default=""),  # separated by commas
)


@dataclass(frozen=True)
class AdapterVersion:
    """One published version of an adapter."""

    name: str
    version: int
    digest: str
    """sha256 of the blob, hexadecimal: the same for the same adapter, whatever its name or upload."""
    source_sha256: str
    """sha256 of what was sent, hexadecimal."""
    rank: int
    """The largest rank of any pair; 0 for an adapter that is a prefix."""
    targets: tuple[str, ...]
    nbytes: int
    num_parameters: int
    created_at: datetime
    num_virtual_tokens: int
    """How many positions of the context a prefix takes; 0 for other adapters."""
    invocation_tokens: tuple[int, ...]
    """What a prompt calls an aLoRA with; empty for other adapters."""
    vocab_size: int | None
    """How many tokens the adapter has; None for as many as the base."""
    tokenizer_digest: str | None
    """sha256 of what it brought of a tokenizer, hexadecimal; None if it uses the base's."""
    tokenizer_parts: tuple[str, ...]
    """What that is: `tokens`, `special_tokens`, `chat_template`."""
    is_live: bool
    """Whether it answered to the plain name when it was looked up."""

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


_is_live = _versions.c.version == _adapters.c.live_version
_of_name = _versions.c.name == bindparam("name")


def _select_versions(*conditions: ColumnElement[bool]) -> Select[Any]:
    return (
        select(*_versions.c, _is_live.label("is_live"))
        .join(_adapters)
        .where(*conditions)
        .order_by(_versions.c.name, _versions.c.version)
    )


# built once: `resolve` is on the path of every request
_SELECT_LIVE = _select_versions(_of_name, _is_live)
_SELECT_VERSION = _select_versions(_of_name, _versions.c.version == bindparam("version"))


class Catalogue:
    """The database; any number of threads and processes may have it open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, path: Path, layout: BaseLayout | None, base_name: str | None) -> "Catalogue":
        """Open the database, or create it for a base; the caller keeps others from doing so at the same time.

        Raises:
            StoreError: it is damaged, of another version or for another base.
        """
        engine = create_engine(f"sqlite:///{path}", max_overflow=-1, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _configure)
        catalogue = cls(engine)
        try:
            catalogue._create(layout, base_name)
            catalogue._upgrade()
            catalogue._check_base(layout, base_name)
        except DatabaseError as error:
            catalogue.close()
            raise StoreError(f"{path} cannot be used as an adapter catalogue: {error.orig}.") from error
        except StoreError:
            catalogue.close()
            raise
        return catalogue

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @property
    def base_name(self) -> str:
        """The name of the base that all adapters here are for."""
        return self._meta("base_name")

    @property
    def layout(self) -> BaseLayout:
        """What an adapter has to fit."""
        return parse_layout(json.loads(self._meta("layout")))

    @property
    def base_tokenizer(self) -> str | None:
        """The digest of the base's tokenizer, if it has been told."""
        with self._engine.connect() as connection:
            return connection.scalar(select(_meta.c.value).where(_meta.c.key == "base_tokenizer"))

    def remember_base_tokenizer(self, digest: str) -> None:
        """Note the digest of the base's tokenizer in place of the one before."""
        with self._transaction() as connection:
            connection.execute(_meta.delete().where(_meta.c.key == "base_tokenizer"))
            connection.execute(_meta.insert().values(key="base_tokenizer", value=digest))

    def resolve(self, name: str, version: int | None = None) -> AdapterVersion:
        """The live version of a name, or the one asked for.

        Raises:
            AdapterNotFound, VersionNotFound: there is none.
        """
        with self._engine.connect() as connection:
            return _resolve(connection, name, version)

    def live_versions(self) -> list[AdapterVersion]:
        """The live version of every adapter, by name."""
        return self._read(_select_versions(_is_live))

    def versions(self, name: str) -> list[AdapterVersion]:
        """All versions of a name, oldest first; none if there is no such adapter."""
        return self._read(_select_versions(_versions.c.name == name))

    def all_versions(self) -> list[AdapterVersion]:
        """All versions of all adapters."""
        return self._read(_select_versions())

    def digests(self) -> set[str]:
        """The blobs that are wanted, of adapters and of tokenizers."""
        of_adapters, of_tokenizers = select(_versions.c.digest), select(_versions.c.tokenizer_digest)
        of_base = select(_meta.c.value).where(_meta.c.key == "base_tokenizer")
        with self._engine.connect() as connection:
            return set(connection.scalars(of_adapters.union(of_tokenizers, of_base))) - {None}

    def refers_to(self, digest: str) -> bool:
        """Whether any version has this blob."""
        with self._engine.connect() as connection:
            return connection.scalar(select(_versions.c.name).where(_has_blob([digest])).limit(1)) is not None

    def is_live(self, digest: str) -> bool:
        """Whether this blob is the live version of any name."""
        return bool(self._read(_select_versions(_versions.c.digest == digest, _is_live)))

    def add(
        self, name: str, adapter: Adapter, digest: str, source_sha256: str, tokenizer: TokenizerForm | None
    ) -> AdapterVersion:
        """Record the next version of a name, live at once."""
        with self._transaction() as connection:
            last = connection.scalar(select(_adapters.c.last_version).where(_adapters.c.name == name))
            version = (last or 0) + 1
            if last is None:
                connection.execute(_adapters.insert().values(name=name, last_version=version, live_version=version))
            else:
                update = _adapters.update().where(_adapters.c.name == name)
                connection.execute(update.values(last_version=version, live_version=version))
            connection.execute(
                _versions.insert().values(
                    name=name,
                    version=version,
                    digest=digest,
                    source_sha256=source_sha256,
                    rank=adapter.rank,
                    targets=",".join(adapter.targets),
                    nbytes=adapter.nbytes,
                    num_parameters=adapter.num_parameters,
                    created_at=datetime.now(UTC).isoformat(),
                    num_virtual_tokens=adapter.num_virtual_tokens,
                    invocation_tokens=",".join(map(str, adapter.invocation_tokens)),
                    vocab_size=adapter.vocab_size,
                    tokenizer_digest=tokenizer.digest if tokenizer else None,
                    tokenizer_parts=",".join(tokenizer.parts) if tokenizer else "",
                )
            )
            return _resolve(connection, name, version)

    def rollback(self, name: str, version: int | None) -> AdapterVersion:
        """Make another version live; by default the highest one below the live one.

        Raises:
            AdapterNotFound, VersionNotFound: there is none.
        """
        with self._transaction() as connection:
            if version is None:
                live = _resolve(connection, name, None)
                below = select(func.max(_versions.c.version)).where(
                    _versions.c.name == name, _versions.c.version < live.version
                )
                version = connection.scalar(below)
                if version is None:
                    raise VersionNotFound(f"Adapter {name} has no version below {live.version}, the live one.")
            _resolve(connection, name, version)
            connection.execute(_adapters.update().where(_adapters.c.name == name).values(live_version=version))
            return _resolve(connection, name, version)

    def remove(self, name: str) -> list[AdapterVersion]:
        """Forget a name and all its versions, which are returned; its numbers are not given again.

        Raises:
            AdapterNotFound: there is no such name.
        """
        with self._transaction() as connection:
            _resolve(connection, name, None)
            removed = _parse_rows(connection.execute(_select_versions(_versions.c.name == name)).all())
            connection.execute(_versions.delete().where(_versions.c.name == name))
            connection.execute(_adapters.update().where(_adapters.c.name == name).values(live_version=None))
            return removed

    def drop_blobs(self, digests: Collection[str]) -> dict[str, int | None]:
        """Forget the versions that have these blobs; where one was live, the newest version left becomes live.

        Returns:
            The names whose live version went, with the version that is live now; None where no version is left.
        """
        with self._transaction() as connection:
            dropped = _has_blob(digests)
            names = connection.scalars(_select_versions(dropped, _is_live).with_only_columns(_versions.c.name)).all()
            connection.execute(_versions.delete().where(dropped))
            now_live: dict[str, int | None] = {}
            for name in names:
                newest = connection.scalar(select(func.max(_versions.c.version)).where(_versions.c.name == name))
                connection.execute(_adapters.update().where(_adapters.c.name == name).values(live_version=newest))
                now_live[name] = newest
            return now_live

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            # at once a writer, so that what is read here cannot change before the write
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def _read(self, query: Select[Any]) -> list[AdapterVersion]:
        with self._engine.connect() as connection:
            return _parse_rows(connection.execute(query).all())

    def _meta(self, key: str) -> str:
        with self._engine.connect() as connection:
            value = connection.scalar(select(_meta.c.value).where(_meta.c.key == key))
        if value is None:
            raise StoreError(f"The adapter catalogue does not say its {key}; it is not one of this program.")
        return str(value)

    def _create(self, layout: BaseLayout | None, base_name: str | None) -> None:
        if layout is None or base_name is None:
            return
        with self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        with self._transaction() as connection:
            _schema.create_all(connection)
            if connection.scalar(select(func.count()).select_from(_meta)) == 0:
                values = {
                    "schema_version": str(SCHEMA_VERSION),
                    "base_name": base_name,
                    "layout": json.dumps(describe_layout(layout)),
                }
                connection.execute(_meta.insert(), [{"key": key, "value": value} for key, value in values.items()])

    def _upgrade(self) -> None:
        """Bring a catalogue of an earlier version up to date, step by step."""
        while (version := self._meta("schema_version")) in UPGRADES:
            with self._transaction() as connection:
                connection.exec_driver_sql(UPGRADES[version])
                _set_meta(connection, "schema_version", str(int(version) + 1))

    def _check_base(self, layout: BaseLayout | None, base_name: str | None) -> None:
        if self._meta("schema_version") != str(SCHEMA_VERSION):
            raise StoreError(
                "The adapter store was written by another version of Onebase: its schema is "
                f"{self._meta('schema_version')}, this program's {SCHEMA_VERSION}. "
                "Serve it with that version, or give another folder as --store."
            )
        if layout is not None and not self._learn_layout(layout):
            raise StoreError(
                f"The adapter store is for base {self.base_name}, whose linears differ from those of the base given"
                f"{f', {base_name}' if base_name else ''}; each base needs a store of its own."
            )
        if base_name is not None and base_name != self.base_name:
            raise StoreError(
                f"The adapter store is for base {self.base_name}, not for {base_name}; each base needs a store of its "
                f"own. If it is the same base under another name, give {self.base_name} as its name."
            )

    def _learn_layout(self, layout: BaseLayout) -> bool:
        """Whether the layout is the base's; if it is, what an earlier program did not note of it is added."""
        known, given = json.loads(self._meta("layout")), describe_layout(layout)
        if any(given.get(key) != value for key, value in known.items()):
            return False
        if given != known:
            with self._transaction() as connection:
                _set_meta(connection, "layout", json.dumps(given))
        return True


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3's own BEGIN is deferred; `_transaction` says its own
    connection.execute("PRAGMA foreign_keys = ON")


def _has_blob(digests: Collection[str]) -> ColumnElement[bool]:
    return or_(_versions.c.digest.in_(digests), _versions.c.tokenizer_digest.in_(digests))


def _resolve(connection: Connection, name: str, version: int | None) -> AdapterVersion:
    row = None
    if version is None:
        row = connection.execute(_SELECT_LIVE, {"name": name}).one_or_none()
    elif version <= LARGEST_INTEGER:
        row = connection.execute(_SELECT_VERSION, {"name": name, "version": version}).one_or_none()
    if row is not None:
        return _parse_row(row)
    if version is None or connection.execute(_SELECT_LIVE, {"name": name}).one_or_none() is None:
        raise AdapterNotFound(f"There is no adapter {name}.")
    raise VersionNotFound(f"Adapter {name} has no version {version}.")


def _parse_rows(rows: Sequence[Row[Any]]) -> list[AdapterVersion]:
    return [_parse_row(row) for row in rows]


def _parse_row(row: Row[Any]) -> AdapterVersion:
    return AdapterVersion(
        name=row.name,
        version=row.version,
        digest=row.digest,
        source_sha256=row.source_sha256,
        rank=row.rank,
        targets=tuple(row.targets.split(",")) if row.targets else (),
        nbytes=row.nbytes,
        num_parameters=row.num_parameters,
        created_at=datetime.fromisoformat(row.created_at),
        num_virtual_tokens=row.num_virtual_tokens,
        invocation_tokens=tuple(map(int, row.invocation_tokens.split(","))) if row.invocation_tokens else (),
        vocab_size=row.vocab_size,
        tokenizer_digest=row.tokenizer_digest,
        tokenizer_parts=tuple(row.tokenizer_parts.split(",")) if row.tokenizer_parts else (),
        is_live=bool(row.is_live),
    )


def _set_meta(connection: Connection, key: str, value: str) -> None:
    connection.execute(_meta.update().where(_meta.c.key == key).values(value=value))
