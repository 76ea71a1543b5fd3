"""From names and numbers to objects: the one module that knows every class.

Two sources of names: a model folder's `config.json`, and the ConfigDicts of
`configs/`. Plain dict literals, no registry.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
import functools
import inspect
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from lrm_jax import flow, losses, weights
from lrm_jax import folder as folder_lib
from lrm_jax import sharding as sharding_lib
from lrm_jax.data import digit_pairs, parquet
from lrm_jax.data import source as source_lib
from lrm_jax.keymaps import lora as lora_keymap
from lrm_jax.models import clip, conv_head, lora, mmdit, qformer_head, reward, t5, vae

CONFIG_CLASSES = {
  cls.__name__: cls
  for cls in (
    clip.CLIPTextConfig,
    conv_head.ConvHeadConfig,
    lora.LoRAConfig,
    mmdit.MMDiTConfig,
    qformer_head.QFormerHeadConfig,
    reward.RewardConfig,
    reward.ScoringConfig,
    t5.T5Config,
    vae.VAEConfig,
  )
}

DTYPES = {
  "float32": jnp.float32,
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
}

REWARD_PRESETS = {
  "dina_sd35m_12layers": reward.RewardConfig.dina_sd35m_12layers,
  "drm_2b": reward.RewardConfig.drm_2b,
  "drm_7b": reward.RewardConfig.drm_7b,
}


def config_to_dict(config: Any) -> dict[str, Any]:
  """A config dataclass as JSON-ready values, with its class under `type`."""
  values: dict[str, Any] = {"type": type(config).__name__}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    values[field.name] = (
      config_to_dict(value) if dataclasses.is_dataclass(value) else value
    )
  return values


def config_from_dict(values: Mapping[str, Any]) -> Any:
  """The inverse of `config_to_dict`.

  Raises:
    ValueError: an unknown class, or fields that its dataclass does not take.
  """
  values = dict(values)
  name = values.pop("type", None)
  if name not in CONFIG_CLASSES:
    raise ValueError(f"config type {name!r}: use one of {sorted(CONFIG_CLASSES)}")
  kwargs = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      value = config_from_dict(value)
    elif isinstance(value, list):
      value = tuple(value)
    kwargs[key] = value
  try:
    return CONFIG_CLASSES[name](**kwargs)
  except TypeError as e:
    raise ValueError(f"{name}: {e}") from e


def dtype(name: str) -> Any:
  """`float32`, `bfloat16` or `float16`.

  Raises:
    ValueError: another name.
  """
  if name not in DTYPES:
    raise ValueError(f"dtype {name!r}: use one of {sorted(DTYPES)}")
  return DTYPES[name]


@dataclasses.dataclass(frozen=True)
class Model:
  """A model split for functional use: `nnx.merge(graphdef, params)` inside jit."""

  graphdef: nnx.GraphDef
  params: dict
  config: Any


def fit(params: Mapping, like: Mapping, *, name: str) -> dict:
  """Checks loaded parameters against an abstract tree and casts to its dtypes.

  Raises:
    FolderError: missing, unexpected or misshapen parameters (all listed).
  """
  found, want = weights.flatten(params), weights.flatten(like)
  problems = [f"missing {p} of shape {want[p].shape}" for p in want if p not in found]
  problems += [f"unexpected {p}" for p in found if p not in want]
  problems += [
    f"{p} has shape {found[p].shape}, the model needs {want[p].shape}"
    for p in want
    if p in found and found[p].shape != want[p].shape
  ]
  if problems:
    raise folder_lib.FolderError(
      f"{name}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)
    )

  def cast(path):
    return np.asarray(found[path]).astype(want[path].dtype, copy=False)

  # numpy lets go of the interpreter while it casts: billions of weights, all cores.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return weights.unflatten(dict(zip(want, pool.map(cast, want), strict=True)))


def _load(folder, name: str, make: Callable[[Any], nnx.Module]) -> Model:
  path, entry = folder_lib.find(folder, name)
  config = config_from_dict(entry["config"])
  graphdef, like = weights.abstract(lambda: make(config))
  params = fit(folder_lib.load_params(path), like, name=str(path))
  return Model(graphdef, params, config)


def load_transformer(
  folder: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  scan_blocks: bool = True,
  attention_impl: str = "auto",
) -> Model:
  """The generator: an `mmdit.MMDiT` with all blocks (params are numpy arrays)."""
  path, entry = folder_lib.find(folder, "transformer")
  config = config_from_dict(entry["config"])
  graphdef, like = weights.abstract(
    lambda: mmdit.MMDiT(
      config,
      scan_blocks=scan_blocks,
      attention_impl=attention_impl,
      dtype=dtype,
      param_dtype=dtype if param_dtype is None else param_dtype,
      rngs=nnx.Rngs(0),
    )
  )
  params = folder_lib.load_params(path)
  if not scan_blocks:
    params = mmdit.unstack_params(params)
  return Model(graphdef, fit(params, like, name=str(path)), config)


def load_vae(folder: str | os.PathLike) -> Model:
  """The autoencoder, float32."""
  return _load(folder, "vae", lambda c: vae.VAE(c, rngs=nnx.Rngs(0)))


def load_clip(
  folder: str | os.PathLike, name: str, *, dtype: Any = jnp.float32
) -> Model:
  """`clip_l` or `clip_g`."""
  make = lambda c: clip.CLIPText(c, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
  return _load(folder, name, make)


def load_t5(folder: str | os.PathLike, *, dtype: Any = jnp.float32) -> Model:
  """The T5 encoder."""
  make = lambda c: t5.T5Encoder(c, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
  return _load(folder, "t5", make)


def make_reward(
  config: reward.RewardConfig,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  trained_dtype: Any = jnp.float32,
  scan_blocks: bool = True,
  remat: str = "none",
  attention_impl: str = "auto",
  rngs: nnx.Rngs | None = None,
) -> reward.RewardModel:
  """A freshly initialised reward model (under `nnx.eval_shape`: an abstract one)."""
  return reward.RewardModel(
    config,
    dtype=dtype,
    param_dtype=param_dtype,
    trained_dtype=trained_dtype,
    scan_blocks=scan_blocks,
    remat=remat,
    attention_impl=attention_impl,
    rngs=nnx.Rngs(0) if rngs is None else rngs,
  )


def load_reward(
  folder: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  trained_dtype: Any = jnp.float32,
  scan_blocks: bool = True,
  attention_impl: str = "auto",
) -> tuple[Model, reward.ScoringConfig]:
  """The reward model of a folder, its backbone assembled and truncated.

  A reward component either brings its own backbone (DRM, full fine-tunes) or only
  adapters and a head, on the folder's (or its base's) transformer (DiNa-LRM).

  Args:
    dtype: compute dtype.
    param_dtype: of the backbone's parameters; None means `dtype`.
    trained_dtype: of adapters and head.
  """
  path, entry = folder_lib.find(folder, "reward")
  config = config_from_dict(entry["config"])
  graphdef, like = weights.abstract(
    lambda: make_reward(
      config,
      dtype=dtype,
      param_dtype=dtype if param_dtype is None else param_dtype,
      trained_dtype=trained_dtype,
      scan_blocks=scan_blocks,
      attention_impl=attention_impl,
    )
  )
  params = folder_lib.load_params(path)
  params["backbone"] = assemble_backbone(folder, entry, params)
  if not scan_blocks:
    params["backbone"] = mmdit.unstack_params(params["backbone"])
  params = fit(params, like, name=str(path))
  return Model(graphdef, params, config), config_from_dict(entry["scoring"])


def assemble_backbone(
  folder: str | os.PathLike, entry: Mapping[str, Any], params: Mapping
) -> dict:
  """Stacked parameters of a reward's truncated backbone, adapters included."""
  config = config_from_dict(entry["config"])
  own = params.get("backbone", {})
  if entry["stored_backbone"] is not None:
    stored = config_from_dict(entry["stored_backbone"])
    return mmdit.truncate_params(own, stored, config.backbone)
  base_path, base_entry = folder_lib.find(folder, "transformer")
  full = config_from_dict(base_entry["config"])
  base = mmdit.truncate_params(folder_lib.load_params(base_path), full, config.backbone)
  return weights.unflatten({**weights.flatten(base), **weights.flatten(own)})


def tokenizer_folder(folder: str | os.PathLike) -> pathlib.Path:
  """The folder (this one or a base) that holds the tokenizers.

  Raises:
    FolderError: none does.
  """
  path, _ = folder_lib.find(folder, "tokenizers")
  return path.parent


def save_lora(
  out: pathlib.Path, params: Mapping, config: lora.LoRAConfig
) -> dict[str, Any]:
  """Writes a generator's adapters as the component `lora` of a model folder.

  Format: `lora/` is a checkpoint of the leaves `blocks/<segment>/<layer>/lora_a` and
  `lora_b` of the full transformer in canonical (stacked) layout, and nothing else;
  its entry in `config.json` is what is returned here. The transformer itself is found
  in the same folder or its base.

  Args:
    out: the folder, usually inside `folder.write_atomically`.
    params: the generator's parameters, nested or flat; only adapters are written.
    config: where the adapters are, and their scale.

  Returns: the entry for `config.json`'s `components["lora"]`.

  Raises:
    ValueError: `params` hold no adapters.
  """
  leaves = {
    path: np.asarray(leaf)
    for path, leaf in weights.flatten(params).items()
    if path.rsplit("/", 1)[-1] in ("lora_a", "lora_b")
  }
  if not leaves:
    raise ValueError("save_lora: these parameters hold no lora_a and lora_b")
  folder_lib.save_params(out / "lora", leaves)
  return {"config": config_to_dict(config)}


def save_reward(
  out: pathlib.Path,
  leaves: Mapping[str, np.ndarray],
  config: reward.RewardConfig,
  scoring: reward.ScoringConfig,
  *,
  stacked: bool,
) -> dict[str, Any]:
  """Writes a reward model as the component `reward` of a model folder.

  Args:
    out: the folder, usually inside `folder.write_atomically`.
    leaves: path -> array: the whole model, or only its adapters and head, for a
      reward on the backbone of the folder or its base.
    stacked: whether the blocks are stacked (the canonical layout) or unrolled.

  Returns: the entry for `config.json`'s `components["reward"]`.
  """
  if not stacked:
    leaves = stack_flat(leaves)
  folder_lib.save_params(out / "reward", leaves)
  own_backbone = any(p.startswith("backbone/") and "/lora_" not in p for p in leaves)
  entry: dict[str, Any] = {
    "kind": "dina" if hasattr(config.head, "num_queries") else "drm",
    "config": config_to_dict(config),
    "stored_backbone": config_to_dict(config.backbone) if own_backbone else None,
    "scoring": config_to_dict(scoring),
  }
  if config.lora is not None:
    targets, exclude = lora_keymap.peft_names(config.backbone, config.lora)
    entry["adapter"] = {"target_modules": targets, "exclude_modules": exclude}
  return entry


def to_device(
  params: Mapping, sharding: jax.sharding.NamedSharding | None = None
) -> Any:
  """numpy parameters -> device arrays: on the default device, or all as `sharding`."""
  if sharding is None:
    return jax.device_put(params)
  return jax.tree.map(lambda leaf: sharding_lib.put(leaf, sharding), params)


# --- from the ConfigDicts of configs/ ----------------------------------------------

TRANSFORMER_PRESETS = {
  "sd35_medium": mmdit.MMDiTConfig.sd35_medium,
  "sd35_large": mmdit.MMDiTConfig.sd35_large,
}


def full_transformer(model: ConfigDict) -> mmdit.MMDiTConfig:
  """The untruncated transformer of `config.model`.

  `model.transformer` names a preset; if it is empty, the base folder says.

  Raises:
    ValueError: an unknown preset.
  """
  name = model["transformer"]
  if not name:
    return config_from_dict(folder_lib.find(model["base"], "transformer")[1]["config"])
  if name not in TRANSFORMER_PRESETS:
    raise ValueError(
      f"model.transformer={name!r}: use one of {sorted(TRANSFORMER_PRESETS)} or ''"
    )
  return TRANSFORMER_PRESETS[name]()


def reward_config(model: ConfigDict, full: mmdit.MMDiTConfig) -> reward.RewardConfig:
  """`config.model` -> RewardConfig on the transformer `full`.

  Raises:
    ValueError: an impossible combination, named.
  """
  image_taps, text_taps = tuple(model["image_taps"]), tuple(model["text_taps"])
  backbone = full.truncate(
    model["num_layers"],
    has_output=model["has_output"],
    image_taps=image_taps,
    text_taps=text_taps,
  )
  head = dict(model["head"])
  if head["type"] == "QFormerHeadConfig":
    head |= dict(
      token_dim=backbone.width,
      num_image_taps=len(image_taps),
      num_text_taps=len(text_taps),
    )
  elif head["type"] == "ConvHeadConfig":
    if not backbone.has_output:
      raise ValueError("model.head ConvHeadConfig needs model.has_output=True")
    head |= dict(in_channels=backbone.out_channels)
  adapters = model["lora"]
  if adapters is not None:
    adapters = lora.LoRAConfig(
      **adapters, last_context=model["num_layers"] in text_taps
    )
  return reward.RewardConfig(
    backbone, config_from_dict(head), adapters, logistic=model["logistic"]
  )


def reward_factory(
  model: ConfigDict, config: reward.RewardConfig
) -> Callable[[nnx.Rngs], reward.RewardModel]:
  """`rngs -> RewardModel` with the dtypes and flags of `config.model`."""
  kwargs = dict(
    dtype=dtype(model["dtype"]),
    param_dtype=dtype(model["backbone_dtype"]),
    trained_dtype=dtype(model["trained_dtype"]),
    scan_blocks=model["scan_blocks"],
    remat=model["remat"],
    attention_impl=model["attention_impl"],
  )
  return lambda rngs: make_reward(config, rngs=rngs, **kwargs)


def base_backbone(
  model: ConfigDict,
  full: mmdit.MMDiTConfig,
  config: reward.RewardConfig,
  like: Mapping,
) -> dict[str, Any]:
  """Pretrained weights for the backbone from the base folder: path -> numpy array.

  Args:
    like: the whole reward model's abstract parameters; what is loaded is checked
      against and cast to them. Everything of the backbone but its adapters is loaded.

  Returns: paths start with `backbone/`; empty for `model.init == "random"`.

  Raises:
    ValueError: an unknown init, or a base folder of another architecture.
    FolderError: parameters that are missing or misshapen.
  """
  if model["init"] == "random":
    return {}
  if model["init"] != "base":
    raise ValueError(f"model.init={model['init']!r}: use 'base' or 'random'")
  path, entry = folder_lib.find(model["base"], "transformer")
  found = config_from_dict(entry["config"])
  if found != full:
    raise ValueError(
      f"{path} holds {found}, but model.transformer={model['transformer']!r} is {full}"
    )
  params = mmdit.truncate_params(folder_lib.load_params(path), full, config.backbone)
  if not model["scan_blocks"]:
    params = mmdit.unstack_params(params)
  wanted = {
    p: leaf
    for p, leaf in weights.flatten(like).items()
    if p.startswith("backbone/") and "/lora_" not in p
  }
  return weights.flatten(
    fit({"backbone": params}, weights.unflatten(wanted), name=str(path))
  )


def stack_flat(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Unrolled reward parameters (path -> array) in the canonical stacked layout."""
  params = weights.unflatten(leaves)
  if "backbone" in params:
    params["backbone"] = mmdit.stack_params(params["backbone"])
  return weights.flatten(params)


def pair_sources(
  data: ConfigDict,
) -> tuple[source_lib.PairSource, source_lib.PairSource]:
  """(training, held-out) pairs of `config.data`.

  Raises:
    ValueError: an unknown kind, or a name without a split.
    DataError: data that are missing or unusable.
  """
  kind, names = data["kind"], (data["train"], data["held_out"])
  if kind == "digits":
    keys = ("num_train", "num_held_out", "split_seed", "channels")
    keys += ("context_dim", "pooled_dim")
    digit_pairs.write(
      data["train"],
      data["held_out"],
      data["prompts"],
      data["samples"],
      **{key: data[key] for key in keys},
    )
  if kind in ("parquet", "digits"):
    return tuple(
      parquet.ParquetPairs(name, cache_blocks=data["cache_blocks"]) for name in names
    )
  if kind != "tfds":
    raise ValueError(f"data.kind={kind!r}: use 'parquet', 'tfds' or 'digits'")
  from lrm_jax.data import tfds_pairs  # a second to import, and rarely needed

  sources = []
  for key, name in zip(("train", "held_out"), names, strict=True):
    folder, separator, split = name.rpartition(":")
    if not separator:
      raise ValueError(f"data.{key}={name!r} must be FOLDER:SPLIT for data.kind='tfds'")
    sources.append(tfds_pairs.TfdsPairs(folder, split))
  return tuple(sources)


def loss_fn(loss: ConfigDict) -> Callable[..., jax.Array]:
  """`(r_chosen, r_rejected, sigma, preference) -> (b,)` of `config.loss`.

  Raises:
    ValueError: an unknown name, or options that the loss does not take.
  """
  options = dict(loss)
  name = options.pop("name")
  if name not in losses.LOSSES:
    raise ValueError(f"loss.name={name!r}: use one of {sorted(losses.LOSSES)}")
  function = losses.LOSSES[name]
  known = inspect.signature(function).parameters
  if unknown := sorted(set(options) - set(known)):
    raise ValueError(f"loss.{unknown[0]} is not an option of {name}")
  return functools.partial(function, **options)


def is_tie_aware(loss: ConfigDict) -> bool:
  """Whether `config.loss` knows what to do with a tie."""
  return loss["name"] in losses.TIE_AWARE


SIGMA_LOOKUPS = {"nearest": flow.nearest_sigma, "index": flow.indexed_sigma}


def sigma_fn(noise: ConfigDict) -> Callable[[jax.Array, int], jax.Array]:
  """`(key, b) -> sigma (b,)` of `config.noise`.

  Raises:
    ValueError: an unknown lookup (the distribution's name is checked by flow).
  """
  if noise["lookup"] not in SIGMA_LOOKUPS:
    raise ValueError(
      f"noise.lookup={noise['lookup']!r}: use one of {sorted(SIGMA_LOOKUPS)}"
    )
  lookup = SIGMA_LOOKUPS[noise["lookup"]]
  table = flow.train_sigmas(noise["shift"])
  options = dict(noise["options"])

  def draw(key, b):
    return lookup(flow.draw_u(key, (b,), noise["distribution"], **options), table)

  return draw
