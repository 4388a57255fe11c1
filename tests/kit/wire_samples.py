"""Every kind of block that the server writes, as it writes them, with the events that a page gets from it.

Pure.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from sse_batcher import wire
from sse_batcher.event import Batch, Event, Text
from sse_batcher.reasons import BatchReason, BusyReason, ByeReason, GapReason

VALUES: list[Any] = [{"n": 1, "text": "ä\u2028€𝄞"}, None, [], "a string", -1.5e300, True]
TEXTS = [Text("<b>one</b>\n\n two"), Text(""), Text("data: x\nid: y\n")]


def _event(event_type: str, value: Any) -> Event:
    is_text = isinstance(value, Text)
    return Event(event_type, "default", value if is_text else json.dumps(value))


def _expected(event_type: str, value: Any, id: str) -> dict[str, Any]:
    return {"type": event_type, "text" if isinstance(value, Text) else "data": value, "id": id}


def _batch(batch_type: str, events: list[tuple[str, Any]], reason: BatchReason, join: str | None = None) -> str:
    made = tuple(_event(*each) for each in events)
    return wire.batch_block(Batch("default", batch_type, made, reason, 1_700_000_000_000, join), "c-1-1").decode()


def _sample(name: str, text: str, *events: tuple[str, Any]) -> dict[str, Any]:
    ids = [f"c-1-1.{k}" for k in range(1, len(events))] + ["c-1-1"]
    return {"name": name, "text": text, "events": [_expected(*each, id) for each, id in zip(events, ids, strict=True)]}


def samples() -> list[dict[str, Any]]:
    """Return for each block its name, its text, and the events, of which each has its data or its text."""
    found = []
    for event_type in ("tools", "message", "error", "ü x"):
        events = [(event_type, value) for value in VALUES]
        for value in [*VALUES, *TEXTS]:
            text = wire.event_block(_event(event_type, value), "c-1-1").decode()
            found.append(_sample(f"{event_type}: {value!r}", text, (event_type, value)))
        for reason in get_args(BatchReason):
            found.append(_sample(f"{event_type}: {reason}", _batch(event_type, events, reason), *events))
        for join in ("", "\n"):
            text = _batch(event_type, [(event_type, value) for value in TEXTS], "manual", join)
            found.append(_sample(f"{event_type}: joined {join!r}", text, (event_type, Text(join.join(TEXTS)))))
    mixed = [(f"t{k}", value) for k, value in enumerate([*VALUES, *TEXTS])]
    found.append(_sample("mixed", _batch("mixed", mixed, "manual"), *mixed))
    for kind, reasons in (("sse_gap", GapReason), ("sse_busy", BusyReason), ("sse_bye", ByeReason)):
        for reason in get_args(reasons):
            data = {"reason": reason}
            text = wire.control(kind, wire.control_data(data), retry=60_000, id="c-1-1").decode()
            found.append(_sample(f"{kind}: {reason}", text, (kind, data)))
    opened = {"heartbeat": 15.0, "channels": ["default", "ü"]}
    opening = wire.control("sse_open", wire.control_data(opened), retry=1500, id="c-1-1")
    text = ": padding\n" + opening.decode()
    found.append(_sample("sse_open", text, ("sse_open", opened)))
    text = wire.HEARTBEAT.decode() + wire.event_block(_event("tools", 1), "c-1-1").decode()
    return [*found, _sample("heartbeat", text, ("tools", 1))]
