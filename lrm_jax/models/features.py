"""What passes between text encoders, backbones and heads.

Axes: b batch, n image tokens, l text tokens, d width.
"""

from typing import Any

from flax import struct

# A leaf is an array, but not only: under eval_shape, vmap's in_axes or a sharding
# rule the same node holds shapes, axes or shardings. So no array type is enforced.
Leaf = Any


@struct.dataclass
class Cond:
  """A prompt as the backbone takes it.

  Attributes:
    context: (b l d) one token per CLIP position, followed by the T5 tokens.
    pooled: (b d) one vector per prompt.
  """

  context: Leaf
  pooled: Leaf


@struct.dataclass
class Embedded:
  """A prompt in the backbone's width: the text-side work of all noise levels.

  Attributes:
    context: (b l d) projected text tokens.
    pooled: (b d) the prompt's part of temb.
  """

  context: Leaf
  pooled: Leaf


@struct.dataclass
class Tokens:
  """The state of a backbone between two blocks.

  Attributes:
    image: (b n d), n = grid[0] * grid[1].
    text: (b l d).
    temb: (b d) embedding of the noise level and of the pooled prompt.
    grid: (height, width) of the image tokens; static under jit.
  """

  image: Leaf
  text: Leaf
  temb: Leaf
  grid: tuple[int, int] = struct.field(pytree_node=False)


@struct.dataclass
class Features:
  """What a backbone hands to a reward head.

  Attributes:
    temb: (b d) embedding of the noise level (and of the pooled prompt).
    image: image tokens after each tapped block, each (b n d), n = grid[0] * grid[1].
    text: text tokens after each tapped block, each (b l d).
    grid: (height, width) of the image tokens; static under jit.
  """

  temb: Leaf
  image: tuple[Leaf, ...]
  text: tuple[Leaf, ...]
  grid: tuple[int, int] = struct.field(pytree_node=False)
