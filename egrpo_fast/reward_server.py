"""`egrpo serve-rewards`: any registered reward over HTTP, for the reward `http` (see `rewards/http.py`)."""

import asyncio
import hmac
import ipaddress
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

import torch
import uvicorn
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from egrpo_fast.config import Reward as RewardConfig
from egrpo_fast.rewards import Reward, RewardError, make_reward, score
from egrpo_fast.rewards.http import TOKEN_VARIABLE, UNFIT, unpack_request

LARGEST_BODY = 512 << 20
"""Bytes of a request: 32 pictures of 1024x1024 in float32 are 384 MiB."""
SLOWEST_BODY = 120.0
"""Seconds in which a request must have arrived."""
MOST_AT_ONCE = 64
"""Connections; further ones are told 503, and come back."""

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

    def guarded(handler: Handler) -> Handler:
        async def guard(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode()
            if expected is not None and not hmac.compare_digest(given, expected):
                return _refuse(401, "the bearer token is missing or wrong")
            return await handler(request)

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
                return _refuse(413, f"a request of more than {LARGEST_BODY >> 20} MiB; send fewer pictures at a time")
            scores = await run_in_threadpool(judge, name, body)
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
    """ValueError where pictures and scores would be open to a network."""
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("token: 16 or more ASCII characters without blanks are expected (openssl rand -hex 32)")
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host}: reachable from outside; set {TOKEN_VARIABLE} or --token-file first")


def serve(rewards: Sequence[RewardConfig], host: str, port: int, token: str | None, device: str, batch: int) -> None:
    """Load the rewards and answer until interrupted. ValueError for what the user must mend."""
    check_access(host, token)
    made: dict[str, Reward] = {reward.name: make_reward(reward.name, reward.options, device) for reward in rewards}
    if len(made) < len(rewards):
        raise ValueError("--rewards: one is named twice")
    print(f"serving {', '.join(made)} on http://{host}:{port} ({'with' if token else 'without'} a token)", flush=True)
    app = make_app(made, token, device, batch)
    uvicorn.run(app, host=host, port=port, limit_concurrency=MOST_AT_ONCE, log_level="warning")
