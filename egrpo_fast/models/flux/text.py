"""FLUX's two text encoders, apart from the rest of its pipeline: prompts to conditioning, live or from a cache."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.utils import logging

from egrpo_fast.config import Model
from egrpo_fast.files import fingerprint, read_bytes, read_json
from egrpo_fast.host_to_device import to_device
from egrpo_fast.models.weight_files import WeightFiles
from egrpo_fast.prompts.embeddings import EmbeddingCache

ENCODERS = {"text_encoder": "clip_text_model", "text_encoder_2": "t5"}
"""Subfolders, and the `model_type` their config names."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
WHOLE_TOKENIZER = "tokenizer.json"
"""The one file that a tokenizer needs, or it needs the others of its kind."""
SHOWN = 3
"""Prompts that an encoder truncates which are told in full."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts. t5: [P, tokens, width]; pooled: CLIP's [P, width]."""

    t5: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Truncation:
    """A prompt of more tokens than `encoder` (T5 or CLIP) is given; cut: the end of the prompt that it does not see."""

    prompt: str
    encoder: str
    tokens: int
    limit: int
    cut: str

    def __str__(self) -> str:
        prompt, cut = (textwrap.shorten(text, 100, placeholder=" ...") for text in (self.prompt, self.cut))
        return f"{self.encoder} sees {self.limit} of {self.tokens} tokens of {prompt!r}; cut: {cut!r}"


def _config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name / "config.json"
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"model.path: {folder} lacks {name}/config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {file} cannot be read: {error}") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != ENCODERS[name]:
        raise ValueError(f"model.path: {folder / name} holds a {found}; {ENCODERS[name]} is expected")
    return config


def _weights(folder: Path, name: str) -> WeightFiles:
    try:
        return WeightFiles(folder / name, "model")
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def text_widths(path: str | Path) -> tuple[int, int]:
    """(T5's, CLIP's pooled) width of a pipeline folder, by its configs. ValueError names what is wrong with it."""
    try:
        return int(_config(Path(path), "text_encoder_2")["d_model"]), int(
            _config(Path(path), "text_encoder")["hidden_size"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"model.path: a text encoder's config.json in {path} gives no width ({error})") from None


def encoder_fingerprint(
    path: str | Path, max_sequence_length: int = 512, quantization: str = "none", dtype: torch.dtype = torch.float32
) -> str:
    """SHA-256, in hex, over what decides the embeddings of a pipeline folder; loads no model, reads a few megabytes.

    Covered: the arguments after `path`; every byte of both encoders' `config.json` and of both tokenizer folders;
    `WeightFiles.samples` of both. Where the folder lies does not matter. ValueError names what is missing.
    """
    folder = Path(path)
    parts = [f"{max_sequence_length} {quantization} {dtype}".encode()]
    for name in TOKENIZERS:
        files = [file for file in sorted((folder / name).rglob("*")) if file.is_file() and file.name[0] != "."]
        if not files:
            raise ValueError(f"model.path: {folder} lacks {name}")
        for file in files:
            parts += [str(file.relative_to(folder)).encode(), read_bytes(file, 1 << 28)]
    for name in ENCODERS:
        _config(folder, name)
        weights = _weights(folder, name)
        parts += [name.encode(), read_bytes(folder / name / "config.json"), *weights.samples()]
    return fingerprint(parts)


def _quantized(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise ValueError(f"model.text_encoder_quantization: {quantization!r} is none of none, int8, nf4")


def _load(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """A frozen encoder. ValueError where the weights are not all of it."""
    _config(folder, name)
    _weights(folder, name)
    try:
        model, told = kind.from_pretrained(folder / name, output_loading_info=True, **options)
    except ImportError as error:
        raise ValueError(f"model.text_encoder_quantization: {error}; pip install bitsandbytes") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"model.path: {folder / name} could not be loaded: {' '.join(str(error).split())}") from None
    if absent := sorted(told["missing_keys"]):
        raise ValueError(f"model.path: {folder / name} lacks {len(absent)} weights of its encoder, first {absent[0]}")
    return model.requires_grad_(False).eval()


def _check_vocabulary(files: Mapping[str, str], folder: Path) -> None:
    """ValueError where a tokenizer's vocabulary is not in its folder. files: setting -> name.

    Without it transformers makes a tokenizer that knows no word, and says nothing; a file that the settings name, it
    may read from anywhere.
    """
    names = set(files.values()) - {WHOLE_TOKENIZER}
    if not (folder / WHOLE_TOKENIZER).is_file() and not all((folder / name).is_file() for name in names):
        raise ValueError(f"there is neither {WHOLE_TOKENIZER} nor {' and '.join(sorted(names))}")
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.exists() else {}
    for key, name in files.items():
        if settings.get(key) not in (None, name):
            raise ValueError(f"{config.name}: {key} is {settings[key]!r}; {name} in the same folder is expected")


def _tokenizer(kind: Any, folder: Path, name: str) -> Any:
    if not (folder / name).is_dir():
        raise ValueError(f"model.path: {folder} lacks {name}")
    try:
        _check_vocabulary(kind.vocab_files_names, folder / name)
        return kind.from_pretrained(folder / name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        told = " ".join(str(error).split())
        raise ValueError(f"model.path: {folder / name} could not be loaded: {told}") from None


class FluxTextEncoder:
    """Both encoders, frozen: prompts to Conditioning, with the numbers of `FluxPipeline.encode_prompt`."""

    def __init__(self, path: str | Path, clip: Any, t5: Any, clip_tokenizer: Any, t5_tokenizer: Any,
                 max_sequence_length: int, quantization: str, dtype: torch.dtype) -> None:  # fmt: skip
        self.path, self.max_sequence_length, self.quantization, self.dtype = (
            path,
            max_sequence_length,
            quantization,
            dtype,
        )
        self._clip, self._t5, self._clip_tokenizer, self._t5_tokenizer = clip, t5, clip_tokenizer, t5_tokenizer
        # A tokenizer that does not say how long prompts may be has 1e30 there.
        most = min(clip_tokenizer.model_max_length, clip.config.max_position_embeddings)
        self.limits = {"T5": max_sequence_length, "CLIP": most}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: str = "none",
    ) -> "FluxTextEncoder":
        """From a pipeline folder. quantization: of T5's weights, by bitsandbytes: none, int8, nf4.

        ValueError names what is missing, truncated or of another architecture.
        """
        folder, quantized = Path(path), _quantized(quantization, dtype)
        clip_tokenizer = _tokenizer(CLIPTokenizer, folder, "tokenizer")
        t5_tokenizer = _tokenizer(T5TokenizerFast, folder, "tokenizer_2")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            clip = _load(CLIPTextModel, folder, "text_encoder", dtype=dtype).to(device)
            if quantized is None:
                t5 = _load(T5EncoderModel, folder, "text_encoder_2", dtype=dtype).to(device)
            else:
                t5 = _load(T5EncoderModel, folder, "text_encoder_2", dtype=dtype, quantization_config=quantized,
                           device_map={"": device})  # fmt: skip
        finally:
            if shown:
                logging.enable_progress_bar()
        return cls(path, clip, t5, clip_tokenizer, t5_tokenizer, max_sequence_length, quantization, dtype)

    @cached_property
    def fingerprint(self) -> str:
        """`encoder_fingerprint` of what was loaded."""
        return encoder_fingerprint(self.path, self.max_sequence_length, self.quantization, self.dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One batch: T5 token embeddings and CLIP's pooled embedding of every prompt, in `dtype` on the device."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        t5_ids = self._t5_tokenizer(list(prompts), max_length=self.limits["T5"], **padded).input_ids
        clip_ids = self._clip_tokenizer(list(prompts), max_length=self.limits["CLIP"], **padded).input_ids
        t5 = self._t5(to_device(t5_ids, self._t5.device))[0]
        pooled = self._clip(to_device(clip_ids, self._clip.device)).pooler_output
        return Conditioning(t5.to(self.dtype), pooled.to(self.dtype))

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """What the encoders do not see, of prompts longer than `limits`."""
        found = []
        for (encoder, limit), tokenizer in zip(self.limits.items(), (self._t5_tokenizer, self._clip_tokenizer)):
            whole = tokenizer(list(prompts), return_offsets_mapping=True, verbose=False)["offset_mapping"]
            for prompt, offsets in zip(prompts, whole):
                if len(offsets) > limit:  # the last token kept is the end mark: the one in its place is the first cut
                    found.append(Truncation(prompt, encoder, len(offsets), limit, prompt[offsets[limit - 1][0] :]))
        return found


def tell_truncated(encoder: FluxTextEncoder, prompts: Iterable[str], field: str) -> None:
    """Print how many prompts are longer than each encoder reads, and what is cut off the first few. field: whose."""
    found: dict[str, list[Truncation]] = {name: [] for name in encoder.limits}
    count = dict.fromkeys(encoder.limits, 0)
    rest = iter(prompts)
    while batch := list(islice(rest, 1024)):
        for cut in encoder.truncated(batch):
            count[cut.encoder] += 1
            found[cut.encoder] += [cut] if count[cut.encoder] <= SHOWN else []
    for name, limit in encoder.limits.items():
        if count[name]:
            print(f"{field}: {count[name]:,} prompts are longer than {name}'s {limit} tokens, and are cut")
        for cut in found[name]:
            print(f"  {cut}")


class CachedText:
    """Conditioning from a folder of `egrpo encode`, in place of a FluxTextEncoder; loads no model."""

    def __init__(self, cache: EmbeddingCache, device: torch.device | str = "cpu") -> None:
        self.cache, self._device = cache, device

    @classmethod
    def open(
        cls,
        embeddings: str | Path,
        path: str | Path,
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: str = "none",
    ) -> "CachedText":
        """embeddings: the folder; the rest: of the encoder it stands for. ValueError if another made it."""
        cache = EmbeddingCache(embeddings)
        fingerprint = encoder_fingerprint(path, max_sequence_length, quantization, dtype)
        how = f"{path}, max_sequence_length {max_sequence_length}, dtype {str(dtype)[6:]}, quantization {quantization}"
        cache.check(fingerprint, *text_widths(path), max_sequence_length, how)
        return cls(cache, device)

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the folder, and would have been loaded."""
        return self.cache.fingerprint

    def require(self, prompts: Sequence[str], field: str = "prompts") -> None:
        """ValueError where a prompt is not in the folder: how many, and the first."""
        self.cache.require(prompts, field)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of these prompts, on the device."""
        t5, pooled = self.cache.encode(prompts)
        return Conditioning(to_device(t5, self._device), to_device(pooled, self._device))


def open_text(
    model: Model, embeddings: str | None, folder: Path, device: torch.device
) -> FluxTextEncoder | CachedText:  # fmt: skip
    """The text encoders of a pipeline folder, or the cache of what they gave (`prompts.embeddings`)."""
    which = folder, model.max_sequence_length, getattr(torch, model.dtype), device, model.text_encoder_quantization
    if embeddings is None:
        return FluxTextEncoder.from_pretrained(*which)
    return CachedText.open(embeddings, *which)
