"""A FLUX pipeline's folder, in diffusers' layout: found, checked, read; and LoRA files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor

from egrpo_fast.backbones.weight_files import WeightFiles, new_adapter
from egrpo_fast.config import Lora
from egrpo_fast.files import read_text

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
FILES = ("model_index.json", "README.md", "LICENSE*", *(f"{part}/*" for part in PARTS))
"""Of a hub repository: the pipeline, and what its licence is."""


def is_hub_id(path: str) -> bool:
    """Whether `path` is taken for a hub id, `owner/name`: it is no folder and does not look like one."""
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def resolve(path: str, field: str = "model.path") -> Path:
    """The local folder of a pipeline: `path` itself, or that of a hub id, downloaded if need be.

    ValueError, which begins with `field`.
    """
    if not is_hub_id(path):
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
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
        components = json.loads(read_text(index))
        found = components.get("_class_name") if isinstance(components, dict) else type(components).__name__
        if found != "FluxPipeline":
            raise ValueError(f"model.path: {path} holds a {found}; FluxPipeline is expected")
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise ValueError(f"model.path: {path} lacks {', '.join(missing)}")
        blocks = len(json.loads(read_text(folder / "vae" / "config.json"))["block_out_channels"])
        architecture = json.loads(read_text(folder / "transformer" / "config.json"))["_class_name"]
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


class TransformerWeights:
    """Where each parameter of a transformer from `meta_transformer` has its value: files, or a new or given adapter."""

    def __init__(self, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], lora: Lora | None, seed: int) -> None:
        self.files, self._shapes, self._seed = files, shapes, seed
        base = {self._in_file(name): shape for name, shape in shapes.items() if ".lora_" not in name}
        files.check(base)
        self._given = {} if lora is None or lora.path is None else _read_lora(lora, shapes)

    @staticmethod
    def _in_file(name: str) -> str:
        return name.replace(".base_layer.", ".")

    def __call__(self, name: str) -> Tensor:
        """The value of one parameter, on the CPU."""
        if ".lora_" not in name:
            return self.files.read(self._in_file(name))
        return self._given[name] if self._given else new_adapter(name, self._shapes[name], self._seed)


def meta_transformer(
    folder: Path, lora: Lora | None = None, seed: int = 0
) -> tuple[FluxTransformer2DModel, TransformerWeights]:
    """The transformer of a pipeline folder without its weights (on the meta device), and where they are.

    lora: adapters are added and alone need gradients. ValueError where files and architecture do not match.
    """
    try:
        settings = json.loads(read_text(folder / "transformer" / "config.json"))
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'transformer' / 'config.json'} describes no transformer: {error!r}") from None
    if lora is not None:
        transformer.requires_grad_(False)
        try:
            transformer.add_adapter(
                LoraConfig(
                    r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, init_lora_weights=False
                )
            )
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    return transformer, TransformerWeights(WeightFiles(folder / "transformer"), shapes, lora, seed)


def _adapter_key(name: str) -> str:
    """A parameter's name in a LoRA file, as diffusers writes it."""
    return "transformer." + name.replace(".default.", ".")


def _read_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    assert lora.path is not None
    if not Path(lora.path).exists():
        raise ValueError(f"model.lora.path: no file or folder {lora.path}")
    try:
        given, metadata = FluxPipeline.lora_state_dict(
            lora.path, local_files_only=True, use_safetensors=True, return_lora_metadata=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.lora.path: {lora.path} cannot be read: {' '.join(str(error).split())}") from None
    given = {name: value for name, value in given.items() if ".lora_" in name}
    names = {_adapter_key(name): name for name in shapes if ".lora_" in name}
    ranks = {value.shape[0] for name, value in given.items() if ".lora_A." in name}
    if ranks and ranks != {lora.rank}:
        raise ValueError(
            f"model.lora.rank: {lora.rank}, but {lora.path} is of rank {', '.join(map(str, sorted(ranks)))}"
        )
    alpha = (metadata or {}).get("transformer.lora_alpha", lora.alpha)
    if alpha != lora.alpha:
        raise ValueError(f"model.lora.alpha: {lora.alpha}, but {lora.path} was made with {alpha}")
    if given.keys() != names.keys():
        other = min(given.keys() ^ names.keys())
        raise ValueError(f"model.lora.target_modules: not the layers that {lora.path} adapts ({other}, ...)")
    for key, name in names.items():
        if tuple(given[key].shape) != shapes[name]:
            raise ValueError(f"model.lora.path: {key} is {tuple(given[key].shape)}, this transformer's {shapes[name]}")
    return {name: given[key] for key, name in names.items()}


def lora_layers(field: str, path: str, transformer: FluxTransformer2DModel) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A LoRA of any rank in a layout that diffusers reads: layer -> A [r, in], B [out, r] and scale [], in float32.

    ValueError, which begins with `field`: it cannot be read, changes more than a transformer's linear layers, or is of
    another architecture.
    """
    if not Path(path).exists():
        raise ValueError(f"{field}: no file or folder {path}")
    try:
        given, alphas, metadata = FluxPipeline.lora_state_dict(
            path, local_files_only=True, use_safetensors=True, return_alphas=True, return_lora_metadata=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{field}: {path} cannot be read: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    adapters = [key for key in given if key.startswith("transformer.") and (".lora_A." in key or ".lora_B." in key)]
    if more := sorted(given.keys() - set(adapters)):
        raise ValueError(f"{field}: {path} changes more than linear layers of the transformer ({more[0]}, ...)")
    found = {}
    for key in filter(lambda key: ".lora_A." in key, adapters):
        down = given[key]
        layer, up = key.removeprefix("transformer.").partition(".lora_A.")[0], given.get(key.replace("_A.", "_B."))
        if up is None or shapes.get(f"{layer}.weight") != (len(up), down.shape[-1]):
            raise ValueError(f"{field}: {path} is for another architecture ({layer})")
        alpha = (alphas or {}).get(f"transformer.{layer}.alpha", (metadata or {}).get("transformer.lora_alpha"))
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        found[layer] = (down.float(), up.float(), torch.tensor(scale))
    if not found:
        raise ValueError(f"{field}: {path} holds no adapters of a transformer")
    return found


def save_lora(folder: Path, adapters: Mapping[str, Tensor], lora: Lora) -> None:
    """`pytorch_lora_weights.safetensors`, for `FluxPipeline.load_lora_weights(folder)`. adapters: by parameter name."""
    layers = {_adapter_key(name).removeprefix("transformer."): value for name, value in adapters.items()}
    # Beside the tensors: a loader takes alpha for the rank where it is not told.
    metadata = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.target_modules}
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


def check_decoder(folder: str, pipeline: Path) -> None:
    """ValueError, before any weight is read, where this is no tiny decoder of the pipeline's latents."""
    try:
        theirs, ours = (json.loads(read_text(at / "config.json")) for at in (Path(folder), pipeline / "vae"))
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
