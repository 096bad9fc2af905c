"""A FLUX pipeline's folder, in diffusers' layout: found, checked, read."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig
from torch import Tensor, nn

from egrpo_fast.config import Lora
from egrpo_fast.files import is_hub_id, read_json
from egrpo_fast.models.lora import Adapter, follow_lora, linear_layers, read_lora
from egrpo_fast.models.weight_files import WeightFiles, fused, new_adapter

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
STEMS = {
    "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
"""Parts with weights -> how the names of their weight files begin."""
CARD = ("README.md", "LICENSE*")
"""Of a hub repository, what its licence is."""


def hub_files(parts: Sequence[str] = PARTS) -> list[str]:
    """Of a hub repository, what is read of a pipeline's parts: patterns of names.

    The same as diffusers downloads: no weights in another format or precision beside them, no model card.
    """
    found = ["model_index.json"]
    for part in parts:
        if stem := STEMS.get(part):
            numbers = "-?????-of-?????"
            weights = (f"{stem}.safetensors", f"{stem}{numbers}.safetensors", f"{stem}.safetensors.index.json")
            found += [f"{part}/{name}" for name in ("config.json", *weights)]
        else:
            found.append(f"{part}/*")
    return found


def resolve(path: str, field: str = "model.path", parts: Sequence[str] = PARTS) -> Path:
    """The local folder of a pipeline: `path` itself, or that of a hub id, whose parts are downloaded if need be.

    ValueError, which begins with `field`.
    """
    if not is_hub_id(path):
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=hub_files(parts)))
    except GatedRepoError:
        raise ValueError(
            f"{field}: {path} is gated: accept its licence at https://huggingface.co/{path} and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{field}: there is neither a folder nor a hub repository {path}") from None
    except (OSError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{field}: {path} is no folder here and could not be downloaded; without a network, give the path of a "
            f"folder that holds it ({told})"
        ) from None


def fetch_card(path: str) -> None:
    """Put the model card and the licence of a hub id into the folder that `resolve` gives, if the hub can be asked."""
    if is_hub_id(path):
        with suppress(OSError, ValueError, RuntimeError):
            snapshot_download(path, allow_patterns=list(CARD))


def check_folder(path: str, height: int, width: int) -> None:
    """ValueError, before any weight is read, where a local folder is no FLUX pipeline or the picture size does not fit.

    A hub id is looked at once it is downloaded (`resolve`).
    """
    if is_hub_id(path):
        return
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"model.path: no folder {path}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model.path: {path} has no model_index.json; a diffusers FLUX pipeline folder is expected")
    try:
        components = read_json(index)
        found = components.get("_class_name") if isinstance(components, dict) else type(components).__name__
        if found != "FluxPipeline":
            raise ValueError(f"model.path: {path} holds a {found}; FluxPipeline is expected")
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise ValueError(f"model.path: {path} lacks {', '.join(missing)}")
        blocks = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
        architecture = read_json(folder / "transformer" / "config.json")["_class_name"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"model.path: {path} cannot be read as a FLUX pipeline: {error!r}") from None
    if architecture != "FluxTransformer2DModel":
        raise ValueError(f"model.path: the transformer of {path} is a {architecture}, not a FluxTransformer2DModel")
    factor = LATENT_PATCH * 2 ** (blocks - 1)
    for name, size in (("height", height), ("width", width)):
        if size % factor:
            raise ValueError(f"model.{name}: {size} is not a multiple of {factor}")
    try:
        meta_transformer(folder)[1].files.close()
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def check_lora(lora: Lora | None, path: str) -> None:
    """ValueError, before any weight is read, where adapters do not fit the transformer of a pipeline folder.

    A hub id is looked at once it is downloaded.
    """
    if lora is not None and not is_hub_id(path):
        meta_transformer(Path(path), lora)[1].files.close()


class TransformerWeights:
    """Where each parameter of a transformer from `meta_transformer` has its value: files, or a new or given adapter."""

    def __init__(
        self, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], lora: Lora | None,
        given: Mapping[str, Adapter], seed: int,
    ) -> None:  # fmt: skip
        """lora: what was adapted. given: adapters by layer; none: new ones."""
        self.files, self.lora, self._shapes, self._given, self._seed = files, lora, shapes, given, seed
        files.check({self._in_file(name): shape for name, shape in shapes.items() if ".lora_" not in name})

    @staticmethod
    def _in_file(name: str) -> str:
        return name.replace(".base_layer.", ".")

    def __call__(self, name: str) -> Tensor:
        """The value of one parameter, on the CPU."""
        if ".lora_" not in name:
            return self.files.read(self._in_file(name))
        if not self._given:
            return new_adapter(name, self._shapes[name], self._seed)
        layer, _, which = name.partition(".lora_")
        return self._given[layer].down if which.startswith("A.") else self._given[layer].up


def meta_transformer(
    folder: Path, lora: Lora | None = None, seed: int = 0
) -> tuple[FluxTransformer2DModel, TransformerWeights]:
    """The transformer of a pipeline folder without its weights (on the meta device), and where they are.

    lora: adapters are added and alone need gradients; it follows the file that it names. ValueError where files and
    architecture do not match.
    """
    try:
        settings = read_json(folder / "transformer" / "config.json")
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'transformer' / 'config.json'} describes no transformer: {error!r}") from None
    given: Mapping[str, Adapter] = {}
    if lora is not None:
        lora, given = follow_lora(lora, settings)
        lora.layers(linear_layers(transformer))  # says which entry takes nothing, as peft does not
        transformer.requires_grad_(False)
        made = LoraConfig(r=lora.rank, target_modules=lora.target_modules, init_lora_weights=False)
        made.lora_alpha = lora.alpha  # type: ignore[assignment]  # peft says int, and only divides it
        try:
            transformer.add_adapter(made)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    return transformer, TransformerWeights(WeightFiles(folder / "transformer"), shapes, lora, given, seed)


def fill(transformer: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a transformer from `meta_transformer` its parameters, one after the other."""
    for name, hollow in list(transformer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(read(name).to(device, dtype), hollow.requires_grad)
        setattr(transformer.get_submodule(owner), leaf, value)


def load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device | str, lora: str | None = None
) -> FluxTransformer2DModel:
    """The transformer of a pipeline folder, whole. lora: adapters to add to its weights.

    A weight and its adapters are added in float32 and rounded to the dtype of the file, as `egrpo export --fuse` does.
    ValueError: the adapters cannot be read or are for another architecture.
    """
    transformer, weights = meta_transformer(folder)
    adapters = read_lora("models", lora, transformer.config) if lora is not None else {}

    def read(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        value = weights(name)
        return fused(value, *adapters[layer]) if leaf == "weight" and layer in adapters else value

    fill(transformer, read, dtype, device)
    weights.files.close()
    return transformer.eval()


def check_decoder(folder: str, pipeline: Path) -> None:
    """ValueError, before any weight is read, where this is no tiny decoder of the pipeline's latents."""
    try:
        theirs, ours = (read_json(at / "config.json") for at in (Path(folder), pipeline / "vae"))
        WeightFiles(folder)
        if theirs["_class_name"] != "AutoencoderTiny":
            raise ValueError(f"it is a {theirs['_class_name']}; AutoencoderTiny is expected")
        factor = 2 ** (len(theirs["decoder_block_out_channels"]) - 1)
        for name, value, wanted in (
            ("latent channels", theirs["latent_channels"], ours["latent_channels"]),
            ("picture pixels per latent", factor, 2 ** (len(ours["block_out_channels"]) - 1)),
        ):
            if value != wanted:
                raise ValueError(f"{value} {name}, that of model.path has {wanted}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tail.decoder: {folder} cannot be used: {' '.join(str(error).split())}") from None


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The picture decoder of a pipeline folder. ValueError where it cannot be loaded."""
    try:
        WeightFiles(folder / "vae")  # says which file is missing or truncated, as diffusers does not
        vae, told = AutoencoderKL.from_pretrained(
            folder / "vae", torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if absent := sorted(told["missing_keys"]):
            raise ValueError(f"it lacks {len(absent)} weights, first {absent[0]}")
        return vae.to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.path: {folder / 'vae'} could not be loaded: {' '.join(str(error).split())}") from None
