"""Scores from an `egrpo serve-rewards` process: for a model whose environment or memory clashes with the trainer's.

One request is a batch, `POST URL/score/REWARD`: safetensors of `images` (uint8, float16 or float32 [B, 3, H, W]) and
`prompts` (the bytes of a JSON list, uint8). The answer is safetensors of `scores`, float32 [B]. Nothing is pickled.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args
from urllib.parse import quote

import httpx2
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from egrpo_fast.files import expanded, read_text
from egrpo_fast.terminal import printable

TOKEN_VARIABLE = "EGRPO_REWARD_TOKEN"
TOKEN_VARIABLES = "EGRPO_"
"""How a variable must be called that is sent to a server: no recipe can ask for another secret of the environment."""
Precision = Literal["uint8", "float16", "float32"]
LONGEST_WAIT = 30.0
"""Seconds, between two attempts."""
LONGEST_REPLY = 1 << 20
UNFIT = 422
"""Status of images or prompts that the reward cannot judge: their fault, not the server's."""
REFUSALS = {400, 401, 403, 404, 413}
"""Statuses that the same request would meet again."""


class RewardServerError(OSError):
    """A reward server that cannot be reached, refuses, or does not answer as it should; the message says which."""


class _Unusable(Exception):
    """An answer that is none; the next may be one."""


def pack_request(images: Tensor, prompts: Sequence[str], precision: Precision = "float16") -> bytes:
    """images: [B, 3, H, W] float in [0, 1]. uint8 is exact for images of 8 bits, and rounds others to it."""
    images = images.mul(255).round() if precision == "uint8" else images
    spelled = torch.frombuffer(bytearray(json.dumps(list(prompts)).encode()), dtype=torch.uint8)
    return save({"images": images.to("cpu", getattr(torch, precision)).contiguous(), "prompts": spelled})


def unpack_request(body: bytes) -> tuple[Tensor, list[str]]:
    """Images as float32 in [0, 1], and prompts. ValueError names what is wrong."""
    try:
        tensors = load(body)
        images = tensors["images"]
        prompts = json.loads(bytes(tensors["prompts"].to(torch.uint8).numpy()))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"not a request: {' '.join(str(error).split())}") from None
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images of shape {tuple(images.shape)}; [B, 3, H, W] is expected")
    if str(images.dtype).removeprefix("torch.") not in get_args(Precision):
        raise ValueError(f"images of {images.dtype}; one of {', '.join(get_args(Precision))} is expected")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts: a list of texts is expected")
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if not bool(((images >= 0) & (images <= 1)).all()):  # NaN is in no range
        raise ValueError("images: not in [0, 1]")
    return images, prompts


class HttpReward:
    """A reward that another process computes.

    reward: its name there. token_file, or the environment variable named by token_variable (EGRPO_...): the bearer
    token; it is sent to `url` and nowhere else, proxies of the environment included. timeout: seconds of one attempt,
    from connecting to the last byte. retries: further attempts, after 0.5, 1, 2, ... seconds. batch: images of one
    request. precision: how images travel. RewardServerError, with nothing scored, where all attempts failed;
    ValueError where the server cannot judge these images.
    """

    sends_images = True
    parameters = staticmethod(lambda **options: 0)

    def __init__(
        self,
        reward: str,
        url: str = "http://127.0.0.1:8017",
        token_file: str | None = None,
        token_variable: str = TOKEN_VARIABLE,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 0.5,
        batch: int = 32,
        precision: Precision = "float16",
        device: torch.device | str = "cpu",
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision: {precision!r}; allowed: {', '.join(get_args(Precision))}")
        for name, value, least in (("timeout", timeout, 1e-3), ("retries", retries, 0), ("batch", batch, 1)):
            if not least <= value < float("inf"):
                raise ValueError(f"{name}: {value} is not allowed; at least {least:g}")
        if not token_variable.startswith(TOKEN_VARIABLES):
            message = f"is sent to the server; only a variable whose name begins with {TOKEN_VARIABLES} is allowed"
            raise ValueError(f"token_variable: {token_variable!r} {message}")
        try:
            address = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"url: {url!r}: {error}") from None
        if address.scheme not in ("http", "https") or not address.host or address.userinfo:
            raise ValueError("url: http://HOST:PORT or https://HOST:PORT is expected, without a user")
        if address.port is not None and not 1 <= address.port <= 65535:
            raise ValueError(f"url: {url!r}: a port is from 1 to 65535")
        self.url, self.reward = url.rstrip("/"), reward
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._batch, self._precision = batch, precision
        token = os.environ.get(token_variable, "")
        if token_file:
            try:
                token = read_text(expanded(token_file), 1 << 16).strip()
            except OSError as error:
                raise ValueError(f"token_file: cannot read {token_file}: {error.strerror}") from None
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = httpx2.create_ssl_context() if address.scheme == "https" else False
        # A wrong address, token or name is an error when the run starts, not after its first rollout.
        served = self._ask("GET", "rewards", None, self._read_names)
        if reward not in served:
            raise RewardServerError(f"{self.url} serves {', '.join(served) or 'nothing'}, not {reward!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(images), self._batch):
            some = slice(start, start + self._batch)
            body = pack_request(images[some], prompts[some], self._precision)
            count = len(images[some])
            path = f"score/{quote(self.reward)}"
            parts.append(self._ask("POST", path, body, lambda reply, count=count: _read_scores(reply, count)))
        return torch.cat(parts).to(images.device)

    @staticmethod
    def _read_names(reply: bytes) -> list[str]:
        try:
            names = json.loads(reply)["rewards"]
            return [printable(str(name)) for name in names]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Unusable("the answer is not that of a reward server") from None

    def _ask(self, method: str, path: str, body: bytes | None, read: Any) -> Any:
        """`read` of the answer; a bounded number of attempts, each of bounded length."""
        message = ""
        for attempt in range(1 + self._retries):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                # One deadline over all of it: timeouts per read never end with a server that sends byte after byte.
                return read(asyncio.run(asyncio.wait_for(self._send(method, path, body), self._timeout)))
            except TimeoutError:
                message = f"no answer within {self._timeout:g} s"
            except httpx2.TransportError as error:
                message = f"cannot be reached ({str(error) or type(error).__name__})"
            except _Unusable as error:
                message = str(error)
        raise RewardServerError(f"{self.url}: {message}; {1 + self._retries} attempts")

    async def _send(self, method: str, path: str, body: bytes | None) -> bytes:
        # trust_env: neither a proxy nor a .netrc of the environment has a part in this.
        client = httpx2.AsyncClient(timeout=self._timeout, trust_env=False, verify=self._tls, headers=self._headers)
        async with client, client.stream(method, f"{self.url}/{path}", content=body) as response:
            reply = b""
            async for chunk in response.aiter_raw():
                reply += chunk
                if len(reply) > LONGEST_REPLY:
                    raise _Unusable("the answer has no end")
        status = response.status_code
        if status == 200:
            return reply
        message = f"status {status} {_message(reply)}".strip()
        if status == UNFIT:
            raise ValueError(f"{self.url}: {_message(reply)}")
        if status in REFUSALS:
            raise RewardServerError(f"{self.url} refuses: {message}")
        raise _Unusable(message)


def _message(reply: bytes) -> str:
    try:
        return printable(" ".join(str(json.loads(reply)["error"]).split())[:300])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _read_scores(reply: bytes, count: int) -> Tensor:
    try:
        scores = load(reply)["scores"]
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        raise _Unusable("the answer holds no scores") from None
    if scores.shape != (count,) or scores.dtype != torch.float32:
        raise _Unusable(f"scores of shape {tuple(scores.shape)}, {scores.dtype}, for {count} images")
    if not bool(torch.isfinite(scores).all()):
        raise _Unusable("scores that are not finite")
    return scores


REWARD = HttpReward
