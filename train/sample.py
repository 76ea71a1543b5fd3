"""What a reward model buys when it steers the quickstart's generator, and its price.

  python train/sample.py --config configs/quickstart.py

Needs the generator, this config's reward model, and the head-only one (`make
quickstart` makes them all). Explore-and-select against best-of-n, at equal network
evaluations; where among the steps exploring pays; the cheap mode. Judged by the reward
itself and by an oracle that it never saw: classifiers fit on other real digits.

Leaves in `sample.workdir`: results.json (every number), tables.md, sample.png,
samples_k1.png and samples_k<most>.png.

Axes: s seeds, b samples of a seed, H W C the latent.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from absl import app, flags, logging
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags
import numpy as np

from lrm_jax import (
  compilation,
  denoiser,
  explore,
  flow,
  plots,
  run_log,
  sample,
  steering,
)
from lrm_jax import folder as folder_lib
from lrm_jax.data import digits
from lrm_jax.models import features

STEERING, HEAD_ONLY = "reward", "head_only"  # the two reward models
# A dozen programs, each run a few times. On a CPU: two thirds of the time to compile,
# and as fast.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}
JUDGE = 3  # folded into a sample's key: the noise under which its result is scored


@dataclasses.dataclass(frozen=True)
class Method:
  """What a program is compiled for; schedule and guidance scale are its arguments.

  Attributes:
    reward: which one steers.
    shared: with the generator's blocks computed once for both (head-only rewards).
    guided: whether a velocity is a guided one.
  """

  reward: str
  options: explore.Explore
  guided: bool
  shared: bool = False


# --- programs ----------------------------------------------------------------------


def make_sampler(
  model: denoiser.Denoiser, method: Method, latent: tuple[int, int, int]
) -> Callable:
  """`(params, conds, schedule, scale, keys) -> (x (b H W C), bad scores)`, pure.

  `conds` are the prompts and the empty prompt, b rows each.
  """

  def run(params, conds, schedule, scale, keys):
    cond, uncond = (model.embed(params, c) for c in conds)
    inputs = cond[denoiser.GENERATOR]
    if method.guided:
      inputs = inputs, uncond[denoiser.GENERATOR]
    if method.shared:
      networks = explore.SharedPrefix(
        model.prefix_fn(params),
        model.tail_fn(params),
        model.head_fn(params, method.reward),
        scale if method.guided else None,
      )
    else:
      velocity = model.velocity_fn(params)
      if method.guided:
        velocity = sample.guide(velocity, scale)
      networks = explore.Apart(velocity, model.reward_fn(params, method.reward))
    x, steps = explore.explore(
      networks,
      inputs,
      model.reward_inputs(cond)[method.reward],
      sample.initial_noise(keys, latent),
      schedule,
      method.options,
      keys=keys,
    )
    return x, jnp.sum(steps.bad)

  return run


def make_judge(model: denoiser.Denoiser) -> Callable:
  """`(params, cond, x, sigmas, keys) -> {reward: (b,)}`: raw scores of results.

  Each reward sees x at its own level of `sigmas`, with noise that depends on the
  sample's key only: the same for every method.
  """

  def run(params, cond, x, sigmas, keys):
    inputs = model.reward_inputs(model.embed(params, cond))
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, JUDGE), x.shape[1:])  # noqa: E731
    eps = jax.vmap(draw)(keys)
    scores = {}
    for name, sigma in sigmas.items():
      sigma = jnp.broadcast_to(sigma, len(x))
      score = model.reward_fn(params, name)
      scores[name] = score(inputs[name], flow.add_noise(x, eps, sigma), sigma)
    return scores

  return run


# --- the bench ---------------------------------------------------------------------


class Bench:
  """Models, prompts, oracle and compiled programs; `measure` makes a Row."""

  def __init__(self, config: ConfigDict):
    c = config.sample
    self.config = config
    rewards = {STEERING: _model_folder(config), HEAD_ONLY: c.head_only}
    model = denoiser.load(config.model.base, rewards).to_device()
    if model.rewards[HEAD_ONLY].sharing != "prefix":
      raise ValueError(
        f"sample.head_only={c.head_only!r} does not share the blocks of the generator "
        f"{config.model.base!r}: train it there, with a frozen backbone"
      )
    self.model = model
    self.latent = (8, 8, model.config.in_channels)
    # In blocks; a head is little beside them.
    self.scoring = {
      name: part.config.backbone.num_layers / model.config.num_layers
      for name, part in model.rewards.items()
    }
    self.levels = {}
    for name, part in model.rewards.items():
      if part.scoring.table:
        raise ValueError(f"reward {name!r} looks its noise levels up in a table")
      self.levels[name] = jnp.float32(part.scoring.u_generated)

    splits = digits.load_splits(config.data.split_seed)
    self.oracle, self.held_out = digits.Oracle(splits.oracle), splits.held_out
    self.real = splits.train
    self.labels = np.arange(c.num) % digits.NUM_DIGITS
    templates = np.arange(c.num) // digits.NUM_DIGITS % len(digits.TEMPLATES)
    prompts = [
      digits.PROMPTS[digits.prompt_id(d, t)]
      for d, t in zip(self.labels, templates, strict=True)
    ]
    embedder = digits.WordEmbedder(config.data.context_dim, config.data.pooled_dim)
    cond = features.Cond(embedder.context(prompts), embedder.pooled(prompts))
    cond = jax.tree.map(jnp.asarray, cond)
    self.conds = cond, jax.tree.map(jnp.zeros_like, cond)
    self.keys = [
      jax.random.split(jax.random.key(config.seed + s), c.num) for s in c.seeds
    ]
    self.sigmas = flow.sampling_sigmas(c.num_steps, config.noise.shift)
    self._programs: dict[Any, Callable] = {}
    self._judge = jax.jit(make_judge(model))

  def schedule(
    self, window: tuple[int, int] | None = None, noise_level: float | None = None
  ) -> sample.Schedule:
    level = self.config.sample.noise_level if noise_level is None else noise_level
    return sample.make_schedule(self.sigmas, noise_level=level, explore_window=window)

  def cost(self, method: Method, schedule: sample.Schedule) -> float:
    """Generator passes per sample."""
    scoring = self.scoring[method.reward]
    return explore.evaluations(
      schedule,
      method.options,
      guided=method.guided,
      scoring=scoring,
      shared=scoring if method.shared else 0.0,
    )

  def draw(
    self, method: Method, schedule: sample.Schedule, scale: float, keys: jax.Array
  ) -> tuple[jax.Array, int, float]:
    """(x (b H W C), bad scores, seconds); compiles where that is new, untimed."""
    args = (self.model.params, self.conds, schedule, jnp.float32(scale), keys)
    if method not in self._programs:
      run = jax.jit(make_sampler(self.model, method, self.latent))
      self._programs[method] = run.lower(*args).compile(COMPILER_OPTIONS)
    start = time.perf_counter()
    x, bad = jax.block_until_ready(self._programs[method](*args))
    return x, int(bad), time.perf_counter() - start

  def scores(self, x: jax.Array, keys: jax.Array, sigma: float | None = None) -> dict:
    """Raw scores (b,) of both rewards, at their own noise level or at `sigma`."""
    levels = self.levels
    if sigma is not None:
      levels = {name: jnp.float32(sigma) for name in levels}
    return jax.device_get(
      self._judge(self.model.params, self.conds[0], x, levels, keys)
    )

  def measure(
    self, method: Method, schedule: sample.Schedule, scale: float, **settings: Any
  ) -> steering.Row:
    """Samples and judges all seeds."""
    drawn = [self.draw(method, schedule, scale, keys) for keys in self.keys]
    xs, bad, seconds = zip(*drawn, strict=True)
    options = method.options
    explored = np.flatnonzero(schedule.explore)
    settings = {
      "method": "explore",
      "steered_by": method.reward,
      "shared": method.shared,
      "candidates": options.candidates,
      "select": options.select,
      "temperature": options.temperature if options.select == "softmax" else None,
      "beam": options.beam,
      "guidance_scale": scale,
      "noise_level": float(schedule.noise_level[0]),
      "window": [int(explored[0]), int(explored[-1]) + 1],
      "bad_scores": sum(bad),
      **settings,
    }
    # The first call touches its memory for the first time.
    best = min(seconds) / len(self.labels)
    return self._row(xs, settings, self.cost(method, schedule), best)

  def affordable(self, plain: Method, evaluations: float) -> int:
    """How many samples and scorings cost at least `evaluations`."""
    each = self.cost(plain, self.schedule()) + self.scoring[plain.reward]
    return max(2, int(np.ceil(evaluations / each)))

  def best_of(self, plain: Method, num: int, scale: float) -> list[steering.Row]:
    """Best of 1, ..., num independent samples by the final score (`explore.best_of_n`).

    Of num samples the first n are what the best of n has to choose from. The first is
    the plain sampler's.
    """
    schedule = self.schedule()
    finals, chosen, elapsed = [], [], []
    for keys in self.keys:
      many = explore.sample_keys(keys, num)
      drawn = [self.draw(plain, schedule, scale, many[:, j]) for j in range(num)]
      x = np.stack([np.asarray(x) for x, _, _ in drawn])  # (n b H W C)
      last = float(schedule.sigma_next[-1])
      score = [self.scores(x[j], many[:, j], last)[plain.reward] for j in range(num)]
      finals.append(x)
      chosen.append(steering.first_best(np.stack(score)))
      elapsed += [seconds for _, _, seconds in drawn]
    rows = []
    for n in range(1, num + 1):
      xs = [
        x[best[n - 1], np.arange(x.shape[1])]
        for x, best in zip(finals, chosen, strict=True)
      ]
      settings = {
        "method": "best_of_n",
        "steered_by": plain.reward,
        "n": n,
        "guidance_scale": scale,
        "noise_level": float(schedule.noise_level[0]),
      }
      evaluations = n * self.cost(plain, schedule)
      evaluations += n * self.scoring[plain.reward] if n > 1 else 0.0
      seconds = n * min(elapsed) / len(self.labels)  # without the scoring
      rows.append(self._row(xs, settings, evaluations, seconds))
    return rows

  def _row(self, xs, settings, evaluations, seconds) -> steering.Row:
    values: dict[str, list] = {
      name: [] for name in (*steering.PER_SAMPLE, *steering.PER_SET)
    }
    images = []
    for x, keys in zip(xs, self.keys, strict=True):
      x = np.asarray(x)
      if not np.isfinite(x).all():
        raise FloatingPointError(f"a sample is not finite: {settings}")
      made = digits.from_latent(np.clip(x, -1, 1))
      scores = self.scores(x, keys)
      values["reward"].append(scores[STEERING])
      values["head_only"].append(scores[HEAD_ONLY])
      for name, value in self.judge(made, self.labels).items():
        values[name].append(value)
      images.append(made)
    values = {name: np.asarray(value, float) for name, value in values.items()}
    return steering.Row(settings, evaluations, seconds, values, np.stack(images))

  def judge(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What needs no reward model."""
    return {
      "accuracy": self.oracle.correct(images, labels),
      "probability": self.oracle.prob(images, labels),
      "frechet": digits.frechet_distance(images, self.held_out.images),
      "diversity": digits.diversity(images, labels),
    }

  def real_digits(self) -> dict[str, float]:
    """As many real digits (if there are), judged as samples are: a perfect generator.

    From the generator's training split; those held out are what samples are compared
    with.
    """
    each = -(-len(self.labels) // digits.NUM_DIGITS)
    pick = np.concatenate(
      [np.flatnonzero(self.real.labels == d)[:each] for d in range(digits.NUM_DIGITS)]
    )
    judged = self.judge(self.real.images[pick], self.real.labels[pick])
    return {name: float(np.mean(value)) for name, value in judged.items()}


# --- the experiments ---------------------------------------------------------------


def experiment(
  bench: Bench, say: Callable[[str, steering.Row], None]
) -> steering.Results:
  """Everything; `say(what, row)` is told of each row."""
  c = bench.config.sample
  check(c)
  scales = tuple(float(scale) for scale in c.guidance_scales)
  main = scales[0]

  def method(k, scale, *, reward=STEERING, shared=False, **options):
    options = explore.Explore(candidates=k, **options)
    return Method(reward, options, guided=scale != 1.0, shared=shared)

  def measured(what, *args, **settings):
    row = bench.measure(*args, **settings)
    say(what, row)
    return row

  names = steering.make_windows(bench.sigmas, c.windows, c.fractions)
  everywhere = bench.schedule()
  steered, best_of = {}, {}
  for scale in scales:
    for k in (1, *c.candidates):
      steered[scale, k] = measured(
        f"k={k}, guidance {scale:g}", method(k, scale), everywhere, scale
      )
    # As many as the dearest k costs; at the main scale some more, for the picture.
    dearest = max(steered[scale, k].evaluations for k in c.candidates)
    num = bench.affordable(method(1, scale), dearest)
    num = max(num, c.best_of) if scale == main else num
    best_of[scale] = bench.best_of(method(1, scale), num, scale)
    say(f"best of {num}, guidance {scale:g}", best_of[scale][-1])

  windows = {}
  for k in c.sweep_candidates:
    for window, name in names.items():
      windows[k, window] = measured(
        f"k={k}, {name}", method(k, main), bench.schedule(window), main
      )

  cheap = {}
  for k in c.cheap_candidates:
    for mode in explore.MODES:
      # The steps that SD3.5-Medium could pay for, not this small generator.
      window = explore.mode_window(mode, c.num_steps, explore.Explore(k))
      cheap[k, mode] = measured(
        f"k={k}, head only, {mode}",
        method(k, main, reward=HEAD_ONLY, shared=True),
        bench.schedule(window),
        main,
        mode=mode,
      )

  variations = {}
  for level in c.noise_levels:
    for k in (1, c.noise_candidates):
      name = f"k={k}, noise level {level:g}"
      at = bench.schedule(noise_level=level)
      variations[name] = measured(name, method(k, main), at, main)
  most = max(c.candidates)
  softmax = method(most, main, select="softmax", temperature=c.temperature)
  name = f"k={most}, softmax at {c.temperature:g}"
  variations[name] = measured(name, softmax, everywhere, main)
  beam = method(most // c.beam, main, beam=c.beam)
  name = f"k={most // c.beam}, beam of {c.beam}"
  variations[name] = measured(name, beam, everywhere, main)
  return steering.Results(steered, best_of, windows, names, cheap, variations)


def check(c: ConfigDict) -> None:
  """Raises ValueError for a `config.sample` that makes no sense; costs nothing."""
  if c.num < 2 * digits.NUM_DIGITS:
    raise ValueError(f"sample.num={c.num}: diversity needs two samples of each digit")
  if not c.seeds or not c.guidance_scales:
    raise ValueError("sample.seeds and sample.guidance_scales must not be empty")
  if not c.candidates or min(c.candidates) < 2:
    raise ValueError(
      f"sample.candidates={tuple(c.candidates)} must be 2 or more each; k = 1 is "
      "always there"
    )
  known = (*c.candidates,)
  if unknown := set(c.sweep_candidates) - set(known):
    raise ValueError(
      f"sample.sweep_candidates: {sorted(unknown)} are not in sample.candidates"
    )
  if not c.cheap_candidates or min(c.cheap_candidates) < 2:
    raise ValueError(
      f"sample.cheap_candidates={tuple(c.cheap_candidates)} must be 2 or more each"
    )
  if c.noise_candidates not in known:
    raise ValueError(
      f"sample.noise_candidates={c.noise_candidates} is not in sample.candidates"
    )
  if c.best_of < 2:
    raise ValueError(f"sample.best_of={c.best_of} must be 2 or more")
  if c.beam < 2 or max(c.candidates) % c.beam:
    raise ValueError(
      f"sample.beam={c.beam} must be 2 or more and divide the most candidates, "
      f"{max(c.candidates)}"
    )


# --- reports -----------------------------------------------------------------------


def draw_figure(path: pathlib.Path, results: steering.Results) -> None:
  """Curves against evaluations at the first scale, and the windows' shares."""
  scale = next(iter(results.best_of))
  steered = [row for (s, _), row in results.explore.items() if s == scale]
  methods = {"explore and select": steered, "best of n": results.best_of[scale]}
  merits = {
    "reward": "reward",
    "probability": "oracle: probability of the digit",
    "frechet": "Frechet distance to real digits",
  }
  curves = {
    title: {
      method: tuple(
        [f(row) for row in rows]
        for f in (
          lambda row: row.evaluations,
          lambda row, name=name: row.mean(name),
          lambda row, name=name: row.spread(name),
        )
      )
      for method, rows in methods.items()
    }
    for name, title in merits.items()
  }
  bars = {}
  shares = steering.window_shares(results)
  for k in dict.fromkeys(e["candidates"] for e in shares):
    mine = [e for e in shares if e["candidates"] == k]
    bars[f"exploring in some steps, k = {k}"] = (
      [e["name"].replace("; ", "\n") for e in mine],
      {
        title: [np.nan if e[name] is None else e[name]["share"] for e in mine]
        for name, title in (("reward", "reward"), ("probability", "oracle probability"))
      },
    )
  title = f"Explore and select on digits, guidance {scale:g}"
  plots.gain_and_cost(path, curves, bars, title=title)


def save(bench: Bench, results: steering.Results, seconds: float) -> str:
  """Writes everything into `sample.workdir`; returns the tables."""
  c = bench.config.sample
  workdir = pathlib.Path(c.workdir)
  real = bench.real_digits()
  intro = (
    f"{len(c.seeds)} seeds x {c.num} samples, {c.num_steps} steps, noise level "
    f"{c.noise_level:g}. ± is the standard deviation of the seeds' means. Evaluations "
    "are passes of the generator per sample; time is relative to k = 1. The oracle was "
    "fit on real digits that no model saw; of as many real digits it says "
    f"{real['accuracy']:.3f} and {real['probability']:.3f}, at a Frechet distance of "
    f"{real['frechet']:.2f} and a diversity of {real['diversity']:.2f}."
  )
  text = steering.tables(results, intro, num_steps=c.num_steps)
  (workdir / "tables.md").write_text(text)
  rows = [*results.explore.values()]
  rows += [row for mine in results.best_of.values() for row in mine]
  rows += [*results.windows.values(), *results.cheap.values()]
  rows += [*results.variations.values()]
  sigmas = bench.schedule().sigma_next.tolist()
  values = {
    "settings": {
      **c.to_dict(),
      "sigma_next": sigmas,
      "scoring": bench.scoring,  # of a generator pass
      "scored_at": {name: float(sigma) for name, sigma in bench.levels.items()},
    },
    "seconds": seconds,
    "real_digits": real,
    "rows": [row.to_dict() for row in rows],
    "equal_evaluations": steering.equal_evaluations(results),
    "windows": steering.window_shares(results),
    "cheap": steering.cheap_shares(results, bench.config.sample.num_steps),
  }
  (workdir / "results.json").write_text(json.dumps(values, indent=2) + "\n")
  draw_figure(workdir / "sample.png", results)
  scale, most = next(iter(results.best_of)), max(c.candidates)
  for k in (1, most):
    images = results.explore[scale, k].images[0][:100]
    digits.save_grid(workdir / f"samples_k{k}.png", images)
  return text


# --- the run -----------------------------------------------------------------------


def _model_folder(config: ConfigDict) -> pathlib.Path:
  return pathlib.Path(config.workdir) / "model"


def check_folders(config: ConfigDict, recipe: str) -> None:
  """Raises FolderError: what is missing, and the commands that make it."""
  commands = {
    config.model.base: "train/generator.py --config configs/quickstart_generator.py",
    str(_model_folder(config)): f"train/reward.py --config {recipe}",
    config.sample.head_only: "train/reward.py --config configs/quickstart.py:frozen",
  }
  missing = [
    f"{path}: python {command}"
    for path, command in commands.items()
    if not pathlib.Path(path).is_dir()
  ]
  if missing:
    raise folder_lib.FolderError(
      "these models are missing; make them with\n  " + "\n  ".join(missing)
    )


def run(config: ConfigDict, recipe: str) -> None:
  """All experiments of a config, which came from the file `recipe`."""
  start = time.monotonic()
  check_folders(config, recipe)
  check(config.sample)
  workdir = pathlib.Path(config.sample.workdir)
  run_log.write_run_info(workdir, config.to_dict(), seed=config.seed)
  bench = Bench(config)

  def say(what: str, row: steering.Row) -> None:
    print(
      f"{time.monotonic() - start:4.0f} s  {what}: reward {row.mean('reward'):.2f}, "
      f"oracle {row.mean('accuracy'):.3f}, {row.evaluations:.1f} evaluations",
      file=sys.stderr,
      flush=True,
    )

  results = experiment(bench, say)
  print(save(bench, results, time.monotonic() - start))
  print(f"wrote {workdir}/results.json, tables.md, sample.png, samples_*.png")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
  recipe = config_flags.get_config_filename(flags.FLAGS["config"])
  compilation.configure()
  try:
    run(flags.FLAGS.config, recipe)
  except (ValueError, OSError, FloatingPointError) as e:
    raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
  # Here, because tests import the other trainers, with this flag, as well.
  config_flags.DEFINE_config_file("config", None, "a file of configs/")
  flags.mark_flag_as_required("config")
  app.run(main)
