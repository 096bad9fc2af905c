"""Shapes: the world's grammar and images, its judges under attack, and the shipped weights."""

import pytest
import torch

from egrpo_fast.shapes import CLIP, PIPELINE, PROMPTS
from egrpo_fast.shapes.checker import soft_score, strict
from egrpo_fast.shapes.world import (
    BACKGROUND,
    COLOURS,
    CORNERS,
    PALETTE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    captions,
    layout,
    parse,
    render,
    render_layout,
    scenes,
)

PAIR = "a small red circle in the top left and a large blue square in the bottom right"


def pictures(caption_list: list[str], seed: int | None = 0) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return render_layout(layout([parse(caption) for caption in caption_list]), generator)


def altered(scene: Scene, k: int = 0, **attributes: str) -> Scene:
    things = list(scene.things)
    things[k] = Thing(**(vars(things[k]) | attributes))
    return Scene(tuple(things))


def another(values: tuple[str, ...], taken: set[str], generator: torch.Generator) -> str:
    free = [value for value in values if value not in taken]
    return free[int(torch.randint(len(free), (), generator=generator))]


# --- world


def test_captions_and_scenes_are_inverse():
    drawn = captions("train", 500, 0) + captions("held-out", 500, 0)
    assert all(parse(caption).caption == caption for caption in drawn)
    assert {len(parse(caption).things) for caption in drawn} == {1, 2}


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("", "caption"),
        ("a photo of a cat", "caption"),
        ("a small red circle at the top left", "caption"),
        (PAIR + " and", "place 'bottom right and'"),
        (" " + PAIR, "caption"),
        ("a tiny red circle in the top left", "size 'tiny'"),
        ("a small pink circle in the top left", "colour 'pink'"),
        ("a small red star in the top left", "shape 'star'"),
        ("a small red circle in the top left corner", "place 'top left corner'"),
        ("a small red circle in the top left and a large red square in the top right", "colour"),
        ("a small red circle in the top left and a large blue square in the top left", "place"),
        ("a small red circle in the middle and a large blue square in the top left", "place"),
        (f"{PAIR} and a small green cross in the top right", "things"),
    ],
)
def test_other_text_is_refused_by_name(caption, named):
    with pytest.raises(ValueError, match=named):
        parse(caption)


def test_the_split_is_stable_and_does_not_leak():
    train, held_out = (sum(scenes(split), ()) for split in ("train", "held-out"))
    assert len(train) + len(held_out) == len({scene.caption for scene in train + held_out}) == 240 + 23040
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert all(Scene(scene.things[::-1]).split == scene.split for scene in train[::50] + held_out[::50])
    assert parse(PAIR).split == "train"
    assert captions("train", 50, 3) == captions("train", 50, 3) != captions("train", 50, 4)
    assert len(set(captions("held-out", len(held_out), 0))) == len(held_out)
    with pytest.raises(ValueError, match="split"):
        captions("test", 1, 0)
    with pytest.raises(ValueError, match="n 100000"):
        captions("train", 100_000, 0)


def test_pictures_are_what_their_captions_say():
    picture = render(parse(PAIR))
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32
    torch.testing.assert_close(picture[:, 8, 8], torch.tensor(PALETTE["red"]))
    torch.testing.assert_close(picture[:, 24, 24], torch.tensor(PALETTE["blue"]))
    torch.testing.assert_close(picture[:, 8, 24], torch.tensor(BACKGROUND))
    assert torch.equal(render(parse(PAIR)), picture)
    assert not torch.equal(render(parse(PAIR), torch.Generator().manual_seed(0)), picture)
    batch = pictures(captions("train", 64, 0))
    assert batch.min() >= 0 and batch.max() <= 1


# --- judges


@pytest.fixture(scope="module")
def truth() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    held_out = captions("held-out", 400, 1)
    images = pictures(held_out)
    return held_out, images, soft_score(images, held_out)


def test_ground_truth_passes(truth):
    held_out, images, soft = truth
    assert soft.dtype == torch.float32 and soft.shape == (400,)
    assert 0.88 < soft.mean() <= 1 and soft.min() > 0.75
    assert strict(images, held_out).float().mean() >= 0.97


def test_attacks_do_not_pay(truth):
    """Every attack, on every caption it applies to: less than ground truth by a margin, and never strictly right."""
    held_out, images, soft = truth
    generator = torch.Generator().manual_seed(0)
    parsed = [parse(caption) for caption in held_out]
    pairs = torch.tensor([len(scene.things) == 2 for scene in parsed])

    def draw(altered_scenes: list[Scene]) -> torch.Tensor:
        return render_layout(layout(altered_scenes), torch.Generator().manual_seed(1))

    away = ((images - torch.tensor(BACKGROUND)[:, None, None]).abs().amax(1, keepdim=True) < 0.02).float()
    stripes = 0.3 * (torch.arange(32) % 4 < 2).float()
    colour = torch.tensor([PALETTE[scene.things[0].colour] for scene in parsed])
    swapped = [
        Scene(tuple(Thing(**(vars(t) | {"colour": u.colour})) for t, u in zip(s.things, s.things[::-1])))
        for s in parsed
    ]
    extra = draw(parsed)
    for b, scene in enumerate(parsed):
        taken = {thing.place for thing in scene.things}
        place = another(CORNERS, taken, generator)
        added = another(COLOURS, {thing.colour for thing in scene.things}, generator)
        more = render(Scene((Thing("circle", added, "small", place),)))
        extra[b] = torch.maximum(extra[b], more)
    every = torch.ones_like(pairs)
    attacks = {
        "noise": ((images + away * 0.15 * torch.randn(images.shape, generator=generator)).clamp(0, 1), every, 0.5),
        "stripes": ((images + away * stripes).clamp(0, 1), every, 0.5),
        "wrong shape": (
            draw([altered(s, shape=another(SHAPES, {s.things[0].shape}, generator)) for s in parsed]),
            every,
            0.8,
        ),
        "wrong colour": (
            draw([altered(s, colour=another(COLOURS, {t.colour for t in s.things}, generator)) for s in parsed]),
            every,
            0.8,
        ),
        "wrong size": (
            draw([altered(s, size=another(SIZES, {s.things[0].size}, generator)) for s in parsed]),
            every,
            0.8,
        ),
        "wrong place": (
            draw([altered(s, place=another(CORNERS, {t.place for t in s.things}, generator)) for s in parsed]),
            every,
            0.8,
        ),
        "missing thing": (draw([Scene(s.things[-1:]) for s in parsed]), pairs, 0.8),
        "extra thing": (extra, every, 0.9),
        "swapped colours": (draw(swapped), pairs, 0.2),
        "flat colour": (colour[:, :, None, None].expand_as(images), every, 0.1),
        "empty": (torch.zeros_like(images), every, 0.1),
        "noise alone": (torch.rand(images.shape, generator=generator), every, 0.1),
        "another's image": (images.roll(1, 0), every, 0.8),
    }
    for name, (attack, applies, share) in attacks.items():
        scores = soft_score(attack, held_out)[applies]
        assert scores.mean() < share * soft[applies].mean(), f"{name}: {scores.mean():.3f}"
        assert (scores < soft[applies]).float().mean() > 0.99, name
        assert strict(attack, held_out)[applies].float().mean() == 0, name


def test_better_pictures_score_better(truth):
    held_out, images, _ = truth
    clean = pictures(held_out, seed=None)
    ladder = [soft_score(clean.lerp(images.roll(1, 0), a), held_out).mean().item() for a in (0.0, 0.1, 0.2, 0.3, 0.5)]
    assert ladder == sorted(ladder, reverse=True) and ladder[0] > ladder[-1] + 0.3


def test_the_judges_survive_any_picture():
    bad = torch.full((2, 3, 32, 32), float("nan"))
    assert soft_score(bad, [PAIR] * 2).isfinite().all() and not strict(bad, [PAIR] * 2).any()
    with pytest.raises(ValueError, match="images"):
        soft_score(bad, [PAIR])
    with pytest.raises(ValueError, match="images"):
        strict(torch.zeros(1, 3, 64, 64), [PAIR])


# --- shipped weights


def test_package_data_is_small():
    files = [path for path in PIPELINE.parent.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 10e6


def test_the_prompt_files_are_the_worlds_captions():
    train, held_out = (PROMPTS[split].read_text().splitlines() for split in ("train", "held_out"))
    assert train == captions("train", len(train), 0) and held_out == captions("held-out", len(held_out), 0)
    assert not set(train) & set(held_out)


def test_the_shipped_pipeline_draws():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(PIPELINE)
    parts = pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2
    assert all(p.dtype == torch.float32 for part in parts for p in part.parameters())
    assert pipeline.scheduler.config.shift == 3.0 and not pipeline.scheduler.config.use_dynamic_shifting
    pipeline.set_progress_bar_config(disable=True)
    prompts = captions("held-out", 16, 2)

    def draw(prompt: list[str]) -> torch.Tensor:
        return pipeline(
            prompt,
            height=32,
            width=32,
            num_inference_steps=16,
            guidance_scale=3.5,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    images = draw(prompts)
    assert images.shape == (16, 3, 32, 32) and images.isfinite().all()
    own, others = soft_score(images, prompts).mean(), soft_score(images.roll(1, 0), prompts).mean()
    assert 0.3 < own < 0.8 and own > others + 0.2
    assert draw(["A naïve photo of 3 cats, 漢字 — isn't it? #$%"]).isfinite().all()


def test_the_shipped_text_encoders_tell_captions_apart():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(PIPELINE, transformer=None, vae=None)
    phrases = [Scene((Thing(s, c, z, p),)).caption for s in SHAPES for c in COLOURS for z in SIZES for p in PLACES]
    embeds, pooled, _ = pipeline.encode_prompt(phrases, max_sequence_length=pipeline.tokenizer_2.model_max_length)
    for e in (embeds.flatten(1), pooled):
        distances = torch.cdist(e, e).fill_diagonal_(torch.inf)
        assert distances.min() > 0.1 * e.norm(dim=1).mean() / e.shape[1] ** 0.5


def test_the_shipped_clip_ranks_captions():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    held_out = captions("held-out", 128, 3)
    normalise = preprocess.transforms[-1]
    with torch.inference_mode():
        similarity = (
            model.eval().encode_image(normalise(pictures(held_out)), normalize=True)
            @ model.encode_text(tokenize(held_out), normalize=True).T
        )
    matching = similarity.diag()
    mismatched = similarity[~torch.eye(128, dtype=torch.bool)]
    assert matching.mean() > mismatched.mean() + 0.4
    assert (similarity.argmax(1) == torch.arange(128)).float().mean() > 0.5
    assert tokenize("A naïve photo of 3 cats, 漢字").shape == (1, 24)
