"""How large a pipeline is: parameters, FLOPs, bytes. Counted on the meta device by its configs, without its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from egrpo_fast.config import LoraConfig, ModelConfig
from egrpo_fast.models.folder import configs_of, family_of
from egrpo_fast.models.lora import follow_lora, linear_layers
from egrpo_fast.models.quantization import quantized_bytes
from egrpo_fast.models.transformer import hollow_transformer
from egrpo_fast.shapes import pipeline_path


@dataclass(frozen=True)
class Quantized:
    """Of quantized weights: how many, their bytes, those of their scales, and how many the largest layer has."""

    parameters: int
    weights: int
    scales: int
    largest: int


class Sizes:
    """Of the pipeline that `model.path` names, drawing images of the size that the settings ask for.

    ValueError: the path is no pipeline's, or its family makes no such images.
    """

    def __init__(self, model: ModelConfig) -> None:
        folder = configs_of(pipeline_path(model.path))
        self.family = family_of(folder)
        self.transformer = hollow_transformer(folder)
        try:
            self.family.check(folder, model)
            self.backbone = self.family.hollow(self.transformer, folder, model)
        except (OSError, KeyError, TypeError, AttributeError) as error:
            name = self.family.pipeline.__name__
            raise ValueError(f"model.path: {folder} cannot be read as a {name}: {error!r}") from None
        itemsize = getattr(torch, model.dtype).itemsize
        self.activations, self.frozen = self.backbone.activations(itemsize), self.family.frozen_bytes(folder, model)
        self.parameters = sum(parameter.numel() for parameter in self.transformer.parameters())

    def adapters(self, lora: LoraConfig | None) -> int:
        """Parameters of the adapters: `sum rank (inputs + outputs)` over the layers that get one. ValueError."""
        if lora is None:
            return 0
        lora = self.followed(lora)
        layers = linear_layers(self.transformer)
        found = {name for names in lora.layers(layers).values() for name in names}
        chosen = (self.transformer.get_submodule(name) for name in found)
        return sum(lora.rank * (layer.in_features + layer.out_features) for layer in chosen)

    def quantized(self, quantization: str) -> Quantized:
        """What is kept in fewer bits with `model.quantization`: the weights of all linear layers."""
        layers = (module for module in self.transformer.modules() if isinstance(module, torch.nn.Linear))
        shapes = [tuple(layer.weight.shape) for layer in layers if quantization != "none"]
        sizes = [quantized_bytes(quantization, shape) for shape in shapes]
        numels = [out * into for out, into in shapes]
        weights, scales = (sum(size[part] for size in sizes) for part in (0, 1))
        return Quantized(sum(numels), weights, scales, max(numels, default=0))

    def followed(self, lora: LoraConfig) -> LoraConfig:
        """With what its file says, or the family."""
        return follow_lora(lora, self.transformer, self.family)[0]

    @cached_property
    def evaluation_flops(self) -> tuple[float, float]:
        """(all, attention's share in them) of one velocity of one image."""
        rows = torch.zeros(1, dtype=torch.int64, device="meta")
        latents = torch.empty(1, *self.backbone.latent_shape, device="meta")
        conditioning = self.backbone.encode([""])
        return _count(lambda: self.backbone.velocity(self.transformer, latents, 0.5, conditioning, rows))

    @cached_property
    def decode_flops(self) -> float:
        """Of one image."""
        return _count(lambda: self.backbone.decode(torch.empty(1, *self.backbone.latent_shape, device="meta")))[0]


def _count(run: Callable[[], object]) -> tuple[float, float]:
    """FLOPs of what runs on the meta device: all, and those of products of two activations."""
    # The counter does not know every fused attention; it always knows matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    by_operator = counter.get_flop_counts().get("Global", {})
    products = sum(count for operator, count in by_operator.items() if "bmm" in str(operator))
    return float(counter.get_total_flops()), float(products)
