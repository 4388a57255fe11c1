"""The report: measured over real HTTP, and it says so when what it measured cannot be true."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sse_batcher.cli import main, serving
from sse_batcher.demo import report
from sse_batcher.demo.report import MODES, Latency, MeasuringError, Row, as_json, as_table, measure
from sse_batcher.demo.scenarios import SCENARIOS, TYPES

from .kit.repository import ROOT
from .kit.waiting import tried

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="segments are counted by Linux alone")


def by_mode(name: str) -> dict[str, Row]:
    return {row.mode: row for row in measure(serving, [name])}


# -- what is measured --------------------------------------------------------------------------------------------------


@linux
def test_a_hub_restart_is_three_frames_instead_of_thirty() -> None:
    rows = by_mode("restart")
    assert [(mode, row.events, row.frames, row.replaced) for mode, row in rows.items()] == [
        ("unbatched", 30, 30, 0),
        ("batched", 30, 3, 0),
        ("mixed", 30, 1, 0),
        ("leading", 30, 6, 0),
        ("compressed", 30, 3, 0),
    ]
    for row in rows.values():
        assert row.segments is not None
        assert row.wire_bytes is not None
        assert row.frames <= row.segments <= 60  # one write a frame; the larger frames do not fit into one segment
        assert row.wire_bytes > row.body_bytes + 52 * row.segments  # and what HTTP puts around each frame
    assert rows["batched"].wire_bytes < 0.8 * rows["unbatched"].wire_bytes
    assert rows["compressed"].wire_bytes < 0.3 * rows["unbatched"].wire_bytes
    assert rows["compressed"].body_bytes < 0.35 * rows["batched"].body_bytes


def test_a_lone_event_waits_for_its_window_unless_the_first_leads() -> None:
    rows = by_mode("one")
    assert {row.frames for row in rows.values()} == {1}
    assert rows["batched"].latency_ms.p50 >= 100
    assert rows["mixed"].latency_ms.p50 >= 100
    assert rows["leading"].latency_ms.p50 < rows["batched"].latency_ms.p50
    assert rows["batched"].added_ms.p50 == rows["batched"].latency_ms.p50 - rows["unbatched"].latency_ms.p50


def test_what_a_newer_event_replaced_is_counted_and_not_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "ROUNDS_OF_A_PERIOD", 1)
    rows = by_mode("config")
    assert caplog.records == []  # it sets its own key, and logs no warning
    assert rows["unbatched"].replaced == 0
    assert rows["batched"].replaced > 0
    assert rows["batched"].frames < rows["unbatched"].frames == 30


# -- what cannot be true -----------------------------------------------------------------------------------------------

Change = Callable[[Iterator[bytes]], Iterable[bytes]]


def spoiled(change: Change) -> Callable[[report.WSGIApp], AbstractContextManager[tuple[str, int]]]:
    """A server that changes the blocks of every stream."""

    def serve(app: report.WSGIApp) -> AbstractContextManager[tuple[str, int]]:
        return serving(lambda environ, start_response: change(iter(app(environ, start_response))))

    return serve


def error_in(serve: report.Serve, said: str) -> str:
    """What a measurement says that cannot succeed. It has little patience, also with a machine that stands still."""

    def error() -> str:
        with pytest.raises(MeasuringError) as caught:
            measure(serve, ["five"])
        return str(caught.value)

    return tried(error, lambda error: said in error)


def test_a_lost_frame_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(blocks: Iterator[bytes]) -> Iterator[bytes]:
        yield next(blocks)
        yield from (block for block in blocks if b'"n":3' not in block)

    monkeypatch.setattr(report, "PATIENCE", 0.5)
    said = "5 of 6 blocks came within"
    assert said in error_in(spoiled(lose), said)


def test_a_lost_event_is_an_error() -> None:
    def lose(blocks: Iterator[bytes]) -> Iterator[bytes]:
        yield next(blocks)
        yield from (block.replace(b'"n":3', b'"n":2') for block in blocks)

    with pytest.raises(MeasuringError, match="of 5 events 5 arrived, and 0 were replaced"):
        measure(spoiled(lose), ["five"])


def test_an_event_that_is_never_sent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PATIENCE", 0.5)
    monkeypatch.setitem(report.MODES, "unbatched", {"batchWindow": 10_000})
    said = "5 events were not sent"
    assert said in error_in(serving, said)


# -- the text ----------------------------------------------------------------------------------------------------------


def row(mode: str, frames: float, segments: float, body: float, wire: float, p50: float, p99: float) -> Row:
    latency, added = Latency(p50 + 4, p99 + 9), Latency(p50, p99)
    return Row("Restart", mode, 5, 30, frames, segments, body, wire, latency, added, 0.0)


UNBATCHED = row("unbatched", 30.0, 30.0, 5801.0, 7541.0, 0.0, 0.0)
BATCHED = row("batched", 3.0, 6.0, 4811.0, 5144.0, 99.0, 103.0)


def test_the_table_is_markdown_with_the_change_against_unbatched() -> None:
    table, where = as_table([UNBATCHED, BATCHED]).split("\n\n")
    assert table.splitlines() == [
        "| scenario | mode      |   frames | segments |  bytes, body |  bytes, wire | added, p50 |    p99 | replaced |",
        "|----------|-----------|---------:|---------:|-------------:|-------------:|-----------:|-------:|---------:|",
        "| Restart  | unbatched |       30 |       30 |        5,801 |        7,541 |            |        |        0 |",
        "|          | batched   | 3 (-90%) | 6 (-80%) | 4,811 (-17%) | 5,144 (-32%) |      99 ms | 103 ms |        0 |",
    ]
    assert where.startswith("Measured on 20")


def test_what_the_system_does_not_tell_is_a_question_mark() -> None:
    table = as_table([replace(row, segments=None, wire_bytes=None) for row in (UNBATCHED, BATCHED)])
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:4]] == ["?", "?"]
    assert [line.split("|")[6].strip() for line in table.splitlines()[2:4]] == ["?", "?"]


def test_the_json_form_has_everything() -> None:
    told = json.loads(as_json([BATCHED]))
    assert set(told["machine"]) == {"date", "python", "system", "machine", "cores"}
    assert told["rows"] == [
        {
            "scenario": "Restart",
            "mode": "batched",
            "rounds": 5,
            "events": 30,
            "frames": 3,
            "segments": 6,
            "body_bytes": 4811,
            "wire_bytes": 5144,
            "latency_ms": {"p50": 103, "p99": 112},
            "added_ms": {"p50": 99, "p99": 103},
            "replaced": 0,
        }
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(serve: Any, progress: Callable[[str], None]) -> list[Row]:
        progress("1/2 Hub restart, unbatched")
        return [UNBATCHED, BATCHED]

    monkeypatch.setattr(report, "measure", quick)


@pytest.mark.usefixtures("measured")
def test_the_result_is_on_stdout_and_the_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| scenario")
    assert err.startswith("1/2 Hub restart, unbatched\n")
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["frames"] == 30


def test_what_could_not_be_measured_is_said_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> list[Row]:
        raise MeasuringError("of 5 events 4 arrived, and 0 were replaced")

    monkeypatch.setattr(report, "measure", fail)
    assert main(["report"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Error: nothing was measured: of 5 events 4 arrived, and 0 were replaced\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.usefixtures("measured")
def test_a_result_that_cannot_be_written_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["report"]) == 1
    assert capsys.readouterr().err.endswith("Error: the output cannot be written: No space left on device\n")


# -- the scenarios -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_the_same_again_for_the_same_randomness(name: str) -> None:
    happen = SCENARIOS[name].happen
    events = happen(Random(1))
    assert events == happen(Random(1))
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert {event.type for event in events} <= set(TYPES)


# -- the table of the documentation ----------------------------------------------------------------------------------


def told_on_the_page() -> dict[tuple[str, str], list[str]]:
    """The cells of the page's table, by scenario and mode, without the percentages."""
    rows, title = {}, ""
    page = (ROOT / "docs" / "explanation" / "batching.md").read_text()
    table = page[page.index("| scenario ") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, mode, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        title = name or title
        rows[title, mode] = [cell.split(" ")[0].replace(",", "") for cell in cells]
    return rows


@linux
@pytest.mark.external
@pytest.mark.timeout(180)  # it takes a minute
def test_the_command_measures_what_the_page_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sse_batcher", "report", "--json"], check=True, capture_output=True, text=True
    )
    rows = json.loads(done.stdout)["rows"]
    told = told_on_the_page()
    assert [(row["scenario"], row["mode"]) for row in rows] == list(told)
    assert len(rows) == 6 * len(MODES)
    assert len(done.stderr.splitlines()) == len(rows)
    for row in rows:
        frames, _, body, _, p50, _, replaced = told[row["scenario"], row["mode"]]
        exact = row["scenario"] in {"Hub restart", "Five servers", "One server", "Sparse events"}
        # What happens over time falls into one more window or one less, as the machine has it.
        assert row["frames"] == pytest.approx(int(frames), abs=0 if exact else 3)
        # How short compressed bytes get depends on ids and times, too.
        precise = 0.02 if row["mode"] == "compressed" else 0.001
        assert row["body_bytes"] == pytest.approx(int(body), rel=precise if exact else 0.1)
        assert row["replaced"] == pytest.approx(int(replaced), abs=0 if exact else 4)
        if p50:
            assert row["added_ms"]["p50"] == pytest.approx(int(p50), abs=30)
