"""Makes a complete diffusers FLUX folder with random weights: `python -m egrpo_fast.models.flux.random OUT`.

The transformer, scheduler and latents (16 channels, 1/8 of the image's side, so sides are multiples of 16) are
FLUX's own; VAE and text encoders are a few layers. The tokenizers are the embedded ones, with room for 77 and 512
tokens; they read any text, most of it a character at a time. The folder is a function of the size, the seed and the
options, for one version of the libraries. It is for trying loading, sharding, training and export, not for images.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from egrpo_fast import shapes
from egrpo_fast.files import follow_umask

TEXT_WIDTH = 64
SIZES = {
    "tiny": {
        "num_layers": 1, "num_single_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12),
    },
    "small": {
        "num_layers": 2, "num_single_layers": 4,
        "num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12),
    },
    "30m": {
        "num_layers": 2, "num_single_layers": 3,
        "num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24),
    },
    "medium": {
        "num_layers": 4, "num_single_layers": 10,
        "num_attention_heads": 10, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56),
    },
}  # fmt: skip
"""Transformers of 0.3, 5, 30 and 491 million parameters."""


def make_pipeline(size: str, seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    """A float32 FLUX pipeline of one of SIZES. guidance_embeds: as in FLUX.1-dev; False: as in FLUX.1-schnell."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tokenizer = CLIPTokenizer.from_pretrained(shapes.PIPELINE / "tokenizer", model_max_length=77)
        tokenizer_2 = T5Tokenizer.from_pretrained(shapes.PIPELINE / "tokenizer_2", model_max_length=512)
        return FluxPipeline(
            # The fixed shift of the training rollout, so that both draw the same image from the same noise.
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                block_out_channels=(16, 32, 32, 32),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=16,
                norm_num_groups=8,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=2 * TEXT_WIDTH,
                    projection_dim=TEXT_WIDTH,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=77,
                    initializer_factor=10.0,  # at 1.0 the pooled output hardly hears the prompt
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer_2=tokenizer_2,
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer_2),
                    d_model=TEXT_WIDTH,
                    d_kv=TEXT_WIDTH // 8,
                    d_ff=2 * TEXT_WIDTH,
                    num_layers=2,
                    num_heads=8,
                    feed_forward_proj="gated-gelu",
                    decoder_start_token_id=0,
                )
            ),
            transformer=FluxTransformer2DModel(
                **SIZES[size],
                in_channels=64,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=guidance_embeds,
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the transformer (%(default)s)")
    parser.add_argument("--schnell", action="store_true", help="no guidance embedding, as in FLUX.1-schnell")
    parser.add_argument("--shard-size", default="10GB", metavar="SIZE",
                        help="most bytes of one file of weights, such as 200MB (%(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights (float32)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = make_pipeline(arguments.size, arguments.seed, not arguments.schnell)
    pipeline.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.out, max_shard_size=arguments.shard_size)
    follow_umask(arguments.out)
    millions = pipeline.transformer.num_parameters() / 1e6
    files = len(list((arguments.out / "transformer").glob("*.safetensors")))
    print(f"{arguments.out}: a transformer of {millions:.1f} million parameters in {files} file(s)")


if __name__ == "__main__":
    main()
