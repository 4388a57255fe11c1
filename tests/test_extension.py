"""The Flask extension: how it is registered, several apps, JSON, signals and logs."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gc
import json
import logging
import re
import threading
import uuid
import weakref
from queue import SimpleQueue
from typing import Any

import pytest
from flask import Flask, current_app, has_request_context
from flask.json.provider import DefaultJSONProvider, JSONProvider

from sse_batcher import SSE, InvalidEventError, UsageError, signals

from .kit.flask_apps import MakeApp, apps_fixture, get, read, status
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT

make_app = apps_fixture()


# -- registration ------------------------------------------------------------------------------------------------------


def test_the_constructor_registers_an_app() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    assert app.extensions["sse_batcher"] is sse
    assert "sse_batcher" in app.blueprints


def test_init_app_registers_an_app_later(make_app: MakeApp) -> None:
    app, sse = make_app()
    assert app.extensions["sse_batcher"] is sse


@pytest.mark.parametrize("same", [True, False])
def test_a_second_registration_is_refused_with_a_full_sentence(make_app: MakeApp, same: bool) -> None:
    app, sse = make_app()
    with pytest.raises(UsageError, match=r"^this app has an SSE already: create one SSE and call init_app\(\) once"):
        (sse if same else SSE()).init_app(app)
    assert app.extensions["sse_batcher"] is sse


def public(thing: object) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_")]


def test_an_sse_shows_what_an_app_calls_and_nothing_else(make_app: MakeApp) -> None:
    app, sse = make_app()
    decorators = [
        "allow_kick",
        "allow_monitor",
        "allow_stats",
        "authorize",
        "identify",
        "revalidate",
        "snapshot",
        "user_snapshot",
    ]
    methods = ["after_commit", "broadcast", "cursor", "enqueue", "for_app", "init_app", "kick", "manager"]
    methods += ["response", "script_url", "sign", "url"]
    assert public(sse) == sorted(decorators + methods)
    assert public(sse.for_app(app)) == decorators


def test_an_sse_names_its_apps(make_app: MakeApp) -> None:
    sse = SSE()
    assert repr(sse) == "<SSE apps=[]>"
    _first, _second = make_app(sse, "shop"), make_app(sse, "blog")
    assert sorted(re.findall("'(.*?)'", repr(sse))) == ["blog", "shop"]


def test_the_decorators_of_an_app_name_its_functions(make_app: MakeApp) -> None:
    app, sse = make_app()
    hooks = sse.for_app(app)
    assert repr(hooks) == "<Hooks: no function>"
    sse.authorize(lambda channels: channels)
    hooks.identify(lambda: "ada")
    hooks.snapshot("a")(lambda: ("state", 1))
    assert repr(hooks) == "<Hooks: identify, snapshot('a')>"


def test_wrong_use_is_an_error_of_ours(make_app: MakeApp) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: channels)
    other = Flask("other")
    for use in (
        lambda: sse.init_app(app),
        lambda: sse.for_app(other),
        lambda: SSE().manager,
        lambda: sse.authorize(lambda channels: ()),
        sse.response,
    ):
        with pytest.raises(UsageError):
            use()


# -- several apps ------------------------------------------------------------------------------------------------------


def test_with_one_app_any_thread_enqueues_without_a_context(make_app: MakeApp) -> None:
    app, sse = make_app()
    with get(app) as response:
        in_thread(lambda: sse.enqueue("log", 1))
        in_thread(lambda: sse.broadcast("note", 2))
        assert in_thread(lambda: sse.manager.flush_all(TIMEOUT))
        assert [event[:2] for event in read(response, 3)[1:]] == [("log", "1"), ("note", "2")]


def test_inside_a_context_it_is_that_apps_manager(make_app: MakeApp) -> None:
    first, sse = make_app()
    second, _ = make_app(sse)
    with first.app_context():
        mine = sse.manager
        sse.enqueue("log", 1)
        with second.app_context():
            assert sse.manager is not mine
        assert sse.manager is mine
    assert mine.get_stats().enqueued == 1
    with second.app_context():
        assert sse.manager.get_stats().enqueued == 0


def test_with_two_apps_a_thread_without_a_context_gets_an_error(make_app: MakeApp) -> None:
    _first, sse = make_app()
    _second, _ = make_app(sse)
    for use in (lambda: sse.enqueue("log", 1), lambda: sse.broadcast("log", 1), lambda: sse.manager):
        with pytest.raises(UsageError, match=r"2 apps have this SSE: take sse\.manager inside an app context"):
            in_thread(use)


def test_a_manager_taken_inside_a_context_is_passed_on(make_app: MakeApp) -> None:
    first, sse = make_app()
    _second, _ = make_app(sse)
    with first.app_context():
        manager = sse.manager
    in_thread(lambda: manager.enqueue("log", 1))
    assert manager.get_stats().enqueued == 1


def test_once_the_other_app_is_gone_a_thread_needs_no_context(make_app: MakeApp) -> None:
    first, sse = make_app()
    second, _ = make_app(sse)
    with second.app_context():
        expected = sse.manager
    del first
    gc.collect()
    assert in_thread(lambda: sse.manager) is expected


def test_without_any_app_a_call_is_an_error() -> None:
    with pytest.raises(UsageError, match="no app has this SSE"):
        SSE().enqueue("log", 1)


def test_in_the_context_of_a_foreign_app_a_call_is_an_error(make_app: MakeApp) -> None:
    _app, sse = make_app()
    with Flask("other").app_context(), pytest.raises(UsageError, match=r"call sse\.init_app\(app\)"):
        sse.enqueue("log", 1)


def test_an_extension_keeps_no_app_alive() -> None:
    class Provider(DefaultJSONProvider):
        def default(self, value: Any) -> Any:
            return str(value)

    sse = SSE()

    def use_an_app() -> weakref.ref[Flask]:
        app = Flask(__name__)
        app.json = Provider(app)
        sse.init_app(app)
        with get(app) as response:
            sse.enqueue("log", object)
            assert sse.manager.flush_all(TIMEOUT)
            read(response, 2)
        return weakref.ref(app)

    app = use_an_app()
    gc.collect()
    assert app() is None
    with pytest.raises(UsageError, match="no app has"):
        _ = sse.manager


def test_a_manager_that_was_passed_on_outlives_its_app() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    manager = sse.manager
    del app
    gc.collect()
    with pytest.raises(UsageError, match="no app has"):
        _ = sse.manager
    with manager:
        manager.enqueue("log", {"a": 1})


# -- JSON --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: int
    y: int


RICH = {
    "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "day": datetime.date(2026, 1, 1),
    "id": uuid.UUID(int=1),
    "price": decimal.Decimal("1.50"),
    "point": Point(1, 2),
}


def text_of(app: Flask, sse: SSE, data: Any) -> str:
    """The JSON text on the wire."""
    with get(app) as response:
        in_thread(lambda: sse.enqueue("log", data))
        assert sse.manager.flush_all(TIMEOUT)
        return read(response, 2)[1].data


def test_data_is_encoded_as_the_app_encodes_it(make_app: MakeApp) -> None:
    app, sse = make_app()
    sent = json.loads(text_of(app, sse, RICH))
    assert sent == json.loads(app.json.dumps(RICH))
    assert sent["id"] == "00000000-0000-0000-0000-000000000001"
    assert (sent["price"], sent["point"]) == ("1.50", {"x": 1, "y": 2})


def test_keys_keep_their_order_whatever_the_app_sorts(make_app: MakeApp) -> None:
    app, sse = make_app()
    assert text_of(app, sse, {"b": 1, "a": 2}) == '{"b":1,"a":2}'


def test_a_provider_that_is_set_after_init_app_counts(make_app: MakeApp) -> None:
    class Provider(DefaultJSONProvider):
        default = staticmethod(lambda value: f"<{value}>")

    app, sse = make_app()
    app.json = Provider(app)
    assert text_of(app, sse, decimal.Decimal(1)) == '"<1>"'


class OtherProvider(JSONProvider):
    """As one around another library: no `default`, and text that is neither ASCII nor one line."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return json.dumps({"wrapped": obj}, default=str, ensure_ascii=False, indent=2)

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return json.loads(s)


def test_a_provider_of_another_kind_is_called_and_its_text_made_one_line_of_ascii(make_app: MakeApp) -> None:
    app, sse = make_app()
    app.json = OtherProvider(app)
    assert text_of(app, sse, {"é": uuid.UUID(int=0)}) == (
        r'{"wrapped":{"\u00e9":"00000000-0000-0000-0000-000000000000"}}'
    )


def test_text_of_another_kind_of_provider_is_still_checked(make_app: MakeApp) -> None:
    app, sse = make_app()
    app.json = OtherProvider(app)
    with pytest.raises(InvalidEventError, match="data is nan, and JSON has no NaN"):
        sse.enqueue("log", float("nan"))


def test_data_that_the_app_cannot_encode_is_refused_in_the_caller(make_app: MakeApp) -> None:
    _app, sse = make_app()
    with pytest.raises(InvalidEventError, match="object is not JSON serializable"):
        sse.enqueue("log", object())


# -- around it ---------------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_receivers_on_the_app_thread_are_in_their_apps_context(make_app: MakeApp) -> None:
    first, sse = make_app(name="first")
    second, _ = make_app(sse, name="second")
    seen: SimpleQueue[tuple] = SimpleQueue()

    def receiver(sender: object, client: object) -> None:
        seen.put((current_app.name, sse.manager is sender, has_request_context(), threading.current_thread().name))

    with signals.client_connected.connected_to(receiver):
        for app in (first, second):
            assert status(app) == 200
            assert seen.get(timeout=TIMEOUT) == (app.name, True, False, "sse_batcher-app")


def test_logs_are_ours_and_never_the_apps(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app, sse = make_app(SSE_OTHER_THING=1)
    text_of(app, sse, 1)
    assert {record.name.split(".")[0] for record in caplog.records} == {"sse_batcher"}


def test_a_second_function_that_authorizes_is_refused(make_app: MakeApp) -> None:
    _, sse = make_app()
    sse.authorize(lambda channels: channels)
    with pytest.raises(UsageError, match="only one"):
        sse.authorize(lambda channels: ())
