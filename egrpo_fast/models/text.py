"""Text encoders by transformers, apart from their pipeline: prompts to conditioning, live or from a cache."""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from egrpo_fast.config import ModelConfig
from egrpo_fast.files import fingerprint, read_bytes, read_json
from egrpo_fast.host_to_device import to_device
from egrpo_fast.models.weight_files import WeightFiles
from egrpo_fast.prompts.embeddings import EmbeddingCache

Conditioning = Mapping[str, Tensor]
"""Encoded prompts: tensors [P, ...] by name. Which names there are, and what they hold, is the model family's.

Where prompts keep their lengths there are `text` [P, longest, C] and, unless all are as long, `mask` [P, longest],
True at the tokens of each.
"""

WHOLE_TOKENIZER = "tokenizer.json"
"""The one file that a tokenizer needs, or it needs the others of its kind."""
SHOWN = 3
"""Of the prompts that an encoder truncates, how many are shown."""


def filled_up(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts [n, C] of any lengths as `text` and `mask`, those that are shorter filled up with zeros."""
    lengths = [len(text) for text in texts]
    made = {"text": nn.utils.rnn.pad_sequence(list(texts), batch_first=True)}
    if len(set(lengths)) > 1:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        made["mask"] = to_device(mask, texts[0].device)
    return made


def _filled_up_to(conditioning: Conditioning, tokens: int) -> Conditioning:
    """The same with a `mask`, and room for so many tokens."""
    text = conditioning["text"]
    mask = conditioning.get("mask", torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
    more = tokens - text.shape[1]
    return {"text": nn.functional.pad(text, (0, 0, 0, more)), "mask": nn.functional.pad(mask, (0, more))}


def joined(*some: Conditioning) -> Conditioning:
    """The prompts of all, one after the other."""
    lengths = {one["text"].shape[1] for one in some if "text" in one}
    if len(lengths) > 1 or any("mask" in one for one in some):
        some = tuple(_filled_up_to(one, max(lengths)) for one in some)
    return {name: torch.cat([one[name] for one in some]) for name in some[0]}


class Text(Protocol):
    """What gives a model its conditioning: a TextEncoder, or what stands in for one."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of these prompts."""


@dataclass(frozen=True)
class Truncation:
    """A prompt of more tokens than `encoder` is given. cut: the end of the prompt that it does not see."""

    prompt: str
    encoder: str
    tokens: int
    limit: int
    cut: str

    def __str__(self) -> str:
        prompt, cut = (textwrap.shorten(text, 100, placeholder=" ...") for text in (self.prompt, self.cut))
        return f"{self.encoder} sees {self.limit} of {self.tokens} tokens of {prompt!r}; cut: {cut!r}"


class TextEncoder(ABC):
    """A family's text encoders, frozen. ValueError from all of it: a folder does not hold what is needed."""

    encoders: ClassVar[Mapping[str, str]]
    """Folders of the encoders, and the `model_type` that their config.json names."""
    tokenizers: ClassVar[tuple[str, ...]]
    """Folders of the tokenizers."""
    most_tokens: ClassVar[int] = 512
    """The largest `model.max_sequence_length`."""
    limits: Mapping[str, int]
    """Most tokens of a prompt that an encoder sees, by what people call the encoder."""
    _tokenizers: Mapping[str, Any]
    """By the same names."""
    room: int
    """Where prompts keep their lengths: of the longest that there can be."""

    @abstractmethod
    def __init__(self, folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> None:
        """Load the encoders of a pipeline folder."""

    @classmethod
    @abstractmethod
    def shapes(cls, folder: Path, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Of one prompt's conditioning, by the configs."""

    @classmethod
    @abstractmethod
    def weight_bytes(cls, folder: Path, model: ModelConfig) -> float:
        """What the weights will take on the device, by the configs."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One batch, in the model's dtype on the device."""

    def stored(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode`, of the same `shapes` whatever the prompts: what a cache keeps. The mask is in the dtype, too."""
        made = self.encode(prompts)
        if "text" not in made:
            return made
        made = _filled_up_to(made, self.room)
        return {"text": made["text"], "mask": made["mask"].to(made["text"].dtype)}

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """What the encoders do not see, of prompts longer than `limits`."""
        found = []
        for name, limit in self.limits.items():
            whole = self._tokenizers[name](list(prompts), return_offsets_mapping=True, verbose=False)["offset_mapping"]
            for prompt, offsets in zip(prompts, whole):
                if len(offsets) > limit:  # the last token kept is the end mark: the one in its place is the first cut
                    found.append(Truncation(prompt, name, len(offsets), limit, prompt[offsets[limit - 1][0] :]))
        return found

    def token_ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """By encoder, [P, limit], on the CPU: filled up, or cut."""
        return {
            name: tokenizer(
                list(prompts), max_length=self.limits[name], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            for name, tokenizer in self._tokenizers.items()
        }

    @classmethod
    def fingerprint(cls, folder: Path, model: ModelConfig | None = None) -> str:
        """SHA-256, in hex, over what decides the conditioning; loads no weights, reads a few megabytes.

        Covered: the settings of `model`; every byte of the encoders' `config.json` and of the tokenizer folders;
        `WeightFiles.samples` of the encoders. Where the folder lies does not matter. model: None: its defaults.
        """
        how = f"{model.max_sequence_length} {model.text_encoder_quantization} torch.{model.dtype}" if model else ""
        parts = [(how or "512 none torch.float32").encode()]
        for name in cls.tokenizers:
            files = [file for file in sorted((folder / name).rglob("*")) if file.is_file() and file.name[0] != "."]
            if not files:
                raise ValueError(f"model.path: {folder} lacks {name}")
            for file in files:
                parts += [str(file.relative_to(folder)).encode(), read_bytes(file, 1 << 28)]
        for name in cls.encoders:
            cls.config(folder, name)
            parts += [name.encode(), read_bytes(folder / name / "config.json"), *_weights(folder, name).samples()]
        return fingerprint(parts)

    @classmethod
    def config(cls, folder: Path, name: str) -> dict[str, Any]:
        """An encoder's config.json."""
        file = folder / name / "config.json"
        try:
            config = read_json(file)
        except FileNotFoundError:
            raise ValueError(f"model.path: {folder} lacks {name}/config.json") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"model.path: {file} cannot be read: {error}") from None
        found = config.get("model_type") if isinstance(config, dict) else None
        if found != cls.encoders[name]:
            raise ValueError(f"model.path: {folder / name} holds a {found}; {cls.encoders[name]} is expected")
        return config

    @classmethod
    def size(cls, folder: Path, name: str, key: str, section: str | None = None) -> int:
        """A number in an encoder's config.json, or in a section of it."""
        try:
            config = cls.config(folder, name)
            return int((config[section] if section else config)[key])
        except (KeyError, TypeError, ValueError) as error:
            message = f"{folder / name / 'config.json'} gives no {key} ({error})"
            raise ValueError(f"model.path: {message}") from None

    @classmethod
    def quantized_bytes(cls, encoder: Any, model: ModelConfig) -> float:
        """Of an encoder with `model.text_encoder_quantization`, which leaves embeddings and head as loaded."""
        itemsize = getattr(torch, model.dtype).itemsize
        bits = {"none": 8 * itemsize, "int8": 8, "nf4": 4.5}[model.text_encoder_quantization]
        ends = {layer.weight for layer in (encoder.get_input_embeddings(), encoder.get_output_embeddings()) if layer}
        whole = sum(weight.numel() for weight in ends)
        return whole * itemsize + (encoder.num_parameters() - whole) * bits / 8

    @classmethod
    def hollow(cls, kind: Any, folder: Path, name: str) -> Any:
        """An encoder, of transformers' class `kind`, without its weights, on the meta device."""
        with torch.device("meta"):
            return kind(kind.config_class(**cls.config(folder, name)))

    @classmethod
    def load(cls, kind: Any, folder: Path, name: str, model: ModelConfig, device: torch.device | str,
             quantized: bool = False) -> Any:  # fmt: skip
        """An encoder, of transformers' class `kind`. quantized: by `model.text_encoder_quantization`."""
        cls.config(folder, name)
        _weights(folder, name)
        dtype = getattr(torch, model.dtype)
        how = _quantization(model.text_encoder_quantization, dtype) if quantized else None
        options = {"quantization_config": how, "device_map": {"": device}} if how else {}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            encoder, report = kind.from_pretrained(folder / name, output_loading_info=True, dtype=dtype, **options)
        except ImportError as error:
            raise ValueError(f"model.text_encoder_quantization: {error}; pip install bitsandbytes") from None
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"model.path: {folder / name} could not be loaded: {' '.join(str(error).split())}"
            ) from None
        finally:
            if shown:
                logging.enable_progress_bar()
        if absent := sorted(report["missing_keys"]):
            raise ValueError(
                f"model.path: {folder / name} lacks {len(absent)} weights of its encoder, first {absent[0]}"
            )
        encoder = encoder.requires_grad_(False).eval()
        return encoder if how else encoder.to(device)


def _weights(folder: Path, name: str) -> WeightFiles:
    try:
        return WeightFiles(folder / name, "model")
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def _quantization(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def load_tokenizer(kind: Any, folder: Path, name: str) -> Any:
    """A tokenizer, of transformers' class `kind`, from its own folder alone. ValueError."""
    if not (folder / name).is_dir():
        raise ValueError(f"model.path: {folder} lacks {name}")
    try:
        # A processor is a tokenizer and more, and says nothing of files.
        _check_vocabulary(getattr(kind, "vocab_files_names", {"tokenizer_file": WHOLE_TOKENIZER}), folder / name)
        return kind.from_pretrained(folder / name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        message = " ".join(str(error).split())
        raise ValueError(f"model.path: {folder / name} could not be loaded: {message}") from None


def _check_vocabulary(files: Mapping[str, str], folder: Path) -> None:
    """ValueError where a tokenizer's vocabulary is not in its folder. files: setting -> name.

    Without it transformers makes a tokenizer that knows no word, and says nothing. A file that the settings name, it
    may read from anywhere.
    """
    names = set(files.values()) - {WHOLE_TOKENIZER}
    if not (folder / WHOLE_TOKENIZER).is_file() and not (names and all((folder / name).is_file() for name in names)):
        others = f"neither {WHOLE_TOKENIZER} nor {' and '.join(sorted(names))}" if names else f"no {WHOLE_TOKENIZER}"
        raise ValueError(f"there is {others}")
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.exists() else {}
    for key, name in files.items():
        if settings.get(key) not in (None, name):
            raise ValueError(f"{config.name}: {key} is {settings[key]!r}; {name} in the same folder is expected")


def tell_truncated(encoder: TextEncoder, prompts: Iterable[str], field: str) -> None:
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
    """Conditioning from a folder of `egrpo encode`, in place of a TextEncoder; loads no model."""

    def __init__(
        self, embeddings: str | Path, kind: type[TextEncoder], folder: Path, model: ModelConfig,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """embeddings: the folder. The rest: of the encoder that it stands for. ValueError: another one made it."""
        self.cache, self._device = EmbeddingCache(embeddings), device
        how = (
            f"{folder}, max_sequence_length {model.max_sequence_length}, dtype {model.dtype}, quantization "
            f"{model.text_encoder_quantization}"
        )
        self.cache.check(kind.fingerprint(folder, model), kind.shapes(folder, model), how)

    def require(self, prompts: Sequence[str], field: str = "prompts") -> None:
        """ValueError where a prompt is not in the folder: how many, and the first."""
        self.cache.require(prompts, field)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of these prompts, on the device."""
        rows = self.cache.encode(prompts)
        if "mask" in rows:  # in the cache all have room for the longest
            rows = filled_up([text[mask.bool()] for text, mask in zip(rows["text"], rows["mask"])])
        return {name: to_device(tensor, self._device) for name, tensor in rows.items()}


@dataclass(frozen=True)
class HollowText:
    """Conditioning of these shapes on the meta device, for counting."""

    shapes: Mapping[str, tuple[int, ...]]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Without values."""
        dtypes = {"mask": torch.bool}
        return {
            name: torch.empty(len(prompts), *shape, dtype=dtypes.get(name), device="meta")
            for name, shape in self.shapes.items()
        }
