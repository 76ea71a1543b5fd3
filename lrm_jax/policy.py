"""The generator that alignment trains: under adapters, beside the same without them.

  model = denoiser.load(generator, rewards).to_device()
  policy = make(model, lora.LoRAConfig(32, 64, lora.JOINT_ATTENTION), remat="full")
  adapters = policy.init(key)

  @jax.jit
  def program(params, adapters, cond, x, sigma):
    inputs = model.embed(params, cond)[denoiser.GENERATOR]
    v = policy.velocity_fn(params, adapters)(inputs, x, sigma)
    v_ref = model.velocity_fn(params)(inputs, x, sigma)
    return v, v_ref

  program(model.params, adapters, ...)

Adapters are a flat dict, path -> float32 array, in the layout of the component `lora`
of a model folder: stacked as in the whole transformer, wherever the denoiser is cut
and whether or not it scans its blocks. So `build.save_lora` takes them as they are,
and a run continues on a machine that cuts or scans otherwise.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax import build, denoiser, weights
from lrm_jax.models import lora, mmdit


@dataclasses.dataclass(frozen=True)
class Policy:
  """A denoiser's generator under adapters. Make one with `make`.

  The reference, the generator without them, is `denoiser.velocity_fn(params)`: both
  run on the denoiser's parameters, which stay as they are, and on what its `embed`
  gives. Its rewards do not see the adapters either; one that shares the generator's
  tokens has to compute them itself (`denoiser.reward_fn`), because the policy's are
  others.

  Attributes:
    config: where the adapters are, and their scale.
    like: path -> ShapeDtypeStruct of the adapters.
    scan_blocks: as the denoiser's.
    prefix, tail: static parts with adapters; as the denoiser's.
  """

  denoiser: denoiser.Denoiser
  config: lora.LoRAConfig
  like: dict[str, jax.ShapeDtypeStruct]
  scan_blocks: bool
  prefix: nnx.GraphDef
  tail: nnx.GraphDef | None

  def init(self, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh adapters, which change nothing yet: see `lora.add_adapters`.

    Each leaf's draw depends on the key and the leaf's path only.
    """
    adapters = {}
    for path, leaf in self.like.items():
      if path.endswith("/lora_b"):
        adapters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        continue
      own = jax.random.fold_in(key, zlib.crc32(path.encode()))
      a = lora.init_a(own, leaf.shape, self.config.rank, leaf.dtype)
      if not self.config.last_context and self._is_last_context(path):
        a = a.at[-1].set(0)  # with B = 0 it gets no gradient
      adapters[path] = a
    return adapters

  def _is_last_context(self, path: str) -> bool:
    """Whether a stack's last layer is the text side of the last block."""
    last = len(self.denoiser.config.segments) - 1
    return path.startswith(f"blocks/{last}/attn/context_")

  def velocity_fn(
    self, params: dict, adapters: Mapping[str, jax.Array]
  ) -> denoiser.NetworkFn:
    """The policy; inputs are `Denoiser.embed`'s `generator`.

    Args:
      params: the denoiser's.
      adapters: as `init` makes them.

    Returns: `(inputs, x (b H W C), sigma (b,)) -> velocity (b H W C)` float32.
    """
    parts = self._parts(adapters)
    prefix = nnx.merge(self.prefix, _joined(params["prefix"], parts["prefix"]))
    if self.tail is None:
      tail = prefix.output
    else:
      tail = nnx.merge(self.tail, _joined(params["tail"], parts["tail"]))
    return lambda inputs, x, sigma: tail(prefix.run(x, 1000.0 * sigma, inputs)[0])

  def _parts(self, adapters: Mapping[str, Any]) -> dict[str, dict]:
    """`prefix` and `tail`: the adapters of each, in its layout."""
    parts = {"prefix": weights.unflatten(adapters)}
    if self.tail is not None:
      full, depth = self.denoiser.config, self.denoiser.prefix_config.num_layers
      parts["prefix"], parts["tail"] = mmdit.split_params(parts["prefix"], full, depth)
    if not self.scan_blocks:
      parts = {name: mmdit.unstack_params(part) for name, part in parts.items()}
    return parts

  def fit(self, adapters: Mapping) -> dict[str, np.ndarray]:
    """Saved adapters, nested or flat, checked and as `init` makes them.

    To continue from a component `lora`: `fit(folder.load_params(path))`.

    Raises:
      FolderError: adapters of another config or generator (all differences listed).
    """
    found = weights.unflatten(weights.flatten(adapters))
    like = weights.unflatten(self.like)
    return weights.flatten(build.fit(found, like, name="saved adapters"))


def make(
  model: denoiser.Denoiser, config: lora.LoRAConfig, *, remat: str = "none"
) -> Policy:
  """A policy on a denoiser's generator; allocates nothing.

  Args:
    config: adapters, in the blocks only. Flow-GRPO's are
      `LoRAConfig(32, 64, lora.JOINT_ATTENTION)`.
    remat: one of `mmdit.REMATS`: what gradients recompute of each block.

  Raises:
    ValueError: an unknown `remat`, targets that match no layer or one outside of the
      blocks, or a generator that has adapters already.
  """
  if remat not in mmdit.REMATS:
    raise ValueError(f"remat={remat!r}: use one of {', '.join(mmdit.REMATS)}")
  if not config.targets:
    raise ValueError("LoRAConfig.targets=() has no layers for adapters")
  params = {
    name: model.params[name] for name in ("prefix", "tail") if name in model.params
  }
  if _adapters_of(params):
    raise ValueError(
      "the generator has adapters already (a component `lora`): load the folder that "
      "its `base` names, and continue from the adapters with Policy.fit"
    )
  like = _abstract_adapters(model.config, config)
  outside = sorted({p.rsplit("/", 1)[0] for p in like if not p.startswith("blocks/")})
  if outside:
    raise ValueError(
      f"LoRA targets {list(config.targets)} match {', '.join(outside)}: adapters can "
      "only be in the blocks, because a prompt is embedded once for the policy, its "
      "reference and rewards; start a target with blocks/ to mean a block's layer"
    )
  graphdefs = {
    name: _adapt(getattr(model, name), part, config, remat)
    for name, part in params.items()
  }
  return Policy(
    denoiser=model,
    config=config,
    like=like,
    scan_blocks=nnx.merge(model.prefix, params["prefix"]).scan_blocks,
    prefix=graphdefs["prefix"],
    tail=graphdefs.get("tail"),
  )


def _abstract_adapters(
  full: mmdit.MMDiTConfig, config: lora.LoRAConfig
) -> dict[str, jax.ShapeDtypeStruct]:
  """Those of the whole transformer, in the canonical layout."""

  def whole():
    model = mmdit.MMDiT(full, rngs=nnx.Rngs(0))
    lora.add_adapters(model, config, rngs=nnx.Rngs(0))
    return model

  return _adapters_of(weights.abstract(whole)[1])


def _adapters_of(params: Mapping) -> dict[str, Any]:
  flat = weights.flatten(params)
  return {p: a for p, a in flat.items() if p.rsplit("/", 1)[-1] in ("lora_a", "lora_b")}


def _adapt(
  graphdef: nnx.GraphDef, params: Mapping, config: lora.LoRAConfig, remat: str
) -> nnx.GraphDef:
  """A part's static part with the adapters that belong in it."""

  def part():
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    model = nnx.merge(graphdef, zeros)
    model.remat = remat
    # A target may have all of its layers on the other side of the cut.
    targets = lora.targets_in(model, config.targets)
    here = dataclasses.replace(config, targets=targets)
    lora.add_adapters(model, here, rngs=nnx.Rngs(0))
    return model

  return weights.abstract(part)[0]


def _joined(params: Mapping, adapters: Mapping) -> dict:
  """Base parameters and adapters, all in one tree."""
  return weights.unflatten({**weights.flatten(params), **weights.flatten(adapters)})
