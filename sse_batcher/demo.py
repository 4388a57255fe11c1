"""The demo's hub: ten simulated servers, their events on a batched and an unbatched side, and what each tab was sent.

Any thread. `Counts._lock` guards all its fields.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .manager import SSEManager
from .options import ClientOptions

SIDES = ("batched", "plain")

Events = list[tuple[str, dict[str, Any]]]

SERVERS = tuple(f"server-{number:02}" for number in range(1, 11))
LISTS = ("tool_list_changed", "resource_list_changed", "prompt_list_changed")


def _change(server: str, event_type: str) -> tuple[str, dict[str, Any]]:
    kind = event_type.removesuffix("_list_changed")
    names = [f"{kind}_{number}" for number in random.sample(range(100, 1000), 3)]
    data = {"server": server, "count": random.randint(3, 40), "added": names[:2], "removed": names[2:]}
    return event_type, data | {"took_ms": random.randint(10, 99), "version": random.randbytes(8).hex()}


def _error() -> tuple[str, dict[str, Any]]:
    return "error", {"server": random.choice(SERVERS), "code": -32000, "message": "the connection was lost"}


ACTIONS: dict[str, Callable[[], Events]] = {
    "restart": lambda: [_change(server, kind) for server in SERVERS for kind in LISTS],
    "five": lambda: [_change(server, LISTS[0]) for server in sorted(random.sample(SERVERS, 5))],
    "one": lambda: [_change(random.choice(SERVERS), random.choice(LISTS))],
    "error": lambda: [_error()],
}


class Demo:
    """A simulated hub of ten servers, and two managers that are fed the same events. Thread-safe."""

    def __init__(self) -> None:
        clients = ClientOptions(heartbeat=5.0)  # a closed tab is noticed, and forgotten, in one heartbeat or two
        self.managers = {
            "batched": SSEManager(clients=clients),
            "plain": SSEManager(batching=False, clients=clients),
        }
        self.counts = Counts()

    def fire(self, action: str) -> None:
        """Let something happen in the hub: one of `ACTIONS`."""
        events = ACTIONS[action]()
        for manager in self.managers.values():
            for event_type, data in events:
                manager.enqueue(event_type, data)

    def close(self) -> None:
        """End all streams in good order. Takes at most a second."""
        for manager in self.managers.values():
            manager.shutdown(timeout=0.5)


@dataclass(eq=False, slots=True)
class _Counted:
    """One open stream, and what it was sent."""

    tab: str
    side: str
    frames: int = 0
    bytes: int = 0


class Counts:
    """What the open streams of each tab were sent: the frames that carry events, and their bytes. Thread-safe.

    Control blocks, heartbeats and what HTTP adds are not counted. A tab is forgotten with its streams.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: list[_Counted] = []  # oldest first

    def count(self, tab: str, side: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass a stream on, counting. Like the stream itself, it holds nothing until it is iterated."""
        mine = _Counted(tab, side)
        with self._lock:
            self._streams.append(mine)
        try:
            for block in blocks:
                if not block.startswith((b":", b"event: sse_")):
                    with self._lock:
                        mine.frames += 1
                        mine.bytes += len(block)
                yield block
        finally:
            getattr(blocks, "close", lambda: None)()
            with self._lock:
                self._streams.remove(mine)

    def read(self, tab: str) -> dict[str, dict[str, int]]:
        """Frames and bytes by side. Where a side was opened again, of its newest stream."""
        with self._lock:
            return {
                counted.side: {"frames": counted.frames, "bytes": counted.bytes}
                for counted in self._streams
                if counted.tab == tab
            }

    def clear(self, tab: str) -> None:
        """Count this tab from zero."""
        with self._lock:
            for counted in self._streams:
                if counted.tab == tab:
                    counted.frames = counted.bytes = 0
