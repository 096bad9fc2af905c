"""Rewards over HTTP: what comes back equals local scores; a server that is gone, slow or lying is named, in time."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat

import pytest
import torch
from safetensors.torch import save

from egrpo_fast import cli
from egrpo_fast.commands import serve_rewards
from egrpo_fast.commands.serve_rewards import bind, check_access, is_loopback, make_app, make_server
from egrpo_fast.distributed.world import free_port
from egrpo_fast.prompts.files import read_prompts
from egrpo_fast.rewards import RewardError, make_reward, score
from egrpo_fast.rewards import http as client
from egrpo_fast.rewards.http import HttpReward, RewardServerError, pack_request, unpack_request
from egrpo_fast.shapes import PROMPTS

TOKEN = "a token of the tests".replace(" ", "-")
PROMPT = read_prompts(PROMPTS["held_out"])[:5]
FAST = {"timeout": 20, "retries": 2, "backoff": 0.01}


def pictures(count=5):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@contextmanager
def serving(rewards, token=TOKEN):
    listener = bind("127.0.0.1", 0)
    server = make_server(make_app(rewards, token, batch=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    listener.close()


def nan_for_dark(images, prompts):
    means = images.mean((1, 2, 3))
    return torch.where(means < 0.1, torch.nan, means)


def out_of_memory(images, prompts):
    raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def server():
    rewards = {
        "shapes_soft": make_reward("shapes_soft", {}),
        "clip": make_reward("clip", {"model": "shapes"}),
        "clip/two words": make_reward("clip", {"model": "shapes"}),
        "nan_for_dark": nan_for_dark,
        "out_of_memory": out_of_memory,
    }
    with serving(rewards) as url:
        yield url


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(client.TOKEN_VARIABLE, TOKEN)


@pytest.mark.parametrize("name", ["clip", "clip/two words", "shapes_soft"])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_round_trip_equals_the_local_score(server, name, batch):
    local = make_reward(name, {} if name == "shapes_soft" else {"model": "shapes"})
    ours = make_reward("http", {"reward": name, "url": server, "batch": batch, "precision": "float32"})
    assert torch.allclose(ours(pictures(), PROMPT), local(pictures(), PROMPT), atol=1e-6)


@pytest.mark.parametrize(("precision", "step"), [("uint8", 0.5 / 255), ("float16", 2**-12), ("float32", 0.0)])
def test_pictures_travel_to_within_half_a_step(precision, step):
    images, prompts = unpack_request(pack_request(pictures(), PROMPT, precision))
    assert prompts == PROMPT and images.dtype == torch.float32
    assert (images - pictures()).abs().max() <= step + 1e-7
    eight_bits = torch.arange(256).div(255).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    if precision != "float16":
        assert torch.equal(unpack_request(pack_request(eight_bits, ["é 絵"], precision))[0], eight_bits)


@pytest.mark.parametrize("given", [None, "wrong-token-of-some-length", TOKEN + "x"])
def test_a_wrong_token_is_refused_at_once_and_never_told(server, given, monkeypatch, tmp_path):
    monkeypatch.delenv(client.TOKEN_VARIABLE)
    options = {"reward": "clip", "url": server}
    if given:
        (tmp_path / "token").write_text(given + "\n")
        options["token_file"] = str(tmp_path / "token")
    with pytest.raises(ValueError, match="refuses: status 401 the bearer token is missing or wrong") as error:
        make_reward("http", options)
    assert TOKEN not in str(error.value) and (given is None or given not in str(error.value))


@pytest.mark.parametrize("url", ["http://here:99999", "http://here:0", "http://.foo:bar", "http://[::1"])
def test_an_address_that_cannot_be_is_refused(url):
    with pytest.raises(ValueError, match="^rewards.http: url: "):
        make_reward("http", {"reward": "clip", "url": url})


def test_a_token_file_is_read(server, monkeypatch, tmp_path):
    monkeypatch.delenv(client.TOKEN_VARIABLE)
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (str(tmp_path / "token"), "~/token", "$HOME/token"):
        assert make_reward("http", {"reward": "clip", "url": server, "token_file": file})
    with pytest.raises(ValueError, match="No such file"):
        make_reward("http", {"reward": "clip", "url": server, "token_file": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="token_file: cannot read /dev/zero: it is a device"):
        make_reward("http", {"reward": "clip", "url": server, "token_file": "/dev/zero"})


def test_what_the_server_cannot_judge_is_the_pictures_fault(server):
    """Refused with its own words, not retried; with `drop` only the image at fault is lost."""
    reward = make_reward("http", {"reward": "shapes_soft", "url": server})
    with pytest.raises(RewardError, match=r"rewards.http: ValueError: .*shapes_soft"):
        score("http", reward, torch.rand(2, 3, 16, 16), PROMPT[:2])
    dark = pictures()
    dark[2] *= 0.01
    reward = make_reward("http", {"reward": "nan_for_dark", "url": server, "precision": "float32"})
    with pytest.raises(RewardError, match="nan_for_dark: not finite for 1 images"):
        score("http", reward, dark, PROMPT)
    with pytest.warns(UserWarning, match="dropped 1 of 5"):
        scores = score("http", reward, dark, PROMPT, drop=True)
    assert scores.isnan().tolist() == [False, False, True, False, False]


def test_a_reward_that_breaks_on_the_server_is_tried_again_then_named(server):
    reward = make_reward("http", {"reward": "out_of_memory", "url": server, **FAST})
    with pytest.raises(RewardServerError, match=r"status 500 rewards.out_of_memory: .*out of memory .*; 3 attempts"):
        reward(pictures(), PROMPT)


def test_a_reward_that_is_not_served_is_told_at_the_start(server):
    with pytest.raises(ValueError, match="rewards.http: .* serves shapes_soft, clip, .*, not 'hps'"):
        make_reward("http", {"reward": "hps", "url": server})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "float8"}, "precision: 'float8'; allowed"),
        ({"timeout": 0}, "timeout: 0 is not allowed"),
        ({"timeout": float("nan")}, "timeout: nan is not allowed"),
        ({"retries": -1}, "retries: -1 is not allowed"),
        ({"batch": 0}, "batch: 0 is not allowed"),
        (
            {"token_variable": "HF_TOKEN"},
            "token_variable: 'HF_TOKEN' is sent to the server; only a variable whose name begins with EGRPO_",
        ),
        ({"token_variable": "egrpo_token"}, "token_variable: 'egrpo_token' "),
        ({"url": "ftp://x"}, "url: http://HOST:PORT"),
        ({"url": "http://me:secret@x"}, "url: http://HOST:PORT"),
        ({"color": 1}, "unexpected keyword argument 'color'"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(ValueError, match=told) as error:
        make_reward("http", {"reward": "clip", **options})
    assert "secret" not in str(error.value)


def answer(body, status=200):
    def respond(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def silent(handler):
    handler.connection.recv(1)  # until the client leaves


def drips(handler):
    """A byte now and then, for ever: no read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass


def drips_headers(handler):
    try:
        for byte in chain(b"HTTP/1.1 200 OK\r\nX-Header: ", repeat(ord("x"))):
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b"x" * 65536)
    except OSError:
        pass


def hangs_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


LIARS = {
    "too few": (answer(save({"scores": torch.zeros(4)})), r"scores of shape \(4,\), torch.float32, for 5 images"),
    "too many": (answer(save({"scores": torch.zeros(6)})), r"scores of shape \(6,\)"),
    "integers": (answer(save({"scores": torch.zeros(5, dtype=torch.int64)})), "torch.int64, for 5"),
    "nan": (answer(save({"scores": torch.tensor([0.0, torch.nan, 0, 0, 0])})), "scores that are not finite"),
    "infinite": (answer(save({"scores": torch.full((5,), torch.inf)})), "scores that are not finite"),
    "other name": (answer(save({"score": torch.zeros(5)})), "the answer holds no scores"),
    "garbage": (answer(b"\x80\x04pickled"), "the answer holds no scores"),
    "empty": (answer(b""), "the answer holds no scores"),
    "status 503": (answer(b'{"error": "busy"}', 503), "status 503 busy"),
    "status 302": (answer(b"", 302), "status 302"),
    "escapes": (answer(json.dumps({"error": "\x1b[2J\x07bad"}).encode(), 503), r"status 503 \\x1b\[2J\\x07bad"),
    "deep": (answer(b'{"error": ' + b"[" * 100_000, 503), "status 503"),
    "no body": (answer(b"", 204), "status 204"),
    "silent": (silent, "no answer within 0.2 s"),
    "drips": (drips, "no answer within 0.2 s"),
    "drips headers": (drips_headers, "no answer within 0.2 s"),
    "endless": (endless, "the answer has no end"),
    "hangs up": (hangs_up, "cannot be reached"),
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_lying_server_is_named_in_time(kind):
    """Honest about what it serves, then lies. As many attempts as asked for, though some lies never end."""
    respond, told = LIARS[kind]
    asked = []

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(json.dumps({"rewards": ["clip"]}).encode())(self)

        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            respond(self)

        def log_message(self, *arguments):
            pass

    liar = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    liar.daemon_threads, liar.block_on_close = True, False
    threading.Thread(target=liar.serve_forever, args=(0.01,), daemon=True).start()
    try:
        reward = HttpReward("clip", f"http://127.0.0.1:{liar.server_port}", **FAST)
        if "no answer" in told:
            reward._timeout = 0.2  # the honest first answer may take its time on a busy machine
        with pytest.raises(RewardServerError, match=f"{told}.*; 3 attempts"):
            reward(pictures(), PROMPT)
        assert len(asked) == 3 or ("no answer" in told and len(asked) < 3)
        assert all(len(unpack_request(body)[0]) == 5 for body in asked)
        # Under `drop` it is still the server's fault: no sample is given a score.
        reward._retries = 0
        with pytest.raises(RewardError, match=f"rewards.http: RewardServerError: .*{told}"):
            score("http", reward, pictures(), PROMPT, drop=True)
    finally:
        liar.shutdown()
        liar.server_close()


def test_a_lie_in_a_later_batch_leaves_no_score(server):
    """All of a call's images are scored, or none: what came before the lie is not handed on."""
    reward = make_reward("http", {"reward": "clip", "url": server, "batch": 2, **FAST})
    honest, calls = reward._send, []

    async def cuts_short(method, path, body):
        calls.append(path)
        reply = await honest(method, path, body)
        return reply if len(calls) == 1 else save({"scores": torch.zeros(1)})

    reward._send = cuts_short
    with pytest.raises(RewardServerError, match=r"scores of shape \(1,\), torch.float32, for 2 images; 3 attempts"):
        reward(pictures(), PROMPT)
    assert len(calls) == 1 + 3


def test_a_server_that_comes_back_is_forgiven(server):
    """Two refused connections, then an answer."""
    reward = make_reward("http", {"reward": "clip", "url": server, "backoff": 0.01, "precision": "float32"})
    honest, calls = reward._send, []

    async def flaky(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise client.httpx2.ConnectError("refused")
        return await honest(*arguments)

    reward._send = flaky
    assert torch.isfinite(reward(pictures(), PROMPT)).all() and len(calls) == 3


def test_an_unreachable_server_is_named_when_the_run_starts():
    with pytest.raises(ValueError, match="rewards.http: .*cannot be reached .*; 3 attempts"):
        make_reward("http", {"reward": "clip", "url": f"http://127.0.0.1:{free_port()}", **FAST})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"garbage", "not a request"),
        (save({"images": pictures()}), "not a request"),
        (save({"images": pictures(), "prompts": torch.zeros(3, dtype=torch.uint8)}), "not a request"),
        (pack_request(pictures(), PROMPT[:3]), "3 prompts for 5 images"),
        (pack_request(pictures()[:, :1], PROMPT), r"images of shape \(5, 1, 32, 32\)"),
        (pack_request(pictures()[:0], []), r"images of shape \(0, 3, 32, 32\)"),
        (pack_request(pictures() * 2, PROMPT), "not in \\[0, 1\\]"),
        (pack_request(pictures() * torch.nan, PROMPT), "not in \\[0, 1\\]"),
    ],
)
def test_a_request_that_is_none_is_told_so(server, body, told):
    with pytest.raises(ValueError, match=told):
        unpack_request(body)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = client.httpx2.post(f"{server}/score/clip", content=body, headers=headers, trust_env=False)
    assert reply.status_code == 422 and isinstance(reply.json()["error"], str)


# Before authentication


def connected(url, sent=b""):
    """A plain socket to the server, which has sent this."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=600)
    connection.sendall(sent)
    return connection


def head(token=TOKEN, length=10**8):
    fields = f"Host: x\r\nContent-Length: {length}\r\nAuthorization: Bearer {token}"
    return f"POST /score/clip HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def is_closed(connection):
    """Waits for the server to close it."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def ask(url):
    return make_reward("http", {"reward": "clip", "url": url, "retries": 0, "timeout": 60})(pictures(), PROMPT)


@pytest.mark.parametrize("sent", [b"", b"POST /score/clip HTTP/1.1\r\nHost: x\r\nX-Half: "], ids=["idle", "half open"])
def test_connections_without_a_request_keep_nobody_out(server, sent):
    """More of them than any limit, from the trainer's own address; the oldest make way."""
    crowd = [connected(server, sent) for _ in range(serve_rewards.MOST_WAITING_OF_ONE + 40)]
    try:
        assert torch.isfinite(ask(server)).all()
        assert all(is_closed(connection) for connection in crowd[:40])
    finally:
        for connection in crowd:
            connection.close()


def test_all_addresses_together_are_bounded(server, monkeypatch):
    monkeypatch.setattr(serve_rewards, "MOST_WAITING", 3)
    crowd = [connected(server) for _ in range(5)]
    assert is_closed(crowd[0]) and is_closed(crowd[1])
    assert torch.isfinite(ask(server)).all()


def test_a_head_that_never_ends_is_cut_off(server, monkeypatch):
    """Though a byte comes now and then; and after a whole request as before the first."""
    complete = serve_rewards._Bounded.on_response_complete

    def then_short(connection):  # the limit of the next head, not of the first
        monkeypatch.setattr(serve_rewards, "SLOWEST_HEAD", 0.1)
        complete(connection)

    monkeypatch.setattr(serve_rewards._Bounded, "on_response_complete", then_short)
    for first in (b"", f"GET /rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()):
        monkeypatch.setattr(serve_rewards, "SLOWEST_HEAD", 3600.0 if first else 0.1)
        connection = connected(server, first)
        if first:
            assert b"200 OK" in connection.recv(10_000)
        for byte in b"POST /score/clip HTTP/1.1\r\nX-Header: " + b"x" * 10_000:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the server was still listening")


def test_a_request_under_way_is_not_cut_off(server, monkeypatch):
    """Its body may take longer than a head may: the time of the head ends once the server has it."""
    ours, begin = [], serve_rewards._Bounded._begin_to_wait
    monkeypatch.setattr(
        serve_rewards._Bounded, "_begin_to_wait", lambda connection: ours.append(connection) or begin(connection)
    )
    body = pack_request(pictures(), PROMPT)
    connection = connected(server, head(length=len(body)))
    while not ours or ours[0].waits:
        time.sleep(0.01)
    ours[0].loop.call_soon_threadsafe(ours[0]._end_of_wait)
    connection.sendall(body)
    assert b"200 OK" in connection.recv(10_000)


def test_without_the_token_no_body_is_read(server):
    """The answer comes before a byte of it was sent."""
    for token in ("wrong", ""):
        connection = connected(server, head(token))
        assert b"401 Unauthorized" in connection.recv(10_000)


def test_places_are_for_those_with_the_token(server, monkeypatch):
    monkeypatch.setattr(serve_rewards, "MOST_AT_ONCE", 1)
    crowd = [connected(server, head("wrong")) for _ in range(5)]
    assert torch.isfinite(ask(server)).all()
    with connected(server, head()) as slow:  # a body under way takes the only place
        while True:
            with connected(server, head()) as other:
                other.settimeout(0.5)
                try:
                    answer = other.recv(10_000)
                    break
                except TimeoutError:  # the first one's head was not read yet
                    continue
        assert answer.startswith(b"HTTP/1.1 503 ")
        slow.close()
    for connection in crowd:
        connection.close()


def test_a_client_that_leaves_is_no_traceback(server, caplog):
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)  # uvicorn's loggers do not propagate
    connection = connected(server, head() + b"some")
    connection.close()
    assert torch.isfinite(ask(server)).all()
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.exc_info]


def test_serving_is_said_once_it_is_true(monkeypatch, capsys):
    """Not while the port is another's; nor are weights loaded for that."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--rewards", "clip={model: /nowhere}", "--port", str(port)]
        monkeypatch.setattr("sys.argv", ["egrpo", "serve-rewards", *arguments])
        with pytest.raises(SystemExit, match=f"error: --host 127.0.0.1 --port {port}: Address already in use"):
            cli.main()
    with pytest.raises(ValueError, match="--host nowhere.invalid --port 1: "):
        bind("nowhere.invalid", 1)
    assert "serving" not in capsys.readouterr().out
    with bind("127.0.0.1", 0) as listener:
        server = make_server(make_app({}, TOKEN), "serving nothing")
        server.should_exit = True  # as soon as it has begun
        server.run(sockets=[listener])
        assert capsys.readouterr().out == "serving nothing\n"


def test_nobody_outside_is_let_in_without_a_token():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.org")
    check_access("127.0.0.1", None)
    check_access("0.0.0.0", TOKEN)
    with pytest.raises(ValueError, match="--host 0.0.0.0: reachable from outside"):
        check_access("0.0.0.0", None)
    for weak in ("", "short", "with blanks in it, though long", "ünicode-ünicode-ünicode"):
        with pytest.raises(ValueError, match="token: 16 or more"):
            check_access("127.0.0.1", weak)


def test_the_command_tells_what_to_mend(monkeypatch):
    monkeypatch.delenv(client.TOKEN_VARIABLE)
    for arguments, told in (
        (["--rewards", "beauty"], "no reward 'beauty'"),
        (["--rewards", "shapes_soft", "--host", "0.0.0.0"], "reachable from outside"),
        (["--rewards", "shapes_soft", "shapes_soft"], "--rewards: one is named twice"),
        (["--rewards", "shapes_soft", "--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["--rewards", "shapes_soft", "--token-file", "/nowhere"], "--token-file: cannot read /nowhere"),
        (
            ["--rewards", "shapes_soft", "--token-file", "/dev/zero"],
            "--token-file: cannot read /dev/zero: it is a device",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["egrpo", "serve-rewards", *arguments])
        with pytest.raises(SystemExit, match=f"error: .*{told}"):
            cli.main()
