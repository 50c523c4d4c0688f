"""Which part of a picture a network gets to see."""

import math

import numpy as np

#: (left, top, right, bottom) in pixels.
Box = tuple[float, float, float, float]

#: What part of the shorter side the middle has when testing: 224 of 256.
CENTRE = 224 / 256


def centre_box(width: int, height: int) -> Box:
    """Return the square in the middle, 7/8 of the shorter side."""
    side = CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, generator: np.random.Generator) -> Box:
    """Return a random part: 8 to 100 % of the area, sides in a ratio of 3:4 to 4:3.

    Szegedy et al., "Going deeper with convolutions", CVPR 2015.
    """
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        part_width, part_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if part_width <= width and part_height <= height:
            left = generator.uniform(0, width - part_width)
            top = generator.uniform(0, height - part_height)
            return left, top, left + part_width, top + part_height
    return centre_box(width, height)
