"""Events that wait in a SQLAlchemy session for the commit of its transaction."""

from __future__ import annotations

import gc
import itertools
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Column, Engine, Integer, String, create_engine, event
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from sse_batcher import SSE, BatchOptions, InvalidEventError, SSEManager, Text, UsageError, signals
from sse_batcher.testing import Recording, record

Base: Any = declarative_base()


class Order(Base):
    __tablename__ = "orders"
    id = Column(Integer, primary_key=True)
    state = Column(String, nullable=False)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'orders.db'}", poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager() as manager:
        yield manager


@pytest.fixture
def sent(manager: SSEManager) -> Iterator[Recording]:
    with record(manager) as sent:
        yield sent


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


Put = Callable[[Any], None]


@pytest.fixture
def put(manager: SSEManager, session: Session) -> Put:
    """Note an event in the session, and write to the database."""

    def put(data: Any) -> None:
        session.add(Order(state=str(data)))
        manager.after_commit(session).enqueue("order", data)

    return put


def data_of(sent: Recording) -> list[Any]:
    return [each.data for each in sent]


# -- one transaction ---------------------------------------------------------------------------------------------------


def test_events_are_sent_at_the_commit_and_in_order(session: Session, put: Put, sent: Recording) -> None:
    for number in range(3):
        put(number)
    session.flush()
    assert data_of(sent) == []
    session.commit()
    assert data_of(sent) == [0, 1, 2]


def test_the_state_is_in_the_database_when_the_event_is_sent(
    engine: Engine, session: Session, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*_: Any) -> None:
        with Session(engine) as other:
            seen.append(other.query(Order).count())

    monkeypatch.setattr("sse_batcher.manager.put_held", look)
    put(1)
    session.commit()
    assert seen == [1]


@pytest.mark.parametrize("end", [Session.rollback, Session.close, Session.invalidate, Session.reset])
def test_without_a_commit_they_are_dropped(
    session: Session, put: Put, sent: Recording, end: Callable[[Session], None]
) -> None:
    put(1)
    end(session)
    put(2)
    session.commit()
    assert data_of(sent) == [2]


def test_a_session_is_used_again_after_a_commit(session: Session, put: Put, sent: Recording) -> None:
    for number in range(3):
        put(number)
        session.commit()
    session.commit()
    assert data_of(sent) == [0, 1, 2]


def test_a_commit_that_fails_sends_nothing(session: Session, put: Put, sent: Recording) -> None:
    put(1)
    session.add(Order(id="no number", state="x"))
    with pytest.raises(Exception, match="datatype mismatch"):
        session.commit()
    session.rollback()
    session.commit()
    assert data_of(sent) == []


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_an_event_begins_the_transaction_as_a_new_object_does(
    session: Session, manager: SSEManager, sent: Recording, ends: str
) -> None:
    manager.after_commit(session).enqueue("order", 1)
    assert session.in_transaction()
    getattr(session, ends)()
    session.commit()
    assert data_of(sent) == [1] * (ends == "commit")


def test_a_session_that_begins_none_by_itself_needs_one(engine: Engine, manager: SSEManager, sent: Recording) -> None:
    with Session(engine, autobegin=False) as session:
        with pytest.raises(UsageError, match=r"call session\.begin\(\)"):
            manager.after_commit(session).enqueue("order", 1)
        with session.begin():
            manager.after_commit(session).enqueue("order", 2)
    assert data_of(sent) == [2]


def test_two_phase_commits_send_at_the_second_phase(
    engine: Engine, manager: SSEManager, sent: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    dialect = engine.dialect
    monkeypatch.setattr(dialect, "do_begin_twophase", lambda *_: phases.append("begin"))
    monkeypatch.setattr(dialect, "do_prepare_twophase", lambda *_: phases.append(f"prepare, {len(sent)} sent"))
    monkeypatch.setattr(dialect, "do_commit_twophase", lambda *_, **__: phases.append(f"commit, {len(sent)} sent"))
    monkeypatch.setattr(dialect, "do_rollback_twophase", lambda *_, **__: phases.append("rollback"))
    with Session(engine, twophase=True) as session:
        for ends in ("commit", "rollback"):
            session.connection()
            manager.after_commit(session).enqueue("order", ends)
            session.prepare()
            getattr(session, ends)()
    assert phases[:3] == ["begin", "prepare, 0 sent", "commit, 0 sent"]
    assert phases[-1] == "rollback"
    assert data_of(sent) == ["commit"]


# -- savepoints --------------------------------------------------------------------------------------------------------


def test_a_savepoint_that_is_rolled_back_drops_only_its_own(session: Session, put: Put, sent: Recording) -> None:
    put("before")
    savepoint = session.begin_nested()
    put("inside")
    with session.begin_nested():
        put("released inside")
    savepoint.rollback()
    put("after")
    assert data_of(sent) == []
    session.commit()
    assert data_of(sent) == ["before", "after"]


def test_a_savepoint_that_is_released_waits_for_the_commit(session: Session, put: Put, sent: Recording) -> None:
    put("before")
    with session.begin_nested():
        put("outer")
        with session.begin_nested():
            put("inner")
        put("outer again")
    put("after")
    assert data_of(sent) == []
    session.commit()
    assert data_of(sent) == ["before", "outer", "inner", "outer again", "after"]


def test_a_rollback_drops_what_savepoints_have_released(session: Session, put: Put, sent: Recording) -> None:
    with session.begin_nested():
        put("inside")
    session.rollback()
    session.commit()
    assert data_of(sent) == []


def test_an_exception_in_a_savepoint_drops_its_events(session: Session, put: Put, sent: Recording) -> None:
    put("before")

    def fail() -> None:
        with session.begin_nested():
            put("inside")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    put("after")
    session.commit()
    assert data_of(sent) == ["before", "after"]


def test_a_commit_with_open_savepoints_sends_all(session: Session, put: Put, sent: Recording) -> None:
    session.begin_nested()
    put("outer")
    session.begin_nested()
    put("inner")
    session.commit()
    assert data_of(sent) == ["outer", "inner"]


def test_events_from_within_a_flush_belong_to_what_is_around(
    session: Session, manager: SSEManager, sent: Recording
) -> None:
    @event.listens_for(session, "after_flush")
    def tell(session: Session, _: Any) -> None:
        for order in session.new:
            manager.after_commit(session).enqueue("order", order.state)

    session.add(Order(state="before"))
    session.flush()
    savepoint = session.begin_nested()
    session.add(Order(state="dropped"))
    session.flush()
    savepoint.rollback()
    with session.begin_nested():
        session.add(Order(state="kept"))
    session.add(Order(state="after"))
    session.commit()
    assert data_of(sent) == ["before", "kept", "after"]


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_the_event_is_that_of_the_call(session: Session, manager: SSEManager, sent: Recording) -> None:
    events, data = manager.after_commit(session), {"id": 7}
    events.enqueue("order", data, channel="team-7", key="a")
    data["id"] = 8
    events.enqueue("order", data, user={"ada", 7})
    events.broadcast("order", Text("all"), key=3)
    session.commit()
    assert [(each.data, each.channel, each.users) for each in sent] == [
        ({"id": 7}, "team-7", ()),
        ({"id": 8}, None, (7, "ada")),
        ("all", "*", ()),
    ]
    sent.assert_sent("order", channel="team-7", key="a")
    sent.assert_sent("order", channel="*", key=3)


@pytest.mark.parametrize(
    ("event_type", "data", "options", "field"),
    [
        ("sse_own", 1, {}, "type"),
        ("order", float("nan"), {}, "data"),
        ("order", "x" * 2_000_000, {}, "data"),
        ("order", 1, {"channel": "*"}, "channel"),
        ("order", 1, {"user": None}, "user"),
        ("order", 1, {"user": 7, "channel": "a"}, "user"),
        ("order", 1, {"key": 1.5}, "key"),
    ],
)
def test_bad_input_is_refused_in_the_call_and_counted(
    session: Session, manager: SSEManager, sent: Recording, event_type: str, data: Any, options: Any, field: str
) -> None:
    refused = []

    @signals.event_refused.connect_via(manager)
    def note(sender: SSEManager, *, error: Exception, event_type: str, channel: Any, user: Any) -> None:
        refused.append((event_type, error))

    with pytest.raises(InvalidEventError) as caught:
        manager.after_commit(session).enqueue(event_type, data, **options)
    assert caught.value.field == field
    assert refused == [(event_type, caught.value)]
    session.commit()
    assert (data_of(sent), sent.refused, manager.get_stats().refused) == ([], 1, 1)


def test_a_plain_enqueue_is_not_held_back(session: Session, put: Put, manager: SSEManager, sent: Recording) -> None:
    put("waits")
    manager.enqueue("order", "at once")
    assert data_of(sent) == ["at once"]


def test_an_event_that_cannot_be_sent_does_not_break_the_commit(
    session: Session, engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.after_commit.failures", itertools.count(1))
    refused = []
    small = SSEManager(batching=BatchOptions(max_frame_bytes=1_000, max_pending_bytes=2_000))

    @signals.event_refused.connect_via(small)
    def note(sender: SSEManager, *, error: Exception, **_: Any) -> None:
        refused.append(type(error).__name__)

    for number in range(3):
        session.add(Order(state="x"))
        small.after_commit(session).enqueue("order", number)
    small.shutdown()
    session.commit()
    with Session(engine) as other:
        assert other.query(Order).count() == 3
    assert refused == ["ClosedError"] * 3
    assert small.get_stats().refused == 3
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert [line.rpartition(": ")[2] for line in lines] == ["1", "2"]
    assert lines[0].startswith("an event was not sent after the commit: the batcher or manager was closed")


def test_other_listeners_of_the_commit_do_no_harm(session: Session, put: Put, manager: SSEManager) -> None:
    @event.listens_for(session, "after_commit")
    def fail(session: Session) -> None:
        manager.after_commit(session).enqueue("order", "by a listener")
        raise LookupError

    with record(manager) as sent:
        put("by the app")
        with pytest.raises(LookupError):
            session.commit()
        assert data_of(sent) == ["by the app", "by a listener"]
        event.remove(session, "after_commit", fail)
        session.close()
        put("next")
        session.commit()
        assert data_of(sent) == ["by the app", "by a listener", "next"]


@pytest.mark.parametrize("listens_at", ["session", "class"])
def test_the_first_event_of_a_session_may_come_from_a_listener_of_its_commit(
    engine: Engine, manager: SSEManager, sent: Recording, listens_at: str
) -> None:
    class OwnSession(Session):
        pass

    with OwnSession(engine) as session:

        @event.listens_for(session if listens_at == "session" else OwnSession, "after_commit")
        def announce(session: Session) -> None:
            manager.after_commit(session).enqueue("order", len(sent))

        session.add(Order(state="x"))
        with session.begin_nested():
            session.add(Order(state="y"))
        assert data_of(sent) == []  # the savepoint alone is no commit
        session.commit()
        assert data_of(sent) == [0, 0] if listens_at == "class" else [0, 1]
        session.connection()
        session.rollback()
        session.add(Order(state="z"))
        session.commit()
        assert len(sent) == 3


def test_a_savepoints_event_from_a_listener_of_its_commit_is_dropped_by_the_rollback(
    engine: Engine, manager: SSEManager, sent: Recording
) -> None:
    with Session(engine) as session:

        @event.listens_for(session, "after_commit")
        def announce(session: Session) -> None:
            manager.after_commit(session).enqueue("order", "released")

        with session.begin_nested():
            session.add(Order(state="x"))
        session.rollback()
        assert data_of(sent) == []
        session.add(Order(state="y"))
        session.commit()
    assert data_of(sent) == ["released"]


# -- kinds of sessions -------------------------------------------------------------------------------------------------


def test_several_sessions_keep_their_events_apart(engine: Engine, manager: SSEManager, sent: Recording) -> None:
    with Session(engine) as one, Session(engine) as two, Session(engine, info=one.info) as three:
        for name, session in [("one", one), ("two", two), ("three", three)]:
            manager.after_commit(session).enqueue("order", name)
        two.commit()
        assert data_of(sent) == ["two"]
        one.rollback()
        three.commit()
    assert data_of(sent) == ["two", "three"]


def test_info_that_was_copied_from_another_session_does_no_harm(
    engine: Engine, manager: SSEManager, sent: Recording
) -> None:
    with Session(engine) as one:
        manager.after_commit(one).enqueue("order", "one")
        with Session(engine, info=one.info) as two:
            two.connection()
            manager.after_commit(two).enqueue("order", "two")
            two.commit()
            assert data_of(sent) == ["two"]
        one.commit()
    assert data_of(sent) == ["two", "one"]


def test_two_managers_share_a_session(session: Session, manager: SSEManager) -> None:
    with SSEManager() as other, record() as sent:
        manager.after_commit(session).enqueue("order", 1)
        other.after_commit(session).enqueue("order", 2)
        session.commit()
        assert data_of(sent) == [1, 2]


def test_a_scoped_session_is_that_of_the_thread(engine: Engine, manager: SSEManager, sent: Recording) -> None:
    scoped = scoped_session(sessionmaker(engine))
    events = manager.after_commit(scoped)  # may be made once for all threads
    events.enqueue("order", "main")

    def work() -> None:
        events.enqueue("order", "other")
        scoped.commit()
        scoped.remove()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert data_of(sent) == ["other"]
    scoped.commit()
    assert data_of(sent) == ["other", "main"]
    events.enqueue("order", "removed")
    scoped.remove()
    scoped.commit()
    scoped.remove()
    assert data_of(sent) == ["other", "main"]


def test_flask_sqlalchemy_and_its_app(tmp_path: Path) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'app.db'}"
    db, sse = SQLAlchemy(app), SSE(app)
    events = sse.after_commit(db.session)  # outside of a context

    class Row(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)

    with record(sse) as sent, app.app_context():
        db.create_all()
        db.session.add(Row())
        events.enqueue("row", 1)
        sse.after_commit(db.session()).broadcast("row", 2)
        assert data_of(sent) == []
        db.session.commit()
        assert data_of(sent) == [1, 2]
        events.enqueue("row", 3)  # the end of the context removes the session
    with app.app_context():
        db.session.commit()
        db.engine.dispose()
    assert data_of(sent) == [1, 2]
    with app.app_context():
        sse.manager.shutdown()


@pytest.mark.parametrize("what", [None, "session", Session, object()])
def test_other_objects_are_refused(manager: SSEManager, what: Any) -> None:
    with pytest.raises(UsageError, match=r"takes a Session or scoped_session.*sync_session"):
        manager.after_commit(what).enqueue("order", 1)


def test_a_session_and_its_events_are_garbage_after_use(engine: Engine, manager: SSEManager, sent: Recording) -> None:
    session = Session(engine)
    reference = weakref.ref(session)
    manager.after_commit(session).enqueue("order", 1)
    session.close()
    del session
    gc.collect()
    assert reference() is None


def test_the_package_imports_no_sqlalchemy() -> None:
    code = """
import sys, sse_batcher, sse_batcher.flask.extension
manager = sse_batcher.SSEManager()
try:
    manager.after_commit(None).enqueue("order", 1)
except sse_batcher.UsageError:
    print(sorted(name for name in sys.modules if "sqlalchemy" in name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
