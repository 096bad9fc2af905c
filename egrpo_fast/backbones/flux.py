"""FLUX, the room that knows diffusers' FLUX: find and check a folder, build the transformer, velocity, decode."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from egrpo_fast.backbones.flux_text import Conditioning, FluxTextEncoder
from egrpo_fast.backbones.weight_files import WeightFiles, new_adapter
from egrpo_fast.config import Config, FirstBlock, Lora, Model, TailCache

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into one token."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
FILES = ("model_index.json", "README.md", "LICENSE*", *(f"{part}/*" for part in PARTS))
"""Of a hub repository: the pipeline, and what its licence is."""

ATTENTION = {"cudnn": "_native_cudnn", "efficient": "_native_efficient", "flash_3_hub": "_flash_3_hub"}
"""Names of `model.attention` that diffusers spells otherwise."""


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
        components = json.loads(index.read_text())
        found = components.get("_class_name") if isinstance(components, dict) else type(components).__name__
        if found != "FluxPipeline":
            raise ValueError(f"model.path: {path} holds a {found}; FluxPipeline is expected")
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise ValueError(f"model.path: {path} lacks {', '.join(missing)}")
        blocks = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
        architecture = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
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
        settings = json.loads((folder / "transformer" / "config.json").read_text())
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


def check_attention(name: str) -> None:
    """ValueError where that `model.attention` cannot run here, by what is installed."""
    if name == "native":
        return
    try:
        _check_attention_backend_requirements(AttentionBackendName(ATTENTION.get(name, name)))
    except RuntimeError as error:
        raise ValueError(f"model.attention: {name} is not installed: {' '.join(str(error).split())}") from None
    if not torch.cuda.is_available():
        raise ValueError(f"model.attention: {name} needs a CUDA device; allowed here: native")


def use_arithmetic(model: Model) -> None:
    """What float32 products may round to on a GPU (`model.tf32`), for this process."""
    torch.set_float32_matmul_precision("high" if model.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = model.tf32


def use_attention(transformer: FluxTransformer2DModel, name: str) -> None:
    """Have every attention layer computed by that `model.attention`."""
    if name != "native":
        transformer.set_attention_backend(ATTENTION.get(name, name))


def use_same_attention(transformer: FluxTransformer2DModel, as_in: FluxTransformer2DModel) -> None:
    """Have every attention layer of one computed as those of another are."""
    (chosen,) = {processor._attention_backend for processor in as_in.attn_processors.values()}
    for processor in transformer.attn_processors.values():
        processor._attention_backend = chosen


class CompiledFlux(FluxTransformer2DModel):
    """A transformer whose repeated blocks are compiled, once for any number of rows; for forwards without gradient."""

    @classmethod
    def of(cls, transformer: FluxTransformer2DModel, backend: str = "inductor") -> "CompiledFlux":
        """One of the same parameters, adapters and attention, on the meta device: weights are lent to it.

        backend: torch.compile's.
        """
        with torch.device("meta"):
            made = cls.from_config(transformer.config)
        for adapter in getattr(transformer, "peft_config", {}).values():
            made.add_adapter(adapter)
        use_same_attention(made, transformer)
        for block in (*made.transformer_blocks, *made.single_transformer_blocks):
            block._compiled_call_impl = partial(_any_rows, torch.compile(block._call_impl, backend=backend))
        return made.requires_grad_(False).eval()

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """A lone row is computed twice: the compiler takes 1 for a number of its own, and would compile for it.

        Of one prompt or of several, the modulation is of one row or of all: that makes two graphs of a block.
        """
        rows = len(inputs["hidden_states"])
        if rows == 1:
            inputs |= {name: inputs[name].expand(2, -1, -1) for name in ("hidden_states", "encoder_hidden_states")}
        return (super().forward(**inputs)[0][:rows],)


def _any_rows(block: Callable[..., Any], **inputs: Any) -> Any:
    """One call of a compiled block, whose inputs [rows, ...] may have another number of rows next time."""
    for name in ("hidden_states", "encoder_hidden_states", "temb"):
        if len(inputs[name]) > 1:
            torch._dynamo.mark_dynamic(inputs[name], 0)
    return block(**inputs)


def check_cache(settings: TailCache, transformer: FluxTransformer2DModel) -> None:
    """ValueError where that `tail.cache` cannot serve this transformer."""
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    if isinstance(settings, FirstBlock) and blocks < 2:
        raise ValueError(f"tail.cache: first_block needs a transformer of two blocks or more, this one has {blocks}")


class FluxCache:
    """diffusers' caching hooks on a transformer, with a state for every sequence of calls (`rollout.Cache`).

    asked, computed: evaluations of a block for a row since it was made, wanted and really done.
    """

    def __init__(self, settings: TailCache, transformer: FluxTransformer2DModel, dtype: torch.dtype) -> None:
        """dtype: of what is kept."""
        self._transformer, self.asked, self.computed = transformer, 0, 0
        if isinstance(settings, FirstBlock):
            transformer.enable_cache(FirstBlockCacheConfig(threshold=settings.threshold))
        else:
            # Lite: full mode keeps what every attention layer gave, 1.8 GB for a row of FLUX.1-dev at 720x720.
            transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=settings.interval, disable_cache_before_step=settings.warm_up,
                    max_order=settings.order, taylor_factors_dtype=dtype, use_lite_mode=True,
                )
            )  # fmt: skip
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.register_forward_pre_hook(self._ask, with_kwargs=True)
            next(block.children()).register_forward_pre_hook(self._compute)

    def sequence(self, family: int, chunk: int) -> AbstractContextManager[None]:
        return self._transformer.cache_context(f"{family}.{chunk}")

    def forget(self) -> None:
        self._transformer._reset_stateful_cache()

    def _ask(self, block: nn.Module, inputs: tuple[()], named: Mapping[str, Tensor]) -> None:
        self.asked += len(named["hidden_states"])

    def _compute(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The first thing inside a block, so it runs where the block is not skipped."""
        self.computed += len(inputs[0])


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

    ValueError, which begins with `field`: it cannot be read, or is of another architecture.
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
    found = {}
    for key, down in given.items():
        if ".lora_A." not in key:
            continue
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


class Text(Protocol):
    """What turns prompts into what the transformer reads: the text encoders, or a cache of what they gave."""

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...


class FluxBackbone:
    """A FLUX pipeline taken apart into what training needs.

    height, width: of the pictures, in pixels. guidance: for a transformer with guidance embedding, ignored by others.
    decode_batch: pictures that `decode` takes at a time. VAE and text encoders are whole, frozen and on the device.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        text: Text,
        height: int,
        width: int,
        guidance: float,
        decode_batch: int,
    ) -> None:
        self.transformer, self._text = transformer, text
        self._vae = vae.requires_grad_(False).eval()
        self._tiny: AutoencoderTiny | None = None
        self.guidance, self.height, self.width, self.decode_batch = guidance, height, width, decode_batch
        self._scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._rows, self._columns = (size // (self._scale_factor * LATENT_PATCH) for size in (height, width))
        self._image_ids = FluxPipeline._prepare_latent_image_ids(
            1, self._rows, self._columns, vae.device, torch.float32
        )

    @classmethod
    def of(
        cls, config: Config, folder: Path, transformer: FluxTransformer2DModel, text: Text, device: torch.device
    ) -> "FluxBackbone":
        """A run's own, around its transformer: the pipeline folder's VAE, and the decoder of its tail."""
        model = config.model
        vae = load_vae(folder, getattr(torch, model.dtype), device)
        if model.vae_tiling:  # tile by tile, where a picture is larger than the VAE's own tile size
            vae.enable_tiling()
        backbone = cls(transformer, vae, text, model.height, model.width, model.guidance, model.decode_batch)
        if config.tail.decoder is not None:
            backbone.use_tiny_decoder(config.tail.decoder)
        return backbone

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        height: int,
        width: int,
        guidance: float = 3.5,
        max_sequence_length: int = 512,
        decode_batch: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "FluxBackbone":
        """Any diffusers FLUX folder or hub id, whole, on one device. ValueError where it cannot be loaded."""
        check_folder(path, height, width)
        folder = resolve(path)
        check_folder(str(folder), height, width)
        text = FluxTextEncoder.from_pretrained(str(folder), max_sequence_length, dtype, device)
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
        vae = load_vae(folder, dtype, device)
        return cls(transformer.to(device), vae, text, height, width, guidance, decode_batch)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of one packed picture."""
        return self._rows * self._columns, self.transformer.config.in_channels

    @property
    def device(self) -> torch.device:
        return self._vae.device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5 token embeddings and CLIP's pooled embedding of every prompt."""
        return self._text.encode(prompts)

    def velocity(
        self, module: Callable[..., tuple[Tensor]], latents: Tensor, t: float, conditioning: Conditioning, rows: Tensor
    ) -> Tensor:
        """The model's velocity `v = x_1 - x_0` at time t in [0, 1].

        module: the transformer, or the engine that wraps it. latents [R, L, C]; rows int64 [R]: prompt of each row.
        Returns [R, L, C] in the model's dtype.
        """
        text = conditioning.t5[rows]
        # Time, guidance and pooled text modulate every block: where all rows have the same, it is computed once.
        alike = len(conditioning.pooled) == 1
        pooled = conditioning.pooled if alike else conditioning.pooled[rows]
        count = len(pooled)
        dtype = text.dtype
        guided = self.transformer.config.guidance_embeds
        return module(
            hidden_states=latents.to(dtype),
            # As the pipeline passes it: rounded to the model's dtype on the scale of 1,000, not of 1.
            timestep=torch.full((count,), t * 1000, dtype=dtype, device=latents.device) / 1000,
            guidance=torch.full((count,), self.guidance, device=latents.device) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def use_tiny_decoder(self, folder: str) -> None:
        """Have `decode` with `tiny` use diffusers' AutoencoderTiny in a folder, such as TAEF1. ValueError."""
        try:
            tiny = AutoencoderTiny.from_pretrained(folder, torch_dtype=self._vae.dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"tail.decoder: {folder} could not be loaded: {' '.join(str(error).split())}") from None
        self._tiny = tiny.requires_grad_(False).eval().to(self._vae.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], of packed latents [B, L, C]; tiny: by that decoder, where given."""
        vae = self._tiny if tiny and self._tiny is not None else self._vae
        pictures = []
        for chunk in latents.split(self.decode_batch):
            unpacked = FluxPipeline._unpack_latents(chunk, self.height, self.width, self._scale_factor)
            scaled = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            pictures.append(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
        return torch.cat(pictures).float().div(2).add(0.5).clamp(0, 1)


def check_decoder(folder: str, pipeline: Path) -> None:
    """ValueError, before any weight is read, where this is no tiny decoder of the pipeline's latents."""
    try:
        theirs, ours = (json.loads((at / "config.json").read_text()) for at in (Path(folder), pipeline / "vae"))
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
