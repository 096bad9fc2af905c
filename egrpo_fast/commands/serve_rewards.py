"""`egrpo serve-rewards`: any registered reward over HTTP, for the reward `http` (see `rewards/http.py`)."""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

import torch
import uvicorn
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from egrpo_fast.config import RewardConfig
from egrpo_fast.rewards import Reward, RewardError, make_reward, score
from egrpo_fast.rewards.http import TOKEN_VARIABLE, UNFIT, unpack_request

LARGEST_BODY = 512 << 20
"""Bytes of a request: 32 images of 1024x1024 in float32 are 384 MiB."""
SLOWEST_BODY = 120.0
"""Seconds in which a request must have arrived."""
MOST_AT_ONCE = 64
"""Requests that carry the token; further ones get status 503, and come back."""
SLOWEST_HEAD = 10.0
"""Seconds in which a connection must bring the head of a request, its token included, or is closed."""
MOST_WAITING, MOST_WAITING_OF_ONE = 512, 32
"""Connections without a request, of all addresses and of one: a further one costs the oldest its place."""

log = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def make_app(
    rewards: Mapping[str, Reward], token: str | None, device: torch.device | str = "cpu", batch: int = 32
) -> Starlette:
    """The application. token: what `Authorization: Bearer` must carry; None: everyone is let in."""
    turn = threading.Lock()  # the rewards share one device, and need not be safe to enter twice
    expected = f"Bearer {token}".encode() if token else None
    busy = 0

    def guarded(handler: Handler) -> Handler:
        async def guard(request: Request) -> Response:
            """Nothing of a body is read, and no place taken, before the token is known to be right."""
            nonlocal busy
            given = request.headers.get("authorization", "").encode()
            if expected is not None and not hmac.compare_digest(given, expected):
                return _refuse(401, "the bearer token is missing or wrong")
            if busy >= MOST_AT_ONCE:
                return _refuse(503, f"{busy} requests are under way")
            busy += 1
            try:
                return await handler(request)
            finally:
                busy -= 1

        return guard

    def judge(name: str, body: bytes) -> Tensor:
        images, prompts = unpack_request(body)
        with turn:
            return torch.cat(
                [
                    score(name, rewards[name], images[start : start + batch].to(device), prompts[start : start + batch])
                    for start in range(0, len(images), batch)
                ]
            ).cpu()

    async def names(request: Request) -> Response:
        return JSONResponse({"rewards": list(rewards)})

    async def scored(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in rewards:
            return _refuse(404, f"no reward {name!r} here; there are: {', '.join(rewards)}")
        try:
            body = await asyncio.wait_for(_body(request), SLOWEST_BODY)
            if body is None:
                return _refuse(413, f"a request of more than {LARGEST_BODY >> 20} MiB; send fewer images at a time")
            scores = await run_in_threadpool(judge, name, body)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except TimeoutError:
            return _refuse(408, f"the request took more than {SLOWEST_BODY:g} s to arrive")
        except ValueError as error:
            if isinstance(error, RewardError) and not isinstance(error.__cause__, ValueError | None):
                log.error("%s", error, exc_info=error.__cause__)  # of the device or the network, say: try again
                return _refuse(500, str(error))
            return _refuse(UNFIT, str(error))
        return Response(save({"scores": scores.float().contiguous()}), media_type="application/octet-stream")

    return Starlette(
        routes=[
            Route("/rewards", guarded(names), methods=["GET"]),
            Route("/score/{name:path}", guarded(scored), methods=["POST"]),
        ]
    )


async def _body(request: Request) -> bytes | None:
    """All of it; None where it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            return None
    return bytes(body)


def check_access(host: str, token: str | None) -> None:
    """ValueError where images and scores would be open to a network."""
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("token: 16 or more ASCII characters without blanks are expected (openssl rand -hex 32)")
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host}: reachable from outside; set {TOKEN_VARIABLE} or --token-file first")


class _Bounded(H11Protocol):
    """uvicorn's HTTP, which gives a connection all the time in the world; here one without a request is soon closed."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()
        waiting = [one for one in self.connections if isinstance(one, _Bounded) and one.waits]
        of_one = [one for one in waiting if one._peer == self._peer]
        for crowd, most in ((of_one, MOST_WAITING_OF_ONE), (waiting, MOST_WAITING)):
            if len(crowd) > most:
                min(crowd, key=lambda one: one._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._clock:
            self._clock.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._begin_to_wait()
        super().on_response_complete()

    @property
    def waits(self) -> bool:
        """Whether no request is under way here."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    @property
    def _peer(self) -> str | None:
        return self.client[0] if self.client else None

    def _begin_to_wait(self) -> None:
        if self._clock:
            self._clock.cancel()
        self._since = self.loop.time()
        self._clock = self.loop.call_later(SLOWEST_HEAD, self._end_of_wait)

    def _end_of_wait(self) -> None:
        if self.waits:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Says where it serves, once it does."""

    message = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.message, flush=True)


def make_server(app: Starlette, message: str = "") -> uvicorn.Server:
    """The application behind uvicorn; `run(sockets=[...])` prints `message` and answers until interrupted."""
    server = _Server(
        uvicorn.Config(
            app, http=_Bounded, ws="none", lifespan="off", proxy_headers=False, server_header=False, log_level="warning"
        )
    )
    server.message = message
    return server


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not listening yet. ValueError where there is none to be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener


def serve(rewards: Sequence[RewardConfig], host: str, port: int, token: str | None, device: str, batch: int) -> None:
    """Load the rewards and answer until interrupted. ValueError for what the user must mend."""
    check_access(host, token)
    if len({reward.name for reward in rewards}) < len(rewards):
        raise ValueError("--rewards: one is named twice")
    with bind(host, port) as listener:  # an address that is taken is an error before minutes of loading
        made: dict[str, Reward] = {reward.name: make_reward(reward.name, reward.options, device) for reward in rewards}
        where = f"[{host}]" if ":" in host else host
        message = f"serving {', '.join(made)} on http://{where}:{port} ({'with' if token else 'without'} a token)"
        with contextlib.suppress(KeyboardInterrupt):
            make_server(make_app(made, token, device, batch), message).run(sockets=[listener])
