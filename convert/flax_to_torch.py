"""Writes a model folder's weights back as PyTorch files.

  python convert/flax_to_torch.py --model models/dina --format dina --out release
  python convert/flax_to_torch.py --model models/drm --format drm --out drm.safetensors
  python convert/flax_to_torch.py --model runs/flow_grpo --format lora \\
      --out lora.safetensors
  python convert/flax_to_torch.py --model models/sd35m --format diffusers --out sd35

`dina`: a DiNa-LRM release folder. `drm`: one file, .safetensors or .pt, and its
head.json beside it; without a suffix a folder with both. `lora`: the generator's
adapters, for StableDiffusion3Pipeline.load_lora_weights. `diffusers`: a
StableDiffusion3Pipeline folder. Tensors keep their dtypes and bits.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
import copy
import json
import pathlib
import shutil
import struct
from typing import Any

import command_line
import ml_dtypes
import numpy as np
import torch_configs

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.keymaps import clip as clip_keymap
from lrm_jax.keymaps import conv_head as conv_head_keymap
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import lora as lora_keymap
from lrm_jax.keymaps import mmdit as mmdit_keymap
from lrm_jax.keymaps import qformer_head as qformer_head_keymap
from lrm_jax.keymaps import t5 as t5_keymap
from lrm_jax.keymaps import vae as vae_keymap
from lrm_jax.keymaps.engine import ConversionError
from lrm_jax.models import conv_head, lora, mmdit, qformer_head, reward

Part = tuple[engine.Keymap, Mapping[str, np.ndarray]]
PICKLED = (".pt", ".pth", ".bin", ".ckpt")

# --- files --------------------------------------------------------------------------

_SAFETENSORS_NAMES = {
  np.dtype(np.float64): "F64",
  np.dtype(np.float32): "F32",
  np.dtype(np.float16): "F16",
  np.dtype(ml_dtypes.bfloat16): "BF16",
}


def write_safetensors(
  path: pathlib.Path,
  parts: Iterable[Part],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Streams parameters into a safetensors file, one torch tensor in memory at a time.

  The format: the header's length (8 bytes, little endian), the header (JSON: name ->
  dtype, shape, offsets), then the data. Wide dtypes come first, so that every tensor
  is aligned.
  """
  parts = list(parts)
  layout = {k: v for keymap, x in parts for k, v in engine.layout(keymap, x).items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
  end = 0
  for key in sorted(layout, key=lambda k: -layout[k][1].itemsize):
    shape, dtype = layout[key]
    start, end = end, end + int(np.prod(shape)) * dtype.itemsize
    header[key] = {
      "dtype": _SAFETENSORS_NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for key, array in _tensors(parts):
      f.seek(8 + len(text) + header[key]["data_offsets"][0])
      f.write(array.reshape(-1).view(np.uint8))


def _tensors(parts: Iterable[Part]) -> Iterator[tuple[str, np.ndarray]]:
  for keymap, leaves in parts:
    yield from engine.export(keymap, leaves)


def write_pickle(path: pathlib.Path, parts: Iterable[Part]) -> None:
  """torch.save of an OrderedDict of tensors."""
  import torch  # the convert extra

  def tensor(array):
    if array.dtype == ml_dtypes.bfloat16:  # numpy has no bfloat16: same bits
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  # A copy: arrays may be read-only views, which torch does not take.
  state = OrderedDict((key, tensor(array.copy())) for key, array in _tensors(parts))
  torch.save(state, path)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


def _component(
  model: pathlib.Path, name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(leaves by path, config entry)."""
  path, entry = folder_lib.find(model, name)
  return weights.flatten(folder_lib.load_params(path)), entry


def _under(leaves: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  return {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}


# --- reward models ------------------------------------------------------------------


def _reward_entry(model: pathlib.Path, fmt: str) -> tuple[Any, dict[str, Any]]:
  """(RewardConfig, config entry) of a reward that `fmt` can hold.

  Raises:
    ConversionError: it is of the other kind.
  """
  entry = folder_lib.find(model, "reward")[1]
  config = build.config_from_dict(entry["config"])
  heads = {"dina": qformer_head.QFormerHeadConfig, "drm": conv_head.ConvHeadConfig}
  if not isinstance(config.head, heads[fmt]):
    other = "drm" if fmt == "dina" else "dina"
    raise ConversionError(
      f"{model}: the reward has a {type(config.head).__name__.removesuffix('Config')}, "
      f"which --format {fmt} cannot hold; try --format {other}"
    )
  return config, entry


def write_dina(model: pathlib.Path, out: pathlib.Path) -> None:
  """A DiNa-LRM release folder: config.json, the head, the adapters in PEFT's format.

  Raises:
    ConversionError: the reward is not a frozen backbone with adapters and a head.
  """
  config, entry = _reward_entry(model, "dina")
  if entry["stored_backbone"] is not None:
    raise ConversionError(
      f"{model}: this reward trained its whole backbone, for which DiNa-LRM has no "
      "released format"
    )
  leaves, _ = _component(model, "reward")
  eta = None
  if config.logistic:
    eta = [float(leaves[f"squash/{name}"]) for name in ("eta3", "eta4")]
  write_json(out / "config.json", _dina_config(config, entry, eta))
  checkpoint = out / "checkpoint"
  checkpoint.mkdir()
  head = _under(leaves, "head/")
  write_pickle(checkpoint / "rm_head.pt", [(qformer_head_keymap.dina(), head)])
  if config.lora is None:
    return

  import peft  # the convert extra

  targets, exclude = _adapter_names(config.backbone, config.lora, entry)
  folder = checkpoint / "backbone_lora"
  folder.mkdir()
  peft.LoraConfig(
    r=config.lora.rank,
    lora_alpha=config.lora.alpha,
    init_lora_weights="gaussian",
    target_modules=targets,
    exclude_modules=exclude or None,
    inference_mode=True,
  ).save_pretrained(folder)
  keymap = lora_keymap.peft(config.backbone, targets, exclude)
  adapters = _under(leaves, "backbone/")
  write_safetensors(folder / "adapter_model.safetensors", [(keymap, adapters)])


def _adapter_names(
  backbone: mmdit.MMDiTConfig, config: lora.LoRAConfig, entry: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
  """PEFT's module lists: those of the converted adapter, if it was converted."""
  if "adapter" in entry:
    adapter = entry["adapter"]
    return adapter["target_modules"], adapter["exclude_modules"]
  return lora_keymap.peft_names(backbone, config)


def _dina_config(
  config: reward.RewardConfig, entry: Mapping[str, Any], eta: list[float] | None
) -> dict[str, Any]:
  """The release's config.json: the one it came with, or written from our configs."""
  if "release" in entry:
    release = copy.deepcopy(entry["release"])
  else:
    head = config.head
    adapter = None
    if config.lora is not None:
      adapter = {
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "init_lora_weights": "gaussian",
      }
    release = {
      "model": {
        "model_type": "thurstone",
        "num_transformer_layers": config.backbone.num_layers,
        "freeze_backbone": config.lora is None,
        "use_lora": config.lora is not None,
        "use_text_features": bool(config.backbone.text_taps),
        "lora_config": adapter,
        "use_logistic": config.logistic,
        "visual_head_idx": list(config.backbone.image_taps),
        "text_head_idx": list(config.backbone.text_taps),
        "use_t_embed": True,
        "reward_head": {
          "use_proj_in": head.project_in,
          "width": -1 if head.width == head.token_dim else head.width,
          "out_dim": 1,
          "num_queries": head.num_queries,
          "num_attn_heads": head.num_heads,
          "dropout": head.dropout,
        },
      },
      "training": {"add_noise": entry["scoring"]["add_noise"]},
    }
  if eta is not None:
    # The original's files lose its learned squashing; ours keep it here.
    release["model"]["logistic_eta"] = eta
  return release


def drm_parts(model: pathlib.Path) -> tuple[list[Part], dict[str, Any]]:
  """What a DRM checkpoint holds, and its head.json."""
  config, entry = _reward_entry(model, "drm")
  if entry["stored_backbone"] is None or config.lora is not None:
    raise ConversionError(
      f"{model}: DRM's format holds a whole trained backbone, this reward has "
      + ("adapters" if config.lora is not None else "none of its own")
    )
  leaves, _ = _component(model, "reward")
  stored = build.config_from_dict(entry["stored_backbone"])
  parts = [
    (
      mmdit_keymap.diffusers(stored, prefix="transformer."),
      _under(leaves, "backbone/"),
    ),
    (conv_head_keymap.drm(), _under(leaves, "head/")),
  ]
  head = {
    **entry.get("release", {}),
    "skip_last_blocks": _full_depth(model, stored) - config.backbone.num_layers,
    "base_channels": config.head.base_channels,
    "num_groups": config.head.num_groups,
  }
  return parts, head


def _full_depth(model: pathlib.Path, stored: mmdit.MMDiTConfig) -> int:
  """Blocks of the transformer that the reward was cut from."""
  if stored.last_context_pre_only:
    return stored.num_layers  # only the last block of a full one is
  entry = folder_lib.find(model, "transformer")[1]
  return build.config_from_dict(entry["config"]).num_layers


# --- the generator ------------------------------------------------------------------


def write_lora(model: pathlib.Path, out: pathlib.Path) -> None:
  """One safetensors file for diffusers' `load_lora_weights`.

  diffusers reads the scale from `lora_adapter_metadata` in the file's header (PEFT's
  LoraConfig as JSON, keys prefixed with the component); without it, it would take
  alpha = r.
  """
  leaves, entry = _component(model, "lora")
  config = build.config_from_dict(entry["config"])
  transformer = build.config_from_dict(
    folder_lib.find(model, "transformer")[1]["config"]
  )
  targets, exclude = _adapter_names(transformer, config, entry)
  modules = lora_keymap.modules(transformer, targets, exclude)
  adapter = {
    "r": config.rank,
    "lora_alpha": config.alpha,
    "init_lora_weights": "gaussian",
    "target_modules": modules,
  }
  adapter = {f"transformer.{key}": value for key, value in adapter.items()}
  keymap = lora_keymap.peft(transformer, targets, exclude, prefix="transformer.")
  write_safetensors(
    out, [(keymap, leaves)], metadata={"lora_adapter_metadata": json.dumps(adapter)}
  )


PIPELINE = {  # component -> (folder, library, class, weights' stem)
  "transformer": (
    "transformer",
    "diffusers",
    "SD3Transformer2DModel",
    "diffusion_pytorch_model",
  ),
  "vae": ("vae", "diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
  "clip_l": ("text_encoder", "transformers", "CLIPTextModelWithProjection", "model"),
  "clip_g": ("text_encoder_2", "transformers", "CLIPTextModelWithProjection", "model"),
  "t5": ("text_encoder_3", "transformers", "T5EncoderModel", "model"),
}
KEYMAPS = {
  "transformer": mmdit_keymap.diffusers,
  "vae": vae_keymap.diffusers,
  "clip_l": clip_keymap.transformers,
  "clip_g": clip_keymap.transformers,
  "t5": t5_keymap.transformers,
}
CONFIGS = {
  "transformer": torch_configs.transformer_config,
  "vae": torch_configs.vae_config,
  "clip_l": torch_configs.clip_config,
  "clip_g": torch_configs.clip_config,
  "t5": torch_configs.t5_config,
}


def write_diffusers(model: pathlib.Path, out: pathlib.Path) -> None:
  """A StableDiffusion3Pipeline folder; at most one component in memory.

  diffusers loads a folder without T5 only if told `text_encoder_3=None,
  tokenizer_3=None`.

  Raises:
    FolderError: a component of the pipeline is missing (only T5 may be).
  """
  with_t5 = folder_lib.has(model, "t5")
  names = [name for name in PIPELINE if name != "t5" or with_t5]
  for name in (*names, "tokenizers", "scheduler"):  # before anything is written
    folder_lib.find(model, name)

  index: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder_3": [None, None],
    "tokenizer_3": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
  }
  for name in names:
    folder, library, cls, stem = PIPELINE[name]
    leaves, entry = _component(model, name)
    config = build.config_from_dict(entry["config"])
    values = CONFIGS[name](config)
    if library == "transformers":
      leaves = _with_projection(leaves, config)
      values["dtype"] = str(next(iter(leaves.values())).dtype)
    (out / folder).mkdir()
    write_json(out / folder / "config.json", values)
    path = out / folder / f"{stem}.safetensors"
    write_safetensors(path, [(KEYMAPS[name](config), leaves)])
    index[folder] = [library, cls]
    del leaves

  tokenizers = build.tokenizer_folder(model)
  for folder in ("tokenizer", "tokenizer_2", "tokenizer_3")[: 3 if with_t5 else 2]:
    source = tokenizers / folder
    shutil.copytree(source, out / folder, copy_function=shutil.copyfile)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    index[folder] = ["transformers", settings["tokenizer_class"]]
  scheduler = folder_lib.find(model, "scheduler")[0] / "scheduler_config.json"
  values = json.loads(scheduler.read_text())
  (out / "scheduler").mkdir()
  write_json(
    out / "scheduler" / "scheduler_config.json",
    {"_class_name": "FlowMatchEulerDiscreteScheduler", **values},
  )
  write_json(out / "model_index.json", index)


def _with_projection(leaves: dict[str, np.ndarray], config: Any) -> dict:
  """transformers' CLIP always projects: a missing projection becomes the identity."""
  if getattr(config, "projection_dim", config) is not None:
    return leaves
  dtype = next(iter(leaves.values())).dtype
  return {**leaves, "projection/kernel": np.eye(config.dim, dtype=dtype)}


# --- doing it -----------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", type=pathlib.Path, required=True, help="model folder")
  parser.add_argument(
    "--format", required=True, choices=["dina", "drm", "lora", "diffusers"]
  )
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--force", action="store_true", help="replace --out")
  args = parser.parse_args(argv)
  with command_line.one_line_errors():
    run(args)


def run(args: argparse.Namespace) -> None:
  """The export that the command line describes."""
  folder_lib.read_config(args.model)
  options = dict(force=args.force, sources=(args.model,))
  if args.format == "lora":
    if args.out.suffix != ".safetensors":
      raise ConversionError(f"--out {args.out}: --format lora writes one .safetensors")
    with folder_lib.write_atomically(args.out, directory=False, **options) as out:
      write_lora(args.model, out)
  elif args.format == "drm":
    _run_drm(args, options)
  else:
    write = {"dina": write_dina, "diffusers": write_diffusers}[args.format]
    with folder_lib.write_atomically(args.out, **options) as out:
      write(args.model, out)
  print(f"wrote {args.out}")


def _run_drm(args: argparse.Namespace, options: Mapping[str, Any]) -> None:
  parts, head = drm_parts(args.model)
  if not args.out.suffix:
    with folder_lib.write_atomically(args.out, **options) as out:
      write_safetensors(out / "model.safetensors", parts)
      write_json(out / "head.json", head)
    return
  if args.out.suffix not in (".safetensors", *PICKLED):
    raise ConversionError(
      f"--out {args.out}: --format drm writes .safetensors, .pt, or a folder"
    )
  sidecar = args.out.with_name("head.json")
  with (
    folder_lib.write_atomically(sidecar, directory=False, **options) as head_out,
    folder_lib.write_atomically(args.out, directory=False, **options) as out,
  ):
    write_json(head_out, head)
    if args.out.suffix == ".safetensors":
      write_safetensors(out, parts)
    else:
      write_pickle(out, parts)


if __name__ == "__main__":
  main()
