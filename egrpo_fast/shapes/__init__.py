"""Shapes: procedural captioned 32x32 images, a tiny FLUX pipeline that draws them, and judges of its images."""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
"""Folder of the shipped pipeline, for `diffusers.FluxPipeline.from_pretrained(PIPELINE)`."""
CLIP = Path(__file__).parent / "clip"
"""Folder of the shipped CLIP, for `open_clip.create_model_and_transforms(f"local-dir:{CLIP}")`."""
PROMPTS = {split: Path(__file__).parent / "prompts" / f"{split}.txt" for split in ("train", "held_out")}
"""Captions of the world, one per line; no caption is in both."""

EMBEDDED = "shapes"
"""As a path in a recipe or command: what ships with the package."""


def pipeline_path(path: str) -> str:
    """The pipeline that a recipe's `model.path` means: the embedded one's folder for `shapes`, else as it is."""
    return str(PIPELINE) if path == EMBEDDED else path


def prompts_path(path: str, split: str) -> str:
    """The file that a recipe's `prompts.SPLIT` means: the embedded captions for `shapes`, else as it is."""
    return str(PROMPTS[split]) if path == EMBEDDED else path
