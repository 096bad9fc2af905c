"""A model family of its own: a convolution that hears a prompt as a few numbers, and a VAE of random weights."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from egrpo_fast.models.protocol import ActivationUnits, Backbone
from egrpo_fast.models.text import TextEncoder

CHANNELS, WORDS = 4, 8


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=16):
        super().__init__()
        first = nn.Conv2d(CHANNELS + 1 + WORDS, width, 3, padding=1)
        self.blocks = nn.ModuleList([first, nn.Conv2d(width, CHANNELS, 3, padding=1)])

    def forward(self, hidden_states, timestep, text):
        """[R, CHANNELS, H, W], [], [R, WORDS]: time and text are channels of the same everywhere."""
        rows, _, *size = hidden_states.shape
        alike = torch.cat([timestep.expand(rows, 1), text], dim=1)[..., None, None].expand(-1, -1, *size)
        return self.blocks[1](self.blocks[0](torch.cat([hidden_states, alike], dim=1)).tanh())


class ToyPipeline(DiffusionPipeline):
    pass


class ToyText(TextEncoder):
    """Counts letters; nothing to load."""

    encoders, tokenizers, limits = {}, (), {}

    def __init__(self, folder, model, device="cpu"):
        self._device = device

    @classmethod
    def shapes(cls, folder, model):
        return {"words": (WORDS,)}

    @classmethod
    def weight_bytes(cls, folder, model):
        return 0.0

    def encode(self, prompts):
        counts = [[prompt.count(letter) / 4 for letter in "abdeglrt"] for prompt in prompts]
        return {"words": torch.tensor(counts, device=self._device)}

    def truncated(self, prompts):
        return []


class ToyBackbone(Backbone):
    pipeline, transformer_class, text_encoder = ToyPipeline, ToyTransformer, ToyText
    input_sizes, lora_targets, pixels_per_latent = (), (), 1
    units = ActivationUnits(forward={4: 2.0}, kept={4: {"Conv2d": 2.0}}, kept_per_head=0, backward=1.0)

    @classmethod
    def guidance_kind(cls, folder):
        return "none"

    @classmethod
    def blocks(cls, transformer):
        return list(transformer.blocks)

    @classmethod
    def size(cls, transformer):
        return transformer.config.width, 1

    def __init__(self, *parts):
        super().__init__(*parts)
        self.latent_shape = CHANNELS, self.height * self.width

    def predict(self, module, latents, t, conditioning, rows):
        latents = latents.unflatten(2, (self.height, self.width)).to(conditioning["words"].dtype)
        return module(latents, torch.full((), t, device=latents.device), conditioning["words"][rows]).flatten(2)

    def _unpacked(self, latents, vae):
        return latents.unflatten(2, (self.height, self.width))


def save(folder):
    """A pipeline of this family in diffusers' layout."""
    torch.manual_seed(0)
    ToyTransformer().save_pretrained(Path(folder) / "transformer")
    AutoencoderKL(latent_channels=CHANNELS).save_pretrained(Path(folder) / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(Path(folder) / "scheduler")
    (Path(folder) / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
