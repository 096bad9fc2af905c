"""A model family of its own: a convolution that hears a prompt as a few numbers, and a VAE whose latents are pixels."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from egrpo_fast.models.protocol import Activations, Backbone
from egrpo_fast.models.text import TextEncoder

WORDS = 8


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=16):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3 + 1 + WORDS, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)])

    def forward(self, hidden_states, timestep, text):
        """[R, 3, H, W], [], [R, WORDS]: time and text are channels of the same everywhere."""
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
        return {"text": (WORDS,)}

    @classmethod
    def weight_bytes(cls, folder, model):
        return 0.0

    def encode(self, prompts):
        counts = [[prompt.count(letter) / 4 for letter in "abdeglrt"] for prompt in prompts]
        return {"text": torch.tensor(counts, device=self._device)}

    def truncated(self, prompts):
        return []


class ToyBackbone(Backbone):
    pipeline, transformer_class, text_encoder = ToyPipeline, ToyTransformer, ToyText
    parts, input_sizes = ("transformer", "vae"), ()

    @classmethod
    def check(cls, folder, height, width):
        if height != width:
            raise ValueError(f"model.width: {width} is not model.height")

    @classmethod
    def fingerprints(cls, folder):
        return {}

    @classmethod
    def blocks(cls, transformer):
        return list(transformer.blocks)

    @classmethod
    def compiled(cls, transformer):
        raise ValueError("rollout.compile: not for this model")

    @classmethod
    def load_decoder(cls, folder, model, device):
        return SimpleNamespace(side=model.height, device=device)

    @classmethod
    def hollow_decoder(cls, folder):
        return SimpleNamespace(side=None, device="meta")

    @classmethod
    def frozen_bytes(cls, folder, model):
        return {"VAE": 0.0, "text encoders": 0.0}

    def __init__(self, transformer, decoder, text, model):
        self.transformer, self._text, self.decode_batch_size = transformer, text, model.decode_batch_size
        self._size = 3, model.height, model.width
        self.latent_shape = model.height * model.width, 3

    def activations(self, itemsize):
        unit = self.latent_shape[0] * itemsize
        width = self.transformer.config.width
        return Activations(width * unit, (12 * unit, width * unit), width * unit, width * unit, 6 * unit)

    def _images(self, latents):
        return latents.transpose(1, 2).unflatten(2, self._size[1:])

    def velocity(self, module, latents, t, conditioning, rows):
        images = self._images(latents).to(conditioning["text"].dtype)
        v = module(images, torch.full((), t, device=latents.device), conditioning["text"][rows])
        return v.flatten(2).transpose(1, 2).contiguous()

    def use_tiny_decoder(self, folder):
        raise ValueError("tail.decoder: not for this model")

    def decode(self, latents, tiny=False):
        return self._images(latents).float().div(2).add(0.5).clamp(0, 1)


def save(folder):
    """A pipeline of this family in diffusers' layout."""
    torch.manual_seed(0)
    ToyTransformer().save_pretrained(Path(folder) / "transformer")
    (Path(folder) / "vae").mkdir()
    (Path(folder) / "vae" / "config.json").write_text("{}")
    (Path(folder) / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
