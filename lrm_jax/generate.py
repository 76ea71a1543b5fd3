"""Generates images, if asked to with reward models that steer or choose.

  python -m lrm_jax.generate --model models/sd35 --out out \\
      --prompt "a photo of a cat" "two dogs playing chess" --images-per-prompt 4
  python -m lrm_jax.generate --model models/sd35 --out out --prompts-file prompts.txt \\
      --reward models/dina --candidates 6 --mode cheap

Killed and started again with the same settings it continues. docs/generation.md
explains samplers, exploring, costs, and what is written; `lrm_jax.pipeline` is the same
in Python.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
import sys
from typing import Any
import warnings

import jax
import numpy as np
from PIL import Image, PngImagePlugin
import tqdm

import lrm_jax
from lrm_jax import compilation, explore, pipeline, run_log, sample, scorer, sheets
from lrm_jax.data import prompts as prompts_lib

SHEET_COLUMNS, SHEET_LINES = 8, 24  # images side by side and one above the other
# Settings in which a run and its continuation may differ: none of them changes an
# image by more than rounding.
MAY_CHANGE = "batch_size|save_latents"


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m lrm_jax.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, help="model folder with a whole SD3.5")
  add("--out", required=True, help="folder for what is written")
  add("--force", action="store_true", help="replace another run in that folder")
  add("--prompt", nargs="+", default=[], help="one or more prompts")
  add("--prompts-file", help="UTF-8, one prompt a line; blank lines are skipped")
  add("--negative-prompt", default="", help="what guidance leads away from")
  add("--images-per-prompt", type=int, default=1)
  add("--seed", type=int, default=0, help="of the first image; image i has seed + i")
  add("--height", type=int, help="pixels (default: what the model was trained at)")
  add("--width", type=int, help="pixels (default: what the model was trained at)")
  add("--steps", type=int, default=50)
  add("--guidance", type=float, default=4.5, help="1: none, at half the cost")
  add(
    "--sampler",
    choices=sorted(sample.SAMPLERS),
    help="default: sde where candidates are compared, else euler",
  )
  add(
    "--noise-level", type=float, help=f"of sde and cps (default: {sample.NOISE_LEVEL})"
  )
  add(
    "--sde-window",
    type=_window,
    metavar="A:B",
    help="draw noise in steps A..B-1 only",
  )
  add("--reward", nargs="+", default=[], help="folders with reward models")
  add(
    "--reward-weights",
    type=float,
    nargs="+",
    help="of each reward's raw score in the sum that is steered by (default: 1)",
  )
  add(
    "--candidates",
    type=int,
    default=1,
    help="k: next states that are compared in a step (default: 1, none)",
  )
  add(
    "--select",
    choices=[name for name in explore.SELECTIONS if name != "random"],
    default="best",
  )
  add("--temperature", type=float, default=1.0, help="of --select softmax")
  add("--beam", type=int, default=1, help="states that are kept (default: 1)")
  add("--chunk", type=int, help="candidates scored at a time, to save memory")
  add(
    "--mode",
    choices=sorted(explore.MODES),
    help="full: compare in all steps (default); cheap: in so many of the noisy ones "
    f"that an image costs at most {explore.BUDGET} times as much as without",
  )
  add(
    "--explore-window",
    type=_window,
    metavar="A:B",
    help="compare candidates in steps A..B-1 only, instead of --mode",
  )
  add("--best-of", type=int, default=1, help="keep the best of n independent images")
  add("--batch-size", type=int, help="images at a time (default: 4 per device)")
  add("--dtype", default="float32", choices=scorer.DTYPES)
  add("--t5-length", type=int, default=256, help="tokens, at most 512")
  add("--save-latents", action="store_true", help="also latents/00000.npy ...")
  return parser


def _window(text: str) -> tuple[int, int]:
  start, colon, stop = text.partition(":")
  try:
    return int(start), int(stop) if colon else int("")
  except ValueError as e:
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B") from e


# --- what is asked for -------------------------------------------------------------


def read_prompts(prompts: Sequence[str], file: str | os.PathLike | None) -> list[str]:
  """The prompts of the command line, then those of the file.

  Raises:
    ValueError: none at all, or not UTF-8.
    OSError: the file cannot be read.
  """
  found = list(prompts)
  for prompt in found:
    try:
      prompt.encode()
    except UnicodeEncodeError as e:
      raise ValueError(f"the prompt {prompt!r} is not valid UTF-8") from e
  if file is not None:
    found += prompts_lib.read(file)
  if not found:
    raise ValueError("no prompts: pass --prompt or --prompts-file")
  return found


def name_rewards(folders: Sequence[str]) -> dict[str, str]:
  """Folders by their last name, or by the whole path where that is not unique.

  Raises:
    ValueError: one folder twice.
  """
  if len(set(folders)) < len(folders):
    twice = next(f for f in folders if folders.count(f) > 1)
    raise ValueError(f"--reward {twice} is given twice")
  last = [pathlib.Path(os.path.abspath(folder)).name for folder in folders]
  taken = {"generator", pipeline.REWARD_FN}  # what the programs call other things
  return {
    folder if last.count(name) > 1 or name in taken else name: folder
    for name, folder in zip(last, folders, strict=True)
  }


def make_settings(args: argparse.Namespace) -> pipeline.Settings:
  """The arguments that say how an image is made.

  Raises:
    ValueError: an impossible combination.
  """
  return pipeline.Settings(
    num_steps=args.steps,
    guidance_scale=args.guidance,
    negative_prompt=args.negative_prompt,
    height=args.height,
    width=args.width,
    sampler=args.sampler,
    noise_level=args.noise_level,
    sde_window=args.sde_window,
    explore=explore.Explore(
      candidates=args.candidates,
      select=args.select,
      temperature=args.temperature,
      beam=args.beam,
      chunk=args.chunk,
    ),
    explore_window=args.explore_window,
    mode=args.mode,
    best_of=args.best_of,
  )


# --- the output folder -------------------------------------------------------------


class Output:
  """The folder of a run: images, their scores, and how they were made.

  An image counts as made when its line in `scores.jsonl` and its files agree. Files
  appear whole or not at all; a line that a killed run left half written is dropped.

  Attributes:
    settings_id: a hash of the run's settings, in every line and every image.
    missing: numbers of the images that are still to be made.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    count: int,
    force: bool,
    save_latents: bool,
  ):
    """Opens or makes the folder of a run with `count` images.

    Raises:
      ValueError: the folder holds something else.
      OSError: it cannot be written.
    """
    self.folder = pathlib.Path(folder)
    self._latents = save_latents
    self._digits = max(5, len(str(count - 1)))
    fixed = {k: v for k, v in config.items() if not re.fullmatch(MAY_CHANGE, k)}
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode())
    self.settings_id = digest.hexdigest()[:16]
    self._lines = self.folder / "scores.jsonl"
    kept: dict[int, dict] = {}
    with _writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      if force:
        self._clear()
    if (self.folder / "run.json").exists():
      run_log.check_same_run(
        self.folder, config, MAY_CHANGE, hint="choose another --out, or pass --force"
      )
      kept = self._read()
    elif any(self.folder.iterdir()) and not force:
      raise ValueError(
        f"{self.folder} is not empty and holds no run.json of an earlier run: choose "
        "another --out, or pass --force to write into it all the same"
      )
    with _writing(self.folder):
      if not kept:
        run_log.write_run_info(
          self.folder,
          config,
          seed=config["seed"],
          extra={"settings": self.settings_id, "prompts": list(prompts)},
        )
      for name in ("images", *(["latents"] if save_latents else [])):
        (self.folder / name).mkdir(exist_ok=True)
    self._write_lines(kept)
    self.missing = [i for i in range(count) if i not in kept]

  def image(self, index: int) -> pathlib.Path:
    return self.folder / "images" / f"{index:0{self._digits}d}.png"

  def latents(self, index: int) -> pathlib.Path:
    return self.folder / "latents" / f"{index:0{self._digits}d}.npy"

  def write(
    self,
    indices: Sequence[int],
    images: np.ndarray,
    latents: np.ndarray,
    records: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
  ) -> None:
    """Writes images, their latents where asked for, and their lines.

    Args:
      images: (n H W 3) uint8.
      latents: (n h w C).
      records: what `scores.jsonl` says of each; text chunks of the PNG, too.
      metadata: text chunks of all images.
    """
    lines = []
    for index, pixels, latent, record in zip(
      indices, images, latents, records, strict=True
    ):
      line = {
        "image": str(self.image(index).relative_to(self.folder)),
        "index": index,
        "settings": self.settings_id,
        **record,
      }
      chunks = PngImagePlugin.PngInfo()
      own = {key: line[key] for key in ("index", "prompt", "seed", "settings")}
      own["scores"] = json.dumps(line["scores"])
      for key, value in (own | dict(metadata)).items():
        chunks.add_text(key, str(value))
      buffer = io.BytesIO()
      Image.fromarray(pixels).save(buffer, "png", pnginfo=chunks)
      _write(self.image(index), buffer.getvalue())
      if self._latents:
        buffer = io.BytesIO()
        np.save(buffer, latent)
        _write(self.latents(index), buffer.getvalue())
      lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with _writing(self._lines), self._lines.open("a", encoding="utf-8") as file:
      file.write("".join(lines))

  def finish(self, per_prompt: int) -> list[dict[str, Any]]:
    """Puts the lines in order and draws the contact sheets; returns the lines."""
    lines = self._read()
    self._write_lines(lines)
    rows = [
      [lines[i] for i in range(start, start + per_prompt)]
      for start in range(0, len(lines), per_prompt)
    ]
    for number, sheet in enumerate(contact_sheets(self.folder, rows), 1):
      buffer = io.BytesIO()
      sheet.save(buffer, "png")
      suffix = "" if number == 1 else f"_{number}"
      _write(self.folder / f"contact_sheet{suffix}.png", buffer.getvalue())
    return list(lines.values())

  def _read(self) -> dict[int, dict[str, Any]]:
    """The lines of images that are there, by number and in order."""
    if not self._lines.exists():
      return {}
    found = {}
    content = self._lines.read_bytes()
    # What comes behind the last newline was being written when the run was killed.
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
      try:
        line = json.loads(text)
        found[line["index"]] = line
      except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
          f"{self._lines}: line {number} is damaged ({e!r}): delete it, and its image "
          "is made again"
        ) from e
    return {i: found[i] for i in sorted(found) if self._is_made(i, found[i])}

  def _is_made(self, index: int, line: Mapping[str, Any]) -> bool:
    """Whether a line and the files that it speaks of agree."""
    if self._latents and not self.latents(index).exists():
      return False
    try:
      with Image.open(self.image(index)) as image:
        found = {key: image.info.get(key) for key in ("index", "seed", "settings")}
    except OSError:
      return False
    return found == {
      "index": str(index),
      "seed": str(line["seed"]),
      "settings": self.settings_id,
    }

  def _write_lines(self, lines: Mapping[int, Mapping[str, Any]]) -> None:
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()]
    _write(self._lines, "".join(texts).encode())

  def _clear(self) -> None:
    """Removes what a run of this program leaves, and nothing else."""
    for pattern in (
      "scores.jsonl",
      "contact_sheet*.png",
      "images/*[0-9].png",
      "latents/*[0-9].npy",
      "run.json",  # last: without it the others are nobody's
    ):
      for path in self.folder.glob(pattern):
        path.unlink()


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Errors of the file system name the file."""
  try:
    yield
  except OSError as e:
    raise OSError(
      f"writing {path} failed: {e.strerror or e}. Is the disk full or read-only?"
    ) from e


def _write(path: pathlib.Path, data: bytes) -> None:
  """A file that appears whole or not at all."""
  draft = path.with_name(f".{path.name}.partial")
  with _writing(path):
    try:
      draft.write_bytes(data)
      draft.replace(path)
    finally:
      draft.unlink(missing_ok=True)


# --- pictures and words ------------------------------------------------------------


def contact_sheets(
  folder: pathlib.Path, rows: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Image.Image]:
  """Pictures of all images: prompts as rows, scores (or seeds) below.

  A prompt with more than SHEET_COLUMNS images takes several lines, and a sheet has at
  most SHEET_LINES of them: more images make more sheets.

  Args:
    folder: what the lines' `image` is relative to.
    rows: each prompt's lines of `scores.jsonl`.
  """
  columns = min(SHEET_COLUMNS, max(map(len, rows)))
  lines = [
    (row[0]["prompt"] if start == 0 else "", row[start : start + columns])
    for row in rows
    for start in range(0, len(row), columns)
  ]
  for first in range(0, len(lines), SHEET_LINES):
    page = []
    for prompt, cells in lines[first : first + SHEET_LINES]:
      images = []
      for line in cells:
        with Image.open(folder / line["image"]) as image:
          images.append((sheets.thumbnail(image), _caption(line)))
      page.append((prompt, images))
    yield sheets.draw(page, columns=columns)


def _caption(line: Mapping[str, Any]) -> str:
  if not line["scores"]:
    return f"seed {line['seed']}"
  values = [score["reported"] for score in line["scores"].values()]
  return " / ".join("not finite" if v is None else f"{v:.3f}" for v in values)


def records(
  made: pipeline.Generated, settings: pipeline.Settings, schedule: sample.Schedule
) -> list[dict[str, Any]]:
  """What `scores.jsonl` says of each image; docs/generation.md describes the fields."""
  explored = schedule.explore & (schedule.noise_level > 0) & settings.exploring
  out = []
  for i in range(len(made)):
    best_of = None
    if made.best_of is not None:
      scores = [_number(score) for score in made.best_of[i]]
      best_of = {"scores": scores, "chosen": int(made.chosen[i])}
    out.append(
      {
        "prompt": made.prompts[i],
        "seed": int(made.seeds[i]),
        "scores": {
          name: {
            "raw": _number(made.raw[name][i]),
            "reported": _number(made.reported[name][i]),
          }
          for name in made.raw
        },
        "steering": [
          {
            "step": int(t),
            "sigma": float(schedule.sigma_next[t]),
            "score": _number(made.steering[t, i]),
          }
          for t in np.flatnonzero(explored)
        ],
        "bad": {
          "candidates": int(made.bad[:, i].sum()),
          "steps": int((made.bad[:, i] > 0).sum()),
        },
        "best_of": best_of,
      }
    )
  return out


def _number(value: np.floating) -> float | None:
  """For JSON, which has no NaN."""
  return float(value) if np.isfinite(value) else None


def complaints(record: Mapping[str, Any], *, finite: bool) -> list[str]:
  """What is wrong with an image, of whose latent we know whether it is finite."""
  found = [] if finite else ["its latent holds NaN or infinity"]
  found += [
    f"its score by {name} is not finite"
    for name, score in record["scores"].items()
    if score["raw"] is None
  ]
  if record["best_of"] and None in record["best_of"]["scores"]:
    bad = record["best_of"]["scores"].count(None)
    found.append(f"{bad} of {len(record['best_of']['scores'])} samples had no score")
  bad = record["bad"]
  if bad["candidates"]:
    found.append(
      f"{bad['candidates']} candidate(s) in {bad['steps']} step(s) had a score that is "
      "not finite"
    )
  return found


def _say(text: str) -> None:
  """One line on stderr, beside the progress bar."""
  tqdm.tqdm.write(text, file=sys.stderr)


# --- the command line --------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
  """What the command line prints on stdout."""
  # Cheap checks first: loading a model takes minutes.
  prompts = read_prompts(args.prompt, args.prompts_file)
  per_prompt = args.images_per_prompt
  if per_prompt < 1:
    raise ValueError(f"--images-per-prompt {per_prompt} must be >= 1")
  rewards = name_rewards(args.reward)
  weights = None
  if args.reward_weights is not None:
    if len(args.reward_weights) != len(rewards):
      raise ValueError(
        f"--reward-weights gives {len(args.reward_weights)} number(s) for "
        f"{len(rewards)} reward(s)"
      )
    weights = dict(zip(rewards, args.reward_weights, strict=True))
  weights = pipeline.check_weights(list(rewards), weights)
  settings = pipeline.resolve(
    args.model, make_settings(args), rewards, t5_length=args.t5_length
  )
  of_images = [prompt for prompt in prompts for _ in range(per_prompt)]
  pipeline.check_seed(args.seed, len(of_images))
  rows = pipeline.batch_rows(args.batch_size, len(of_images), jax.device_count())

  joined = "\n".join(prompts)
  config = {
    "model": args.model,
    "rewards": rewards,
    "weights": weights,
    "prompts": {
      "count": len(prompts),
      "sha256": hashlib.sha256(joined.encode()).hexdigest(),
    },
    "images_per_prompt": per_prompt,
    "seed": args.seed,
    "dtype": args.dtype,
    "t5_length": args.t5_length,
    "batch_size": rows,
    "save_latents": args.save_latents,
    "settings": dataclasses.asdict(settings),
  }
  out = Output(
    args.out,
    config,
    prompts,
    count=len(of_images),
    force=args.force,
    save_latents=args.save_latents,
  )
  there = len(of_images) - len(out.missing)
  if there:
    _say(f"{there} of {len(of_images)} image(s) are there already")
  if out.missing:
    make(args, out, of_images, rewards, weights, settings, rows)
  lines = out.finish(per_prompt)
  summary = [f"wrote {len(out.missing)} image(s) to {args.out}"]
  for name in lines[0]["scores"]:
    scores = [line["scores"][name]["reported"] for line in lines]
    finite = [score for score in scores if score is not None]
    mean = f"{np.mean(finite):.4f}" if finite else "-"
    summary.append(f"{name}: mean {mean} of {len(finite)} score(s)")
  return "\n".join(summary)


def make(
  args: argparse.Namespace,
  out: Output,
  prompts: Sequence[str],
  rewards: Mapping[str, str],
  weights: Mapping[str, float],
  settings: pipeline.Settings,
  rows: int,
) -> None:
  """Makes what `out` lacks, and writes each batch while the next one is computed."""
  pipe = pipeline.Pipeline.load(
    args.model,
    rewards=rewards,
    weights=weights,
    dtype=args.dtype,
    t5_length=args.t5_length,
  )
  shared = "".join(
    f", {name} shares {sharing}" for name, sharing in pipe.sharing.items()
  )
  _say(
    f"loaded {args.model} on {pipe.mesh.size} x {jax.devices()[0].device_kind}{shared}"
    f"; an image takes {pipe.evaluations(settings):.1f} passes of the transformer"
  )
  schedule = pipe.schedule(settings)
  metadata = {
    "negative_prompt": settings.negative_prompt,
    "steps": settings.num_steps,
    "guidance": settings.guidance_scale,
    "sampler": settings.sampler,
    "noise_level": settings.noise_level,
    "sde_window": settings.sde_window,
    "explore": json.dumps(dataclasses.asdict(settings.explore)),
    "mode": settings.mode,
    "explore_window": settings.explore_window,
    "best_of": settings.best_of,
    "model": args.model,
    "rewards": json.dumps(dict(rewards)),
    "weights": json.dumps(dict(weights)),
    "dtype": args.dtype,
    "t5_length": args.t5_length,
    "versions": json.dumps(
      {"lrm_jax": lrm_jax.__version__}
      | {name: importlib.metadata.version(name) for name in ("jax", "flax", "pillow")}
    ),
  }
  batches = pipe.stream(
    [prompts[i] for i in out.missing],
    settings,
    seed=[args.seed + i for i in out.missing],
    batch_size=rows,
    progress=True,
  )
  done = 0
  with futures.ThreadPoolExecutor(1) as pool:
    writing: futures.Future | None = None
    for made in batches:
      indices = out.missing[done : done + len(made)]
      done += len(made)
      found = records(made, settings, schedule)
      for index, record, finite in zip(indices, found, made.finite, strict=True):
        if problems := complaints(record, finite=bool(finite)):
          _say(f"warning: {out.image(index)}: {'; '.join(problems)}")
      if writing is not None:
        writing.result()
      writing = pool.submit(
        out.write, indices, made.images, made.latents, found, metadata
      )
    if writing is not None:
      writing.result()


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for input that cannot be used."""
  args = _parser().parse_args(argv)
  compilation.configure()
  with warnings.catch_warnings():
    # Prompts that are cut: each of them, on one line.
    warnings.filterwarnings("always", category=UserWarning, module="lrm_jax")
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    try:
      print(run(args))
    except (ValueError, OSError) as e:
      print(f"error: {e}", file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print("interrupted: the same command continues", file=sys.stderr)
      return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
