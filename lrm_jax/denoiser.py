"""A generator and reward models, as the functions that samplers take.

All of them run over one tree of parameters, which is an argument of the jitted
program and holds one copy of what they have in common:

  denoiser = load(generator, {"dina": folder}).to_device()

  @jax.jit
  def program(params, cond, x, sigma):
    embedded = denoiser.embed(params, cond)
    v = denoiser.velocity_fn(params)(embedded["generator"], x, sigma)
    inputs = denoiser.reward_inputs(embedded)["dina"]
    return v, denoiser.reward_fn(params, "dina")(inputs, x, sigma)

  program(denoiser.params, ...)

Axes: b batch, H W latent pixels, C latent channels.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import os
from typing import Any

from flax import nnx
import jax

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import attention, features, lora, mmdit, reward

# (inputs, x (b H W C), sigma (b,)) -> velocity (b H W C), or scores (b,); float32.
NetworkFn = Callable[[features.Embedded, jax.Array, jax.Array], jax.Array]
# What the blocks before the cut return: the state behind them, and what they tapped.
Prefix = tuple[features.Tokens, features.Features]

GENERATOR = "generator"


@dataclasses.dataclass(frozen=True)
class RewardPart:
  """The static part of a reward model.

  Attributes:
    sharing: what it has in common with the generator.
      `prefix`: its backbone is the generator's first blocks, frozen (a head only);
        their tokens serve both.
      `weights`: the same, under adapters: the tokens are its own.
      `nothing`: it has a backbone of its own.
    embedded: the entry of `Denoiser.embed` that is its inputs.
  """

  config: reward.RewardConfig
  scoring: reward.ScoringConfig
  graphdef: nnx.GraphDef
  sharing: str
  embedded: str


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A generator, cut where the backbones end that rewards share with it.

  Make one with `load`. Methods that take `params` are for use inside jit.

  Attributes:
    config: of the whole generator.
    params: `prefix`, the blocks before the cut, or all; `tail`, the others;
      `rewards/<name>`, what a reward does not share.
    prefix, tail: static parts of the two; the latter None where nothing is cut.
    prefix_config: has the taps of all heads on the generator's tokens.
    rewards: by name.
  """

  config: mmdit.MMDiTConfig
  params: dict
  prefix: nnx.GraphDef
  prefix_config: mmdit.MMDiTConfig
  tail: nnx.GraphDef | None
  rewards: dict[str, RewardPart]

  def to_device(self, sharding: jax.sharding.NamedSharding | None = None) -> "Denoiser":
    """With parameters on the default device, or all as `sharding`."""
    return dataclasses.replace(self, params=build.to_device(self.params, sharding))

  def embed(self, params: dict, cond: features.Cond) -> dict[str, features.Embedded]:
    """Everything of the prompts' work that depends on neither x nor sigma.

    Returns: one entry per distinct set of weights: `generator`, and the names of the
      rewards with an embedding of their own. See `reward_inputs`.
    """
    embedded = {GENERATOR: nnx.merge(self.prefix, params["prefix"]).embed(cond)}
    for name, part in self.rewards.items():
      if part.embedded == name:
        embedded[name] = self._reward(params, name).backbone.embed(cond)
    return embedded

  def reward_inputs(self, embedded: Mapping[str, Any]) -> dict[str, Any]:
    """Each reward's entry of what `embed` returned, by the reward's name."""
    return {name: embedded[part.embedded] for name, part in self.rewards.items()}

  def velocity_fn(self, params: dict) -> NetworkFn:
    """The generator; inputs are `embed`'s `generator`."""
    prefix_fn, tail_fn = self.prefix_fn(params), self.tail_fn(params)
    return lambda inputs, x, sigma: tail_fn(prefix_fn(inputs, x, sigma)[0])

  def reward_fn(self, params: dict, name: str) -> NetworkFn:
    """A reward's raw score; inputs are its entry of `reward_inputs`."""
    model = self._reward(params, name)
    return lambda inputs, x, sigma: model(x, sigma, inputs)

  # -- in pieces, for `explore.SharedPrefix` --

  def prefix_fn(
    self, params: dict
  ) -> Callable[[features.Embedded, jax.Array, jax.Array], Prefix]:
    """The generator before the cut; inputs are `embed`'s `generator`."""
    model = nnx.merge(self.prefix, params["prefix"])
    return lambda inputs, x, sigma: model.run(x, 1000.0 * sigma, inputs)

  def tail_fn(self, params: dict) -> Callable[[features.Tokens], jax.Array]:
    """The generator behind the cut: velocity (b H W C) float32."""
    if self.tail is None:
      return nnx.merge(self.prefix, params["prefix"]).output
    return nnx.merge(self.tail, params["tail"])

  def head_fn(
    self, params: dict, name: str
  ) -> Callable[[features.Embedded, Prefix], jax.Array]:
    """`(inputs, prefix) -> (b,)` raw scores; the inputs are not read.

    Raises:
      ValueError: a reward that does not share the generator's tokens.
    """
    part = self.rewards[name]
    if part.sharing != "prefix":
      raise ValueError(
        f"reward {name!r} shares {part.sharing} with the generator: only a head on its "
        "frozen backbone reads the generator's tokens"
      )
    model, config = self._reward(params, name), part.config.backbone

    def head(inputs, prefix):
      del inputs
      tokens, feats = prefix

      def tapped(stream):
        taps = getattr(self.prefix_config, f"{stream}_taps")
        at = dict(zip(taps, getattr(feats, stream), strict=True))
        return tuple(at[i] for i in getattr(config, f"{stream}_taps"))

      return model.score(
        tokens, feats.replace(image=tapped("image"), text=tapped("text"))
      )

    return head

  def reward_params(self, params: dict, name: str) -> dict:
    """All of a reward's parameters: its own, and those of the generator's it uses."""
    part, own = self.rewards[name], params["rewards"][name]
    if part.sharing == "nothing":
      return own
    return _overlay(_shared_backbone(params, part.config), own)

  def _reward(self, params: dict, name: str) -> reward.RewardModel:
    return nnx.merge(self.rewards[name].graphdef, self.reward_params(params, name))


def load(
  generator: str | os.PathLike,
  rewards: Mapping[str, str | os.PathLike],
  *,
  dtype: str = "float32",
  scan_blocks: bool | None = None,
  attention_impl: str = "auto",
) -> Denoiser:
  """Reads a generator and reward models; parameters are numpy arrays.

  What a reward shares with the generator follows from its folder, see RewardPart; a
  generator with adapters (component `lora`) has no frozen blocks to share. There is
  one cut, where the first backbone ends that a reward shares: sharing rewards of
  another depth get a backbone of their own.

  Args:
    generator: a model folder with a transformer.
    rewards: name -> model folder.
    dtype: `float32` or `bfloat16`, of the backbones and their compute; adapters,
      the heads' parameters and all results are float32.
    scan_blocks: blocks under `lax.scan` (compiles fast) or unrolled (runs faster on a
      GPU). None: unrolled on a GPU, else scanned.
    attention_impl: `auto`, `xla` or `cudnn`.

  Raises:
    FolderError: a folder without the component that is asked of it.
    ValueError: a reward for other prompts or latents than the generator's.
  """
  if GENERATOR in rewards:
    raise ValueError(f"a reward cannot be named {GENERATOR!r}")
  attention.resolve(attention_impl, build.dtype(dtype))
  if scan_blocks is None:
    scan_blocks = jax.default_backend() != "gpu"
  options = dict(
    dtype=build.dtype(dtype), scan_blocks=scan_blocks, attention_impl=attention_impl
  )
  full = build.config_from_dict(folder_lib.find(generator, "transformer")[1]["config"])
  configs = {
    name: build.config_from_dict(folder_lib.find(path, "reward")[1]["config"])
    for name, path in rewards.items()
  }
  for name, config in configs.items():
    check_inputs(name, config.backbone, full)

  on_generator = {
    name: configs[name].backbone.num_layers
    for name, path in rewards.items()
    if _is_on_generator(path, generator)
  }
  depth = next(iter(on_generator.values()), full.num_layers)
  sharing = {name: configs[name] for name, d in on_generator.items() if d == depth}
  denoiser = _load_generator(generator, full, depth, sharing, **options)

  own, parts = {}, {}
  for name, path in rewards.items():
    if name in sharing:
      own[name], parts[name] = _load_sharing(name, path, denoiser.params, **options)
    else:
      model, scoring = build.load_reward(path, **options)
      own[name] = model.params
      parts[name] = RewardPart(model.config, scoring, model.graphdef, "nothing", name)
  params = {**denoiser.params, "rewards": own}
  return dataclasses.replace(denoiser, params=params, rewards=parts)


def abstract(
  full: mmdit.MMDiTConfig,
  rewards: Mapping[str, reward.RewardConfig],
  *,
  on_generator: Collection[str] = (),
  depth: int | None = None,
  dtype: str = "float32",
  scan_blocks: bool = True,
  attention_impl: str = "auto",
) -> Denoiser:
  """What `load` would make of model folders; parameters are ShapeDtypeStructs.

  Scores are reported raw: how they are published is not in a config.

  Args:
    full: the generator, without adapters.
    on_generator: names of the rewards whose backbone is the generator's first blocks,
      as they are or under adapters; the others have one of their own.
    depth: of the cut; None: where `load` cuts.
    dtype, attention_impl: as of `load`.
    scan_blocks: has no default of the platform, which need not be this one.

  Raises:
    ValueError: a reward for other prompts or latents than the generator's.
  """
  if unknown := sorted(set(on_generator) - set(rewards)):
    raise ValueError(f"on_generator={unknown}, but the rewards are {sorted(rewards)}")
  for name, config in rewards.items():
    check_inputs(name, config.backbone, full)
  options = dict(
    dtype=build.dtype(dtype), scan_blocks=scan_blocks, attention_impl=attention_impl
  )
  depths = {n: c.backbone.num_layers for n, c in rewards.items() if n in on_generator}
  if depth is None:
    depth = next(iter(depths.values()), full.num_layers)
  sharing = {name: rewards[name] for name, d in depths.items() if d == depth}
  denoiser = _abstract_generator(full, depth, sharing, None, **options)

  own, parts = {}, {}
  for name, config in rewards.items():
    graphdef, like = _abstract_reward(config, **options)
    own[name], shares, embedded = like, "nothing", name
    if name in sharing:
      shared = weights.flatten(_shared_backbone(denoiser.params, config))
      flat = weights.flatten(like)
      own[name] = weights.unflatten({p: a for p, a in flat.items() if p not in shared})
      shares, embedded = _sharing(config), _embedded(name, own[name])
    scoring = reward.ScoringConfig()
    parts[name] = RewardPart(config, scoring, graphdef, shares, embedded)
  params = {**denoiser.params, "rewards": own}
  return dataclasses.replace(denoiser, params=params, rewards=parts)


def check_inputs(
  name: str, backbone: mmdit.MMDiTConfig, full: mmdit.MMDiTConfig
) -> None:
  """Checks that a reward reads the generator's prompts and latents.

  Raises:
    ValueError: it does not.
  """
  for field in ("context_dim", "pooled_dim", "in_channels"):
    found, want = getattr(backbone, field), getattr(full, field)
    if found != want:
      raise ValueError(
        f"reward {name!r} has {field}={found}, the generator has {field}={want}: they "
        "cannot read the same prompts and latents"
      )


def _is_on_generator(folder: str | os.PathLike, generator: str | os.PathLike) -> bool:
  """Whether a reward's backbone is made of the generator's stored weights."""
  if folder_lib.find(folder, "reward")[1]["stored_backbone"] is not None:
    return False
  base, ours = (folder_lib.find(f, "transformer")[0] for f in (folder, generator))
  return base.resolve() == ours.resolve() and not folder_lib.has(generator, "lora")


def _abstract_generator(
  full: mmdit.MMDiTConfig,
  depth: int,
  sharing: Mapping[str, reward.RewardConfig],
  adapters: lora.LoRAConfig | None,
  *,
  dtype: Any,
  scan_blocks: bool,
  attention_impl: str,
) -> Denoiser:
  """The generator, cut after `depth` blocks (if any are left), without rewards."""
  frozen = [config.backbone for config in sharing.values() if config.lora is None]
  image_taps, text_taps = (
    tuple(sorted({t for c in frozen for t in getattr(c, name)}))
    for name in ("image_taps", "text_taps")
  )
  prefix_config = full.truncate(
    depth,
    has_output=depth == full.num_layers,
    image_taps=image_taps,
    text_taps=text_taps,
  )
  kw = dict(
    dtype=dtype,
    param_dtype=dtype,
    scan_blocks=scan_blocks,
    attention_impl=attention_impl,
  )

  def make(part):
    if part == "tail":
      return mmdit.Tail(full, depth, **kw, rngs=nnx.Rngs(0))
    model = mmdit.MMDiT(prefix_config, **kw, rngs=nnx.Rngs(0))
    if adapters is not None:
      lora.add_adapters(model, adapters, rngs=nnx.Rngs(0))
    return model

  graphdefs, like = {}, {}
  for part in ("prefix", "tail") if depth < full.num_layers else ("prefix",):
    graphdefs[part], like[part] = weights.abstract(functools.partial(make, part))
  return Denoiser(
    full, like, graphdefs["prefix"], prefix_config, graphdefs.get("tail"), {}
  )


def _load_generator(
  folder: str | os.PathLike,
  full: mmdit.MMDiTConfig,
  depth: int,
  sharing: Mapping[str, reward.RewardConfig],
  *,
  dtype: Any,
  scan_blocks: bool,
  attention_impl: str,
) -> Denoiser:
  """The same with its parameters, and the folder's adapters if it has any."""
  params = {"prefix": build.load_transformer(folder, dtype=dtype).params}
  adapters = None
  if folder_lib.has(folder, "lora"):
    path, entry = folder_lib.find(folder, "lora")
    adapters = build.config_from_dict(entry["config"])
    params["prefix"] = _overlay(params["prefix"], folder_lib.load_params(path))
  if depth < full.num_layers:
    params["prefix"], params["tail"] = mmdit.split_params(params["prefix"], full, depth)
  made = _abstract_generator(
    full,
    depth,
    sharing,
    adapters,
    dtype=dtype,
    scan_blocks=scan_blocks,
    attention_impl=attention_impl,
  )
  for part, like in made.params.items():
    if not scan_blocks:
      params[part] = mmdit.unstack_params(params[part])
    params[part] = build.fit(params[part], like, name=f"{folder}: {part}")
  return dataclasses.replace(made, params=params)


def _abstract_reward(
  config: reward.RewardConfig, *, dtype: Any, scan_blocks: bool, attention_impl: str
) -> tuple[nnx.GraphDef, dict]:
  """The static part of a whole reward model, and its abstract parameters."""
  return weights.abstract(
    lambda: build.make_reward(
      config,
      dtype=dtype,
      param_dtype=dtype,
      scan_blocks=scan_blocks,
      attention_impl=attention_impl,
    )
  )


def _sharing(config: reward.RewardConfig) -> str:
  """What a reward on the generator's weights shares, see RewardPart."""
  return "prefix" if config.lora is None else "weights"


def _embedded(name: str, own: Mapping) -> str:
  """Which embedding a reward on the generator's weights reads, given its own leaves."""
  adapts = not {"context_embed", "text_embed"}.isdisjoint(own.get("backbone", {}))
  return name if adapts else GENERATOR


def _load_sharing(
  name: str,
  folder: str | os.PathLike,
  params: Mapping[str, Any],
  *,
  dtype: Any,
  scan_blocks: bool,
  attention_impl: str,
) -> tuple[dict, RewardPart]:
  """What a reward adds to the generator's parameters, and its static part."""
  path, entry = folder_lib.find(folder, "reward")
  config = build.config_from_dict(entry["config"])
  graphdef, like = _abstract_reward(
    config, dtype=dtype, scan_blocks=scan_blocks, attention_impl=attention_impl
  )
  own = folder_lib.load_params(path)
  if "backbone" in own and not scan_blocks:
    own["backbone"] = mmdit.unstack_params(own["backbone"])
  shared = _shared_backbone(params, config)
  whole = build.fit(_overlay(shared, own), like, name=str(path))
  paths = weights.flatten(own)
  own = weights.unflatten(
    {p: leaf for p, leaf in weights.flatten(whole).items() if p in paths}
  )
  part = RewardPart(
    config=config,
    scoring=build.config_from_dict(entry["scoring"]),
    graphdef=graphdef,
    sharing=_sharing(config),
    embedded=_embedded(name, own),
  )
  return own, part


def _shared_backbone(params: Mapping[str, Any], config: reward.RewardConfig) -> dict:
  """`{"backbone": ...}`: what a sharing reward takes from the generator."""
  backbone = {k: v for k, v in params["prefix"].items() if k not in mmdit.OUTPUT}
  if config.backbone.has_output:
    last = params.get("tail", params["prefix"])
    backbone |= {k: last[k] for k in mmdit.OUTPUT}
  return {"backbone": backbone}


def _overlay(params: Mapping, more: Mapping) -> dict:
  """The leaves of both trees in one."""
  return weights.unflatten({**weights.flatten(params), **weights.flatten(more)})
