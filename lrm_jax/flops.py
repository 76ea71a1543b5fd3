"""Floating-point operations of a forward pass, by formula (2 per multiply-add).

Counts matrix products and attention, as torch's FlopCounterMode does; element-wise
work adds about half a percent. XLA's own `cost_analysis` counts the body of a scan
once, whatever its length, so a utilisation must be computed from these.

Configs are duck-typed (`MMDiTConfig`, `QFormerHeadConfig`, ...): this module knows
arithmetic only. Axes: n image tokens, l text tokens, d width.
"""

from typing import Any

_TIME_DIM = 256  # width of the sinusoidal embedding (models.mmdit)


def image_tokens(config: Any, height: int, width: int) -> int:
  """Tokens of a latent of `height` x `width` pixels (512 px images: 64 x 64)."""
  return (height // config.patch_size) * (width // config.patch_size)


def mmdit(config: Any, n: int, l: int) -> int:  # noqa: E741
  """One forward pass of one sample through an `MMDiTConfig`'s transformer."""
  d = config.width
  patch = config.patch_size**2
  total = 2 * patch * config.in_channels * d * n
  total += 2 * config.context_dim * d * l
  total += 2 * (_TIME_DIM + config.pooled_dim) * d + 4 * d * d
  for i in range(config.num_layers):
    last = config.last_context_pre_only and i == config.num_layers - 1
    total += block(d, n, l, dual=i in config.dual_layers, last=last)
  if config.has_output:
    total += 4 * d * d + 2 * patch * config.out_channels * d * n
  return total


def block(d: int, n: int, l: int, *, dual: bool, last: bool) -> int:  # noqa: E741
  """One MMDiT block; `last`: it does not update the text stream.

  qkv 3, out 1 and MLP 8 products of d x d per token; a dual block has another
  attention on the image tokens. adaLN runs once per sample, not per token.
  """
  linear = 2 * d * d * (n * (16 if dual else 12) + l * (3 if last else 12))
  attention = 4 * (n + l) ** 2 * d + (4 * n * n * d if dual else 0)
  modulation = 2 * d * d * ((9 if dual else 6) + (2 if last else 6))
  return linear + attention + modulation


def qformer_head(config: Any, n: int, l: int) -> int:  # noqa: E741
  """One pass of a `QFormerHeadConfig`'s head over one noise level."""
  d, e, q = config.width, config.width // 4, config.num_queries
  streams = [(n, config.num_image_taps)]
  if config.num_text_taps:
    streams.append((l, config.num_text_taps))

  total = 0
  for tokens, taps in streams:
    modulation = 2 * config.token_dim * 2 * d + 2 * (2 * d) ** 2
    project_in = config.project_in or config.token_dim != d
    adapter = modulation + tokens * (2 * d * e + 2 * config.token_dim * d * project_in)
    total += taps * adapter + 2 * tokens * taps * e * d
    total += tokens * (2 * d * d + 2 * d)  # the gate
    total += 2 * 2 * tokens * d * d + 4 * q * tokens * d  # keys, values, attention
  total += 2 * (2 * q * d * d)  # query and output of the first attention
  total += 2 * (2 * q * d * d) + 2 * 2 * n * d * d + 4 * q * n * d  # the second
  return total + 16 * q * d * d + 2 * q * d


def conv_head(config: Any, height: int, width: int) -> int:
  """One pass of a `ConvHeadConfig`'s head over a latent of height x width."""
  c = config.base_channels
  total = 0
  for d_in, d_out in ((config.in_channels, c), (c, 2 * c), (2 * c, 2 * c)):
    height, width = (height + 1) // 2, (width + 1) // 2
    total += 2 * 9 * d_in * d_out * height * width
  return total + 2 * 2 * c * config.hidden + 2 * config.hidden


def lora(config: Any, rank: int, n: int, l: int) -> int:  # noqa: E741
  """The adapters of every attention projection of a backbone, one forward pass.

  Each projection d -> d has a pair d -> rank -> d.
  """
  d = config.width
  projections = 0
  for i in range(config.num_layers):
    last = config.last_context_pre_only and i == config.num_layers - 1
    projections += n * (8 if i in config.dual_layers else 4) + l * (3 if last else 4)
  return 4 * d * rank * projections


def reward(config: Any, height: int, width: int, l: int) -> int:  # noqa: E741
  """One score: a `RewardConfig`'s backbone, its adapters (unmerged), and its head."""
  n = image_tokens(config.backbone, height, width)
  total = mmdit(config.backbone, n, l)
  if config.lora is not None:
    total += lora(config.backbone, config.lora.rank, n, l)
  if hasattr(config.head, "num_queries"):
    return total + qformer_head(config.head, n, l)
  return total + conv_head(config.head, height, width)


def attention(config: Any, n: int, l: int) -> int:  # noqa: E741
  """The part of `mmdit` that is products of activations, not with weights."""
  d = config.width
  dual = sum(i in config.dual_layers for i in range(config.num_layers))
  return config.num_layers * 4 * (n + l) ** 2 * d + dual * 4 * n * n * d


# Passes over attention per training step, in units of its forward: itself and, in flash
# kernels, two and a half times that backward; with full rematerialisation once more.
ATTENTION_PASSES = {"none": 3.5, "attention": 3.5, "full": 4.5}


def reward_training(
  config: Any,
  height: int,
  width: int,
  l: int,  # noqa: E741
  *,
  train_backbone: bool,
) -> int:
  """Forward and backward of one score, as model FLOPs: no credit for recomputation.

  A trained product costs three forward passes: itself, and the gradients of both its
  factors. With a frozen backbone the gradients of its weights fall away; attention,
  which has no weights, still costs three. Adapters are not counted.
  """
  n = image_tokens(config.backbone, height, width)
  backbone = mmdit(config.backbone, n, l)
  if hasattr(config.head, "num_queries"):
    head = qformer_head(config.head, n, l)
  else:
    head = conv_head(config.head, height, width)
  if train_backbone:
    return 3 * (backbone + head)
  return 2 * backbone + attention(config.backbone, n, l) + 3 * head


# Dense bf16 FLOP/s per chip, from the vendors' data sheets, by jax's device_kind.
_PEAKS = (
  ("H200", 990e12),
  ("H100", 990e12),
  ("A100", 312e12),
  ("TPU v6 lite", 918e12),  # v6e
  ("TPU v5 lite", 197e12),  # v5e
  ("TPU v5", 459e12),  # v5p
  ("TPU v4", 275e12),
)


def peak(device_kind: str) -> float | None:
  """A chip's bf16 FLOP/s by its `device_kind`; None where we do not know it."""
  return next((value for name, value in _PEAKS if name in device_kind), None)
