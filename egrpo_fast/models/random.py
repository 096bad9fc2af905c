"""Makes a complete diffusers folder of a model family with random weights: `python -m egrpo_fast.models.random OUT`.

Transformer, scheduler and latents are of the family's own kind; VAE and text encoders are a few layers. The tokenizers
are of the family's own format and read any text, most of it a character at a time. The folder is a function of the
family, the size, the seed and the options, for one version of the libraries. It is for trying loading, sharding,
training and export, not for images.
"""

import argparse
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from egrpo_fast import models as rooms
from egrpo_fast import shapes
from egrpo_fast.files import follow_umask

TEXT_WIDTH = 64
SIZES = ("tiny", "small", "30m", "medium")


def makers() -> dict[str, Callable[[str], Any]]:
    """`KINDS` of every `models/*/random.py`: by a name, what makes a float32 pipeline of one of SIZES."""
    found: dict[str, Callable[[str], Any]] = {}
    for room in pkgutil.iter_modules(rooms.__path__, f"{rooms.__name__}."):
        if room.ispkg and find_spec(f"{room.name}.random"):
            found |= import_module(f"{room.name}.random").KINDS
    return found


def make_pipeline(kind: str = "flux-dev", size: str = "tiny", seed: int = 0) -> Any:
    """A float32 pipeline of one of `makers()`, a function of the seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return makers()[kind](size)


def vae(channels: int, **settings: Any) -> AutoencoderKL:
    """An image decoder of 1/8 of the image's side."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, **settings,
    )  # fmt: skip


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(shapes.PIPELINE / "tokenizer", model_max_length=77)


def clip(kind: Any, tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> Any:
    """A CLIP text encoder, of transformers' class `kind`."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            initializer_factor=10.0,  # at 1.0 the pooled output hardly hears the prompt
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(shapes.PIPELINE / "tokenizer_2", model_max_length=512)


def t5(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=8,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


def byte_tokenizer(
    kind: Any, special: Sequence[str], pad: str, template: str, words: Sequence[str] = (), **more: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges, of transformers' class `kind`, with these special tokens and chat template.

    words: what it reads as one token each.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.add_tokens([AddedToken(word) for word in words])
    made = kind(tokenizer_object=core, pad_token=pad, eos_token=special[-1], model_max_length=4096, **more)
    made.chat_template = template
    return made


QWEN = ("<think>", "</think>", "<|im_start|>", "<|endoftext|>", "<|im_end|>")
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Of the Qwen family's format and chat."""
    return byte_tokenizer(Qwen2TokenizerFast, QWEN, "<|endoftext|>", QWEN_CHAT, words)


def qwen3(tokenizer: PreTrainedTokenizerFast, num_hidden_layers: int) -> Qwen3Config:
    """Of a small Qwen3."""
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=num_hidden_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip


def sized(sizes: Mapping[str, Mapping[str, Any]], size: str) -> dict[str, Any]:
    """The settings of a size. ValueError names those that there are."""
    if size not in sizes:
        raise ValueError(f"--size: {size!r} is none of {', '.join(sizes)}")
    return dict(sizes[size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--family", choices=sorted(makers()), default="flux-dev", help="kind of model (%(default)s)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the transformer (%(default)s)")
    parser.add_argument("--shard-size", default="10GB", metavar="SIZE",
                        help="most bytes of one file of weights, such as 200MB (%(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights (float32)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        pipeline = make_pipeline(arguments.family, arguments.size, arguments.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    pipeline.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.out, max_shard_size=arguments.shard_size)
    follow_umask(arguments.out)
    millions = pipeline.transformer.num_parameters() / 1e6
    files = len(list((arguments.out / "transformer").glob("*.safetensors")))
    print(f"{arguments.out}: a transformer of {millions:.1f} million parameters in {files} file(s)")


if __name__ == "__main__":
    main()
