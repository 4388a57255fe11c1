"""Events of a database transaction: they wait in the SQLAlchemy session, and are sent when it commits.

Runs in the thread that uses the session. As the session itself, its events are for one thread at a time. Imports no
SQLAlchemy: an app that has a session has imported it.
"""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .errors import UsageError
from .event import NOT_GIVEN, NotGiven, User
from .runtime.log_fields import log_fields
from .runtime.log_once import is_logged

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

    AnySession: TypeAlias = Session | scoped_session[Any]

_log = logging.getLogger("sse_batcher.after_commit")

Send: TypeAlias = Callable[[], None]
"""Sends an event that was checked and encoded before. May raise."""

failures = itertools.count(1)
"""Numbers the events of this process that could not be sent after a commit."""


class Hold(Protocol):
    """What checks and encodes an event, as `SSEManager.enqueue` does, and returns what sends it."""

    def __call__(
        self,
        event_type: str,
        data: Any,
        *,
        channel: str | NotGiven,
        key: str | int | None,
        user: User | Sequence[User] | AbstractSet[User] | NotGiven,
        is_broadcast: bool,
    ) -> Send: ...


class AfterCommit:
    """Sends events when the transaction of a SQLAlchemy session commits. Returned by ``after_commit(session)``.

    An event is sent when the outermost transaction of the session has been committed, in the order of the calls. It is
    dropped if that is rolled back, or ends without a commit. If a savepoint is rolled back, the events since its
    beginning are dropped. After a commit or rollback, further events belong to the next transaction.

    As with the session, its methods are for one thread at a time.
    """

    def __init__(self, session: AnySession, hold: Hold) -> None:
        self._session = session
        self._hold = hold

    def enqueue(
        self,
        event_type: str,
        data: Any,
        *,
        channel: str | NotGiven = NOT_GIVEN,
        key: str | int | None = None,
        user: User | Sequence[User] | AbstractSet[User] | NotGiven = NOT_GIVEN,
    ) -> None:
        """Send an event after the commit. The parameters are those of `SSEManager.enqueue`.

        The event is checked and encoded in this call. So it raises `InvalidEventError` here, and later changes of
        `data` do not count. Begins a transaction if there is none, as ``session.add()`` does. Raises `UsageError` if
        the session has none and must not begin one by itself (``autobegin=False``).

        After the commit, nothing is raised: an event that cannot be sent then, because the manager was shut down or
        its backlog is full, is logged and counted in `refused`. If an ``after_commit`` listener of the session's class
        or `sessionmaker` raises, SQLAlchemy calls no listener of the session after it, so the events are dropped.
        """
        self._wait(self._hold(event_type, data, channel=channel, key=key, user=user, is_broadcast=False))

    def broadcast(self, event_type: str, data: Any, *, key: str | int | None = None) -> None:
        """Send an event to all clients after the commit. Otherwise as `enqueue`."""
        self._wait(self._hold(event_type, data, channel=NOT_GIVEN, key=key, user=NOT_GIVEN, is_broadcast=True))

    def _wait(self, send: Send) -> None:
        session = _real(self._session)  # now: a scoped session stands for another one in each thread or request
        if not session.in_transaction():
            if not getattr(session, "autobegin", True):
                raise UsageError("this session has no transaction: call session.begin() before after_commit().enqueue")
            session.begin()
        _events_of(session).add(_innermost(session), send)


class _Events:
    """The events of one session that wait for a commit."""

    def __init__(self, session: Session) -> None:
        self.session = weakref.ref(session)
        self._waiting: dict[SessionTransaction, list[Send]] = {}
        self._committed = _committed_now(session)
        """A transaction that was committed and has not ended yet: SQLAlchemy is calling listeners for it."""
        self._listens = False

    def listen(self) -> None:
        """Have `commit` called. Not while SQLAlchemy calls listeners for a commit: none can be added to them then."""
        session = self.session()
        if session is not None and not self._listens and self._committed is None:
            self._listens = True
            # The first one of the session: another one that raises must not keep the events of a committed transaction
            # back. Those of its class and of a `sessionmaker` are called before, whatever is done here.
            _event().listen(session, "after_commit", _after_commit, insert=True)

    def add(self, transaction: SessionTransaction, send: Send) -> None:
        if transaction is self._committed and not transaction.nested:
            _send_all([send])  # a listener for the commit has enqueued it
        else:
            self._waiting.setdefault(transaction, []).append(send)

    def commit(self, transaction: SessionTransaction) -> None:
        self._committed = transaction
        if not transaction.nested:
            _send_all(self._waiting.pop(transaction, []))

    def end(self, transaction: SessionTransaction) -> None:
        """Forget the events of a transaction. Those of a savepoint that was released now wait for what is around it."""
        events = self._waiting.pop(transaction, [])
        is_committed, self._committed = transaction is self._committed, None
        around = transaction.parent
        # Not what SQLAlchemy begins for a flush: its end is no commit.
        while around is not None and not around.nested and around.parent is not None:
            around = around.parent
        if events and is_committed and around is not None:
            self._waiting.setdefault(around, []).extend(events)


_KEY = "sse_batcher.after_commit"
"""Where the `_Events` of a session are in its ``info``."""


def _events_of(session: Session) -> _Events:
    events = session.info.get(_KEY)
    # The info may have been copied from another session.
    if not isinstance(events, _Events) or events.session() is not session:
        events = session.info[_KEY] = _Events(session)
        _event().listen(session, "after_transaction_end", _after_transaction_end)
        events.listen()
    return events


def _after_commit(session: Session) -> None:
    _events_of(session).commit(_innermost(session))


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    events = _events_of(session)
    events.end(transaction)
    events.listen()


def _event() -> Any:
    return sys.modules["sqlalchemy"].event


def _committed_now(session: Session) -> SessionTransaction | None:
    """Return the innermost transaction if it was committed, and SQLAlchemy is calling listeners for it."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    # Not public. A transaction that is only not active may also be prepared, or have failed.
    state = getattr(transaction, "_state", None)
    return transaction if getattr(state, "name", None) == "COMMITTED" else None


def _innermost(session: Session) -> SessionTransaction:
    """Return the innermost savepoint of the session, or its transaction."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    assert transaction is not None
    return transaction


def _send_all(events: list[Send]) -> None:
    """Send these events. Raises nothing: the transaction is committed, and the app must not take it for failed."""
    for send in events:
        try:
            send()
        except Exception as error:
            number = next(failures)
            if is_logged(number):  # a backlog that is full refuses many
                _log.error(
                    "an event was not sent after the commit: %s. Such events so far: %d",
                    error,
                    number,
                    extra=log_fields("after_commit_failed", error=error, failures=number),
                )


def _real(session: object) -> Session:
    """Return the session itself, if this is a scoped session such as ``db.session`` of Flask-SQLAlchemy."""
    orm: Any = sys.modules.get("sqlalchemy.orm")
    if orm is not None and isinstance(session, orm.scoped_session):
        session = session()
    if orm is None or not isinstance(session, orm.Session):
        raise UsageError(
            f"after_commit() takes a Session or scoped_session of SQLAlchemy, not {type(session).__name__}. Of an "
            f"AsyncSession, pass its sync_session"
        )
    found: Session = session
    return found
