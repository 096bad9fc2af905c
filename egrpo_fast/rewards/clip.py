"""CLIP score: cosine similarity of picture and prompt in an open_clip model (Radford et al., 2021)."""

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from egrpo_fast.shapes import CLIP


class ClipScore:
    """`cos(image_features, text_features)` in [-1, 1].

    model: an open_clip model name, `local-dir:FOLDER` or `hf-hub:ID`, or `shapes` for the embedded one. pretrained: its
    weights' tag or file, where the model does not name them itself. Pictures stay on their device: shorter side to the
    model's size (bicubic, antialiased), centre crop, the model's own normalisation.
    """

    def __init__(self, model: str, pretrained: str | None = None, device: torch.device | str = "cpu") -> None:
        name = f"local-dir:{CLIP}" if model == "shapes" else model
        # Without weights open_clip would hand out a random model, and a run would train on noise.
        network = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True, device=device)
        self._model = network.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_preprocess_cfg(self._model)
        size = config["size"]
        self._size = size[0] if isinstance(size, (tuple, list)) else size
        self._mean, self._std = (
            torch.tensor(config[key], device=device).reshape(1, 3, 1, 1) for key in ("mean", "std")
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        height, width = images.shape[-2:]
        scale = self._size / min(height, width)
        target = (max(self._size, round(height * scale)), max(self._size, round(width * scale)))
        if target != (height, width):
            images = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self._size) // 2 for side in target)
        images = images[..., top : top + self._size, left : left + self._size]
        return (images - self._mean) / self._std

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # A group shares its prompt: encode each distinct one once.
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = self._tokenizer(list(distinct)).to(images.device)
        text = F.normalize(self._model.encode_text(tokens), dim=-1)
        image = F.normalize(self._model.encode_image(self.preprocess(images)), dim=-1)
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=images.device)
        return (image * text[rows]).sum(-1).float()
