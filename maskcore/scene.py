"""The built-in synthetic picture set: little scenes of people with and without masks.

Every picture shows one to eight people. The class says who wears a mask:

* 0, "nobody": no person in the picture wears a mask;
* 1, "everybody": every person wears one;
* 2, "not all": at least one person wears one and at least one does not.

A mask counts as worn only when it covers nose, mouth and chin. Pulled under the nose or down onto
the chin it counts as NOT worn; such masks appear in classes 0 and 2, so the mere presence of a
mask in the picture does not give the class away. Everything else (number of people, clothes,
scarves, hats, beards, hands, backgrounds, light) is drawn from the same distribution in every
class, except that class 2 needs at least two people.

A picture is a pure function of (seed, index, size): each has its own random stream, so neither the
order in which pictures are drawn nor the process that draws them matters.

Lengths inside a figure are in units of half its head's height: the head's centre is (0, 0), its
crown (0, -1), its chin (0, 1).
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("nobody", "everybody", "not all")

T = TypeVar("T")
Colour = tuple[int, int, int]
Point = tuple[float, float]
Canvas = ImageDraw.ImageDraw
# A map from u in -1..1 (left to right) and v in 0..1 (top to bottom) to a part of the figure.
Patch = Callable[[float, float], Point]
# Where a head is, and half its height, in pixels.
Place = tuple[float, float, float]

# Figures are drawn at this multiple of the final size and averaged down, for smooth edges.
OVERSAMPLING = 2
# Half the width of a head at its widest.
CHEEK = 0.77
# Relative frequency of one, two, ... eight people. Few people with large faces dominate, so that a
# small network can learn from a few thousand pictures.
CROWD = (0.36, 0.27, 0.16, 0.09, 0.05, 0.03, 0.02, 0.02)
# Head size (half height over the picture's shorter side) for one, two, ... eight people.
HEAD_LOW = (0.19, 0.16, 0.14, 0.12, 0.11, 0.10, 0.10, 0.09)
HEAD_HIGH = (0.33, 0.24, 0.19, 0.16, 0.14, 0.13, 0.12, 0.11)
# Share of the people without a mask who have one on, but wrongly.
WRONG_SHARE = 0.25


def _palette(codes: str) -> tuple[Colour, ...]:
    numbers = [int(code, 16) for code in codes.split()]
    return tuple((number >> 16, number >> 8 & 255, number & 255) for number in numbers)


SKIN = _palette("fadec8 f1cbae e5b896 d2a07c b8835e 966648 744d36 52372a")
HAIR = _palette("1c1818 34241c 563824 805430 be9458 e2c488 a04828 969698 dedcd8")
# The colours masks come in. Clothes, hats, scarves and backgrounds use them too, so that no colour
# means "mask".
MASK = _palette("a0cee6 a0cee6 f2f4f6 f2f4f6 80bec8 f0b8c8 28282e c6cace c4b8de")
CLOTH = _palette("b22c34 2c4680 347048 e2b23c 6e3e80 3c4046 d67846 ceba98 5a8cb4 865c42 e8e4da")
HAIR_STYLES = (
    "short",
    "short",
    "short",
    "long",
    "long",
    "bob",
    "curly",
    "bald",
    "bun",
    "headscarf",
)
PATTERNS = ("stripes", "bars", "dots", "check", "badge")


@dataclass(frozen=True)
class Mask:
    """A mask: how it looks and how it is worn ("right", "nose" for under it, or "chin")."""

    kind: str
    worn: str
    colour: Colour
    accent: Colour
    pattern: str


@dataclass(frozen=True)
class Person:
    """One person's traits; x, y (the head's centre) and head (half its height) are in pixels."""

    x: float
    y: float
    head: float
    tilt: float
    turn: float
    jaw: float
    skin: Colour
    hair: Colour
    hair_style: str
    hairline: float
    part: float
    hat: str
    hat_colour: Colour
    glasses: str
    frame_colour: Colour
    beard: str
    mouth: str
    eyes_open: float
    shoulders: float
    clothes: Colour
    clothes_accent: Colour
    clothes_pattern: str
    collar: str
    scarf: Colour | None
    prop: str
    prop_side: int
    prop_colour: Colour
    lit_from: int
    mask: Mask | None


class Pen:
    """Draws shapes given in a figure's own units: turned, tilted, scaled and moved into place."""

    def __init__(self, canvas: Canvas, person: Person, tilted: bool = True) -> None:
        self.canvas = canvas
        self.x, self.y, self.scale = person.x, person.y, person.head
        self.turn = person.turn if tilted else 0.0
        angle = person.tilt if tilted else 0.0
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def at(self, x: float, y: float) -> Point:
        """The canvas position of a point of the figure."""
        # Turning the head moves what lies at its front most and its outline not at all.
        x += self.turn * 0.34 * max(0.0, 1.0 - (x / CHEEK) ** 2)
        # The head tilts about a point in the neck.
        y -= 0.8
        return (
            self.x + self.scale * (x * self.cos - y * self.sin),
            self.y + self.scale * (x * self.sin + y * self.cos + 0.8),
        )

    def fill(self, points: Sequence[Point], colour: Colour, alpha: int = 255) -> None:
        """A filled polygon."""
        self.canvas.polygon([self.at(x, y) for x, y in points], fill=(*colour, alpha))

    def stroke(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """A line through the points, its width in the figure's units."""
        pixels = max(1, round(width * self.scale))
        self.canvas.line([self.at(x, y) for x, y in points], (*colour, 255), pixels, "curve")

    def band(self, x: float, top: Point, bottom: Point, colour: Colour) -> None:
        """An upright trapezium about x; its top and bottom are each a height and half a width."""
        (high, upper), (low, lower) = top, bottom
        corners = [(x - upper, high), (x + upper, high), (x + lower, low), (x - lower, low)]
        self.fill(corners, colour)

    def oval(self, x: float, y: float, rx: float, ry: float, ink: Colour, alpha: int = 255) -> None:
        """A filled ellipse."""
        self.fill(_arc(x, y, rx, ry, 0.0, 2 * math.pi, 22), ink, alpha)


class Stream:
    """A picture's random stream, with the few kinds of draw that this module needs."""

    def __init__(self, *key: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def between(self, low: float, high: float) -> float:
        """A uniform number."""
        return low + (high - low) * float(self.generator.random())

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self.generator.random()) < probability

    def count(self, low: int, high: int) -> int:
        """A uniform whole number, both ends included."""
        return int(self.generator.integers(low, high + 1))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self.generator.integers(len(options)))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, with probability proportional to its weight."""
        mark = self.between(0.0, sum(weights))
        for position, weight in enumerate(weights):
            mark -= weight
            if mark < 0:
                return position
        return len(weights) - 1


def draw(seed: int, index: int, size: int | None = None) -> tuple[Image.Image, int]:
    """Picture number `index` of set `seed`, and its class code.

    Args:
        seed: Which set; any number not below zero.
        index: Which picture of the set; any number not below zero.
        size: Side of the (square) picture in pixels. None gives each picture a size and shape of
            its own, about 325 to 612 pixels a side, as photographs have.

    Returns:
        The picture (RGB) and its class code, an index into CLASSES.
    """
    picture, code, _ = _render(seed, index, size)
    return picture, code


def jpeg(seed: int, index: int, size: int | None = None) -> tuple[bytes, int]:
    """The same picture as JPEG bytes (quality 60 to 95), and its class code."""
    picture, code, quality = _render(seed, index, size)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), code


def _class_code(seed: int, index: int) -> int:
    # Each run of three pictures has one of each class, so that any count of pictures is balanced.
    group, place = divmod(index, len(CLASSES))
    order = Stream(seed, group, 1).generator.permutation(len(CLASSES))
    return int(order[place])


def _render(seed: int, index: int, size: int | None) -> tuple[Image.Image, int, int]:
    code = _class_code(seed, index)
    stream = Stream(seed, index)
    quality = stream.count(60, 95)
    width, height = _frame_size(stream)
    if size is not None:
        width = height = size
    lit_from = stream.pick((-1, 1))
    large = (width * OVERSAMPLING, height * OVERSAMPLING)
    people = _people(stream, code, *large, lit_from)
    # Its pixels are repeated here and averaged again below: the background needs no smooth edges.
    picture = _backdrop(stream, width, height).resize(large, Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture, "RGBA")
    for person in people:
        _draw_person(canvas, person, large[1])
    picture = picture.reduce(OVERSAMPLING)
    return _photograph(picture, stream, lit_from), code, quality


def _frame_size(stream: Stream) -> tuple[int, int]:
    long_side = stream.count(480, 612)
    short_side = max(325, round(long_side * stream.between(0.62, 1.0)))
    return (short_side, long_side) if stream.chance(0.35) else (long_side, short_side)


# --- Who is in the picture ------------------------------------------------------------------------


def _people(stream: Stream, code: int, width: int, height: int, lit_from: int) -> list[Person]:
    """Everybody in the picture, from the farthest to the nearest."""
    # Class 2 cannot have one person only; the other counts keep their relative frequency.
    count = 1 + stream.weighted((0.0, *CROWD[1:]) if code == 2 else CROWD)
    places = _places(stream, count, width, height)
    masked = _who_is_masked(stream, code, count)
    pairs = zip(places, masked, strict=True)
    return [_person(stream, place, wears, lit_from) for place, wears in pairs]


def _who_is_masked(stream: Stream, code: int, count: int) -> list[bool]:
    if code != 2:
        return [code == 1] * count
    number = stream.count(1, count - 1)
    return [bool(place < number) for place in stream.generator.permutation(count)]


def _places(stream: Stream, count: int, width: int, height: int) -> list[Place]:
    """Where everybody's head is, farthest first, with no face hidden by somebody nearer."""
    largest = stream.between(HEAD_LOW[count - 1], HEAD_HIGH[count - 1]) * min(width, height)
    places: list[Place] = []
    attempt = 0
    while len(places) < count:
        attempt += 1
        if attempt % 40 == 0:
            # This many people do not fit at this size: begin again with smaller heads.
            places.clear()
            largest *= 0.97
        depth = stream.between(0.0, 1.0)
        head = largest * (0.74 + 0.26 * depth)
        top, bottom = head * 1.1, height - head * 1.3
        # Nearer people stand lower, as seen by a camera at eye level or above.
        y = top + (bottom - top) * min(1.0, max(0.0, 0.62 * depth + stream.between(-0.05, 0.5)))
        place = (stream.between(head, width - head), y, head)
        if all(_faces_clear(place, other) for other in places):
            places.append(place)
    return sorted(places, key=lambda place: place[2])


def _faces_clear(one: Place, other: Place) -> bool:
    """Whether the nearer of two people leaves the other's face in view."""
    (near_x, near_y, near), (far_x, far_y, far) = sorted((one, other), key=lambda place: -place[2])
    apart = abs(near_x - far_x)
    if near_y - far_y > 1.45 * near + 1.05 * far:
        return True  # Quite above the nearer head, hat and all.
    # Beside the nearer head, and not sunk behind the nearer shoulders.
    beside = apart > 1.02 * near + 0.85 * far
    above_shoulders = far_y + 1.1 * far < near_y + 1.5 * near
    return beside and (above_shoulders or apart > 2.1 * near + 0.85 * far)


def _person(stream: Stream, place: Place, wears: bool, lit_from: int) -> Person:
    x, y, head = place
    clothes, accent = _two_colours(stream)
    style = stream.pick(HAIR_STYLES)
    bearded = style in ("short", "bald", "curly") and stream.chance(0.45)
    return Person(
        x=x,
        y=y,
        head=head,
        tilt=stream.between(-0.1, 0.1) if stream.chance(0.6) else stream.between(-0.3, 0.3),
        turn=stream.between(-0.25, 0.25) if stream.chance(0.6) else stream.between(-0.75, 0.75),
        jaw=stream.between(0.46, 0.64),
        skin=_vary(stream, stream.pick(SKIN), 10),
        hair=_vary(stream, stream.pick(HAIR), 12),
        hair_style=style,
        hairline=stream.between(-0.66, -0.46),
        part=stream.between(-0.5, 0.5),
        hat=stream.pick(("beanie", "cap", "brim")) if stream.chance(0.2) else "none",
        hat_colour=_any_colour(stream),
        glasses=stream.pick(("round", "square", "sun")) if stream.chance(0.28) else "none",
        frame_colour=_vary(stream, stream.pick(((30, 30, 32), (110, 60, 40), (150, 140, 90))), 10),
        beard=stream.pick(("full", "goatee", "stubble", "moustache")) if bearded else "none",
        mouth=stream.pick(("closed", "smile", "grin", "open")),
        eyes_open=stream.between(0.75, 1.15) if stream.chance(0.93) else 0.12,
        shoulders=stream.between(1.55, 1.95),
        clothes=clothes,
        clothes_accent=accent,
        clothes_pattern=stream.pick(("plain", "plain", *PATTERNS)),
        collar=stream.pick(("round", "vee", "shirt", "jacket", "polo")),
        scarf=_any_colour(stream) if stream.chance(0.14) else None,
        prop=stream.pick(("hand", "cup", "phone")) if stream.chance(0.14) else "none",
        prop_side=stream.pick((-1, 1)),
        prop_colour=_any_colour(stream),
        lit_from=lit_from,
        mask=_mask(stream, wears),
    )


def _mask(stream: Stream, wears: bool) -> Mask | None:
    kind = stream.pick(("surgical", "surgical", "surgical", "cloth", "cloth", "cloth", "ffp"))
    colour, accent = _two_colours(stream)
    if kind != "cloth":
        colour = _vary(stream, stream.pick(MASK if kind == "surgical" else MASK[2:]), 8)
    worn = "right" if wears else stream.pick(("nose", "chin"))
    mask = Mask(kind, worn, colour, accent, stream.pick(("plain", *PATTERNS)))
    return mask if wears or stream.chance(WRONG_SHARE) else None


def _any_colour(stream: Stream) -> Colour:
    return _vary(stream, stream.pick(MASK if stream.chance(0.4) else CLOTH), 14)


def _two_colours(stream: Stream) -> tuple[Colour, Colour]:
    first, second = _any_colour(stream), _any_colour(stream)
    if sum(abs(a - b) for a, b in zip(first, second, strict=True)) < 90:
        second = _shade(first, 0.6) if sum(first) > 300 else _mix(first, (255, 255, 255), 0.55)
    return first, second


# --- Colours and outlines -------------------------------------------------------------------------


def _limited(red: float, green: float, blue: float) -> Colour:
    return (
        min(255, max(0, round(red))),
        min(255, max(0, round(green))),
        min(255, max(0, round(blue))),
    )


def _vary(stream: Stream, colour: Colour, amount: int) -> Colour:
    """A colour near this one: lightness and hue both moved a little."""
    light = stream.between(-amount, amount)
    red, green, blue = (part + light + stream.between(-amount, amount) / 2 for part in colour)
    return _limited(red, green, blue)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return _limited(red * factor, green * factor, blue * factor)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return _limited(red, green, blue)


def _arc(x: float, y: float, rx: float, ry: float, a: float, b: float, steps: int) -> list[Point]:
    """Points along an ellipse from angle a to b, clockwise from the right, as y points down."""
    turn = (b - a) / steps
    angles = [a + turn * step for step in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def _dome(x: float, y: float, rx: float, ry: float, steps: int = 14) -> list[Point]:
    """The upper half of an ellipse, left to right."""
    return _arc(x, y, rx, ry, math.pi, 2 * math.pi, steps)


def _bowl(x: float, y: float, rx: float, ry: float, steps: int = 12) -> list[Point]:
    """The lower half of an ellipse, right to left."""
    return _arc(x, y, rx, ry, 0.0, math.pi, steps)


def _mirrored(points: list[Point]) -> list[Point]:
    """A closed outline from its right half."""
    return points + [(-x, y) for x, y in reversed(points)]


def _half_width(y: float, jaw: float) -> float:
    """Half the width of a face at this height; a larger `jaw` is a narrower chin."""
    if y < 0:
        return CHEEK * math.sqrt(max(0.0, 1 - y * y))
    return CHEEK * math.pow(1 - min(1.0, y) ** 2.3, jaw)


def _cheek(low: float, high: float, jaw: float, wider: float = 1.0) -> list[Point]:
    """The right half of a face's outline between two heights."""
    heights = [low + (high - low) * step / 20 for step in range(21)]
    return [(_half_width(y, jaw) * wider, y) for y in heights]


def _strip(patch: Patch, top: float, bottom: float) -> list[Point]:
    """The outline of a patch between two of its own heights."""
    steps = [step / 7 for step in range(-7, 8)]
    return [patch(u, top) for u in steps] + [patch(u, bottom) for u in reversed(steps)]


def _across(patch: Patch, v: float) -> list[Point]:
    return [patch(step / 6, v) for step in range(-6, 7)]


def _pattern(pen: Pen, patch: Patch, pattern: str, colour: Colour, repeats: int) -> None:
    """Print a pattern on a patch; drawn in the patch's own u and v, it cannot spill over."""
    if pattern in ("stripes", "check"):
        for row in range(repeats):
            stripe = _strip(patch, row / repeats, (row + 0.5) / repeats)
            pen.fill(stripe, colour, 255 if pattern == "stripes" else 150)
    if pattern in ("bars", "check"):
        _bars(pen, patch, colour, repeats, 255 if pattern == "bars" else 150)
    elif pattern == "dots":
        for row in range(repeats):
            for column in range(repeats + 1):
                u = -0.9 + 1.8 * (column + row % 2 * 0.5) / (repeats + 0.5)
                x, y = patch(u, (row + 0.5) / repeats)
                pen.oval(x, y, 0.05, 0.05, colour)
    elif pattern == "badge":
        # To one side: in the middle of a mask it would look like an open mouth.
        x, y = patch(0.42, 0.4)
        size = 0.06 + 0.5 / repeats
        pen.oval(x, y, size, size, colour)
        pen.band(x, (y - size / 3, size / 2), (y + size / 3, size / 2), _shade(colour, 0.6))


def _bars(pen: Pen, patch: Patch, colour: Colour, repeats: int, alpha: int) -> None:
    along = [step / 6 for step in range(7)]
    for column in range(repeats):
        left = -1 + 2 * (column + 0.25) / repeats
        right = left + 1 / repeats
        bar = [patch(left, v) for v in along] + [patch(right, v) for v in along[::-1]]
        pen.fill(bar, colour, alpha)


# --- One person -----------------------------------------------------------------------------------


def _draw_person(canvas: Canvas, person: Person, bottom: float) -> None:
    body, head = Pen(canvas, person, tilted=False), Pen(canvas, person)
    mouth_covered = person.mask is not None and person.mask.worn == "right"
    _draw_back_hair(head, person)
    _draw_body(body, person, (bottom - person.y) / person.head)
    _draw_locks(head, person)
    _draw_neck(body, person)
    if person.scarf:
        _draw_scarf(body, person.scarf)
    _draw_head(head, person)
    _draw_eyes(head, person)
    _draw_beard(head, person)
    if not mouth_covered:
        _draw_mouth(head, person)
    if person.mask:
        _draw_mask(head, person, person.mask)
    if not mouth_covered:
        _draw_nose(head, person)
    _draw_shadow(head, person)
    _draw_front_hair(head, person)
    _draw_hat(head, person)
    _draw_glasses(head, person)
    _draw_prop(body, person)


def _draw_back_hair(pen: Pen, person: Person) -> None:
    colour = _shade(person.hair, 0.8)
    if person.hair_style in ("long", "bob"):
        length = 1.9 if person.hair_style == "long" else 0.95
        pen.fill(_mirrored([(0.0, -1.12), *_dome(0, -0.12, 0.96, 1.0)[8:], (0.95, length)]), colour)
    elif person.hair_style == "curly":
        for x, y in _arc(0, -0.15, 0.78, 0.86, 0.85 * math.pi, 2.15 * math.pi, 11):
            pen.oval(x, y, 0.34, 0.34, colour)
    elif person.hair_style == "bun":
        pen.oval(person.part * 0.5, -1.2, 0.36, 0.32, colour)


def _draw_body(pen: Pen, person: Person, depth: float) -> None:
    waist = min(depth, 5.4)
    if depth > waist:
        _draw_legs(pen, person, waist, depth)

    def patch(u: float, v: float) -> Point:
        drop = 0.26 * u * u + 0.5 * abs(u) ** 9
        return u * person.shoulders * (1 + 0.06 * v), 1.3 + drop + v * (waist - 1.2 - drop)

    pen.fill(_strip(patch, 0, 1), person.clothes)
    repeats = min(8, max(2, round(waist * 1.6)))
    _pattern(pen, patch, person.clothes_pattern, person.clothes_accent, repeats)
    for side in (-1, 1):
        arm = person.shoulders * 0.72 * side
        pen.stroke([(arm, 2.5), (arm * 1.04, waist)], _shade(person.clothes, 0.7), 0.05)
    dark = person.shoulders * -person.lit_from
    shade = [(dark, 1.75), (dark * 0.5, 1.6), (dark * 0.55, waist), (dark * 1.06, waist)]
    pen.fill(shade, (0, 0, 0), 30)


def _draw_legs(pen: Pen, person: Person, waist: float, depth: float) -> None:
    for side in (-1, 1):
        leg = person.shoulders * 0.36 * side
        pen.band(leg, (waist - 0.2, 0.58), (depth, 0.5), _shade(person.clothes_accent, 0.7))


def _draw_locks(pen: Pen, person: Person) -> None:
    """What falls onto the shoulders: long hair, or the lower part of a headscarf."""
    if person.hair_style == "long":
        for side in (-1, 1):
            lock = [(0.6, -0.4), (0.98, -0.1), (1.04, 1.0), (0.96, 2.1), (0.6, 2.2), (0.5, 1.0)]
            pen.fill([(side * x, y) for x, y in lock], _shade(person.hair, 0.88))
    elif person.hair_style == "headscarf":
        drape = [(0.9, 0.2), (1.0, 1.2), (0.7, 1.75)]
        pen.fill(_mirrored(drape), _shade(person.hat_colour, 0.85))


def _draw_neck(pen: Pen, person: Person) -> None:
    if person.hair_style == "headscarf":
        return
    skin = _shade(person.skin, 0.85)
    if person.collar == "vee":
        pen.fill([(-0.52, 1.32), (0.52, 1.32), (0.0, 2.0)], skin)
    elif person.collar == "round":
        pen.oval(0, 1.36, 0.55, 0.24, skin)
    elif person.collar == "jacket":
        pen.band(0, (1.32, 0.5), (2.9, 0.12), person.clothes_accent)
    pen.band(0, (0.5, 0.42), (1.2, 0.44), skin)
    pen.band(0, (1.2, 0.44), (1.38, 0.54), skin)
    pen.oval(0, 0.98, 0.42, 0.26, _shade(person.skin, 0.68))
    if person.collar in ("shirt", "polo", "jacket"):
        collar = _mix(person.clothes, person.clothes_accent, 0.35)
        for side in (-1, 1):
            flap = [(0.58, 1.12), (0.04, 1.5), (0.3, 1.78), (0.78, 1.42)]
            light = 1.08 if side == person.lit_from else 0.85
            pen.fill([(side * x, y) for x, y in flap], _shade(collar, light))


def _draw_scarf(pen: Pen, colour: Colour) -> None:
    pen.oval(0, 1.42, 0.82, 0.3, _shade(colour, 0.85))
    pen.fill(_bowl(0, 1.24, 0.72, 0.42) + _bowl(0, 1.24, 0.72, 0.14)[::-1], colour)
    pen.fill([(0.2, 1.55), (0.56, 1.5), (0.66, 2.7), (0.26, 2.75)], _shade(colour, 0.92))


def _draw_head(pen: Pen, person: Person) -> None:
    if person.hair_style != "headscarf":
        for side in (-1, 1):
            # The ear on the side that is turned away goes out of view.
            if side * person.turn < 0.45:
                pen.oval(side * 0.78, 0.1, 0.13, 0.23, _shade(person.skin, 0.88))
    pen.fill(_mirrored(_cheek(-1.0, 1.0, person.jaw)), person.skin)
    blush = _mix(person.skin, (214, 90, 80), 0.3)
    for side in (-1, 1):
        pen.oval(side * 0.42, 0.34, 0.2, 0.14, blush, 70)


def _draw_eyes(pen: Pen, person: Person) -> None:
    brow = _mix(person.hair, (40, 30, 26), 0.5)
    for side in (-1, 1):
        x = side * 0.33
        pen.oval(x, -0.04, 0.17, 0.12, _shade(person.skin, 0.86))
        pen.oval(x, -0.03, 0.14, 0.075 * person.eyes_open, (244, 242, 238))
        if person.eyes_open > 0.5:
            pen.oval(x + 0.05 * person.turn, -0.03, 0.065, 0.072, (62, 44, 34))
        pen.stroke(_dome(x, -0.02, 0.15, 0.1, 6), (40, 30, 28), 0.03)
        pen.stroke(_dome(x, -0.16, 0.19, 0.08, 6), brow, 0.06)


def _draw_nose(pen: Pen, person: Person) -> None:
    dark, light = _shade(person.skin, 0.72), _mix(person.skin, (255, 255, 255), 0.3)
    side = -person.lit_from
    pen.fill([(0.03 * side, -0.05), (0.18 * side, 0.34), (0.02 * side, 0.43)], dark, 190)
    pen.oval(0, 0.33, 0.14, 0.11, _shade(person.skin, 0.94))
    pen.oval(-0.02 * side, 0.29, 0.05, 0.07, light)
    pen.stroke(_bowl(0, 0.34, 0.15, 0.11, 8), dark, 0.04)
    for nostril in (-1, 1):
        pen.oval(nostril * 0.075, 0.4, 0.045, 0.03, _shade(person.skin, 0.4))


def _draw_mouth(pen: Pen, person: Person) -> None:
    lips = _mix(_shade(person.skin, 0.8), (176, 50, 60), 0.5)
    if person.mouth == "closed":
        pen.oval(0, 0.64, 0.25, 0.075, lips)
        pen.stroke([(-0.24, 0.64), (0.0, 0.65), (0.24, 0.64)], _shade(lips, 0.6), 0.03)
    elif person.mouth == "smile":
        pen.fill(_bowl(0, 0.58, 0.31, 0.15) + _bowl(0, 0.58, 0.31, 0.06)[::-1], lips)
        pen.stroke(_bowl(0, 0.58, 0.32, 0.1), _shade(lips, 0.6), 0.03)
    elif person.mouth == "grin":
        pen.fill(_bowl(0, 0.56, 0.35, 0.22), lips)
        pen.fill(_bowl(0, 0.58, 0.3, 0.15), (246, 244, 238))
    else:
        pen.oval(0, 0.65, 0.21, 0.17, lips)
        pen.oval(0, 0.66, 0.16, 0.12, (70, 24, 26))
        pen.fill(_dome(0, 0.61, 0.14, 0.07), (240, 238, 232))


def _draw_beard(pen: Pen, person: Person) -> None:
    hair = _shade(person.hair, 0.9)
    if person.beard in ("full", "stubble"):
        lip = [(0.62, 0.36), (0.34, 0.47)]
        outline = [(0.0, 0.47), *lip[::-1], *_cheek(0.1, 0.95, person.jaw, 1.02), (0.0, 1.08)]
        pen.fill(_mirrored(outline), hair, 235 if person.beard == "full" else 70)
    elif person.beard == "goatee":
        pen.oval(0, 0.9, 0.26, 0.22, hair)
    if person.beard in ("goatee", "moustache"):
        pen.fill(_dome(0, 0.56, 0.33, 0.12), hair)


# Height of a mask's edges: top and bottom at its middle, top and bottom at its sides.
EDGES = {
    "right": (0.06, 1.1, 0.26, 0.66),
    "nose": (0.5, 1.14, 0.4, 0.74),
    "chin": (0.84, 1.24, 0.56, 0.86),
}


def _draw_mask(pen: Pen, person: Person, mask: Mask) -> None:
    top, bottom, side_top, side_bottom = EDGES[mask.worn]

    def patch(u: float, v: float) -> Point:
        upper = top + (side_top - top) * abs(u) ** 1.6
        lower = bottom - (bottom - side_bottom) * abs(u) ** 2.4
        y = upper + (lower - upper) * v
        # No narrower than the face at its sides, and tucked in below the chin.
        return u * max(0.3, _half_width(min(y, 0.93), person.jaw)) * 1.03, y

    _draw_straps(pen, mask, side_top, side_bottom)
    pen.fill(_strip(patch, 0, 1), mask.colour)
    if mask.kind == "surgical":
        _draw_pleats(pen, patch, mask)
    elif mask.kind == "ffp":
        _draw_cup(pen, patch, mask)
    else:
        _pattern(pen, patch, mask.pattern, mask.accent, 4)
        pen.stroke([patch(0, v / 4) for v in range(5)], _shade(mask.colour, 0.75), 0.03)
    pen.stroke(_across(patch, 0), _shade(mask.colour, 0.72), 0.035)


def _draw_straps(pen: Pen, mask: Mask, top: float, bottom: float) -> None:
    strap = (236, 236, 236) if sum(mask.colour) > 240 else (60, 60, 64)
    # An FFP mask's upper strap runs round the head; the others have loops round the ears.
    upper = -0.1 if mask.kind == "ffp" and mask.worn != "chin" else 0.0
    for side in (-1, 1):
        pen.stroke([(side * 0.68, top + 0.05), (side * 0.82, upper)], strap, 0.045)
        pen.stroke([(side * 0.68, bottom - 0.04), (side * 0.84, 0.22)], strap, 0.045)


def _draw_pleats(pen: Pen, patch: Patch, mask: Mask) -> None:
    for v in (0.3, 0.5, 0.7):
        pen.stroke(_across(patch, v), _shade(mask.colour, 0.82), 0.04)
        pen.stroke(_across(patch, v + 0.05), _mix(mask.colour, (255, 255, 255), 0.35), 0.03)
    pen.stroke(_across(patch, 0.06), _mix(mask.colour, (255, 255, 255), 0.5), 0.07)


def _draw_cup(pen: Pen, patch: Patch, mask: Mask) -> None:
    """The lower panel and the seam of an FFP mask, and on some a valve."""
    dark = _shade(mask.colour, 0.84)
    panel = ((-0.95, 0.5), (0.0, 0.42), (0.95, 0.5), (0.6, 0.95), (-0.6, 0.95))
    pen.fill([patch(u, v) for u, v in panel], dark)
    pen.stroke([patch(u, v) for u, v in panel[:3]], _shade(dark, 0.8), 0.04)
    if mask.pattern in ("dots", "badge"):
        x, y = patch(0.42, 0.58)
        pen.oval(x, y, 0.12, 0.1, _shade(mask.colour, 0.66))
        pen.oval(x, y, 0.08, 0.06, _mix(mask.colour, (255, 255, 255), 0.3))


def _draw_shadow(pen: Pen, person: Person) -> None:
    """Shade the side of the face (and of its mask) away from the light."""
    cheek = [(-person.lit_from * x, y) for x, y in _cheek(-0.95, 0.99, person.jaw, 1.02)]
    for reach in (0.35, 0.5, 0.65, 0.8):
        pen.fill(cheek + [(x * reach, y) for x, y in reversed(cheek)], (20, 10, 20), 18)


def _draw_front_hair(pen: Pen, person: Person) -> None:
    if person.hair_style == "headscarf":
        face = _cheek(-0.72, 0.98, person.jaw, 0.98)
        edge = [(x * 1.2, y * 1.12) for x, y in _cheek(-1.0, 1.0, 0.5)]
        # Two halves of a ring, so that the face stays open between them.
        for side in (-1, 1):
            ring = [*edge, (0.0, 0.98), *reversed(face), (0.0, -0.72)]
            pen.fill([(side * x, y) for x, y in ring], person.hat_colour)
        return
    if person.hair_style == "bald":
        pen.oval(-0.25, -0.72, 0.2, 0.12, _mix(person.skin, (255, 255, 255), 0.35), 90)
        return
    low = {"long": 0.28, "bob": 0.28, "bun": -0.2}.get(person.hair_style, 0.0)
    temple = [(0.62, -0.36), (0.7, low - 0.1), (0.84, low)]
    fringe = [*temple[::-1], (person.part, person.hairline), *((-x, y) for x, y in temple)]
    pen.fill(_dome(0, -0.14, 0.86, 0.96) + fringe, person.hair)
    if person.hair_style == "curly":
        for x, y in _dome(0, -0.2, 0.68, 0.74, 7):
            pen.oval(x, y, 0.24, 0.22, person.hair)
    shine = _arc(0, -0.2, 0.6, 0.72, 1.3 * math.pi, 1.6 * math.pi, 6)
    pen.stroke(shine, _mix(person.hair, (255, 255, 255), 0.25), 0.06)


def _draw_hat(pen: Pen, person: Person) -> None:
    colour = person.hat_colour
    if person.hat == "none" or person.hair_style == "headscarf":
        return
    crown = _dome(0, -0.42, 0.9, 0.86)
    if person.hat == "beanie":
        pen.fill(crown, colour)
        pen.band(0, (-0.62, 0.93), (-0.34, 0.93), _shade(colour, 0.8))
        pen.oval(0, -1.3, 0.17, 0.15, _shade(colour, 1.1))
    elif person.hat == "cap":
        pen.fill(crown, colour)
        pen.oval(0, -0.42, 0.92, 0.16, _shade(colour, 0.7))
    else:
        pen.fill(_dome(0, -0.5, 0.74, 0.82), colour)
        pen.oval(0, -0.46, 1.3, 0.17, _shade(colour, 0.85))
        pen.band(0, (-0.66, 0.74), (-0.52, 0.74), _shade(colour, 0.5))


def _draw_glasses(pen: Pen, person: Person) -> None:
    if person.glasses == "none":
        return
    dark = person.glasses == "sun"
    for side in (-1, 1):
        x = side * 0.35
        if person.glasses == "square":
            lens = [(x - 0.24, -0.18), (x + 0.24, -0.18), (x + 0.22, 0.13), (x - 0.22, 0.13)]
            lens.append(lens[0])
        else:
            lens = _arc(x, -0.02, 0.25, 0.19, 0, 2 * math.pi, 14)
        pen.fill(lens, (24, 24, 30) if dark else (225, 235, 245), 235 if dark else 50)
        pen.stroke(lens, person.frame_colour, 0.05)
        pen.stroke([(side * 0.58, -0.06), (side * 0.78, -0.02)], person.frame_colour, 0.05)
    pen.stroke([(-0.1, -0.04), (0.1, -0.04)], person.frame_colour, 0.05)


def _draw_prop(pen: Pen, person: Person) -> None:
    """A hand by the chin, a cup or a telephone held up; the mouth stays in view."""
    if person.prop == "none":
        return
    side = person.prop_side
    x, y = {"hand": (0.62, 1.0), "cup": (0.5, 1.75), "phone": (1.0, 0.7)}[person.prop]
    x *= side
    elbow = x + side * 0.5
    forearm = [(x - 0.2, y + 0.4), (x + 0.2, y + 0.4), (elbow + 0.4, y + 2.6)]
    pen.fill([*forearm, (elbow - 0.4, y + 2.6)], _shade(person.clothes, 0.82))
    if person.prop == "cup":
        pen.band(x, (y - 0.42, 0.3), (y + 0.36, 0.24), person.prop_colour)
        pen.oval(x, y - 0.42, 0.3, 0.07, _shade(person.prop_colour, 0.6))
    elif person.prop == "phone":
        pen.band(x, (y - 0.75, 0.17), (y + 0.1, 0.17), (34, 34, 38))
    skin = _shade(person.skin, 0.94)
    pen.oval(x, y + 0.22, 0.27, 0.28, skin)
    for finger in range(4):
        tip = x - side * (0.24 - 0.14 * finger)
        finger_skin = _shade(skin, 0.93 + 0.03 * finger)
        pen.stroke([(tip, y + 0.2), (tip - side * 0.04, y - 0.16)], finger_skin, 0.12)


# --- Where they are -------------------------------------------------------------------------------


def _backdrop(stream: Stream, width: int, height: int) -> Image.Image:
    """The background, out of focus by a varying amount."""
    picture = Image.new("RGB", (width, height), _wall_colour(stream))
    paint = stream.pick((_plain, _room, _street, _park, _shelves, _bokeh))
    paint(ImageDraw.Draw(picture, "RGBA"), stream, width, height)
    blur = stream.between(0.0, 0.012) * min(width, height)
    return picture.filter(ImageFilter.BoxBlur(blur))


def _wall_colour(stream: Stream) -> Colour:
    options = (SKIN[:5], MASK, CLOTH, ((214, 206, 192), (176, 180, 178), (120, 124, 130)))
    colour = _vary(stream, stream.pick(stream.pick(options)), 16)
    return _mix(colour, (150, 146, 142), stream.between(0.0, 0.6))


def _box(canvas: Canvas, x: float, y: float, wide: float, high: float, colour: Colour) -> None:
    canvas.rectangle((x, y, x + wide, y + high), fill=colour)


def _plain(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    top, bottom = _wall_colour(stream), _wall_colour(stream)
    bottom = _mix(top, bottom, stream.between(0.2, 0.8))
    for step in range(40):
        y = height * step / 40
        _box(canvas, 0, y, width, height / 40 + 1, _mix(top, bottom, step / 39))


def _room(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    floor = height * stream.between(0.7, 0.95)
    _box(canvas, 0, floor, width, height, stream.pick(SKIN[3:]))
    wide, high = width * stream.between(0.2, 0.4), height * stream.between(0.25, 0.45)
    x, y = stream.between(0, width - wide), height * stream.between(0.05, 0.2)
    _box(canvas, x - 5, y - 5, wide + 10, high + 10, (236, 232, 224))
    _box(canvas, x, y, wide, high, _vary(stream, (196, 220, 238), 20))
    canvas.line((x + wide / 2, y, x + wide / 2, y + high), (236, 232, 224), 5)
    for _ in range(stream.count(1, 4)):
        wide, high = width * stream.between(0.06, 0.3), height * stream.between(0.08, 0.4)
        x, base = stream.between(-0.1, 0.9) * width, floor + height * 0.06
        if stream.chance(0.5):
            # A picture on the wall instead of furniture on the floor.
            base, wide, high = height * stream.between(0.2, 0.4), wide * 0.5, high * 0.5
        _box(canvas, x, base - high, wide, high, _any_colour(stream))
        inset, accent = wide * 0.12, _any_colour(stream)
        _box(canvas, x + inset, base - high * 0.88, wide - 2 * inset, high * 0.3, accent)


def _street(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    _box(canvas, 0, 0, width, height, _vary(stream, (190, 212, 232), 24))
    x = -width * 0.1
    while x < width:
        wide, top = width * stream.between(0.14, 0.34), height * stream.between(-0.1, 0.4)
        wall = _wall_colour(stream)
        _box(canvas, x, top, wide, height, wall)
        glass = _mix(wall, stream.pick(((40, 50, 64), (220, 230, 236), (240, 214, 150))), 0.7)
        columns, pane = stream.count(2, 4), height * stream.between(0.05, 0.08)
        for row in range(8):
            for column in range(columns):
                left = x + wide * (column + 0.25) / columns
                _box(canvas, left, top + pane * (0.8 + 1.8 * row), wide / columns / 2, pane, glass)
        x += wide
    _box(canvas, 0, height * stream.between(0.78, 0.95), width, height, (104, 104, 108))


def _park(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    _box(canvas, 0, 0, width, height, _vary(stream, (184, 214, 236), 24))
    ground = height * stream.between(0.45, 0.75)
    _box(canvas, 0, ground, width, height, _vary(stream, (112, 150, 72), 24))
    for _ in range(stream.count(3, 8)):
        x, size = stream.between(0, width), height * stream.between(0.1, 0.24)
        leaf = _vary(stream, stream.pick(((60, 110, 56), (90, 136, 60), (170, 120, 52))), 16)
        base = ground + stream.between(0.0, 0.1) * height
        _box(canvas, x - size * 0.1, base - size * 1.6, size * 0.2, size * 1.6, (92, 68, 50))
        for _ in range(4):
            left = x + size * stream.between(-1.3, -0.1)
            top = base - size * stream.between(1.8, 3.0)
            canvas.ellipse((left, top, left + size * 1.4, top + size * 1.3), fill=leaf)


def _shelves(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    rows = stream.count(3, 5)
    board = stream.pick(SKIN[2:])
    for row in range(rows):
        base, room = height * (row + 1) / rows, height / rows
        x = 0.0
        while x < width:
            wide = width * stream.between(0.02, 0.07)
            tall = room * stream.between(0.4, 0.85)
            if stream.chance(0.85):
                _box(canvas, x, base - tall, max(wide - 1, 0), tall, _any_colour(stream))
            x += wide
        _box(canvas, 0, base - room * 0.08, width, room * 0.08, board)


def _bokeh(canvas: Canvas, stream: Stream, width: int, height: int) -> None:
    _plain(canvas, stream, width, height)
    for _ in range(stream.count(15, 35)):
        x, y = stream.between(0, width), stream.between(0, height)
        radius = min(width, height) * stream.between(0.02, 0.09)
        colour = stream.pick((stream.pick(SKIN), stream.pick(MASK), stream.pick(CLOTH)))
        box = (x - radius, y - radius, x + radius, y + radius)
        canvas.ellipse(box, fill=(*colour, stream.count(60, 170)))


# --- The camera -----------------------------------------------------------------------------------


def _photograph(picture: Image.Image, stream: Stream, lit_from: int) -> Image.Image:
    """Focus and motion blur, light, white balance, contrast and noise."""
    width, height = picture.size
    picture = _blurred(picture, stream)
    contrast, light = stream.between(0.75, 1.1), stream.between(-20, 20)
    warmth, tint = stream.between(-0.12, 0.12), stream.between(-0.04, 0.04)
    field = _light_field(stream, width, height, lit_from)
    sigma = stream.between(0.0, 8.0)
    noise = stream.generator.standard_normal((height, width), dtype=np.float32) * np.float32(sigma)
    bands = []
    for band, gain in zip(picture.split(), (1 + warmth, 1 + tint, 1 - warmth), strict=True):
        # (level - 128) * contrast + 128 + light, times the gain and the light's share here.
        slope, offset = contrast * gain, (128 - 128 * contrast + light) * gain
        pixels = np.asarray(band) * (field * np.float32(slope))
        pixels += field * np.float32(offset) + noise
        bands.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return Image.merge("RGB", bands)


def _blurred(picture: Image.Image, stream: Stream) -> Image.Image:
    unit = min(picture.size) / 400
    soft, motion = stream.between(0.0, 0.9) * unit, stream.between(0.0, 2.2) * unit
    if stream.chance(0.4):
        return picture.filter(ImageFilter.BoxBlur((soft, soft)))
    if stream.chance(0.25):
        return picture.filter(ImageFilter.BoxBlur((motion, soft)))
    return picture


def _light_field(stream: Stream, width: int, height: int, lit_from: int) -> npt.NDArray[np.float32]:
    """Brightness over the picture: brighter towards the light, darker in the corners."""
    slope, vignette = stream.between(0.0, 0.18) * lit_from, stream.between(0.0, 0.15)
    across = np.linspace(-1, 1, width)[None, :]
    down = np.linspace(-1, 1, height)[:, None]
    return (1.04 + slope * across - vignette * (across * across + down * down)).astype(np.float32)
