"""The fields of log records: each line has a name, and values that any JSON formatter can write."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE, EventBatcher, SSEManager
from sse_batcher.manager_state import process_of
from sse_batcher.runtime.log_fields import PREFIX, log_fields

from .kit.documents import files, text_of
from .kit.repository import DOCS
from .kit.waiting import TIMEOUT, wait_until


@pytest.fixture(scope="module")
def generated() -> Iterator[ModuleType]:
    """The module that makes the tables, as Sphinx imports it."""
    sys.path.insert(0, str(DOCS))
    import generated

    yield generated
    sys.path.remove(str(DOCS))
    del sys.modules["generated"]


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name.startswith(PREFIX)}


def is_plain(value: object) -> bool:
    """Whether JSON has this value: what is read back is the same, and of the same type."""
    return isinstance(value, (str, int, float, list, type(None))) and json.loads(json.dumps(value)) == value


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_call_that_logs_names_its_line(generated: ModuleType) -> None:
    calls = generated.log_calls()
    assert len(calls) > 55
    names = [generated.log_fields_of(call)[0] for call in calls]
    assert all(re.fullmatch(r"[a-z]+\d?(_[a-z]+)*", name) for name in names)
    # A line has one name, and a name one line.
    texts: dict[str, set[str]] = {}
    for call, name in zip(calls, names, strict=True):
        has_level = ast.unparse(call.func).endswith((".log", ".log_once"))
        texts.setdefault(name, set()).add(ast.unparse(call.args[has_level]))
    assert {name for name, found in texts.items() if len(found) > 1} == set()


def test_a_call_without_a_name_is_found(generated: ModuleType) -> None:
    call = ast.parse('_log.warning("a text", extra={})', mode="eval").body
    with pytest.raises(ValueError, match=r"^add extra=log_fields"):
        generated.log_fields_of(call)


def test_every_field_is_explained(generated: ModuleType) -> None:
    used = {PREFIX + name for call in generated.log_calls() for name in generated.log_fields_of(call)[1:]}
    rows = text_of("reference/counters").partition("\nThe fields:")[2]
    explained = {
        name for row in re.findall(r"^\| (`sse_.*?) \|", rows, flags=re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert explained == used | {"sse_code"}


def test_no_name_is_an_attribute_of_a_record() -> None:
    record = logging.makeLogRecord({})
    assert not any(name.startswith(PREFIX) for name in vars(record))
    logging.getLogger("any").makeRecord("any", logging.INFO, "", 0, "", (), None, extra=log_fields("a", message=1))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (0.5, 0.5),
        ("7", "7"),
        (("a", "b"), ["a", "b"]),
        (b"sse\xff", "sse\ufffd"),
        (ValueError("no"), "no"),
        ([b"a", (1,)], ["a", [1]]),
    ],
)
def test_values_are_made_plain(value: object, shown: object) -> None:
    made = log_fields("line", value=value)
    assert made == {"sse_code": "line", "sse_value": shown}
    assert is_plain(made["sse_value"])


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it has no text")


def test_an_error_without_a_text_does_not_end_the_thread_that_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    def sink(batch: object) -> None:
        raise SilentError

    with EventBatcher(sink) as batcher:
        batcher.enqueue("log", 1)
        assert not batcher.flush_all()
        assert batcher.get_stats().thread_restarts == 0
    [record] = [record for record in caplog.records if fields_of(record)["sse_code"] == "sink_failed"]
    assert fields_of(record)["sse_error"] == "<SilentError>"


def test_a_stream_that_ends_says_all_about_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    with SSEManager() as manager:
        client = manager.subscribe(["a", "b"], user=7)
        size = len(next(client))
        client.close()
        wait_until(lambda: caplog.records, "the line is there")
    (record,) = caplog.records
    found = fields_of(record)
    assert found.pop("sse_duration") >= 0
    assert found == {
        "sse_code": "stream_ended",
        "sse_client": 1,
        "sse_channels": ["a", "b"],
        "sse_user": 7,
        "sse_reason": "left",
        "sse_frames": 0,
        "sse_bytes": size,
    }
    assert all(map(is_plain, found.values()))


def test_lines_of_the_extension_have_fields(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("logged", static_folder=None)
    app.config["SSE_FORIEGN_KEY_OF_ANOTHER"] = 1
    sse = SSE(app)
    client = app.test_client()
    client.get("/events?channel=a&channel=b")
    sse.authorize(lambda channels: None)  # type: ignore[arg-type, return-value]
    client.get("/events?channel=a")
    client.get("/events/stats")
    process_of(sse.manager).drain()
    assert sse.manager.shutdown(TIMEOUT)
    found = [fields_of(record) for record in caplog.records]
    assert found[0] == {"sse_code": "unknown_key", "sse_key": "SSE_FORIEGN_KEY_OF_ANOTHER"}
    assert {"sse_code": "authorize_missing", "sse_channels": ["a", "b"]} in found
    assert {"sse_code": "authorize_returned_none", "sse_channels": ["a"]} in found
    assert {"sse_code": "stats_not_allowed"} in found
    assert all(is_plain(value) for record in found for value in record.values())


def test_no_token_is_in_a_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = Flask("logged", static_folder=None)
    app.secret_key = "secret"
    sse = SSE(app)

    @sse.snapshot("broken")
    def fail() -> None:
        raise RuntimeError("a fault of the app")

    with app.test_request_context():
        token = sse.sign(["broken"])
    for query in (f"?token={token}", f"?token={token}x"):
        app.test_client().get(f"/events{query}")
    assert sse.manager.shutdown(TIMEOUT)
    records = [record for record in caplog.records if record.name.startswith("sse_batcher")]
    assert "snapshot_failed" in [fields_of(record)["sse_code"] for record in records]
    assert not any(token[5:40] in json.dumps(fields_of(record)) + record.getMessage() for record in records)


# -- the formatter of the guide ----------------------------------------------------------------------------------------


def test_the_formatter_of_the_guide_writes_each_record_as_one_line_of_json() -> None:
    namespace: dict[str, Any] = {}
    exec(files(text_of("guides/monitoring"))["json_lines.py"], namespace)
    formatter = namespace["JsonFormatter"]()
    logger = logging.getLogger("sse_batcher.any")
    extra = log_fields("stream_ended", channels=("a\nb",), user=None, duration=1.5)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        caught = sys.exc_info()
    for info in (None, caught):
        record = logger.makeRecord(logger.name, logging.INFO, "", 0, "stream %d ended", (5,), info, extra=extra)
        text = formatter.format(record)
        assert "\n" not in text
        line = json.loads(text)
        assert (line["logger"], line["level"], line["message"]) == ("sse_batcher.any", "INFO", "stream 5 ended")
        assert {name: value for name, value in line.items() if name.startswith(PREFIX)} == {
            "sse_code": "stream_ended",
            "sse_channels": ["a\nb"],
            "sse_user": None,
            "sse_duration": 1.5,
        }
        assert ("two" in line.get("exception", "")) == (info is not None)
    foreign = logging.getLogger("other").makeRecord("other", logging.INFO, "", 0, "text", (), None)
    assert json.loads(formatter.format(foreign))["message"] == "text"
