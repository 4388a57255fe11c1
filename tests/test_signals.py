"""Signals: their arguments, the thread that sends them, and receivers that raise or block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

import pytest
from blinker import NamedSignal

from sse_batcher import Batch, BatchOptions, Client, Event, InvalidEventError, SSEManager, signals
from sse_batcher.streams.client import ClientInfo

from .kit.sse_parser import take_events
from .kit.waiting import TIMEOUT

APP_THREAD = "sse_batcher-app"
EVERY_EVENT_ALONE = BatchOptions(batch_window=0)


class Receiver:
    """Keeps what it is called with, and the name of the thread it is called on."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Any, dict[str, Any], str]] = SimpleQueue()

    def __call__(self, sender: Any, **values: Any) -> None:
        self.calls.put((sender, values, threading.current_thread().name))

    def call(self) -> tuple[Any, dict[str, Any], str]:
        return self.calls.get(timeout=TIMEOUT)


@contextmanager
def receiving(signal: NamedSignal, sender: Any = None) -> Iterator[Receiver]:
    receiver = Receiver()
    with ExitStack() as stack:
        args = () if sender is None else (sender,)
        stack.enter_context(signal.connected_to(receiver, *args))
        yield receiver


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=EVERY_EVENT_ALONE) as manager:
        yield manager


async def receive_later(*_: Any, **__: Any) -> None:
    raise AssertionError("never awaited")


def test_an_async_receiver_is_an_error_in_the_log(manager: SSEManager, caplog: pytest.LogCaptureFixture) -> None:
    with signals.event_refused.connected_to(receive_later), pytest.raises(InvalidEventError):
        manager.enqueue("sse_open", 1)
    assert caplog.messages == [
        "a receiver of the signal event_refused is async, and so does nothing: write it with def"
    ]


# -- arguments and threads ---------------------------------------------------------------------------------------------


def test_a_client_that_connects_is_a_signal_on_the_app_thread(manager: SSEManager) -> None:
    before = time.time()
    with receiving(signals.client_connected) as receiver:
        client = manager.subscribe(["a", "b"])
        sender, values, thread = receiver.call()
    assert sender is manager
    assert values == {"client": client.info}
    assert thread == APP_THREAD
    assert (client.info.id, client.info.channels) == (1, ("a", "b"))
    assert before <= client.info.connected_at <= time.time()


def test_a_client_that_leaves_is_one_signal_on_the_app_thread(manager: SSEManager) -> None:
    with receiving(signals.client_disconnected) as receiver:
        client = manager.subscribe()
        client.close()
        client.close()
        sender, values, thread = receiver.call()
        assert sender is manager
        assert values.pop("duration") >= 0
        assert values == {"client": client.info, "reason": "left", "frames": 0, "bytes": 0}
        assert thread == APP_THREAD
        assert manager.shutdown(TIMEOUT)
        assert receiver.calls.empty()


def test_a_client_that_a_shutdown_ends_is_a_signal_with_that_reason(manager: SSEManager) -> None:
    with receiving(signals.client_disconnected) as receiver:
        client = manager.subscribe()
        iterating = threading.Thread(target=lambda: list(client))
        iterating.start()
        while manager.get_stats().bytes == 0:
            assert iterating.is_alive()
        assert manager.shutdown(TIMEOUT)
        iterating.join(TIMEOUT)
        ended = receiver.call()[1]
        assert (ended["client"], ended["reason"], ended["bytes"]) == (client.info, "shutdown", client.counts.bytes)
        assert receiver.calls.empty()


def test_a_client_that_leaves_after_the_shutdown_is_a_signal_too() -> None:
    with receiving(signals.client_disconnected) as receiver:
        for _ in range(20):
            manager = SSEManager()
            client = manager.subscribe()
            assert manager.shutdown(TIMEOUT)
            client.close()
            assert receiver.call()[1]["client"] is client.info


def test_a_batch_that_was_taken_is_a_signal_on_the_app_thread() -> None:
    with SSEManager(batching=BatchOptions(batch_window=10)) as manager:
        with receiving(signals.batch_flushed) as receiver:
            manager.enqueue("log", 1, channel="a")
            manager.enqueue("log", 2, channel="a")
            assert manager.flush_all(TIMEOUT)
            sender, values, thread = receiver.call()
        assert sender is manager
        (batch,) = values.values()
        assert list(values) == ["batch"]
        assert thread == APP_THREAD
        events = (Event("log", "a", "1"), Event("log", "a", "2"))
        assert batch == Batch("a", "log", events, "manual", batch.timestamp)


def test_a_refused_event_is_a_signal_in_the_thread_of_the_caller(manager: SSEManager) -> None:
    with receiving(signals.event_refused) as receiver:
        with pytest.raises(InvalidEventError) as caught:
            manager.enqueue("log", {1}, channel="a")
        sender, values, thread = receiver.call()
    assert sender is manager
    assert values == {"error": caught.value, "event_type": "log", "channel": "a", "user": None}
    assert thread == threading.current_thread().name


def test_a_receiver_for_one_manager_hears_of_no_other(manager: SSEManager) -> None:
    with SSEManager(batching=EVERY_EVENT_ALONE) as other, receiving(signals.client_connected, manager) as receiver:
        with receiving(signals.client_connected, other) as theirs:
            client = manager.subscribe()
            other.subscribe()
            assert theirs.call()[0] is other
            assert receiver.call()[1] == {"client": client.info}
            assert manager.shutdown(TIMEOUT)
            assert receiver.calls.empty()


def test_what_a_receiver_gets_is_plain_and_frozen(manager: SSEManager) -> None:
    with receiving(signals.client_connected) as receiver:
        client = manager.subscribe()
        info = receiver.call()[1]["client"]
    assert type(info) is ClientInfo
    assert not isinstance(info, Client)
    with pytest.raises(AttributeError):
        info.id = 2
    client.close()


def test_without_a_receiver_no_app_thread_is_started(manager: SSEManager) -> None:
    manager.subscribe().close()
    manager.enqueue("log", 1)
    assert manager.flush_all(TIMEOUT)
    assert APP_THREAD not in [thread.name for thread in threading.enumerate()]


def test_receivers_run_inside_the_context_that_the_manager_was_given() -> None:
    steps: SimpleQueue[str] = SimpleQueue()

    @contextmanager
    def context() -> Iterator[None]:
        steps.put("in")
        yield
        steps.put("out")

    def receiver(sender: object, **values: object) -> None:
        steps.put("received")

    with SSEManager(context=context) as manager, signals.client_connected.connected_to(receiver):
        manager.subscribe()
        assert [steps.get(timeout=TIMEOUT) for _ in range(3)] == ["in", "received", "out"]


# -- receivers that misbehave ------------------------------------------------------------------------------------------


def raising(sender: object, **values: object) -> None:
    raise KeyError("a receiver's own mistake")


def enqueue_a_mistake(manager: SSEManager) -> None:
    with pytest.raises(InvalidEventError):
        manager.enqueue("", 1)


CAUSES: dict[str, tuple[NamedSignal, Callable[[SSEManager], Any]]] = {
    "client_connected": (signals.client_connected, lambda manager: manager.subscribe()),
    "client_disconnected": (signals.client_disconnected, lambda manager: manager.subscribe().close()),
    "batch_flushed": (signals.batch_flushed, lambda manager: manager.enqueue("log", 1)),
    "event_refused": (signals.event_refused, enqueue_a_mistake),
}


@pytest.mark.parametrize(("signal", "cause"), CAUSES.values(), ids=CAUSES)
def test_a_receiver_that_raises_is_logged_and_hurts_no_other(
    manager: SSEManager, caplog: pytest.LogCaptureFixture, signal: NamedSignal, cause: Callable[[SSEManager], Any]
) -> None:
    stream = manager.subscribe()
    with signal.connected_to(raising), receiving(signal) as receiver:
        for _ in range(3):
            cause(manager)
            receiver.call()
        assert manager.shutdown(TIMEOUT)
    logged = [record for record in caplog.records if record.name == "sse_batcher.signals"]
    assert [record.getMessage() for record in logged] == [f"a receiver of the signal {signal.name} failed"] * 3
    assert all(record.exc_info and record.exc_info[0] is KeyError for record in logged)
    assert len(caplog.records) == 3
    assert list(stream)[-1].startswith(b"event: sse_bye\n")


def test_a_context_that_raises_is_logged_and_the_next_receiver_is_called(caplog: pytest.LogCaptureFixture) -> None:
    calls = iter([True, False])

    @contextmanager
    def context() -> Iterator[None]:
        if next(calls):
            raise KeyError("no app any more")
        yield

    with SSEManager(context=context) as manager, receiving(signals.client_connected) as receiver:
        manager.subscribe()
        second = manager.subscribe()
        assert receiver.call()[1] == {"client": second.info}
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("sse_batcher.helper", "a task on the app thread failed")


def test_what_comes_faster_than_receivers_take_it_is_dropped_and_counted(manager: SSEManager) -> None:
    entered, released = threading.Event(), threading.Event()
    taken = []

    def slow(sender: object, client: ClientInfo) -> None:
        entered.set()
        assert released.wait(2 * TIMEOUT)
        taken.append(client.id)

    with signals.client_connected.connected_to(slow):
        manager.subscribe()
        assert entered.wait(TIMEOUT)  # one in the receiver's hand
        for _ in range(1_000):
            manager.subscribe()
        assert manager.get_stats().signals_dropped == 0
        for _ in range(5):
            manager.subscribe()
        assert manager.get_stats().signals_dropped == 5
        released.set()
        assert manager.shutdown(TIMEOUT)
    assert taken == list(range(1, 1_002))


def test_a_stuck_receiver_delays_no_event_and_no_client(manager: SSEManager) -> None:
    entered, released = threading.Event(), threading.Event()

    def stuck(sender: object, **values: object) -> None:
        entered.set()
        assert released.wait(2 * TIMEOUT)

    with signals.client_connected.connected_to(stuck), signals.batch_flushed.connected_to(stuck):
        client = manager.subscribe()
        assert entered.wait(TIMEOUT)
        for number in range(5):
            manager.enqueue("log", number)
        assert manager.flush_all(TIMEOUT)
        assert [event.json for event in take_events(client, 6)[1:]] == list(range(5))
        released.set()
        assert manager.shutdown(TIMEOUT)


@pytest.mark.parametrize("name", CAUSES)
def test_a_receiver_may_enqueue_and_flush(manager: SSEManager, name: str) -> None:
    signal, cause = CAUSES[name]
    answers: SimpleQueue[bool] = SimpleQueue()
    calls = iter([True])

    def receiver(sender: SSEManager, **values: object) -> None:
        if next(calls, False):
            sender.enqueue("echo", name)
            answers.put(sender.flush_all(TIMEOUT))

    client = manager.subscribe()
    with signal.connected_to(receiver):
        cause(manager)
        assert answers.get(timeout=TIMEOUT)
        events = [
            event for event in take_events(client, 3 if name == "batch_flushed" else 2)[1:] if event.type == "echo"
        ]
    assert [event.json for event in events] == [name]


def test_a_receiver_may_shut_the_manager_down(manager: SSEManager) -> None:
    answers: SimpleQueue[bool] = SimpleQueue()

    def receiver(sender: SSEManager, **values: object) -> None:
        answers.put(sender.shutdown())

    with signals.batch_flushed.connected_to(receiver):
        manager.enqueue("log", 1)
        assert answers.get(timeout=TIMEOUT) is False  # the app thread cannot have ended
    assert manager.shutdown(TIMEOUT)


def test_a_receiver_without_other_references_is_forgotten(manager: SSEManager) -> None:
    receiver = Receiver()
    calls = receiver.calls
    signals.client_connected.connect(receiver)
    del receiver
    manager.subscribe()
    assert manager.shutdown(TIMEOUT)
    assert calls.empty()
