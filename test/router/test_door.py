"""Who gets in with which key, over which wire, and how the door closes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import aiohttp
import orjson
import pytest
from aiohttp import web

from router.fleet import WAIT_S, FakeEngine, eventually, fleet, free_port
from router.test_proxy import STREAM, run
from sglang_star_router.control_key import ControlKey

CLIENT = {"Authorization": "Bearer client"}
ADMIN = {"Authorization": "Bearer admin"}
LOOK = {"Authorization": "Bearer look"}
KEYS = {"api_key": "client", "admin_api_key": "admin"}

ORDERS = [
    ("POST", "/star/migrate"), ("POST", "/star/drain"), ("POST", "/star/undrain"),
    ("POST", "/abort_request"), ("POST", "/flush_cache"), ("GET", "/flush_cache"),
    ("POST", "/start_profile"), ("POST", "/stop_profile"),
]  # fmt: skip
VIEWS = [("GET", "/star/cluster"), ("GET", "/star/migrations")]


async def ask(running, method, path, headers=None):
    async with running.session.request(
        method, running.url + path, json={} if method == "POST" else None, headers=headers
    ) as answer:
        return answer.status


@pytest.mark.parametrize(("method", "path"), ORDERS + VIEWS)
def test_the_control_plane_has_a_key_of_its_own(method, path):
    async def check():
        engine = FakeEngine()
        async with fleet(engine, **KEYS) as running:
            assert await ask(running, method, path) == 401
            assert await ask(running, method, path, CLIENT) == 401
            assert engine.orders == engine.others == []
            assert await ask(running, method, path, ADMIN) not in (401, 403)

    run(check())


def test_an_admin_key_alone_leaves_generation_open_as_at_sglang():
    async def check():
        async with fleet(FakeEngine(), admin_api_key="admin") as running:
            assert await ask(running, "POST", "/generate") == 200
            assert await ask(running, "GET", "/star/cluster") == 401
            assert await ask(running, "GET", "/star/cluster", ADMIN) == 200

    run(check())


def test_engines_are_given_the_worker_key_for_requests_and_the_admin_key_for_orders():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, **KEYS) as running:
            # An admin may generate too; his key is not for the engine's ordinary routes.
            for key in (CLIENT, ADMIN):
                assert await ask(running, "POST", "/generate", key) == 200
            assert {one["Authorization"] for one in engine.headers} == {"Bearer client"}
            await running.post("/star/undrain", {"instance": engine.name}, headers=ADMIN)
            assert engine.order_keys == ["Bearer admin"]

    run(check())


def test_control_plane_keys_look_or_order(caplog):
    keys = tuple(
        ControlKey.parse(text) for text in ("1:ann:admin:admin", "2:bob:user:look:with:colons")
    )
    look = {"Authorization": "Bearer look:with:colons"}

    async def check():
        async with fleet(
            FakeEngine(), api_key="client", control_plane_api_keys=keys,
            control_plane_audit_enabled=True,
        ) as running:  # fmt: skip
            assert await ask(running, "GET", "/star/cluster", look) == 200
            assert await ask(running, "POST", "/star/drain", look) == 403
            assert await ask(running, "POST", "/flush_cache", look) == 403
            assert await ask(running, "POST", "/flush_cache", ADMIN) == 200
            assert await ask(running, "POST", "/flush_cache", CLIENT) == 401
            assert await ask(running, "POST", "/generate", look) == 401

    with caplog.at_level("INFO", logger="sglang_star_router.audit"):
        run(check())
    said = [record.getMessage() for record in caplog.records]
    assert any("1 (ann)" in line and "POST /flush_cache" in line and "200" in line for line in said)
    assert any("2 (bob)" in line and "403" in line for line in said)
    assert not any("colons" in line for line in said)


@pytest.mark.parametrize(
    "given", ["bearer client", "Bearer  client", "Bearer", "", "Bearer clien", "Basic client"]
)
def test_only_the_key_opens(given):
    async def check():
        async with fleet(FakeEngine(), api_key="client") as running:
            status = await ask(running, "POST", "/generate", {"Authorization": given})
            # The scheme's name has no case; nothing else may differ.
            assert status == (200 if given == "bearer client" else 401)

    run(check())


def test_refusals_are_counted():
    async def check():
        async with fleet(FakeEngine(), **KEYS) as running:
            await ask(running, "POST", "/generate")
            await ask(running, "POST", "/star/drain", CLIENT)
            text = (await running.get("/metrics"))[1].decode()
            assert 'star_router_denied_total{door="client"} 1.0' in text
            assert 'star_router_denied_total{door="admin"} 1.0' in text

    run(check())


def test_what_is_no_http_is_counted_and_fills_no_log(caplog):
    async def check():
        async with fleet(FakeEngine(), **KEYS) as running:
            host, _, port = running.url.removeprefix("http://").partition(":")
            for sent in (
                b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not for us\r\n\r\n",
            ):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(sent)
                assert b" 400 " in await reader.readline()
                writer.close()
            text = (await running.get("/metrics"))[1].decode()
            assert "star_router_malformed_requests_total 3.0" in text

    run(check())
    assert not [one for one in caplog.records if one.name.startswith("aiohttp")]


def test_no_path_written_otherwise_passes_by_the_admin_door():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, **KEYS) as running:
            host, _, port = running.url.removeprefix("http://").partition(":")
            for path in (
                "/star/../star/cluster", "//star/cluster", "/%73tar/cluster", "/star%2Fcluster",
                "/STAR/cluster", "/v1/../star/cluster", "/v1/%2e%2e/flush_cache", "/./flush_cache",
                "/v1/../flush_cache", "/flush_cache/", "/flush_cache;x", "/v1/..%2fflush_cache",
            ):  # fmt: skip
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(
                    f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    "Authorization: Bearer client\r\n\r\n".encode()
                )
                answer = await reader.read()
                writer.close()
                assert int(answer.split()[1]) in (400, 401, 404, 405), path
            assert engine.others == []

    run(check())


def test_no_key_is_needed_only_to_ask_whether_one_is():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, cors_allowed_origins=("http://page.invalid",), **KEYS) as running:
            for path in ("/flush_cache", "/v1/models", "/star/cluster"):
                for headers in ({}, {"Origin": "http://other.invalid"}):
                    async with running.session.options(
                        running.url + path, headers=headers
                    ) as answer:
                        assert answer.status in (401, 405)
            assert engine.others == []

    run(check())


def test_what_engines_say_of_themselves_is_told_without_their_keys():
    async def check():
        for engines in ([FakeEngine()], [FakeEngine("prefill"), FakeEngine("decode")]):
            async with fleet(*engines) as running:
                for path in ("/server_info", "/get_server_info"):
                    status, info = await running.get(path)
                    assert status == 200
                    assert b"fake" in info
                    assert b"secret" not in info

    run(check())


def test_an_engine_that_sends_elsewhere_is_not_followed():
    async def check():
        seen = []

        async def elsewhere(reader, writer):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        port = free_port()
        server = await asyncio.start_server(elsewhere, "127.0.0.1", port)
        engine = FakeEngine(reply_status=307, reply_body=b"", location=f"http://127.0.0.1:{port}/x")
        async with fleet(engine, **KEYS) as running:
            async with running.session.post(
                running.url + "/generate", json={"text": "a"}, headers=CLIENT, allow_redirects=False
            ) as answer:
                assert answer.status == 307
            assert seen == []
        server.close()

    run(check())


# --------------------------------------------------------------------------- browsers


def test_pages_of_allowed_origins_may_read_answers():
    async def check():
        engine = FakeEngine()
        async with fleet(
            engine, api_key="k", cors_allowed_origins=("https://page.invalid",)
        ) as running:
            for origin, allowed in (
                ("https://page.invalid", "https://page.invalid"),
                ("https://other.invalid", None),
            ):
                preflight = {"Origin": origin, "Access-Control-Request-Method": "POST",
                             "Access-Control-Request-Headers": "authorization"}  # fmt: skip
                async with running.session.options(
                    running.url + "/generate", headers=preflight
                ) as answer:
                    assert answer.headers.get("Access-Control-Allow-Origin") == allowed
                    assert (answer.status == 204) == (allowed is not None)
                for body in (STREAM, {"text": "a"}):
                    async with running.session.post(
                        running.url + "/generate", json=body,
                        headers={"Origin": origin, "Authorization": "Bearer k"},
                    ) as answer:  # fmt: skip
                        assert answer.status == 200
                        assert answer.headers.get("Access-Control-Allow-Origin") == allowed

    run(check())


# --------------------------------------------------------------------------- TLS


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A CA, and certificates of it for a server and for a client."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for ca in ("ca", "other"):
        openssl(*new, "-x509", "-days", "2", "-subj", f"/CN={ca}",
                "-keyout", f"{ca}.key", "-out", f"{ca}.pem")  # fmt: skip
    (folder / "extra").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", "extra",
                "-out", f"{name}.pem")  # fmt: skip
    return folder


def test_clients_are_served_over_tls(certificates):
    async def check():
        tls = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        async with fleet(
            FakeEngine(),
            tls_cert_path=str(certificates / "server.pem"),
            tls_key_path=str(certificates / "server.key"),
        ) as running:
            assert running.url.startswith("https://")
            status, body = await running.post("/generate", STREAM, ssl=tls)
            assert (status, body) == (200, b"".join(running.engines[0].chunks))
            with pytest.raises(aiohttp.ClientError):
                await running.post("/generate", STREAM)
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.load_verify_locations(certificates / "ca.pem")
            old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises(aiohttp.ClientError):
                await running.post("/generate", STREAM, ssl=old)

    run(check())


@contextlib.asynccontextmanager
async def tls_engine(certificates, engine):
    """The engine behind TLS that asks for a certificate of the CA."""
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=str(certificates / "ca.pem")
    )
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    await engine.start()
    port = free_port()
    site = web.TCPSite(engine.runner, "127.0.0.1", port, ssl_context=context)
    await site.start()
    engine.url = f"https://127.0.0.1:{port}"
    yield engine
    await engine.stop()


def test_instances_are_reached_over_mutual_tls(certificates):
    paths = {
        "client_cert_path": str(certificates / "client.pem"),
        "client_key_path": str(certificates / "client.key"),
        "ca_cert_paths": (str(certificates / "ca.pem"),),
    }

    async def check():
        async with tls_engine(certificates, FakeEngine()) as engine:
            async with fleet(engine, start=False, **paths) as running:
                await running.until_healthy()
                assert (await running.post("/generate", STREAM))[0] == 200
            for wrong in (
                {"ca_cert_paths": paths["ca_cert_paths"]},
                paths | {"ca_cert_paths": (str(certificates / "other.pem"),)},
                paths | {"ca_cert_paths": ()},
            ):
                async with fleet(engine, start=False, **wrong) as running:
                    instance = running.instance(engine)
                    await eventually(lambda one=instance: "cannot" in one.trouble or one.failures)
                    assert not instance.healthy
                    assert (await running.post("/generate", STREAM))[0] == 503

    run(check())


@pytest.mark.parametrize("flag", ["--tls-cert-path", "--client-cert-path", "--ca-cert-paths"])
def test_certificate_files_are_named_when_they_cannot_be_read(flag, tmp_path, capsys):
    from sglang_star_router.launch_router import main

    missing = str(tmp_path / "missing.pem")
    words = ["--worker-urls", "http://127.0.0.1:1", flag, missing]
    if flag != "--ca-cert-paths":
        words += [flag.replace("cert", "key"), missing]
    assert main(words) == 2
    assert missing in capsys.readouterr().err


# --------------------------------------------------------------------------- probes and the end


def test_liveness_is_not_readiness():
    async def check():
        engine = FakeEngine()
        async with fleet(engine, api_key="k") as running:
            engine.health_status = 500
            await eventually(lambda: not running.instance(engine).healthy)
            for path, status in (
                ("/liveness", 200), ("/ping", 200), ("/readiness", 503), ("/ready", 503),
                ("/health", 503), ("/health_generate", 503),
            ):  # fmt: skip
                assert (await running.get(path))[0] == status

    run(check())


class Router:
    """A router in a process of its own."""

    def __init__(self, engine: FakeEngine, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sglang_star_router.launch_router", "--worker-urls", engine.url,
             "--port", str(self.port), *flags],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=WAIT_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    async def until(self, path: str, status: int) -> None:
        while await asyncio.to_thread(self.status, path) != status:
            assert self.process.poll() is None
            await asyncio.sleep(0.02)

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def streaming(router, engine):
    """A stream through ``router`` that has begun and waits for the engine's gate."""
    engine.gate = asyncio.Event()
    async with (
        aiohttp.ClientSession() as session,
        session.post(router.url + "/generate", json=STREAM) as response,
    ):
        first = await response.content.readuntil(b"\n\n")
        assert first == engine.chunks[0]
        yield response


def test_what_is_open_ends_before_the_router_does():
    async def check():
        engine = await FakeEngine().start()
        try:
            with Router(engine) as router:
                await router.until("/readiness", 200)
                async with streaming(router, engine) as response:
                    router.process.send_signal(signal.SIGTERM)
                    await router.until("/readiness", 503)
                    # It still answers probes, and tells newcomers to go elsewhere.
                    assert await asyncio.to_thread(router.status, "/liveness") == 200
                    async with (
                        aiohttp.ClientSession() as session,
                        session.post(router.url + "/generate", json=STREAM) as late,
                    ):
                        assert late.status == 503
                        assert late.headers["Connection"] == "close"
                        assert "Retry-After" in late.headers
                    engine.gate.set()
                    assert await response.content.read() == b"".join(engine.chunks[1:])
                assert await router.ended() == 0
        finally:
            await engine.stop()

    run(check())


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_the_grace_period_has_an_end(how):
    async def check():
        engine = await FakeEngine().start()
        grace = "0.5" if how == "grace" else "100000"
        try:
            with Router(engine, "--shutdown-grace-period-secs", grace) as router:
                await router.until("/readiness", 200)
                async with streaming(router, engine) as response:
                    router.process.send_signal(signal.SIGTERM)
                    if how == "second signal":
                        await router.until("/readiness", 503)
                        router.process.send_signal(signal.SIGTERM)
                    rest = b""
                    with contextlib.suppress(aiohttp.ClientError):
                        rest = await response.content.read()
                    if rest:
                        error = orjson.loads(rest.strip().removeprefix(b"data: "))["error"]
                        assert error["type"] == "service_unavailable"
                assert await router.ended() == 0
        finally:
            await engine.stop()

    run(check())


def test_metrics_have_a_port_of_their_own_if_asked_for():
    async def check():
        engine = await FakeEngine().start()
        port = free_port()
        try:
            with Router(
                engine, "--prometheus-port", str(port), "--prometheus-duration-buckets", "1", "2"
            ) as router:
                await router.until("/readiness", 200)

                def read(path):
                    url = f"http://127.0.0.1:{port}{path}"
                    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                        return answer.read()

                text = await asyncio.to_thread(read, "/metrics")
                assert b'star_router_first_byte_seconds_bucket{le="2.0"}' in text
                assert b'le="0.5"' not in text.split(b"first_byte_seconds")[2]
                with pytest.raises(urllib.error.HTTPError):
                    await asyncio.to_thread(read, "/star/cluster")
        finally:
            await engine.stop()

    run(check())
