"""Low-rank adapters on the Dense layers of a model (Hu et al. 2021, arXiv 2106.09685).

The adapter's arithmetic lives in `layers.Dense`; here is where adapters go and how
they start.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp

from lrm_jax.models import layers

# Every projection of every attention: DiNa-LRM's list. Flow-GRPO's generator adapters
# leave out the image-only attention.
ALL_ATTENTION = (r"attn2?/(context_)?(qkv|out)",)
JOINT_ATTENTION = (r"attn/(context_)?(qkv|out)",)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which layers get adapters.

  Attributes:
    rank, alpha: r and alpha; the adapter's output is scaled by alpha / r.
    targets: regexes of module paths (without layer numbers, matched to their end).
    last_context: whether the last block's text-stream projections have adapters.
      DiNa-LRM leaves them out where that block's text tokens are not tapped. False
      zeroes both matrices there: neither then gets a gradient, so they stay zero.
  """

  rank: int
  alpha: int | float
  targets: tuple[str, ...] = ALL_ATTENTION
  last_context: bool = True

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"LoRAConfig.rank={self.rank} must be >= 1")


def add_adapters(
  model: nnx.Module, config: LoRAConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs
) -> None:
  """Attaches adapters to every target `Dense` of `model`, stacked blocks included.

  A ~ N(0, 1/r^2) and B = 0 (PEFT's "gaussian"), so that the model's output does not
  change. Adapters are float32 by default: in bfloat16 they would not move at a
  learning rate of 5e-5.

  Raises:
    ValueError: a target that matches no layer.
  """
  if unused := sorted(set(config.targets) - set(targets_in(model, config.targets))):
    raise ValueError(f"LoRA targets {unused} match no layer of the model")
  for name, dense in _dense_layers(model):
    if any(_hits(target, name) for target in config.targets):
      _attach(dense, config, param_dtype, rngs)
  if not config.last_context:
    _zero_last_context(model)


def targets_in(model: nnx.Module, targets: Iterable[str]) -> tuple[str, ...]:
  """Those of `targets` that match some layer of `model`."""
  names = [name for name, _ in _dense_layers(model)]
  return tuple(t for t in targets if any(_hits(t, name) for name in names))


def init_a(
  key: jax.Array, shape: Sequence[int], rank: int, dtype=jnp.float32
) -> jax.Array:
  """A fresh A: N(0, 1/r^2), PEFT's "gaussian"."""
  return nnx.initializers.normal(stddev=1.0 / rank)(key, shape, dtype)


def _dense_layers(model: nnx.Module) -> list[tuple[str, layers.Dense]]:
  """Each Dense, stacked ones once, with its path without layer numbers."""
  return [
    ("/".join(str(k) for k in path if not isinstance(k, int)), module)
    for path, module in nnx.iter_modules(model)
    if isinstance(module, layers.Dense)
  ]


def _hits(target: str, name: str) -> bool:
  return re.search(rf"(^|/)(?:{target})$", name) is not None


def _attach(dense: layers.Dense, config: LoRAConfig, param_dtype, rngs) -> None:
  *stack, d_in, d_out = dense.kernel.shape
  columns = dense.groups * config.rank
  a = init_a(rngs.params(), (*stack, d_in, columns), config.rank, param_dtype)
  dense.lora_a = layers.LoRAParam(a)
  dense.lora_b = layers.LoRAParam(jnp.zeros((*stack, config.rank, d_out), param_dtype))
  dense.lora_scale = config.alpha / config.rank


def _zero_last_context(model: nnx.Module) -> None:
  """Zeroes the A matrices of the last block's text stream (B is zero already)."""
  attn = model.blocks[-1].attn if model.scan_blocks else model.blocks[-1][-1].attn
  for name in ("context_qkv", "context_out"):
    dense = getattr(attn, name, None)
    if dense is not None and dense.lora_a is not None:
      a = dense.lora_a[...]
      zero = a.at[-1].set(0) if model.scan_blocks else jnp.zeros_like(a)
      dense.lora_a[...] = zero


def merge(params: dict, scale: float, groups: dict[str, int]) -> dict:
  """Folds adapters into their kernels: `kernel + scale * A B` per group, float32.

  For scoring only: a merged forward differs from the adapter's in the last bits,
  which is more than a policy-gradient clip range of 1e-4 forgives.

  Args:
    params: nested parameters with `lora_a`, `lora_b` beside some kernels.
    scale: alpha / r.
    groups: fused projections by the layer's name, e.g. {"qkv": 3, "context_qkv": 3};
      1 where not named.
  """

  def walk(node, name):
    if not isinstance(node, dict):
      return node
    if "lora_a" not in node:
      return {k: walk(v, k) for k, v in node.items()}
    g = groups.get(name, 1)
    a, b, kernel = node["lora_a"], node["lora_b"], node["kernel"]
    a = a.reshape(*a.shape[:-1], g, -1).astype(jnp.float32)
    b = b.reshape(*b.shape[:-1], g, -1).astype(jnp.float32)
    delta = jnp.einsum(
      "...dgr,...rgo->...dgo", a, b, precision=jax.lax.Precision.HIGHEST
    )
    merged = kernel.astype(jnp.float32) + scale * delta.reshape(kernel.shape)
    rest = {k: v for k, v in node.items() if k not in ("lora_a", "lora_b")}
    return {**rest, "kernel": merged.astype(kernel.dtype)}

  return walk(params, "")
