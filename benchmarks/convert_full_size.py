"""Converts a full-size random SD3.5 transformer and compares one forward with torch.

  python benchmarks/convert_full_size.py --work /tmp/full \\
      --out benchmarks/results/convert_full_size.json

Writes the random checkpoint (bfloat16, sharded safetensors with an index) if it is not
there and converts it in a child process. Then the same small latent goes through
diffusers and through the converted folder, each in its own process and in float32
arithmetic on the same bfloat16 weights. Needs the convert extra, about 20 GB of memory
and 15 of disk for SD3.5-Medium.

Speed: converting takes turns with what diffusers does to a folder, reading it and
writing it again (`from_pretrained`, `save_pretrained`); loading what was converted, in
bfloat16, with `from_pretrained` of the source. All files are in the page cache.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONVERT = ROOT / "convert" / "torch_to_flax.py"
SHARD_BYTES = 2_000_000_000
LATENT, TEXT_TOKENS = 32, 154  # a small input: the weights are what is tested


def presets():
  from lrm_jax.models import mmdit

  return {
    "sd35_medium": mmdit.MMDiTConfig.sd35_medium(),
    "sd35_large": mmdit.MMDiTConfig.sd35_large(),
  }


def write_checkpoint(folder: pathlib.Path, config) -> None:
  """A pipeline folder that holds a random transformer, shard by shard."""
  import diffusers
  import safetensors.torch
  import torch

  values = config.to_diffusers()
  transformer = folder / "transformer"
  transformer.mkdir(parents=True)
  with torch.device("meta"):
    model = diffusers.SD3Transformer2DModel.from_config(values)
  generator = torch.Generator().manual_seed(0)
  table = diffusers.models.embeddings.get_2d_sincos_pos_embed(
    config.width,
    config.pos_embed_size,
    base_size=config.pos_embed_base,
    output_type="pt",
  )
  weight_map, shard, size, count = {}, {}, 0, 0

  def flush():
    nonlocal shard, size, count
    count += 1
    name = f"diffusion_pytorch_model-{count:05d}.safetensors"
    safetensors.torch.save_file(shard, transformer / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, name))
    shard, size = {}, 0

  for key, meta in model.state_dict().items():
    if key == "pos_embed.pos_embed":
      tensor = table.reshape(meta.shape)
    elif ".norm_" in key:
      tensor = torch.ones(meta.shape)
    else:
      # 0.02 everywhere, the adaLN layers included: with their usual zeros the blocks
      # would be identities.
      tensor = 0.02 * torch.randn(meta.shape, generator=generator)
    shard[key] = tensor.to(torch.bfloat16)
    size += shard[key].nbytes
    if size > SHARD_BYTES:
      flush()
  flush()
  index = {"metadata": {}, "weight_map": weight_map}
  path = transformer / "diffusion_pytorch_model.safetensors.index.json"
  path.write_text(json.dumps(index))
  (transformer / "config.json").write_text(json.dumps(values))
  (folder / "scheduler").mkdir()
  (folder / "scheduler" / "scheduler_config.json").write_text(
    json.dumps({"shift": 3.0, "num_train_timesteps": 1000})
  )
  (folder / "model_index.json").write_text(
    json.dumps({"_class_name": "StableDiffusion3Pipeline"})
  )


def inputs(config) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(1)
  return {
    "x": rng.standard_normal((1, LATENT, LATENT, config.in_channels), np.float32),
    "t": np.asarray([400.0], np.float32),
    "context": rng.standard_normal((1, TEXT_TOKENS, config.context_dim), np.float32),
    "pooled": rng.standard_normal((1, config.pooled_dim), np.float32),
  }


def run_torch(folder: pathlib.Path, config, out: pathlib.Path) -> None:
  import diffusers
  import torch

  model = diffusers.SD3Transformer2DModel.from_pretrained(
    folder / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=True
  )
  given = {k: torch.from_numpy(v) for k, v in inputs(config).items()}
  start = time.monotonic()
  with torch.inference_mode():
    velocity = model(
      hidden_states=given["x"].permute(0, 3, 1, 2),
      timestep=given["t"],
      encoder_hidden_states=given["context"],
      pooled_projections=given["pooled"],
    ).sample
  print(f"torch forward {time.monotonic() - start:.1f} s")
  np.save(out, velocity.permute(0, 2, 3, 1).numpy())


def run_jax(folder: pathlib.Path, config, out: pathlib.Path) -> None:
  from flax import nnx
  import jax
  import jax.numpy as jnp

  from lrm_jax import build
  from lrm_jax.models import features

  model = build.load_transformer(folder, dtype=jnp.float32, param_dtype=jnp.bfloat16)
  given = inputs(config)

  @jax.jit
  def forward(params, x, t, cond):
    return nnx.merge(model.graphdef, params)(x, t, cond)[0]

  cond = features.Cond(given["context"], given["pooled"])
  start = time.monotonic()
  with jax.default_matmul_precision("highest"):
    velocity = jax.block_until_ready(
      forward(model.params, given["x"], given["t"], cond)
    )
  print(f"jax compile and forward {time.monotonic() - start:.1f} s")
  np.save(out, velocity)


def resave(folder: pathlib.Path, out: pathlib.Path) -> None:
  """What diffusers does to a folder that is stored anew."""
  import diffusers
  import torch

  model = diffusers.SD3Transformer2DModel.from_pretrained(
    folder / "transformer", torch_dtype=torch.bfloat16
  )
  model.save_pretrained(out)


def load_torch(folder: pathlib.Path) -> float:
  """Seconds until all weights are in memory."""
  import diffusers
  import torch

  start = time.monotonic()
  model = diffusers.SD3Transformer2DModel.from_pretrained(
    folder / "transformer", torch_dtype=torch.bfloat16
  )
  with torch.no_grad():
    sum(float(p.view(-1)[::512].sum()) for p in model.parameters())  # all pages
  return time.monotonic() - start


def load_jax(folder: pathlib.Path) -> float:
  """The same for a converted folder."""
  import jax
  import jax.numpy as jnp

  from lrm_jax import build

  jax.devices()
  start = time.monotonic()
  model = build.load_transformer(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  jax.block_until_ready(build.to_device(model.params))
  return time.monotonic() - start


def child(*args: str) -> tuple[float, float]:
  """Runs a command; (seconds, peak resident GB, mapped checkpoint pages included)."""
  start = time.monotonic()
  process = subprocess.Popen([sys.executable, *args])
  _, status, usage = os.wait4(process.pid, 0)
  if status != 0:
    raise SystemExit(f"error: {' '.join(args)} failed with status {status}")
  return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=pathlib.Path, required=True, help="scratch folder")
  parser.add_argument("--model", choices=list(presets()), default="sd35_medium")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
  parser.add_argument("--rounds", type=int, default=3, help="of what is timed")
  steps = ("torch", "jax", "resave", "load_torch", "load_jax")
  parser.add_argument("--step", choices=steps, help=argparse.SUPPRESS)
  args = parser.parse_args()
  config = presets()[args.model]
  source, converted = args.work / args.model, args.work / f"{args.model}_jax"
  if args.step == "resave":
    resave(source, args.work / "resaved")
    return
  if args.step in ("load_torch", "load_jax"):
    load, folder = (
      (load_torch, source) if args.step == "load_torch" else (load_jax, converted)
    )
    (args.work / f"{args.step}.txt").write_text(str(load(folder)))
    return
  if args.step is not None:
    run = {"torch": run_torch, "jax": run_jax}[args.step]
    run(
      {"torch": source, "jax": converted}[args.step],
      config,
      args.work / f"{args.step}.npy",
    )
    return

  if not source.exists():
    print(f"writing a random {args.model} to {source}", flush=True)
    write_checkpoint(source, config)
  nbytes = sum(f.stat().st_size for f in source.rglob("*.safetensors"))
  result = {"model": args.model, "checkpoint_gb": nbytes / 1e9}
  convert = (
    str(CONVERT), "--sd35", str(source), "--only", "transformer", "--force",
    "--out", str(converted),
  )  # fmt: skip
  same = ("--work", str(args.work), "--model", args.model)
  rounds = []
  for _ in range(args.rounds):
    one = {}
    one["convert_s"], result["convert_peak_gb"] = child(*convert)
    one["resave_s"], result["resave_peak_gb"] = child(
      __file__, *same, "--step", "resave"
    )
    for step in ("load_jax", "load_torch"):
      _, result[f"{step}_peak_gb"] = child(__file__, *same, "--step", step)
      one[f"{step}_s"] = float((args.work / f"{step}.txt").read_text())
    rounds.append(one)
    print(json.dumps(one), flush=True)
  result["rounds"] = rounds
  for name, (a, b) in {
    "convert_to_resave": ("convert_s", "resave_s"),
    "load_to_torch": ("load_jax_s", "load_torch_s"),
  }.items():
    result[name] = statistics.median(one[a] / one[b] for one in rounds)
  result["torch_s"], result["torch_peak_gb"] = child(__file__, *same, "--step", "torch")
  result["jax_s"], result["jax_peak_gb"] = child(__file__, *same, "--step", "jax")
  expected = np.load(args.work / "torch.npy").astype(np.float64)
  found = np.load(args.work / "jax.npy").astype(np.float64)
  result["relative_error"] = float(
    np.linalg.norm(found - expected) / np.linalg.norm(expected)
  )
  result["velocity_rms"] = float(np.sqrt(np.mean(expected**2)))
  result = {k: round(v, 8) if isinstance(v, float) else v for k, v in result.items()}
  print(json.dumps(result, indent=2))
  if args.out is not None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
