"""`egrpo encode`: prompts through a pipeline's text encoders, once, into a folder (`prompts/embeddings.py`)."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from egrpo_fast.config import ModelConfig, load_config
from egrpo_fast.models.folder import configs_of, family_of, resolve
from egrpo_fast.models.text import tell_truncated
from egrpo_fast.prompts.embeddings import EmbeddingWriter, Index
from egrpo_fast.prompts.files import read_prompts
from egrpo_fast.shapes import EMBEDDED, PROMPTS, pipeline_path
from egrpo_fast.terminal import printable


def read_all(files: Iterable[str | Path], column: str = "prompt") -> tuple[list[str], list[str]]:
    """(prompts of all files, warnings). `shapes` stands for the captions that ship with the package."""
    paths = [path for file in files for path in (PROMPTS.values() if str(file) == EMBEDDED else (file,))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = [prompt for path in paths for prompt in read_prompts(path, column=column)]
    return prompts, [str(warning.message) for warning in caught]


def default_settings(model: str) -> dict[str, Any]:
    """Arguments of `encode` that are not asked for: the trainer's defaults, or those of the `shapes` recipe."""
    if model == EMBEDDED:
        recipe = load_config("shapes").model
        return {"max_sequence_length": recipe.max_sequence_length, "dtype": recipe.dtype}
    return {"max_sequence_length": 512, "dtype": "bfloat16"}


def _batches(prompts: Sequence[str], places: np.ndarray, size: int) -> Iterator[list[str]]:
    for start in range(0, len(places), size):
        yield [prompts[int(place)] for place in places[start : start + size]]


def encode(
    files: Sequence[str | Path],
    out: str | Path,
    model: str,
    max_sequence_length: int = 512,
    dtype: str = "bfloat16",
    quantization: str = "none",
    batch: int = 16,
    column: str = "prompt",
    device: torch.device | str = "cpu",
    shard_bytes: int = 2**28,
    verify: bool = False,
    negative_prompt: str = "",
) -> int:
    """Encode what `out` does not hold yet; returns how many prompts that were. Repeat an interrupted call to go on.

    negative_prompt: encoded, too, for a model with classifier-free guidance. ValueError, before any weight is loaded,
    for what the user must mend. A row depends on which prompts shared its
    batch by rounding alone; after an interruption the same call makes the same batches.
    """
    prompts, repeats = read_all(files, column)
    for warning in repeats:
        print(printable(f"warning: {warning}"))
    pipeline = pipeline_path(model)
    folder = configs_of(pipeline)
    family = family_of(folder)
    kind = family.text_encoder
    if family.guidance_kind(folder) == "classifier_free":
        prompts = [negative_prompt, *prompts]
    path = resolve(pipeline, parts=(*kind.encoders, *kind.tokenizers))
    made_with = {"max_sequence_length": max_sequence_length, "dtype": dtype}
    settings = ModelConfig.model_validate({"path": ".", "text_encoder_quantization": quantization, **made_with})
    index = Index(
        encoder=kind.fingerprint(path, settings), made_with={"model": model, **made_with, "quantization": quantization},
        shapes=kind.shapes(path, settings), dtype=settings.dtype,
    )  # fmt: skip
    with EmbeddingWriter(out, index, shard_bytes, verify) as writer:
        if writer.dropped:
            print(printable(f"warning: damaged, to be made again: {', '.join(writer.dropped)}"))
        places = writer.missing(prompts)
        print(f"{len(prompts):,} prompts: {len(places):,} to encode, the others are there already or repeated")
        if not len(places):
            return 0
        writer.check_space(len(places))
        encoder = kind(path, settings, device)
        tell_truncated(encoder, (prompts[int(place)] for place in places), "prompts")
        with tqdm(total=len(places), desc="encoding", unit="prompt") as bar:
            for some in _batches(prompts, places, batch):
                try:
                    rows = encoder.stored(some)
                except torch.OutOfMemoryError:
                    raise ValueError(
                        f"--batch: {batch} prompts do not fit on {device}; try {max(1, batch // 2)}"
                    ) from None
                writer.add(some, rows)
                bar.update(len(some))
    return len(places)
