"""The command line: what it accepts, and what it says when it does not."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.fleet import WAIT_S, FakeEngine, fleet, free_port, request_status
from router.test_proxy import run
from sglang_star.errors import ConfigError
from sglang_star_router.command_line import parse_args
from sglang_star_router.launch_router import main

URL = "http://127.0.0.1:1"


def test_flags_of_sglang_router_are_understood():
    line = (
        "--pd-disaggregation --prefill http://p:30000 9001 --prefill http://q:30000 none "
        "--prefill http://r:30000 --decode http://d:1 --decode http://e:1 --host 0.0.0.0 "
        "--port 8000 --policy round_robin --prefill-policy least-requests --api-key k "
        "--request-timeout-secs 10 --health-check-interval-secs 2 --log-level debug "
        "--rescheduler star --rescheduler-interval 0.2 --rescheduler-param risk_sigma=0.25"
    )
    config = parse_args(line.split())
    assert [(m.endpoint.url, m.role, m.bootstrap_port) for m in config.members] == [
        ("http://p:30000", "prefill", 9001),
        ("http://q:30000", "prefill", None),
        ("http://r:30000", "prefill", None),
        ("http://d:1", "decode", None),
        ("http://e:1", "decode", None),
    ]
    assert config.disaggregated
    assert config.policy == "round-robin"
    assert config.rescheduler_params == {"risk_sigma": 0.25}
    assert parse_args(["--worker-urls", URL, "--decode-policy", "star"]).policy == "star"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no instance"),
        (f"--worker-urls {URL} {URL}/", "twice"),
        (f"--worker-urls {URL} --pd-disaggregation --decode {URL}", "--worker-urls"),
        (f"--decode {URL}", "--pd-disaggregation"),
        (f"--pd-disaggregation --decode {URL}", "--prefill"),
        (f"--pd-disaggregation --prefill {URL}", "--decode"),
        (f"--pd-disaggregation --prefill {URL} x --decode http://d:1", "bootstrap port"),
        (f"--pd-disaggregation --prefill {URL} 1 2 --decode http://d:1", "one port"),
        ("--worker-urls localhost:30000", "instance URL"),
        ("--worker-urls http://h:99999", "not a URL"),
        ("--worker-urls http://h:1/v1", "more than"),
        (f"--worker-urls {URL} --port 70000", "--port"),
        (f"--worker-urls {URL} --rescheduler-interval 0", "--rescheduler-interval"),
        (f"--worker-urls {URL} --request-timeout-secs -1", "--request-timeout-secs"),
        (f"--worker-urls {URL} --rescheduler star --rescheduler-param nonsense=1", "nonsense"),
        (f"--worker-urls {URL} --rescheduler star --rescheduler-param risk_sigma", "NAME=NUMBER"),
        (f"--worker-urls {URL} --rescheduler-param risk_sigma=1", "--rescheduler off"),
        (f"--worker-urls {URL} --policy-param x=1", "x"),
        (
            f"--worker-urls {URL} --rescheduler star --rescheduler-param recompute_tokens_per_s=9",
            "leave recompute_tokens_per_s out",
        ),
    ],
)
def test_bad_combinations_end_with_a_message(line, words, capsys):
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--policy cache_aware", "--rescheduler fast", "--no-such-flag"])
def test_unknown_names_are_argparse_errors(line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--worker-urls", URL, *line.split()])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_config_error_is_a_star_error():
    with pytest.raises(ConfigError):
        parse_args([])


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "sglang_star_router.launch_router",
             "--worker-urls", URL, "--port", str(port)],
            capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_not_this_machine_is_named(capsys):
    assert main(["--worker-urls", URL, "--host", "nowhere.invalid"]) == 2
    said = capsys.readouterr().err
    assert "cannot listen on nowhere.invalid:30000" in said
    assert "--host" in said


def test_star_router_says_where_it_listens():
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", "sglang_star.cli", "router", "--worker-urls", URL,
         "--port", str(port)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stderr is not None
        said = next((line for line in child.stderr if "listening" in line), "")
        assert said.endswith(f"listening on http://127.0.0.1:{port}\n")
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()


def test_process_serves_and_ends_on_sigterm_without_importing_torch_or_sglang():
    port = free_port()
    code = (
        "import sys; from sglang_star_router.launch_router import main\n"
        f"status = main(['--worker-urls', {URL!r}, '--port', '{port}'])\n"
        "heavy = {'torch', 'sglang'} & {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if "listening" in line:
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
            assert b"star_router_" in answer.read()
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=WAIT_S)
        assert child.returncode == 0, errors
    finally:
        child.kill()
        child.wait()


def test_metrics_parse_and_dashboard_is_self_contained():
    async def check():
        engine = FakeEngine()
        async with fleet(engine) as running:
            await running.post("/generate", {"text": "a"})
            await running.publish(engine, request_status("r1"), retractions=3)
            text = (await running.get("/metrics"))[1].decode()
            families = {f.name: f for f in text_string_to_metric_families(text)}
            assert all(name.startswith("star_router_") for name in families)
            (sample,) = families["star_router_kv_used_tokens"].samples
            assert sample.labels == {"instance": engine.name}
            assert sample.value == 110
            assert [s.value for s in families["star_router_retractions"].samples] == [3]
            served = families["star_router_requests"].samples
            assert {(s.labels["path"], s.labels["status"]) for s in served} == {
                ("/generate", "200")
            }
            status, page = await running.get("/dashboard")
            assert status == 200
            assert b"/star/cluster" in page
            assert b"/star/migrations" in page
            assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")
            assert b"https://" not in page

    run(check())
