"""The deployment guides agree with each other, with the files beside them, and with the code."""

from __future__ import annotations

import configparser
import json
import re
import runpy
import tomllib
from typing import Any

import flask
import pytest

from sse_batcher import SSE, EventBatcher
from sse_batcher.runtime.process import EXIT_SECONDS
from sse_batcher.transports.descriptors import MAX_RESERVE, reserved
from sse_batcher.transports.watcher import FULL_SHARE

from .kit.deploy import COMMAND, DEPLOY, GUIDES, app_of, dockerfile, kubernetes, unit
from .kit.repository import ROOT
from .kit.servers import SERVERS

PAGE = (GUIDES / "deployment.md").read_text()
SERVER_PAGE = (GUIDES / "server.md").read_text()


def supervisord(section: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser()
    parser.read(DEPLOY / "supervisord.conf")
    return parser[section]


def pod() -> Any:
    return kubernetes("Deployment")["spec"]["template"]["spec"]


def container() -> Any:
    (only,) = pod()["containers"]
    return only


def test_all_run_the_same_command_in_the_folder_of_the_app() -> None:
    program = supervisord("program:shop")
    assert program["command"] == f"%(here)s/.venv/bin/{COMMAND}"
    assert program["directory"] == "%(here)s"
    assert unit("ExecStart") == [f"/srv/shop/.venv/bin/{COMMAND}"]
    assert unit("WorkingDirectory") == dockerfile("WORKDIR") == ["/srv/shop"]
    assert json.loads(*dockerfile("CMD")) == COMMAND.split()
    assert "command" not in container()  # nor arguments: the image knows its own
    assert "args" not in container()
    assert [line.split(" ", 1)[1] for line in unit("ExecReload")[:1]] == [f"--check-config {COMMAND.split(' ', 1)[1]}"]
    assert f"\ngunicorn --check-config {COMMAND.split(' ', 1)[1]}\n" in PAGE


def test_each_supervisor_waits_until_gunicorn_and_sse_batcher_have_given_up() -> None:
    longest = runpy.run_path(str(DEPLOY / "gunicorn.conf.py"))["graceful_timeout"] + EXIT_SECONDS
    (_, before_the_stop) = container()["lifecycle"]["preStop"]["exec"]["command"]
    (docker,) = re.findall(r"^docker run .*--stop-timeout (\d+)", PAGE, re.M)
    assert float(supervisord("program:shop")["stopwaitsecs"]) > longest
    assert float(*unit("TimeoutStopSec")) > longest
    assert float(docker) > longest
    assert pod()["terminationGracePeriodSeconds"] > longest + float(before_the_stop)
    for shown in (
        f"`stopwaitsecs={supervisord('program:shop')['stopwaitsecs']}`",
        f"`TimeoutStopSec={unit('TimeoutStopSec')[0]}`",
        f"`--stop-timeout {docker}`",
        f"`terminationGracePeriodSeconds: {pod()['terminationGracePeriodSeconds']}`",
        f"the {before_the_stop} s of `preStop`",
        f"and {EXIT_SECONDS:g} s more",
    ):
        assert shown in PAGE


def test_each_stops_gunicorn_with_sigterm_and_alone() -> None:
    # gunicorn passes it on: workers that get it from others, too, may end while they still start.
    program = supervisord("program:shop")
    assert program["stopsignal"] == "TERM"
    assert "stopasgroup" not in program
    assert (unit("KillMode"), unit("KillSignal")) == (["mixed"], [])
    assert dockerfile("STOPSIGNAL") == ["SIGTERM"]


def test_all_raise_the_number_of_descriptors_alike() -> None:
    limit = supervisord("supervisord")["minfds"]
    assert unit("LimitNOFILE") == [limit]
    assert f"--ulimit nofile={limit}:{limit}" in PAGE
    assert f"{int(limit):,}" in PAGE


def test_the_probes_ask_routes_of_the_app_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    app: dict[str, Any] = {"__name__": "app"}
    exec(app_of(GUIDES / "deployment.md"), app)
    with app["sse"].manager:
        client = app["app"].test_client()
        paths = {name: container()[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")}
        assert paths == {"readiness": "/events/health/ready", "liveness": "/events/health/live"}
        assert all(client.get(path).status_code == 200 for path in paths.values())
        monkeypatch.setattr(EventBatcher, "publishing_for", 6)  # Redis is away
        assert client.get("/events/health").status_code == 503
        # A restart would not help, and the same Redis is away for all pods.
        assert [client.get(path).json["status"] for path in paths.values()] == ["degraded", "ok"]
    assert {container()[f"{name}Probe"]["httpGet"]["port"] for name in paths} == {"http"}
    (port,) = container()["ports"]
    assert port["name"] == kubernetes("Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert dockerfile("ENV") == [f"PORT={port['containerPort']}"]
    assert dockerfile("EXPOSE") == [str(port["containerPort"])]


def test_a_rollout_goes_on_only_with_a_pod_that_has_been_ready_for_some_probes() -> None:
    assert kubernetes("Deployment")["spec"]["minReadySeconds"] >= 2 * container()["readinessProbe"]["periodSeconds"]


def test_the_service_sends_requests_to_the_pods_of_the_deployment() -> None:
    spec = kubernetes("Deployment")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == kubernetes("Service")["spec"]["selector"] == labels


def test_the_image_has_what_the_command_needs() -> None:
    copied = [word for value in dockerfile("COPY") for word in value.split()[:-1]]
    assert copied == ["requirements.txt", "app.py", "gunicorn.conf.py"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"^python:(3\.\d+)-slim$", *dockerfile("FROM"))
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    needed = set(re.findall(r"`([\w\[\]]+)`", *re.findall(r"^`requirements.txt` has (.*)\.", PAGE, re.M)))
    assert needed == {"flask", "gunicorn", "sse_batcher[redis]"}
    assert "redis" in project["optional-dependencies"]


def test_the_config_key_of_the_backend_is_the_one_that_the_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {environment["name"]: environment["value"] for environment in container()["env"]}
    values |= dict([value.split("=", 1) for value in unit("Environment")])
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    app = flask.Flask("app")
    app.config.from_prefixed_env()
    assert app.config["SSE_BACKEND"] == values["FLASK_SSE_BACKEND"]
    assert set(values) == {"FLASK_SSE_BACKEND"}
    with SSE(app).manager as manager:
        assert "Redis" in repr(manager) or "redis" in repr(manager)


def test_every_supervisor_command_is_one_of_supervisorctls() -> None:
    commands = re.findall(r"^supervisorctl -c supervisord.conf (\w+)", PAGE, re.M)
    assert commands == ["status", "signal", "restart", "stop"]  # which the other tests of these pages run


# -- the page about servers --------------------------------------------------------------------------------------------


def test_every_server_that_is_tested_is_in_the_table() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| `", SERVER_PAGE, re.M)
    named = {row.partition(" (")[0].replace(", ", "-").lower() for row in rows}
    tested = {re.sub(r"-(detached|http11|http|uwsgi|unix|\d+)", "", name) for name in SERVERS} - {"nginx"}
    other_names = {"gunicorn": "gunicorn-gthread", "werkzeug": "flask's own"}
    assert {other_names.get(name, name) for name in tested} == named


def test_the_numbers_about_threads_and_descriptors_are_those_of_the_code() -> None:
    assert "four fifths of the threads" in SERVER_PAGE
    assert FULL_SHARE == 4 / 5
    assert f"A quarter of the limit (at most {MAX_RESERVE:,} descriptors)" in SERVER_PAGE
    assert (reserved(400), reserved(1_000_000)) == (100, MAX_RESERVE)
