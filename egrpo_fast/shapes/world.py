"""The world: images of one or two coloured shapes on a dark ground, and the captions that name them.

    scene   = thing | thing "and" thing            two things differ in colour and stand in two different corners
    thing   = "a" size colour shape place
    place   = "in the top left" | ... | "in the bottom right" | "in the middle"      the last for a single thing only

Images are float32 [3, 32, 32] in [0, 1]; x grows to the right, y downwards, pixel (i, j) has its centre at
(j + 0.5, i + 0.5).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor

SIDE = 32
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
CORNERS = PLACES[:4]
PALETTE = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.20, 0.85),
    "white": (0.95, 0.95, 0.95),
}
COLOURS = tuple(PALETTE)
BACKGROUND = (0.08, 0.08, 0.10)
RADII = (3.6, 6.4)
"""Radius in pixels of every size."""
CENTRES = ((8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0), (16.0, 16.0))
"""Centre (x, y) in pixels of every place."""
SHIFT, SCALE, TINT = 1.0, 0.08, 0.04
"""Half-widths of the uniform jitter of a centre (pixels), a radius (relative) and a colour channel."""
SINGLES = 0.25
"""Share of images with a single thing."""
SPLITS = ("train", "held-out")


@dataclass(frozen=True, order=True)
class Thing:
    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        for name, allowed in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} in the {self.place}"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"things: a scene holds 1 or 2, not {len(self.things)}")
        if len(self.things) == 2:
            for name in ("colour", "place"):
                values = {getattr(thing, name) for thing in self.things}
                if len(values) < 2:
                    raise ValueError(f"{name}: two things must differ in it, both have {values.pop()!r}")
            if any(thing.place not in CORNERS for thing in self.things):
                raise ValueError(f"place: two things must stand in {', '.join(CORNERS)}")

    @property
    def caption(self) -> str:
        return " and ".join(thing.phrase for thing in self.things)

    @property
    def split(self) -> str:
        """One scene in ten is held out, whichever way round its caption names the things."""
        held_out = zlib.crc32(" and ".join(sorted(thing.phrase for thing in self.things)).encode()) % 10 == 0
        return SPLITS[held_out]


def parse(caption: str) -> Scene:
    """The scene of a caption, `parse(scene.caption) == scene`; ValueError names what is not of this world."""
    things = []
    for phrase in caption.split(" and "):
        words = phrase.split(" ")
        if len(words) < 7 or words[0] != "a" or words[4:6] != ["in", "the"]:
            raise ValueError(f"caption: {phrase!r} in {caption!r} is not 'a <size> <colour> <shape> in the <place>'")
        things.append(Thing(shape=words[3], colour=words[2], size=words[1], place=" ".join(words[6:])))
    return Scene(tuple(things))


@cache
def scenes(split: str) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """All scenes of a split: those of one thing, those of two."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    singles = (Scene((Thing(*thing),)) for thing in product(SHAPES, COLOURS, SIZES, PLACES))
    pairs = (
        Scene(tuple(Thing(*thing) for thing in zip(shapes, colours, sizes, places)))
        for shapes in product(SHAPES, repeat=2)
        for colours in permutations(COLOURS, 2)
        for sizes in product(SIZES, repeat=2)
        for places in permutations(CORNERS, 2)
    )
    return tuple(s for s in singles if s.split == split), tuple(s for s in pairs if s.split == split)


def captions(split: str, n: int, seed: int) -> list[str]:
    """`n` distinct captions of a split in an order of the seed, a quarter of them (or all there are) of one thing."""
    singles, pairs = scenes(split)
    n_singles = max(min(round(SINGLES * n), len(singles)), n - len(pairs))
    if not 0 <= n <= len(singles) + len(pairs):
        raise ValueError(f"n {n} is not in 0 .. {len(singles) + len(pairs)}, the number of {split} captions")
    generator = torch.Generator().manual_seed(seed)

    def pick(pool: Sequence[Scene], k: int) -> list[Scene]:
        return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:k].tolist()]

    return [scene.caption for scene in pick(pick(singles, n_singles) + pick(pairs, n - n_singles), n)]


def layout(scenes: Sequence[Scene]) -> Tensor:
    """Indices of (shape, colour, size, place) of every thing: int64 [B, 2, 4], -1 where there is no second thing."""
    index = torch.full((len(scenes), 2, 4), -1)
    for b, scene in enumerate(scenes):
        for k, t in enumerate(scene.things):
            row = SHAPES.index(t.shape), COLOURS.index(t.colour), SIZES.index(t.size), PLACES.index(t.place)
            index[b, k] = torch.tensor(row)
    return index


def coverage(shape: Tensor, centre: Tensor, radius: Tensor, margin: float = 0.0) -> Tensor:
    """Share of each pixel that a shape covers, `clamp(0.5 + margin - signed distance, 0, 1)`.

    shape int64 [...], centre float [..., 2], radius float [...] -> float [..., 32, 32]; margin dilates, in pixels.
    """
    grid = torch.arange(SIDE, device=centre.device) + 0.5
    x = grid[None, :] - centre[..., 0, None, None]
    y = grid[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    dx, dy = x.abs(), y.abs()
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(dx, dy) - 0.92 * r
    # Apex up: sides of slope 2, unit normals (2, -1) / sqrt(5).
    triangle = torch.maximum((2 * dx - y - r) / 5**0.5, y - 0.9 * r)
    cross = torch.maximum(torch.minimum(dx, dy) - 0.34 * r, torch.maximum(dx, dy) - 1.05 * r)
    distances = torch.stack(torch.broadcast_tensors(circle, square, triangle, cross), dim=-3)
    index = shape[..., None, None, None].expand(*distances.shape[:-3], 1, SIDE, SIDE)
    return (0.5 + margin - distances.gather(-3, index).squeeze(-3)).clamp(0, 1)


def render_layout(index: Tensor, generator: torch.Generator | None = None, jitter: float = 1.0) -> Tensor:
    """Images of a `layout`: int64 [B, 2, 4] -> float32 [B, 3, 32, 32] in [0, 1]; jitter of place, size and colour
    from the generator, as many times the usual as `jitter` says, none without a generator."""
    shape, colour, size, place = index.clamp(min=0).unbind(-1)

    def uniform(*tail: int) -> Tensor:
        if generator is None:
            return torch.zeros(*shape.shape, *tail)
        return jitter * (torch.rand(*shape.shape, *tail, generator=generator) * 2 - 1)

    centre = torch.tensor(CENTRES)[place] + SHIFT * uniform(2)
    radius = torch.tensor(RADII)[size] * (1 + SCALE * uniform())
    paint = (torch.tensor(list(PALETTE.values()))[colour] + TINT * uniform(3)).clamp(0, 1)
    mask = coverage(shape, centre, radius) * (index[..., :1] >= 0).unsqueeze(-1)
    image = torch.tensor(BACKGROUND)[:, None, None].expand(len(index), 3, SIDE, SIDE)
    for k in range(index.shape[1]):
        image = image.lerp(paint[:, k, :, None, None], mask[:, k, None])
    return image


def render(scene: Scene, generator: torch.Generator | None = None) -> Tensor:
    """Image of a scene, float32 [3, 32, 32] in [0, 1]; canonical without a generator, jittered with one."""
    return render_layout(layout([scene]), generator)[0]
