"""Converts SD3.5 and its reward models from PyTorch to a model folder.

  python convert/torch_to_flax.py --sd35 stable-diffusion-3.5-medium \\
      --reward DiNa-LRM-SD35M-12layers --out models/dina
  python convert/torch_to_flax.py --sd35 sd3.5_medium.safetensors --out models/sd35m
  python convert/torch_to_flax.py --base models/sd35m --reward drm/model.safetensors \\
      --out models/drm

Keys and shapes of everything are checked before any weight is read. The output folder
appears only when all of it is written (and verified, with --verify).
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import gc
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import command_line
from flax import nnx
import numpy as np
import single_file
import torch_files

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
from lrm_jax.models import clip, conv_head, lora, mmdit, qformer_head, reward, t5, vae

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SCHEDULER = {"shift": 3.0, "num_train_timesteps": 1000}
# How many of the last blocks DRM leaves out, by the depth of the full transformer.
DRM_SKIPPED = {24: 3, 38: 5}


@dataclasses.dataclass(frozen=True)
class Part:
  """One torch checkpoint (or a prefix of one) and where it goes.

  Attributes:
    prefix: our path of the part inside its component, e.g. `head/`.
    keep_dtype: not affected by --dtype (float32 heads, the autoencoder).
  """

  source: torch_files.Source
  keymap: engine.Keymap
  shapes: Mapping[str, tuple[int, ...]]
  prefix: str = ""
  keep_dtype: bool = False


@dataclasses.dataclass(frozen=True)
class Component:
  """One Orbax checkpoint of the model folder."""

  name: str
  entry: dict[str, Any]
  parts: tuple[Part, ...]
  constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _shapes(make: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
  return weights.shapes(weights.abstract(make)[1])


def _mmdit_shapes(config: mmdit.MMDiTConfig) -> dict[str, tuple[int, ...]]:
  return _shapes(lambda: mmdit.MMDiT(config, rngs=nnx.Rngs(0)))


def _under(shapes: Mapping, prefix: str) -> dict[str, tuple[int, ...]]:
  return {k[len(prefix) :]: v for k, v in shapes.items() if k.startswith(prefix)}


def _config(make: Callable[[Any], Any], path: pathlib.Path) -> Any:
  """`make(config.json)`, with the file's name in any complaint."""
  values = torch_files.read_json(path)
  with _settings_of(path):
    return make(values)


@contextlib.contextmanager
def _settings_of(path: pathlib.Path) -> Iterator[None]:
  """Whatever is wrong with the values read from `path` is reported with its name."""
  try:
    yield
  except ConversionError:
    raise
  except KeyError as e:
    raise ConversionError(f"{path} lacks {e}") from e
  except (ValueError, TypeError, AttributeError) as e:
    raise ConversionError(f"{path}: {e}") from e


# --- SD3.5: a diffusers folder -----------------------------------------------------


# name here -> (subfolder, file stem, config reader, keymap, model)
FOLDER_COMPONENTS = {
  "transformer": (
    "transformer",
    "diffusion_pytorch_model",
    mmdit.MMDiTConfig.from_diffusers,
    mmdit_keymap.diffusers,
    mmdit.MMDiT,
  ),
  "vae": (
    "vae",
    "diffusion_pytorch_model",
    vae.VAEConfig.from_diffusers,
    vae_keymap.diffusers,
    vae.VAE,
  ),
  "clip_l": (
    "text_encoder",
    "model",
    clip.CLIPTextConfig.from_transformers,
    clip_keymap.transformers,
    clip.CLIPText,
  ),
  "clip_g": (
    "text_encoder_2",
    "model",
    clip.CLIPTextConfig.from_transformers,
    clip_keymap.transformers,
    clip.CLIPText,
  ),
  "t5": (
    "text_encoder_3",
    "model",
    t5.T5Config.from_transformers,
    t5_keymap.transformers,
    t5.T5Encoder,
  ),
}


def from_folder(
  path: pathlib.Path, only: Collection[str] | None = None
) -> list[Component]:
  """The components of a diffusers StableDiffusion3Pipeline folder (or those named).

  A pipeline saved without T5 (text_encoder_3 null in model_index.json) has none.

  Raises:
    ConversionError: not such a folder, or a name that it does not hold.
  """
  index = torch_files.read_json(path / "model_index.json")
  pipeline = index.get("_class_name")
  if pipeline != "StableDiffusion3Pipeline":
    raise ConversionError(
      f"{path / 'model_index.json'} describes a {pipeline}, not a "
      "StableDiffusion3Pipeline"
    )
  names = list(FOLDER_COMPONENTS)
  if (index.get("text_encoder_3", [""]) or [None])[-1] is None:
    names.remove("t5")
  components = []
  for name in _chosen(names, only, path):
    sub, stem, read_config, keymap, model = FOLDER_COMPONENTS[name]
    config = _config(read_config, path / sub / "config.json")
    components.append(
      _component(
        name,
        config,
        torch_files.open_component(path / sub, stem),
        keymap(config),
        _shapes(lambda m=model, c=config: m(c, rngs=nnx.Rngs(0))),
        keep_dtype=name == "vae",
      )
    )
  return components


def _chosen(
  names: Sequence[str], only: Collection[str] | None, path: pathlib.Path
) -> list[str]:
  if only is None:
    return list(names)
  if unknown := sorted(set(only) - set(names)):
    raise ConversionError(f"--only {unknown}: {path} holds {list(names)}")
  return [name for name in names if name in only]


def _component(name, config, source, keymap, shapes, keep_dtype=False) -> Component:
  part = Part(source, keymap, shapes, keep_dtype=keep_dtype)
  return Component(name, {"config": build.config_to_dict(config)}, (part,))


# --- SD3.5: Stability's single file ------------------------------------------------


def from_single_file(path: pathlib.Path, norm_num_groups: int) -> list[Component]:
  """The components that a single-file checkpoint holds.

  Raises:
    ConversionError: it holds no SD3.5 transformer, or keys of no known component.
  """
  source = torch_files.open_file(path)
  prefixes = (
    single_file.TRANSFORMER,
    single_file.VAE,
    single_file.CLIP_L,
    single_file.CLIP_G,
    single_file.T5,
  )
  if strange := [k for k in source.tensors if not k.startswith(prefixes)]:
    raise ConversionError(
      engine.report(
        f"{path} is not a single-file SD3.5 checkpoint",
        [f"unexpected key {k}" for k in strange],
      )
    )
  held = [p for p in prefixes if any(k.startswith(p) for k in source.tensors)]
  tensors, name = source.tensors, str(path)

  config = single_file.mmdit_config(tensors, name)
  components = [
    _component(
      "transformer",
      config,
      source.under(single_file.TRANSFORMER),
      mmdit_keymap.stability(config),
      _mmdit_shapes(config),
    )
  ]
  if single_file.VAE in held:
    config = single_file.vae_config(tensors, name, norm_num_groups)
    components.append(
      _component(
        "vae",
        config,
        source.under(single_file.VAE),
        vae_keymap.stability(config),
        _shapes(lambda c=config: vae.VAE(c, rngs=nnx.Rngs(0))),
        keep_dtype=True,
      )
    )
  for part, prefix in (("clip_l", single_file.CLIP_L), ("clip_g", single_file.CLIP_G)):
    if prefix in held:
      config = single_file.clip_config(tensors, prefix, name)
      components.append(
        _component(
          part,
          config,
          source.under(prefix),
          clip_keymap.stability(config, part),
          _shapes(lambda c=config: clip.CLIPText(c, rngs=nnx.Rngs(0))),
        )
      )
  if single_file.T5 in held:
    config = single_file.t5_config(tensors, name)
    components.append(
      _component(
        "t5",
        config,
        source.under(single_file.T5),
        t5_keymap.stability(config),
        _shapes(lambda c=config: t5.T5Encoder(c, rngs=nnx.Rngs(0))),
      )
    )
  return components


# --- reward models -----------------------------------------------------------------


def from_dina(path: pathlib.Path, full: mmdit.MMDiTConfig) -> Component:
  """A DiNa-LRM release folder on the transformer `full`.

  Raises:
    ConversionError: files, settings or keys that do not fit.
  """
  release = torch_files.read_json(path / "config.json")
  checkpoint = path / "checkpoint"
  lora_dir = checkpoint / "backbone_lora"
  with _settings_of(path / "config.json"):
    model = release["model"]
    backbone = full.truncate(
      model["num_transformer_layers"],
      has_output=False,
      image_taps=tuple(model["visual_head_idx"]),
      text_taps=tuple(model["text_head_idx"]),
    )
    head = qformer_head.QFormerHeadConfig(
      **qformer_head_keymap.config_kwargs(model, backbone.width)
    )
    if not model.get("use_t_embed", True):
      raise ValueError("use_t_embed is false: the head reads the noise level here")
    # A frozen backbone has no adapters, whatever use_lora says.
    frozen, adapted = model["freeze_backbone"], model["use_lora"]
    if not frozen and not adapted:
      raise ValueError(
        "use_lora and freeze_backbone are both false; a fully fine-tuned DiNa-LRM "
        "is not a released format"
      )
    logistic = bool(model.get("use_logistic", False))
    # rm_head.pt holds the head only: the original loses its learned etas on saving,
    # and starts from these. Our own exports keep them in config.json.
    eta3, eta4 = (float(eta) for eta in model.get("logistic_eta", (0.0, 0.15)))
    scoring = dataclasses.replace(
      reward.ScoringConfig.dina(),
      add_noise=bool(release.get("training", {}).get("add_noise", True)),
    )

  adapters, targets, exclude = None, (), ()
  if not frozen:
    adapters, targets, exclude = _adapter_config(
      torch_files.read_json(lora_dir / "adapter_config.json"), lora_dir, backbone
    )
  config = reward.RewardConfig(backbone, head, adapters, logistic=logistic)
  shapes = _shapes(lambda: build.make_reward(config))
  parts = [
    Part(
      torch_files.open_file(checkpoint / "rm_head.pt"),
      qformer_head_keymap.dina(),
      _under(shapes, "head/"),
      prefix="head/",
      keep_dtype=True,
    )
  ]
  if adapters is not None:
    lora_shapes = {
      k: v for k, v in _under(shapes, "backbone/").items() if "/lora_" in k
    }
    parts.append(
      Part(
        torch_files.open_file(lora_dir / "adapter_model.safetensors"),
        lora_keymap.peft(backbone, targets, exclude),
        lora_shapes,
        prefix="backbone/",
        keep_dtype=True,
      )
    )
  constants = {}
  if logistic:
    constants = {
      "squash/eta3": np.asarray(eta3, np.float32),
      "squash/eta4": np.asarray(eta4, np.float32),
    }
  entry = {
    "kind": "dina",
    "config": build.config_to_dict(config),
    "stored_backbone": None,
    "scoring": build.config_to_dict(scoring),
    "adapter": {"target_modules": list(targets), "exclude_modules": list(exclude)},
    "release": release,
  }
  return Component("reward", entry, tuple(parts), constants)


def _adapter_config(
  config: Mapping[str, Any], lora_dir: pathlib.Path, backbone: mmdit.MMDiTConfig
) -> tuple[lora.LoRAConfig, tuple[str, ...], tuple[str, ...]]:
  """Our LoRAConfig and PEFT's (target_modules, exclude_modules)."""
  where = lora_dir / "adapter_config.json"
  for key in ("r", "lora_alpha", "target_modules"):
    if key not in config:
      raise ConversionError(f"{where} lacks {key}")
  # What changes the adapter's arithmetic or where it goes. (Dropout and initialisation
  # do neither.)
  unsupported = {
    key: config[key]
    for key in (
      "use_dora",
      "use_rslora",
      "use_qalora",
      "use_bdlora",
      "rank_pattern",
      "alpha_pattern",
      "lora_bias",
      "fan_in_fan_out",
      "modules_to_save",
      "layers_to_transform",
      "layer_replication",
      "target_parameters",
      "trainable_token_indices",
      "alora_invocation_tokens",
    )
    if config.get(key)
  }
  for key, only in (("peft_type", "LORA"), ("bias", "none")):
    if config.get(key, only) != only:
      unsupported[key] = config[key]
  if unsupported:
    raise ConversionError(f"{where} sets {unsupported}, which is not supported")
  if not isinstance(config["r"], int) or config["r"] < 1:
    raise ConversionError(f"{where}: r={config['r']!r} is not a rank")
  targets = config["target_modules"]
  exclude = config.get("exclude_modules") or []
  if not isinstance(targets, list) or not isinstance(exclude, list):
    raise ConversionError(
      f"{where}: target_modules and exclude_modules must be lists of names, "
      f"not {targets!r} and {exclude!r}"
    )
  adapted = lora_keymap.modules(backbone, targets, exclude)
  if not adapted:
    raise ConversionError(f"{where}: target_modules {targets} name no attention layer")
  last = f"transformer_blocks.{backbone.num_layers - 1}.attn.add_q_proj"
  return (
    lora.LoRAConfig(
      rank=config["r"],
      alpha=config["lora_alpha"],
      targets=lora_keymap.targets_of(adapted),
      last_context=last in adapted,
    ),
    tuple(sorted(targets)),
    tuple(sorted(exclude)),
  )


def from_drm(
  path: pathlib.Path, full: mmdit.MMDiTConfig, skip_last: int | None
) -> Component:
  """A DRM checkpoint (`model.safetensors` or `.pt`) on the architecture `full`.

  A `head.json` beside the file may say `skip_last_blocks`, `num_groups`; otherwise
  the published values for the depth of `full` hold.

  Raises:
    ConversionError: keys or shapes that do not fit, or an unknown depth.
  """
  source = torch_files.open_file(path)
  sidecar = path.with_name("head.json")
  settings = torch_files.read_json(sidecar) if sidecar.is_file() else {}
  if skip_last is None:
    skip_last = settings.get("skip_last_blocks", DRM_SKIPPED.get(full.num_layers))
  if skip_last is None:
    raise ConversionError(
      f"{path}: how many of the last of {full.num_layers} blocks DRM leaves out is "
      "published only for 24 (3) and 38 (5): pass --drm-skip-last"
    )
  if strange := [
    k for k in source.tensors if not k.startswith(("transformer.", "reward_output."))
  ]:
    raise ConversionError(
      engine.report(
        f"{path} is not a DRM checkpoint", [f"unexpected key {k}" for k in strange]
      )
    )
  first = "reward_output.down1.0.weight"
  if first not in source.tensors:
    raise ConversionError(f"{path}: missing key {first}")
  (base_channels, *_), _ = source.tensors[first]
  with _settings_of(sidecar if settings else path):
    if settings.get("base_channels", base_channels) != base_channels:
      raise ValueError(
        f"base_channels={settings['base_channels']}, but {first} has {base_channels}"
      )
    truncated = full.truncate(full.num_layers - skip_last, has_output=True)
    head = conv_head.ConvHeadConfig(
      in_channels=full.out_channels,
      base_channels=base_channels,
      num_groups=settings.get("num_groups", conv_head.ConvHeadConfig.num_groups),
    )
  # The release keeps the blocks it does not use; a file without them is as good.
  left_out = f"transformer.transformer_blocks.{truncated.num_layers}."
  has_all = any(k.startswith(left_out) for k in source.tensors)
  stored = full if has_all or skip_last == 0 else truncated
  config = reward.RewardConfig(truncated, head)
  head_shapes = _under(_shapes(lambda: build.make_reward(config)), "head/")
  parts = (
    Part(
      source.under("transformer."),
      mmdit_keymap.diffusers(stored, prefix="transformer."),
      _mmdit_shapes(stored),
      prefix="backbone/",
    ),
    Part(
      source.under("reward_output."),
      conv_head_keymap.drm(),
      head_shapes,
      prefix="head/",
      keep_dtype=True,
    ),
  )
  entry = {
    "kind": "drm",
    "config": build.config_to_dict(config),
    "stored_backbone": build.config_to_dict(stored),
    "scoring": build.config_to_dict(reward.ScoringConfig.drm()),
    "release": settings,
  }
  return Component("reward", entry, parts)


def open_reward(
  path: pathlib.Path, full: mmdit.MMDiTConfig, skip_last: int | None
) -> Component:
  """Either kind of reward checkpoint, told apart by what lies at `path`."""
  if path.is_dir():
    if (path / "model.safetensors").is_file():
      return from_drm(path / "model.safetensors", full, skip_last)
    return from_dina(path, full)
  return from_drm(path, full, skip_last)


# --- doing it ----------------------------------------------------------------------


def check(components: list[Component]) -> None:
  """All keys and shapes, before anything is read.

  Raises:
    ConversionError: what does not fit, component by component.
  """
  complaints = []
  for component in components:
    for part in component.parts:
      _, problems = engine.match(part.keymap, part.source.tensors, part.shapes)
      if problems:
        complaints.append(engine.report(part.source.name, problems))
  if complaints:
    raise ConversionError("\n".join(complaints))


class Progress:
  """`name  1.23 / 4.49 GB`, on one line of a terminal, or every tenth in a log."""

  def __init__(self, name: str, total: int):
    self.name, self.total, self.done, self.shown = name, max(total, 1), 0, -1
    self.start = time.monotonic()

  def __call__(self, key: str, array: np.ndarray) -> None:
    del key
    self.done += array.nbytes
    tenth = 10 * self.done // self.total
    if tenth != self.shown and (sys.stderr.isatty() or self.done >= self.total):
      self.shown = tenth
      self._print(end="\r" if sys.stderr.isatty() else "\n")

  def _print(self, end: str) -> None:
    seconds = time.monotonic() - self.start
    print(
      f"{self.name:12s} {self.done / 1e9:7.3f} / {self.total / 1e9:.3f} GB read "
      f"({seconds:.0f} s)",
      end=end,
      file=sys.stderr,
      flush=True,
    )


def convert(component: Component, out: pathlib.Path, dtype: Any) -> dict[str, Any]:
  """Reads one component, writes it, and returns its config entry."""
  total = sum(part.source.nbytes for part in component.parts)
  progress = Progress(component.name, total)
  leaves = dict(component.constants)
  for part in component.parts:
    filled = engine.fill(
      part.keymap,
      part.source.tensors,
      part.shapes,
      part.source.read,
      dtype=None if part.keep_dtype else dtype,
      name=part.source.name,
      on_tensor=progress,
    )
    leaves |= {part.prefix + path: leaf for path, leaf in filled.items()}
  start = time.monotonic()
  folder_lib.save_params(out / component.name, leaves)
  nbytes = sum(leaf.nbytes for leaf in leaves.values())
  params = sum(leaf.size for leaf in leaves.values())
  print(
    f"{component.name:12s} {nbytes / 1e9:7.3f} GB, {params:,} parameters written "
    f"({time.monotonic() - start:.0f} s)",
    file=sys.stderr,
  )
  dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
  return {**component.entry, "parameters": params, "dtypes": dtypes}


def copy_files(
  sd35: pathlib.Path | None,
  tokenizers: pathlib.Path | None,
  out: pathlib.Path,
  names: set[str],
) -> dict[str, Any]:
  """Tokenizers and the scheduler config. Returns their config entries."""
  entries: dict[str, Any] = {}
  if sd35 is None:
    return entries
  source = tokenizers or (sd35 if sd35.is_dir() else None)
  if source is not None and "clip_l" in names:
    wanted = TOKENIZERS if "t5" in names else TOKENIZERS[:2]
    for name in wanted:
      if not (source / name).is_dir():
        raise ConversionError(f"{source / name} does not exist")
      shutil.copytree(source / name, out / name)
    entries["tokenizers"] = {"folders": list(wanted)}
  scheduler = sd35 / "scheduler" / "scheduler_config.json"
  values = torch_files.read_json(scheduler) if sd35.is_dir() else SCHEDULER
  for key in SCHEDULER:
    if key not in values:
      raise ConversionError(f"{scheduler} lacks {key}")
  if values.get("use_dynamic_shifting"):
    raise ConversionError(f"{scheduler}: use_dynamic_shifting is not SD3.5's schedule")
  (out / "scheduler").mkdir()
  (out / "scheduler" / "scheduler_config.json").write_text(
    json.dumps(values, indent=2) + "\n"
  )
  entries["scheduler"] = {key: values[key] for key in SCHEDULER}
  return entries


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--sd35", type=pathlib.Path, help="diffusers folder or one file")
  source.add_argument("--base", type=pathlib.Path, help="an already converted folder")
  parser.add_argument("--reward", type=pathlib.Path, help="DiNa-LRM folder or DRM file")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="model folder")
  parser.add_argument(
    "--dtype",
    default="keep",
    choices=["keep", *build.DTYPES],
    help="of backbones and text encoders; the rest stays as it is",
  )
  parser.add_argument(
    "--only",
    type=lambda s: s.split(","),
    metavar="NAMES",
    help="components of --sd35 to convert, e.g. transformer,vae",
  )
  parser.add_argument(
    "--tokenizers", type=pathlib.Path, help="folder with tokenizer/..."
  )
  parser.add_argument(
    "--vae-norm-groups", type=int, default=32, help="single files only"
  )
  parser.add_argument("--drm-skip-last", type=int, help="blocks that DRM leaves out")
  parser.add_argument("--force", action="store_true", help="replace --out")
  parser.add_argument("--verify", action="store_true", help="compare with torch")
  args = parser.parse_args(argv)
  with command_line.one_line_errors():
    run(args)


def run(args: argparse.Namespace) -> None:
  """The conversion that the command line describes."""
  if args.base is not None:
    if args.reward is None:
      raise ConversionError("--base needs --reward: there is nothing else to convert")
    if args.only is not None or args.tokenizers is not None:
      raise ConversionError("--only and --tokenizers belong to --sd35, not to --base")
  components: list[Component] = []
  if args.sd35 is not None:
    if args.sd35.is_dir():
      components = from_folder(args.sd35, args.only)
    else:
      with _settings_of(args.sd35):  # e.g. widths that no number of heads divides
        components = from_single_file(args.sd35, args.vae_norm_groups)
      names = _chosen([c.name for c in components], args.only, args.sd35)
      components = [c for c in components if c.name in names]
    full = None
    if "transformer" in (c.name for c in components):
      full = build.config_from_dict(components[0].entry["config"])
  else:
    full = build.config_from_dict(
      folder_lib.find(args.base, "transformer")[1]["config"]
    )
  if args.reward is not None:
    if full is None:
      raise ConversionError(
        f"--only {args.only} leaves out the transformer, on which {args.reward} builds"
      )
    components.append(open_reward(args.reward, full, args.drm_skip_last))
  check(components)

  dtype = None if args.dtype == "keep" else np.dtype(build.dtype(args.dtype))
  sources = (args.sd35, args.base, args.reward, args.tokenizers)
  with folder_lib.write_atomically(args.out, force=args.force, sources=sources) as out:
    entries: dict[str, Any] = {}
    for component in components:
      entries[component.name] = convert(component, out, dtype)
      gc.collect()
    entries |= copy_files(args.sd35, args.tokenizers, out, {c.name for c in components})
    config: dict[str, Any] = {
      "source": {
        "sd35": args.sd35 and args.sd35.name,
        "reward": args.reward and args.reward.name,
      },
      "components": entries,
    }
    if args.base is not None:
      config["base"] = str(args.base.resolve())
    folder_lib.write_config(out, config)
    if args.verify:
      import verification  # imports torch and diffusers

      verification.verify(
        args.sd35,
        args.reward,
        out,
        list(entries),
        None if dtype is None else args.dtype,
      )
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
