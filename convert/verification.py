"""Recomputes a freshly converted folder with PyTorch, component by component.

The torch side reads the original files with diffusers', transformers' and PEFT's own
loaders, never through our keymaps. One exception: a reward converted on `--base` is
put on that base's transformer as our exporter writes it, for its original is unknown.
Everything runs in float32; the two sides live one after the other, so that the peak
is one float32 copy of the largest component.
"""

from collections.abc import Callable, Mapping
import gc
import pathlib
from typing import Any

import diffusers
from diffusers.loaders import single_file_utils
from flax import nnx
import jax
import numpy as np
import safetensors
import single_file
import torch
import torch_configs
import torch_files
import torch_reference
import transformers

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import mmdit as mmdit_keymap
from lrm_jax.keymaps.engine import ConversionError
from lrm_jax.models import conv_head, features, mmdit

# ||ours - torch|| / ||torch||. Two float32 implementations of networks this deep
# differ by 1e-6 to 1e-4; one wrong tensor changes far more than 1e-3.
TOLERANCE = 1e-3
SUBFOLDERS = {
  "transformer": "transformer",
  "vae": "vae",
  "clip_l": "text_encoder",
  "clip_g": "text_encoder_2",
  "t5": "text_encoder_3",
}
PREFIXES = {
  "transformer": single_file.TRANSFORMER,
  "vae": single_file.VAE,
  "clip_l": single_file.CLIP_L,
  "clip_g": single_file.CLIP_G,
  "t5": single_file.T5,
}
Arrays = list[np.ndarray]


def verify(
  sd35: pathlib.Path | None,
  reward: pathlib.Path | None,
  out: pathlib.Path,
  names: list[str],
  dtype: str | None = None,
) -> None:
  """Compares the components `names` of the folder `out` with their originals.

  Prints `name  relative error  tolerance  ok` for each.

  Args:
    sd35: the original folder or single file; None if `out` has a base.
    reward: the original reward checkpoint, if there is one.
    dtype: what backbones and text encoders were converted to; the torch side is
      rounded alike. None: they kept their dtypes.

  Raises:
    ConversionError: errors above the tolerance; names them all.
  """
  bad = []
  for name in [n for n in names if n in SUBFOLDERS or n == "reward"]:
    entry = folder_lib.find(out, name)[1]
    config = build.config_from_dict(entry["config"])
    inputs = INPUTS[name](config)
    with torch.no_grad():
      if name == "reward":
        want = _torch_reward(sd35, reward, out, entry, dtype, inputs)
      else:
        want = TORCH[name](_load_torch(sd35, name, config, dtype), inputs)
    gc.collect()
    with jax.default_matmul_precision("highest"):
      got = OURS[name](out, inputs)
    gc.collect()
    error = max(_relative_error(a, b) for a, b in zip(got, want, strict=True))
    ok = error <= TOLERANCE  # false for NaN
    print(f"{name:12s} {error:.1e}  {TOLERANCE:.0e}  {'ok' if ok else 'FAILED'}")
    if not ok:
      bad.append(f"{name} ({error:.1e})")
  if bad:
    raise ConversionError(
      f"verification failed: {', '.join(bad)} differ from PyTorch by more than the "
      f"relative tolerance {TOLERANCE:.0e}"
    )


def _relative_error(got: np.ndarray, want: np.ndarray) -> float:
  if got.shape != want.shape:
    raise ConversionError(f"verification: shapes {got.shape} and {want.shape} differ")
  got, want = got.astype(np.float64), want.astype(np.float64)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- inputs: numpy, in torch's layout (NCHW) ----------------------------------------


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _latent_inputs(config: mmdit.MMDiTConfig) -> dict[str, np.ndarray]:
  """Not square, so that height and width cannot be confused."""
  side = config.patch_size * min(8, config.pos_embed_size)
  height = max(config.patch_size, side - 2 * config.patch_size)
  return {
    "x": _normal(1, 2, config.in_channels, height, side),
    "t": np.array([100.0, 900.0], np.float32),
    "context": _normal(2, 2, 12, config.context_dim),
    "pooled": _normal(3, 2, config.pooled_dim),
  }


def _vae_inputs(config):
  d = config.downsampling
  return {
    "image": _normal(1, 1, config.in_channels, 6 * d, 8 * d).clip(-1, 1),
    "z": _normal(2, 1, config.latent_channels, 6, 8),
  }


def _clip_inputs(config):
  """Random ids with an end token (in a legacy config: the largest id) inside."""
  rng = np.random.default_rng(1)
  ids = rng.integers(3, config.vocab_size - 1, (2, config.max_length))
  ids = np.where(ids == config.eos_token_id, config.vocab_size - 2, ids)
  legacy = config.eos_token_id == 2
  end = config.vocab_size - 1 if legacy else config.eos_token_id
  ids[0, config.max_length // 2 :] = end
  ids[1, -1] = end
  return {"ids": ids}


def _t5_inputs(config):
  return {"ids": np.random.default_rng(1).integers(0, config.vocab_size, (2, 24))}


INPUTS: dict[str, Callable[[Any], dict[str, np.ndarray]]] = {
  "transformer": _latent_inputs,
  "vae": _vae_inputs,
  "clip_l": _clip_inputs,
  "clip_g": _clip_inputs,
  "t5": _t5_inputs,
  "reward": lambda config: _latent_inputs(config.backbone),
}


# --- the PyTorch side ---------------------------------------------------------------

CLASSES = {
  "transformer": diffusers.SD3Transformer2DModel,
  "vae": diffusers.AutoencoderKL,
  "clip_l": transformers.CLIPTextModelWithProjection,
  "clip_g": transformers.CLIPTextModelWithProjection,
  "t5": transformers.T5EncoderModel,
}


def _tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
  return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _torch_transformer(model, inputs) -> Arrays:
  i = _tensors(inputs)
  return [model(i["x"], i["context"], i["pooled"], i["t"]).sample.numpy()]


def _torch_vae(model, inputs) -> Arrays:
  i = _tensors(inputs)
  posterior = model.encode(i["image"]).latent_dist
  image = model.decode(i["z"]).sample
  return [posterior.mean.numpy(), posterior.logvar.numpy(), image.numpy()]


def _torch_clip(model, inputs) -> Arrays:
  out = model(_tensors(inputs)["ids"], output_hidden_states=True)
  return [out.hidden_states[-2].numpy(), out.text_embeds.numpy()]


def _torch_t5(model, inputs) -> Arrays:
  return [model(_tensors(inputs)["ids"]).last_hidden_state.numpy()]


TORCH = {
  "transformer": _torch_transformer,
  "vae": _torch_vae,
  "clip_l": _torch_clip,
  "clip_g": _torch_clip,
  "t5": _torch_t5,
}


def _load_torch(sd35: pathlib.Path, name: str, config: Any, dtype: str | None):
  """One original component in float32, rounded to `dtype` as the conversion did."""
  if sd35.is_dir():
    folder = sd35 / SUBFOLDERS[name]
    diffusers_model = name in ("transformer", "vae")
    stem = "diffusion_pytorch_model" if diffusers_model else "model"
    _, variant = torch_files.find_component(folder, stem)
    key = "torch_dtype" if diffusers_model else "dtype"
    kwargs = {key: torch.float32, "variant": variant, "local_files_only": True}
    model = CLASSES[name].from_pretrained(folder, **kwargs)
  else:
    model = _from_single_file(sd35, name, config)
  return _rounded(model, None if name == "vae" else dtype).eval()


def _rounded(model: torch.nn.Module, dtype: str | None) -> torch.nn.Module:
  if dtype is None:
    return model
  return model.to(getattr(torch, dtype)).to(torch.float32)


def _from_single_file(path: pathlib.Path, name: str, config: Any) -> torch.nn.Module:
  prefix = PREFIXES[name]
  state = _read_state(path, prefix)
  if name == "transformer":
    state = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    values = torch_configs.transformer_config(config)
  elif name == "vae":
    values = torch_configs.vae_config(config)
    state = single_file_utils.convert_ldm_vae_checkpoint(state, values)
  else:
    inner = f"{prefix}transformer."
    state = {k.removeprefix(inner): v for k, v in state.items() if k.startswith(inner)}
    is_t5 = name == "t5"
    values = torch_configs.t5_config(config) if is_t5 else None
    if is_t5:
      state["encoder.embed_tokens.weight"] = state["shared.weight"]
    else:
      values = torch_configs.clip_config(config)
      state.pop("text_model.embeddings.position_ids", None)
      state.pop("logit_scale", None)
      state.setdefault("text_projection.weight", torch.eye(config.dim))
  return _filled(name, values, state)


def _filled(name: str, values: Mapping[str, Any], state: Mapping) -> torch.nn.Module:
  """The class of component `name` with these weights, in float32."""
  with torch.device("meta"):
    if name in ("transformer", "vae"):
      kwargs = {k: v for k, v in values.items() if not k.startswith("_")}
      model = CLASSES[name](**kwargs)
    else:
      model = CLASSES[name](CLASSES[name].config_class(**values))
  model.to_empty(device="cpu")
  model.load_state_dict(state, strict=True)
  for key, buffer in model.named_buffers():
    if key.endswith("position_ids"):  # not saved, so it is not in the state
      buffer.copy_(torch.arange(buffer.shape[-1]))
  return model


def _read_state(path: pathlib.Path, prefix: str) -> dict[str, torch.Tensor]:
  """The tensors of one file whose key starts with `prefix` (keys keep it)."""
  if path.suffix == ".safetensors":
    with safetensors.safe_open(path, framework="pt") as f:
      return {k: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}
  state = torch.load(path, map_location="cpu", weights_only=True)
  for outer in ("state_dict", "model", "module"):
    state = state.get(outer, state)
  state = {k.removeprefix("module."): v for k, v in state.items()}
  return {k: v for k, v in state.items() if k.startswith(prefix)}


def _exported_base(out: pathlib.Path) -> torch.nn.Module:
  """The base's transformer, back in torch through our own export."""
  path, entry = folder_lib.find(out, "transformer")
  config = build.config_from_dict(entry["config"])
  leaves = weights.flatten(folder_lib.load_params(path))
  leaves = {k: np.asarray(v, np.float32) for k, v in leaves.items()}
  exported = engine.export(mmdit_keymap.diffusers(config), leaves)
  state = {key: torch.from_numpy(array) for key, array in exported}
  return _filled("transformer", torch_configs.transformer_config(config), state).eval()


def _torch_reward(sd35, path, out, entry, dtype, inputs) -> Arrays:
  config = build.config_from_dict(entry["config"])
  if isinstance(config.head, conv_head.ConvHeadConfig):
    model = _torch_drm(path, entry, config, dtype)
  else:
    if sd35 is None:
      transformer = _exported_base(out)
    else:
      full = build.config_from_dict(folder_lib.find(out, "transformer")[1]["config"])
      transformer = _load_torch(sd35, "transformer", full, dtype)
    model = torch_reference.read_dina_release(path, transformer)
  i = _tensors(inputs)
  return [model(i["x"], i["t"], i["context"], i["pooled"])[:, 0].numpy()]


def _torch_drm(path: pathlib.Path, entry, config, dtype) -> torch.nn.Module:
  if path.is_dir():
    path = path / "model.safetensors"
  stored = build.config_from_dict(entry["stored_backbone"])
  state = _read_state(path, "transformer.")
  state = {k.removeprefix("transformer."): v for k, v in state.items()}
  values = torch_configs.transformer_config(stored)
  if not stored.last_context_pre_only:
    # diffusers' last block is always without a text output: build one more, drop it.
    values["num_layers"] += 1
    last = f"transformer_blocks.{stored.num_layers}."
    with torch.device("meta"):
      kwargs = {k: v for k, v in values.items() if not k.startswith("_")}
      extra = diffusers.SD3Transformer2DModel(**kwargs).state_dict()
    state |= {k: torch.zeros(v.shape) for k, v in extra.items() if k.startswith(last)}
  transformer = _rounded(_filled("transformer", values, state), dtype).eval()
  model = torch_reference.DrmReward(
    transformer,
    skip_last_blocks=values["num_layers"] - config.backbone.num_layers,
    base_channels=config.head.base_channels,
    num_groups=config.head.num_groups,
  )
  head = _read_state(path, "reward_output.")
  head = {k.removeprefix("reward_output."): v for k, v in head.items()}
  model.reward_output.load_state_dict(head)
  return model


# --- our side -----------------------------------------------------------------------


def _run(model: build.Model, call: Callable, *args) -> Any:
  """`call(model, *args)` under jit."""
  flat = weights.flatten(model.params)
  model.params.clear()
  for path in list(flat):  # one by one: no second copy of all of them
    flat[path] = jax.device_put(flat[path])
  params = weights.unflatten(flat)
  return jax.jit(lambda p, *a: call(nnx.merge(model.graphdef, p), *a))(params, *args)


def _nhwc(x: np.ndarray) -> np.ndarray:
  return x.transpose(0, 2, 3, 1)


def _nchw(x: jax.Array) -> np.ndarray:
  return np.asarray(x).transpose(0, 3, 1, 2)


def _our_transformer(out, i) -> Arrays:
  cond = features.Cond(context=i["context"], pooled=i["pooled"])
  model = build.load_transformer(out)
  v = _run(model, lambda m, *a: m(*a)[0], _nhwc(i["x"]), i["t"], cond)
  return [_nchw(v)]


def _our_vae(out, i) -> Arrays:
  def both(model, image, z):
    return (*model.encode(image), model.decode(z))

  arrays = _run(build.load_vae(out), both, _nhwc(i["image"]), _nhwc(i["z"]))
  return [_nchw(a) for a in arrays]


def _our_clip(name):
  def compute(out, i) -> Arrays:
    ids = i["ids"].astype(np.int32)
    arrays = _run(build.load_clip(out, name), lambda m, ids: m(ids), ids)
    return [np.asarray(a) for a in arrays]

  return compute


def _our_t5(out, i) -> Arrays:
  ids = i["ids"].astype(np.int32)
  return [np.asarray(_run(build.load_t5(out), lambda m, ids: m(ids), ids))]


def _our_reward(out, i) -> Arrays:
  cond = features.Cond(context=i["context"], pooled=i["pooled"])
  model, _ = build.load_reward(out)
  score = _run(model, lambda m, *a: m(*a), _nhwc(i["x"]), i["t"] / 1000, cond)
  return [np.asarray(score)]


OURS = {
  "transformer": _our_transformer,
  "vae": _our_vae,
  "clip_l": _our_clip("clip_l"),
  "clip_g": _our_clip("clip_g"),
  "t5": _our_t5,
  "reward": _our_reward,
}
