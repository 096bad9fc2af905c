"""Trains everything that `egrpo_fast.shapes` ships: `python benchmarks/pretrain_shapes.py OUT [--stages ...]`.

    OUT/pipeline       a FluxPipeline: 32x32 images, latents [4, 16, 16], 64 packed tokens of 16 channels
    OUT/clip           an open_clip model and its tokenizer, `local-dir:OUT/clip`
    OUT/prompts        train.txt and held_out.txt, captions of the two splits
    OUT/pretrain.json  losses, seconds and scores of every stage

Stages run in the order prompts, text, vae, flux, blur, clip, check; each reads what it needs from OUT and writes its
part there, so a run can be taken up at any stage. A stage is a function of the seed and of `--scale`, which
multiplies all step counts. All of it runs on the CPU; where other processes share it, one thread (OMP_NUM_THREADS=1)
is as fast as two.

The transformer learns captions of the train split by flow matching until it draws them all (`flux`), and then unlearns
some of it on images of wider jitter, many of which differ from their caption in one or two attributes (`blur`): so a
base results whose samples of one caption differ in what they show, which a policy gradient needs, rather than one that
draws everything equally badly.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from egrpo_fast.files import follow_umask
from egrpo_fast.shapes import checker, world
from egrpo_fast.shapes.world import Scene

MAX_SEQUENCE_LENGTH = 24
"""Tokens of a caption for both text encoders; the longest of the world takes 19. Give it to the pipeline's call."""
SHIFT, GUIDANCE, SAMPLING_STEPS = 3.0, 3.5, 16
TEXT_WIDTH = 64
PICTURES = 60_000
PROMPTS = {"train": 4000, "held-out": 256}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, name: str) -> dict[str, float]:
    """AdamW on `loss()` with linear warm-up and cosine decay; leaves the exponential moving average of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up + 1, 0.05 * lr),
        ],
        [warm_up],
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    model.train()
    smooth, start = 0.0, time.monotonic()
    for step in (bar := trange(steps, desc=name, mininterval=5)):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        smooth += (value.item() - smooth) / min(step + 1, 100)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    model.load_state_dict(average.module.state_dict())
    model.eval().requires_grad_(False)
    return {"steps": steps, "seconds": round(time.monotonic() - start, 1), "loss": round(smooth, 5)}


# --- text ------------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make every word of the world one token; any other text falls apart into bytes."""
    captions = [scene.caption for scene in chain(*world.scenes("train"))]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_SEQUENCE_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigrams: the words of the world and the printable ASCII characters; others become <unk>."""
    words = sorted({word for scene in chain(*world.scenes("train")) for word in scene.caption.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocab += [(f"▁{word}", -1.0) for word in words] + [(chr(c), -6.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def train_text(out: Path, scale: float, seed: int) -> dict:
    """Tokenizers and the random, frozen text encoders, drawn wide enough that captions part in embedding space."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(clip_config)
    for module in text_encoder.modules():
        # The default deviation of 0.02 would leave the pooled output all but deaf to the caption.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    t5_config = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=8,
        relative_attention_max_distance=MAX_SEQUENCE_LENGTH,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    text_encoder_2 = T5EncoderModel(t5_config)
    # FLUX gives text no positions of its own: strong relative biases make each head look at a neighbour, so that an
    # embedding tells what its word belongs to.
    nn.init.normal_(text_encoder_2.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=3.0)
    folders = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    for folder, part in zip(folders, (tokenizer, tokenizer_2, text_encoder, text_encoder_2)):
        part.save_pretrained(out / "pipeline" / folder)
    return {"vocabularies": [len(tokenizer), len(tokenizer_2)]}


# --- vae -------------------------------------------------------------------------------------------------------------


def draw_images(seed: int, n: int, jitter: float = 1.0) -> tuple[Tensor, list[Scene]]:
    """`n` jittered images of scenes of the train split: float32 [n, 3, 32, 32] and the scenes."""
    singles, pairs = world.scenes("train")
    generator = torch.Generator().manual_seed(seed)
    single = torch.rand(n, generator=generator) < world.SINGLES
    index = torch.randint(2**31, (n,), generator=generator)
    scenes = [
        singles[i % len(singles)] if alone else pairs[i % len(pairs)]
        for alone, i in zip(single.tolist(), index.tolist())
    ]
    layouts = world.layout(scenes)
    chunks = tqdm(layouts.split(512), desc="render", mininterval=5)
    return torch.cat([world.render_layout(chunk, generator, jitter) for chunk in chunks]), scenes


def train_vae(out: Path, scale: float, seed: int) -> dict:
    """Beta-VAE with a pixel deviation of 0.1, then shift and scale that make the mode's latents unit normal."""
    pictures, _ = draw_images(seed + 1, PICTURES)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        x = pictures[torch.randint(len(pictures), (48,))] * 2 - 1
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().sum((1, 2, 3))
        return (error / (2 * 0.1**2) + 0.05 * posterior.kl()).mean() / x[0].numel()

    record = fit(vae, loss, round(700 * scale), 2e-3, "vae")
    with torch.inference_mode():
        probe = pictures[:512] * 2 - 1
        latents = vae.encode(probe).latent_dist.mode()
        error = (vae.decode(latents).sample - probe).square().mean() / 4
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out / "pipeline" / "vae")
    return record | {"psnr": round(-10 * error.log10().item(), 2), "scaling_factor": vae.config.scaling_factor}


# --- flux ------------------------------------------------------------------------------------------------------------


def corrupt(scene: Scene) -> Scene:
    """The scene with one or two attributes of its things replaced at random, still a scene of the train split."""
    allowed = {"shape": world.SHAPES, "colour": world.COLOURS, "size": world.SIZES, "place": world.PLACES}
    while True:
        things = list(scene.things)
        for _ in range(int(torch.randint(1, 3, ()))):
            k, name = int(torch.randint(len(things), ())), list(allowed)[int(torch.randint(len(allowed), ()))]
            value = allowed[name][int(torch.randint(len(allowed[name]), ()))]
            things[k] = replace(things[k], **{name: value})
        try:
            corrupted = Scene(tuple(things))
        except ValueError:
            continue
        if corrupted != scene and corrupted.split == "train":
            return corrupted


def flow_matching(
    pipeline: FluxPipeline, seed: int, pictures: int, jitter: float, wrong: float
) -> Callable[[], Tensor]:
    """The loss `|v(x_t, t) - (x_1 - x_0)|^2` at `x_t = (1 - t) x_0 + t x_1`, t = 1 noise, uniform before the shift of
    3, on so many images of so much jitter, the share `wrong` of them under the caption of a corrupted scene."""
    vae = pipeline.vae
    captions = [scene.caption for scene in chain(*world.scenes("train"))]
    line = {caption: i for i, caption in enumerate(captions)}
    images, scenes = draw_images(seed, pictures, jitter)
    named = [
        corrupt(scene) if flip else scene for scene, flip in zip(scenes, (torch.rand(len(scenes)) < wrong).tolist())
    ]
    lines = torch.tensor([line[scene.caption] for scene in named])
    with torch.no_grad():
        encoded = []
        for chunk in tqdm(images.split(500), desc="encode", mininterval=5):
            z = vae.encode(chunk * 2 - 1).latent_dist.mode()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            encoded.append(pipeline._pack_latents(z, *z.shape))
        latents = torch.cat(encoded)
        texts = [
            pipeline.encode_prompt(captions[i : i + 500], max_sequence_length=MAX_SEQUENCE_LENGTH)[:2]
            for i in trange(0, len(captions), 500, desc="embed", mininterval=5)
        ]
    embeds, pooled = (torch.cat(parts) for parts in zip(*texts))
    side = world.SIDE // 4
    img_ids = pipeline._prepare_latent_image_ids(1, side, side, latents.device, latents.dtype)
    txt_ids = torch.zeros(MAX_SEQUENCE_LENGTH, 3)

    def loss() -> Tensor:
        i = torch.randint(len(latents), (32,))
        u = torch.rand(len(i))
        t = SHIFT * u / (1 + (SHIFT - 1) * u)
        x_0, x_1 = latents[i], torch.randn_like(latents[i])
        velocity = pipeline.transformer(
            hidden_states=x_0.lerp(x_1, t[:, None, None]),
            encoder_hidden_states=embeds[lines[i]],
            pooled_projections=pooled[lines[i]],
            timestep=t,
            guidance=torch.full_like(t, GUIDANCE),
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return (velocity - (x_1 - x_0)).square().mean()

    return loss


def save(pipeline: FluxPipeline, folder: Path) -> None:
    """Half precision halves the package; diffusers loads it in float32."""
    pipeline.transformer.half()
    pipeline.save_pretrained(folder)


def train_flux(out: Path, scale: float, seed: int) -> dict:
    """A transformer that draws what the caption says."""
    folder = out / "pipeline"
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 8, 8),
        ),
    )
    loss = flow_matching(pipeline, seed + 2, PICTURES, jitter=1.0, wrong=0.0)
    record = {"parameters": pipeline.transformer.num_parameters()}
    record |= fit(pipeline.transformer, loss, round(1900 * scale), 2e-3, "flux")
    save(pipeline, folder)
    return record | evaluate(folder, world.captions("held-out", 64, seed), 2, seed)


def train_blur(out: Path, scale: float, seed: int) -> dict:
    """Unlearns some of it, on images of wider jitter, four in ten of them not what the caption says."""
    pipeline = FluxPipeline.from_pretrained(out / "pipeline")
    loss = flow_matching(pipeline, seed + 5, PICTURES // 3, jitter=1.5, wrong=0.4)
    record = fit(pipeline.transformer, loss, round(300 * scale), 5e-4, "blur")
    save(pipeline, out / "pipeline")
    return record


# --- clip ------------------------------------------------------------------------------------------------------------


def augment(pictures: Tensor) -> Tensor:
    """Blur, noise, contrast: what separates a generated image from a rendered one. Shapes and range kept."""
    sigmas = (0.2, 0.4, 0.6, 0.9)
    blurred = torch.cat([gaussian_blur(part, 3, [sigma]) for part, sigma in zip(pictures.chunk(4), sigmas)])
    strength = torch.rand(len(pictures), 3, 1, 1, 1).unbind(1)
    mixed = pictures.lerp(blurred, strength[0]) * (1 - 0.2 * strength[1])
    return (mixed + 0.06 * strength[2] * torch.randn_like(pictures)).clamp(0, 1)


def train_clip(out: Path, scale: float, seed: int) -> dict:
    """A CLIP of its own, contrastive; half of a batch corrupts the other half: the near misses to tell apart."""
    tokenizer = clip_tokenizer()
    width = 64
    model_cfg = {
        "embed_dim": width,
        "vision_cfg": {"image_size": world.SIDE, "patch_size": 4, "width": width, "layers": 3, "head_width": 16},
        "text_cfg": {
            "context_length": MAX_SEQUENCE_LENGTH,
            "vocab_size": len(tokenizer),
            "width": width,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "clip",
        },
    }
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": world.SIDE}
    model = open_clip.CLIP(**model_cfg)
    folder = out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2)
    )
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    criterion = open_clip.ClipLoss()
    pictures, scenes = draw_images(seed + 3, PICTURES // 3)
    near = [corrupt(scene) for scene in tqdm(scenes, desc="corrupt", mininterval=5)]
    near_images = world.render_layout(world.layout(near), torch.Generator().manual_seed(seed + 4))
    pictures = torch.stack((pictures, near_images), 1)
    tokens = tokenize([s.caption for pair in zip(scenes, near) for s in pair]).unflatten(0, (-1, 2))

    def loss() -> Tensor:
        i = torch.randint(len(pictures), (64,))
        images = augment(pictures[i].flatten(0, 1)) * 2 - 1
        return criterion(*model(images, tokens[i].flatten(0, 1)))

    record = fit(model, loss, round(1000 * scale), 2e-3, "clip")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")

    held_out = world.captions("held-out", 256, seed)
    layouts = world.layout([world.parse(caption) for caption in held_out])
    with torch.inference_mode():
        images = model.encode_image(world.render_layout(layouts, torch.Generator().manual_seed(seed)) * 2 - 1, True)
        similarity = images @ model.encode_text(tokenize(held_out), True).T
    matching = similarity.diag()
    mismatched = (similarity.sum(1) - matching) / (len(similarity) - 1)
    return record | {
        "similarity": {"matching": matching.mean().item(), "mismatched": mismatched.mean().item()},
        "top-1 of 256": (similarity.argmax(1) == torch.arange(len(similarity))).float().mean().item(),
    }


# --- check -----------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, captions: list[str], group: int, seed: int) -> dict[str, float]:
    """Scores of `group` samples of every caption by the pipeline as loaded from its folder."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(desc="sample", mininterval=5)
    pictures = torch.cat(
        [
            pipeline(
                prompt=captions[i : i + 16],
                height=world.SIDE,
                width=world.SIDE,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE,
                num_images_per_prompt=group,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=torch.Generator().manual_seed(seed + i),
                output_type="pt",
            ).images
            for i in range(0, len(captions), 16)
        ]
    )
    repeated = [caption for caption in captions for _ in range(group)]
    soft = checker.soft_score(pictures, repeated)
    return {
        "soft": soft.mean().item(),
        "strict": checker.strict(pictures, repeated).float().mean().item(),
        "within-group std": soft.unflatten(0, (-1, group)).std(1).mean().item(),
    }


def check(out: Path, scale: float, seed: int) -> dict:
    """The shipped pipeline on held-out captions, beside jittered ground truth."""
    captions = world.captions("held-out", 64, seed)
    layouts = world.layout([world.parse(caption) for caption in captions])
    truth = world.render_layout(layouts, torch.Generator().manual_seed(seed))
    return {
        "base": evaluate(out / "pipeline", captions, 12, seed),
        "ground truth": {
            "soft": checker.soft_score(truth, captions).mean().item(),
            "strict": checker.strict(truth, captions).float().mean().item(),
        },
    }


def write_prompts(out: Path, scale: float, seed: int) -> dict:
    """Prompt files of both splits."""
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    for split, count in PROMPTS.items():
        lines = world.captions(split, count, seed)
        (out / "prompts" / f"{split.replace('-', '_')}.txt").write_text("\n".join(lines) + "\n")
    return dict(PROMPTS)


STAGES: dict[str, Callable[[Path, float, int], dict]] = {
    "prompts": write_prompts,
    "text": train_text,
    "vae": train_vae,
    "flux": train_flux,
    "blur": train_blur,
    "clip": train_clip,
    "check": check,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write pipeline/, clip/ and pretrain.json to")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all step counts (default: 1)")
    arguments = parser.parse_args()
    path = arguments.out / "pretrain.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for stage in arguments.stages:
        torch.manual_seed(arguments.seed)
        start = time.monotonic()
        result = STAGES[stage](arguments.out, arguments.scale, arguments.seed)
        follow_umask(arguments.out)
        record[stage] = result | {"stage seconds": round(time.monotonic() - start, 1)}
        record["seed"], record["scale"] = arguments.seed, arguments.scale
        record["versions"] = {"python": platform.python_version()} | {
            module.__name__: module.__version__ for module in (torch, diffusers, transformers, open_clip)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        tqdm.write(f"{stage}: {json.dumps(record[stage])}")


if __name__ == "__main__":
    main()
