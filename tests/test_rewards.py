"""The rewards' common contract, and CLIP score against open_clip's own preprocessing."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from egrpo_fast.rewards import make_reward, score
from egrpo_fast.shapes import CLIP, PROMPTS
from egrpo_fast.shapes.world import parse, render

CAPTIONS = PROMPTS["held_out"].read_text().splitlines()[:6]


@pytest.fixture(scope="module")
def pictures():
    return torch.stack([render(parse(caption), None) for caption in CAPTIONS])


@pytest.fixture(scope="module")
def clip():
    return make_reward("clip", {"model": "shapes"})


def test_shapes_rewards_know_their_own_pictures(pictures):
    right = score("shapes_soft", make_reward("shapes_soft", {}), pictures, CAPTIONS)
    wrong = score("shapes_soft", make_reward("shapes_soft", {}), pictures, CAPTIONS[::-1])
    assert (right > 0.8).all() and wrong.mean() < right.mean() - 0.4
    strict = make_reward("shapes_strict", {})
    assert score("shapes_strict", strict, pictures, CAPTIONS).tolist() == [1.0] * 6


def test_clip_score_is_open_clips_cosine(pictures, clip):
    """Against the model's own PIL transform, on pictures of 8 bits as that transform sees them, square and not."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(CAPTIONS)
    for images, bound in ((pictures, 1e-3), (F.interpolate(pictures, (48, 96), mode="bicubic").clamp(0, 1), 2e-2)):
        eight_bit = images.mul(255).round().div(255)
        theirs = torch.stack([transform(to_pil_image(image)) for image in eight_bit])
        with torch.no_grad():
            image, text = F.normalize(model.encode_image(theirs)), F.normalize(model.encode_text(tokens))
        assert torch.allclose(clip(eight_bit, CAPTIONS), (image * text).sum(-1), rtol=0, atol=bound)


def test_clip_prefers_the_right_caption(pictures, clip):
    assert clip(pictures, CAPTIONS).mean() > clip(pictures, CAPTIONS[::-1]).mean() + 0.1


def test_batched_equals_one_by_one(pictures, clip):
    repeated, prompts = pictures.repeat_interleave(2, 0), [c for c in CAPTIONS for _ in range(2)]
    alone = torch.cat([clip(picture[None], [prompt]) for picture, prompt in zip(repeated, prompts)])
    assert torch.allclose(clip(repeated, prompts), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda images, prompts: torch.zeros(1), "broken: scores of shape"),
        (lambda images, prompts: torch.tensor([0.0] * 5 + [float("nan")]), "broken: not finite for 1 pictures"),
    ],
    ids=["wrong length", "NaN"],
)
def test_a_lying_reward_is_named(reward, told, pictures):
    with pytest.raises(ValueError, match=told):
        score("broken", reward, pictures, CAPTIONS)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("beauty", {}, "no reward 'beauty'; there are: clip"),
        ("shapes_soft", {"sharpness": 2}, "shapes_soft: .*sharpness"),
        ("clip", {"model": "local-dir:/nowhere"}, "rewards.clip"),
    ],
)
def test_bad_rewards_are_refused_by_name(name, options, told):
    with pytest.raises(ValueError, match=told):
        make_reward(name, options)
