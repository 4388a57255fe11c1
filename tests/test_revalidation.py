"""Users who are asked about while their streams are open, and the app thread, which asks later."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest

from sse_batcher import Client, ClientOptions, SSEManager, signals
from sse_batcher.runtime.app_thread import AppThread, Task
from sse_batcher.streams.revalidation import QUIET_SECONDS, Revalidator

from .kit.clock import Clock
from .kit.delivery import Delivery, last, numbers
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT

# -- revalidation ------------------------------------------------------------------------------------------------------


class Later(AppThread):
    """An app thread whose time is set by hand, and whose tasks run here."""

    def __init__(self) -> None:
        super().__init__(nullcontext)
        self.orders: list[tuple[float, Task]] = []

    def post_later(self, seconds: float, task: Task) -> None:
        self.orders.append((seconds, task))

    def pass_time(self) -> None:
        orders, self.orders = self.orders, []
        for _, task in orders:
            task()


class Asked:
    """A site whose users are asked about. `answers` is what is said, or raised, of each; True by default."""

    def __init__(self) -> None:
        self.delivery = Delivery()
        self.app_thread = Later()
        self.answers: dict[Hashable, Any] = {}
        self.questions: list[Hashable] = []
        self.clock = Clock()
        self.revalidator = Revalidator(self.answer, 30, self.delivery.hub, self.app_thread, self.clock)

    def answer(self, user: Hashable) -> Any:
        self.questions.append(user)
        answer = self.answers.get(user, True)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def connect(self, user: Hashable) -> Client:
        client = self.delivery.connect("default", user=user)
        self.revalidator.watch(user)
        next(client)
        return client


@pytest.fixture
def site() -> Asked:
    return Asked()


def test_each_user_is_asked_about_once_in_each_period_however_many_streams_he_has(site: Asked) -> None:
    for user in ("ada", "ada", "bob"):
        site.connect(user)
    assert [seconds for seconds, _ in site.app_thread.orders] == [30, 30]
    for _ in range(2):
        site.app_thread.pass_time()
    assert site.questions == ["ada", "bob"] * 2


def test_who_may_not_stay_loses_all_his_streams_before_anything_more_is_sent(site: Asked) -> None:
    his, other = [site.connect("ada") for _ in range(2)], site.connect("bob")
    site.delivery.deliver()
    site.answers["ada"] = False
    site.app_thread.pass_time()
    assert [last(client).json for client in his] == [{"reason": "revoked"}] * 2
    assert numbers(other, 1) == [1]


@pytest.mark.parametrize("answer", [RuntimeError("the database is away"), None, 1, "no"], ids=repr)
def test_an_answer_that_fails_or_is_none_ends_nothing_is_logged_and_asked_again(
    site: Asked, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = site.connect("ada")
    site.answers["ada"] = answer
    site.app_thread.pass_time()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'ada'" in caplog.text
    site.delivery.deliver()
    assert numbers(client, 1) == [1]
    site.answers["ada"] = False
    site.app_thread.pass_time()
    assert last(client).json == {"reason": "revoked"}


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The level of each line, and what it counts."""
    found = [(each.levelname, re.search(r"Errors .*?\.", each.getMessage())) for each in caplog.records]
    caplog.clear()
    return [(level, counts[0]) for level, counts in found if counts]


def test_several_errors_in_a_row_are_an_error_in_the_log(site: Asked, caplog: pytest.LogCaptureFixture) -> None:
    site.connect("ada")
    site.connect("bob")
    site.answers["ada"] = AttributeError("'NoneType' object has no attribute 'active'")
    site.app_thread.pass_time()
    assert logged(caplog) == [("WARNING", "Errors in a row: 1; users with errors: 1.")]
    site.app_thread.pass_time()
    assert logged(caplog) == []
    site.app_thread.pass_time()
    assert "must return False for a user who may not stay, also for one who was deleted" in caplog.text
    assert "AttributeError" in caplog.text
    assert logged(caplog) == [("ERROR", "Errors in a row: 3; users with errors: 1.")]
    site.answers["ada"] = True
    site.app_thread.pass_time()
    site.clock.now += QUIET_SECONDS
    site.answers["ada"] = None
    site.app_thread.pass_time()
    assert logged(caplog) == [("WARNING", "Errors in a row: 1; users with errors: 1.")]


def test_a_database_that_is_away_is_not_logged_for_each_user(site: Asked, caplog: pytest.LogCaptureFixture) -> None:
    for user in range(100):
        site.connect(user)
        site.answers[user] = RuntimeError("the database is away")
    for _ in range(5):
        site.app_thread.pass_time()
    assert [level for level, _ in logged(caplog)] == ["WARNING", "ERROR"]
    site.clock.now += QUIET_SECONDS
    site.app_thread.pass_time()
    assert logged(caplog) == [("ERROR", "Errors in a row: 6; users with errors: 100.")]


@pytest.mark.parametrize("user", ["ada", "bob"], ids=["the same user returns", "another user comes"])
def test_the_errors_of_users_who_have_left_are_forgotten(
    site: Asked, caplog: pytest.LogCaptureFixture, user: str
) -> None:
    client = site.connect("ada")
    site.answers["ada"] = site.answers["bob"] = None
    site.app_thread.pass_time()
    client.close()
    site.app_thread.pass_time()
    caplog.clear()
    site.clock.now += QUIET_SECONDS
    site.connect(user)
    site.app_thread.pass_time()
    assert logged(caplog) == [("WARNING", "Errors in a row: 1; users with errors: 1.")]


def test_a_user_is_asked_about_again_whatever_was_raised(site: Asked) -> None:
    site.connect("ada")
    site.answers["ada"] = SystemExit()  # as a time limit of gevent, no Exception
    with pytest.raises(SystemExit):
        site.app_thread.pass_time()
    site.answers["ada"] = True
    site.app_thread.pass_time()
    assert site.questions == ["ada", "ada"]


async def answer_later(user: object) -> bool:
    return True


def test_revalidate_must_not_be_async() -> None:
    with pytest.raises(TypeError, match=r"^revalidate must not be async"):
        SSEManager(revalidate=answer_later)
    with SSEManager() as manager:
        with pytest.raises(TypeError, match=r"^revalidate must not be async"):
            manager.revalidate = answer_later
        assert manager.revalidate is None


def test_an_answer_that_is_a_coroutine_is_an_error(site: Asked, caplog: pytest.LogCaptureFixture) -> None:
    site.connect("ada")
    site.answers["ada"] = answer_later("ada")
    site.app_thread.pass_time()
    assert "revalidate returned a coroutine instead of True or False" in caplog.text


def test_nobody_asks_about_a_user_who_has_left_until_he_is_back(site: Asked) -> None:
    site.connect("ada").close()
    site.app_thread.pass_time()
    assert site.questions == []
    assert site.app_thread.orders == []
    site.connect("ada")
    site.app_thread.pass_time()
    assert site.questions == ["ada"]


def test_a_user_who_returns_while_the_last_question_of_him_ends_is_asked_about(
    site: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.connect("ada").close()
    has_user = site.delivery.hub.has_user

    def has_left(user: Hashable) -> bool:
        answer = has_user(user)
        monkeypatch.undo()
        site.connect("ada")  # right after the check that finds no stream; the user still counts as asked about
        return answer

    monkeypatch.setattr(site.delivery.hub, "has_user", has_left)
    site.app_thread.pass_time()
    site.app_thread.pass_time()
    assert site.questions == ["ada"]


def test_an_answer_that_takes_long_delays_no_signal_and_no_shutdown() -> None:
    entered, free, told = threading.Event(), threading.Event(), threading.Event()

    def answer(user: object) -> bool:
        entered.set()
        return free.wait(2 * TIMEOUT)

    def connected(sender: object, **values: object) -> None:
        told.set()

    manager = SSEManager(clients=ClientOptions(revalidate_every=0.01), revalidate=answer)
    try:
        manager.subscribe(user=7)
        assert entered.wait(TIMEOUT)
        with signals.client_connected.connected_to(connected):
            manager.subscribe()
            assert told.wait(TIMEOUT)
        assert manager.shutdown(TIMEOUT)
    finally:
        free.set()


def test_a_manager_asks_on_a_thread_of_its_own_and_ends_the_stream() -> None:
    asked: list[tuple[Hashable, str]] = []

    def may_stay(user: Hashable) -> bool:
        asked.append((user, threading.current_thread().name))
        return len(asked) < 3

    with SSEManager(clients=ClientOptions(revalidate_every=0.01), revalidate=may_stay) as manager:
        client = manager.subscribe(user=7)
        nobody = manager.subscribe()  # is not asked about
        assert [event.json for event in parse(b"".join(client))][-1] == {"reason": "revoked"}
        nobody.close()
    assert asked == [(7, "sse_batcher-revalidate")] * 3


# -- the app thread's later tasks --------------------------------------------------------------------------------------


def test_a_task_for_later_runs_when_its_time_has_come_and_those_of_the_same_time_in_their_order(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)  # its turns are taken here
    app_thread = AppThread(nullcontext, clock)
    ran: list[str] = []
    for seconds, name in [(5, "b"), (5, "c"), (1, "a")]:
        app_thread.post_later(seconds, partial(ran.append, name))
    assert app_thread.work() == 1
    clock.now += 1
    assert (app_thread.work(), ran) == (4, ["a"])
    clock.now += 4
    assert (app_thread.work(), ran) == (None, ["a", "b", "c"])


def test_an_app_thread_that_is_closed_forgets_what_was_for_later() -> None:
    app_thread = AppThread(nullcontext)
    app_thread.post_later(3600, lambda: pytest.fail("it was closed before"))
    assert app_thread.close(TIMEOUT)
