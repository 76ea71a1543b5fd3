"""`Pipeline`: prompts to images, with a sampler that reward models may steer.

  pipeline = Pipeline.load("models/sd35", rewards={"dina": "models/dina"})
  settings = Settings(explore=explore.Explore(candidates=6), mode="cheap")
  made = pipeline.generate(["a photo of a cat"], settings, seed=3)

docs/generation.md explains samplers, exploring, seeds and costs.

Axes: b images, T steps, m beams, n candidates of an image in a step, H W pixels,
h w latent pixels, C latent channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lrm_jax import build, encoders, flops, flow, sample, text
from lrm_jax import denoiser as denoiser_lib
from lrm_jax import explore as explore_lib
from lrm_jax import folder as folder_lib
from lrm_jax import rewards as rewards_lib
from lrm_jax import scorer as scorer_lib
from lrm_jax import sharding as sharding_lib
from lrm_jax.models import features, vae

BATCH_PER_DEVICE = 4
PROMPTS_PER_DEVICE = 8
MAX_SEED = 2**32 - 1
# The decoder's widest activations take 1 KiB per pixel: 2 GiB on each device.
DECODE_PIXELS = 1 << 21
REWARD_FN = "reward_fn"  # the name of a user's own reward


# --- settings ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
  """How images are made; impossible combinations are a ValueError.

  Attributes:
    num_steps: T, of SD3.5's shifted schedule.
    guidance_scale: 1 is no guidance, at half the cost.
    negative_prompt: what guidance leads away from.
    height, width: in pixels. None: what the generator was trained at.
    sampler: of `sample.SAMPLERS`. None: `sde` where candidates are compared, else
      `euler`.
    noise_level: of a stochastic sampler. None: `sample.NOISE_LEVEL`.
    sde_window: steps `start <= i < stop` that draw noise. None: all.
    explore: candidates per step, and how they are chosen.
    explore_window: steps in which candidates are compared. None: as `mode` says.
    mode: of `explore.MODES`; `cheap` looks at what these models cost. None: `full`.
    best_of: so many independent samples, of which the one with the best final score
      is kept.
  """

  num_steps: int = 50
  guidance_scale: float = 4.5
  negative_prompt: str = ""
  height: int | None = None
  width: int | None = None
  sampler: str | None = None
  noise_level: float | None = None
  sde_window: tuple[int, int] | None = None
  explore: explore_lib.Explore = explore_lib.Explore(candidates=1)
  explore_window: tuple[int, int] | None = None
  mode: str | None = None
  best_of: int = 1

  def __post_init__(self):
    for name in ("num_steps", "best_of"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
    if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
      raise ValueError(f"guidance_scale={self.guidance_scale} must be >= 0")
    name = self.sampler_name
    deterministic = sample.find_sampler(name).log_prob is None
    if deterministic and self.exploring:
      raise ValueError(
        f"candidates={self.explore.candidates}, beam={self.explore.beam} need a "
        f"sampler that draws noise: {name!r} would make them all the same, use "
        "'sde' or 'cps'"
      )
    for field in ("noise_level", "sde_window"):
      if deterministic and getattr(self, field) is not None:
        raise ValueError(
          f"{field}={getattr(self, field)} has no effect on the sampler {name!r}, "
          "which draws no noise: use 'sde' or 'cps'"
        )
    if self.mode is not None and self.explore_window is not None:
      raise ValueError(
        f"mode={self.mode!r} and explore_window={self.explore_window} both say where "
        "to explore: give one"
      )
    if self.best_of > 1 and self.exploring:
      raise ValueError(
        f"best_of={self.best_of} compares independent samples, and candidates="
        f"{self.explore.candidates}, beam={self.explore.beam} explores within one: "
        "use one of the two"
      )
    schedule = self.schedule(np.linspace(1, 0, self.num_steps + 1))
    if self.exploring and not np.any(schedule.explore & (schedule.noise_level > 0)):
      raise ValueError(
        "no step explores: the exploring window has no step that draws noise"
      )

  @property
  def exploring(self) -> bool:
    """Whether candidates are compared."""
    return self.explore.num > 1

  @property
  def sampler_name(self) -> str:
    if self.sampler is None:
      return "sde" if self.exploring else "euler"
    return self.sampler

  @property
  def guided(self) -> bool:
    return self.guidance_scale != 1

  def schedule(self, sigmas: np.ndarray, **cost: float) -> sample.Schedule:
    """The steps between noise levels (T+1,).

    Args:
      cost: `scoring` and `shared` of `explore.evaluations`, which cheap mode looks at.
    """
    window = self.explore_window
    if window is None:
      window = explore_lib.mode_window(
        self.mode or "full", self.num_steps, self.explore, guided=self.guided, **cost
      )
    level = sample.NOISE_LEVEL if self.noise_level is None else self.noise_level
    return sample.make_schedule(
      sigmas,
      noise_level=level,
      sde_window=self.sde_window,
      explore_window=window,
    )


def resolve(
  folder: str | os.PathLike,
  settings: Settings,
  rewards: Mapping[str, str | os.PathLike] | None = None,
  *,
  own_reward: bool = False,
  t5_length: int = 256,
) -> Settings:
  """Checks settings against model folders, of which only the configs are read.

  Args:
    rewards, own_reward: the rewards' folders by name, and whether there is one of the
      user's own besides.
    t5_length: tokens of T5.

  Returns: the settings with what None stood for: sampler, height and width.

  Raises:
    FolderError: a folder lacks a component.
    ValueError: settings that these models cannot serve.
  """
  if not 1 <= t5_length <= text.T5_MAX_LENGTH:
    raise ValueError(f"t5_length={t5_length} is not in 1..{text.T5_MAX_LENGTH}")
  rewards = rewards or {}
  parts = ("transformer", "vae", "clip_l", "clip_g", "tokenizers", "scheduler")
  scorer_lib.require(folder, parts, "generating images")
  for name, path in rewards.items():
    scorer_lib.require(path, ("reward",), f"the reward {name!r}")
  if not (rewards or own_reward):
    for what, wanted in (
      (f"best_of={settings.best_of}", settings.best_of > 1),
      (
        f"candidates={settings.explore.candidates}, beam={settings.explore.beam}",
        settings.exploring,
      ),
    ):
      if wanted:
        raise ValueError(f"{what} needs a reward to choose by")

  full = _config(folder, "transformer")
  autoencoder: vae.VAEConfig = _config(folder, "vae")
  if autoencoder.latent_channels != full.in_channels:
    raise folder_lib.FolderError(
      f"{folder}: the autoencoder's latents have {autoencoder.latent_channels} "
      f"channels, the transformer takes {full.in_channels}"
    )
  patch = autoencoder.downsampling * full.patch_size
  trained = patch * full.pos_embed_base
  tables = {"the generator": full.pos_embed_size}
  for name, path in rewards.items():
    backbone = _config(path, "reward").backbone
    denoiser_lib.check_inputs(name, backbone, full)
    tables[f"the reward {name!r}"] = backbone.pos_embed_size
  sizes = {}
  for side in ("height", "width"):
    size = getattr(settings, side)
    sizes[side] = size = trained if size is None else size
    if size < patch or size % patch:
      raise ValueError(f"{side}={size} must be a positive multiple of {patch} pixels")
    for owner, table in tables.items():
      if size > patch * table:
        raise ValueError(
          f"{side}={size} is beyond the position table of {owner}, which ends at "
          f"{patch * table} pixels"
        )
  return dataclasses.replace(settings, sampler=settings.sampler_name, **sizes)


def _config(folder: str | os.PathLike, name: str) -> Any:
  return build.config_from_dict(folder_lib.find(folder, name)[1]["config"])


def check_seed(seed: int, count: int) -> None:
  """Checks that images 0..count-1 can have the seeds from `seed` on.

  Raises:
    ValueError: a seed outside 0..MAX_SEED.
  """
  if seed < 0 or seed + count - 1 > MAX_SEED:
    raise ValueError(f"the seeds {seed}..{seed + count - 1} are not in 0..{MAX_SEED}")


def batch_rows(batch_size: int | None, count: int, num_devices: int) -> int:
  """Images that are made at a time, among `count` of them.

  Args:
    batch_size: None: BATCH_PER_DEVICE on each device, or fewer where that is enough
      for all.

  Raises:
    ValueError: a batch that cannot be split over the devices.
  """
  if batch_size is None:
    return num_devices * min(BATCH_PER_DEVICE, max(1, -(-count // num_devices)))
  if batch_size < 1 or batch_size % num_devices:
    raise ValueError(
      f"batch_size={batch_size} must be a positive multiple of the number of devices, "
      f"{num_devices}"
    )
  return batch_size


# --- results -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generated:
  """Images and what is known of them; n images, arrays on the host.

  Attributes:
    prompts: (n).
    seeds: (n) int64.
    images: (n H W 3) uint8.
    latents: (n h w C) float32, scaled as the generator's.
    raw, reported: reward's name -> (n) float32 final scores, at the level at which
      the reward was published for generated latents; not finite where the model
      failed.
    steering: (T n) float32, what each image's state after a step had been chosen by;
      NaN in steps that did not explore.
    bad: (T n) int32, candidates whose score was not finite.
    finite: (n) bool, whether the latents hold no NaN or infinity.
    best_of: (n best_of) the final scores that were compared (the weighted sum of raw
      scores); None where nothing was.
    chosen: (n) which of them was kept.
  """

  prompts: tuple[str, ...]
  seeds: np.ndarray
  images: np.ndarray
  latents: np.ndarray
  raw: dict[str, np.ndarray]
  reported: dict[str, np.ndarray]
  steering: np.ndarray
  bad: np.ndarray
  finite: np.ndarray
  best_of: np.ndarray | None
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.prompts)


def _join(parts: Sequence[Generated]) -> Generated:
  """Batches as one."""
  axes = {"steering": 1, "bad": 1}

  def join(name):
    values = [getattr(part, name) for part in parts]
    if name == "prompts":
      return sum(values, ())
    if values[0] is None:
      return None
    return jax.tree.map(lambda *a: np.concatenate(a, axis=axes.get(name, 0)), *values)

  return Generated(**{f.name: join(f.name) for f in dataclasses.fields(Generated)})


# --- the pipeline ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
  """What of the settings a program is compiled for."""

  explore: explore_lib.Explore
  sampler: str
  guided: bool

  @property
  def exploring(self) -> bool:
    return self.explore.num > 1


@struct.dataclass
class _Given:
  """What all steps of a batch have in common.

  Attributes:
    params: of the denoiser.
    embedded: what the networks are given of the prompts, see `Denoiser.embed`; and
      the prompts as they are, for a user's own reward.
    uncond: (1 ...) the generator's, of the negative prompt; None without guidance.
    guidance_scale: ().
    weights: of the rewards, by name.
  """

  params: Any
  embedded: Any
  uncond: Any
  guidance_scale: Any
  weights: Any


class Pipeline:
  """A generator, rewards, text encoders and an autoencoder, on a mesh of devices.

  Text encoders and autoencoder are loaded when they are first needed; they stay on the
  devices until `free` is called. Make one with `Pipeline.load`.

  Attributes:
    folder: the generator's.
    reward_folders: name -> folder.
    weights: name -> weight of each reward, a user's own included.
    sharing: name -> what the reward has in common with the generator, see
      `denoiser.RewardPart`.
    mesh: of all devices; parameters are on each, images are split over them.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    denoiser: denoiser_lib.Denoiser,
    mesh: jax.sharding.Mesh,
    *,
    reward_folders: dict[str, pathlib.Path],
    reward_fn: rewards_lib.RewardFn | None,
    weights: dict[str, float],
    dtype: str,
    t5_length: int,
  ):
    """`denoiser.params` on the devices; `weights` of every reward."""
    self.folder = folder
    self.reward_folders = reward_folders
    self.weights = weights
    self.sharing = {name: part.sharing for name, part in denoiser.rewards.items()}
    self.mesh = mesh
    self._denoiser = denoiser
    self._reward_fn = reward_fn
    self._dtype = dtype
    self._t5_length = t5_length
    self._split = sharding_lib.batch_sharding(mesh)
    self._copied = sharding_lib.replicated(mesh)
    schedule = folder_lib.find(folder, "scheduler")[1]
    self._sigmas = functools.partial(
      flow.sampling_sigmas,
      shift=schedule["shift"],
      num=schedule["num_train_timesteps"],
    )
    self._final_levels = {
      name: scorer_lib.Level.of(reward_folders[name], part.scoring)
      for name, part in denoiser.rewards.items()
    }
    self._text_part: encoders.TextEncoder | None = None
    self._vae_part: build.Model | None = None
    self._keys_jit = jax.jit(_keys, static_argnames="n")
    self._embed_jit = jax.jit(self._embed)
    self._embed_uncond_jit = jax.jit(self._embed_uncond)
    self._start_jit = jax.jit(self._start, static_argnames=("program", "latent"))
    self._step_jit = jax.jit(
      self._step, static_argnames="program", donate_argnames="carry"
    )
    self._finish_jit = jax.jit(self._finish, static_argnames="program")
    self._score_jit = jax.jit(self._score)
    self._decode_jit: Callable | None = None

  @classmethod
  def load(
    cls,
    folder: str | os.PathLike,
    *,
    rewards: Mapping[str, str | os.PathLike] | None = None,
    reward_fn: rewards_lib.RewardFn | None = None,
    weights: Mapping[str, float] | None = None,
    dtype: str = "float32",
    scan_blocks: bool | None = None,
    attention_impl: str = "auto",
    t5_length: int = 256,
    devices: Sequence[jax.Device] | None = None,
  ) -> "Pipeline":
    """Reads a generator and rewards and puts them on the devices.

    Args:
      folder: a model folder with all parts of an SD3.5.
      rewards: name -> model folder with a reward.
      reward_fn: a reward of the user's own, named `reward_fn`: a jax function
        `(cond, x, sigma) -> (b,)` of the prompts (`features.Cond`), of noisy latents
        (b h w C) and of their noise levels (b,). The final score is at sigma 0.
      weights: of each reward in the sum of raw scores that is steered by; None: 1.
      dtype, scan_blocks, attention_impl, t5_length: as of `scorer.Scorer.load`.
      devices: None: all.

    Raises:
      FolderError: no such folder, or it lacks a component.
      ValueError: an argument that is none of the above, or models that do not fit
        together.
    """
    given = dict(rewards or {})
    if dtype not in scorer_lib.DTYPES:
      raise ValueError(f"dtype={dtype!r}: use one of {scorer_lib.DTYPES}")
    names = list(given)
    if reward_fn is not None:
      if REWARD_FN in given:
        raise ValueError(f"a folder's reward cannot be named {REWARD_FN!r} beside one")
      names.append(REWARD_FN)
    weights = check_weights(names, weights)
    own = reward_fn is not None
    resolve(folder, Settings(), given, own_reward=own, t5_length=t5_length)

    mesh = sharding_lib.make_mesh(devices=devices)
    denoiser = denoiser_lib.load(
      folder,
      given,
      dtype=dtype,
      scan_blocks=scan_blocks,
      attention_impl=attention_impl,
    )
    return cls(
      pathlib.Path(folder),
      denoiser.to_device(sharding_lib.replicated(mesh)),
      mesh,
      reward_folders={name: pathlib.Path(path) for name, path in given.items()},
      reward_fn=reward_fn,
      weights=weights,
      dtype=dtype,
      t5_length=t5_length,
    )

  # -- what it does --

  def generate(
    self,
    prompts: Sequence[str],
    settings: Settings | None = None,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    progress: bool = False,
  ) -> Generated:
    """`stream` at once: everything is kept in memory."""
    return _join(
      list(
        self.stream(
          prompts, settings, seed=seed, batch_size=batch_size, progress=progress
        )
      )
    )

  def stream(
    self,
    prompts: Sequence[str],
    settings: Settings | None = None,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    progress: bool = False,
  ) -> Iterator[Generated]:
    """One image for each prompt, in batches.

    An image depends on its prompt, its seed and the settings, whatever the batch; the
    same program gives the same bits, another batch size or number of devices gives
    the same up to rounding.

    Args:
      prompts: "" is the empty one. Those that are longer than an encoder takes are
        cut, with a warning.
      settings: None: `Settings()`.
      seed: of the first image, the i-th has `seed + i`; or one for each prompt.
      batch_size: see `batch_rows`; a last batch that is smaller is padded.
      progress: a bar on stderr, with one tick per step and batch.

    Yields: the images of a batch.

    Raises:
      ValueError: settings that these models cannot serve, no prompts, seeds that are
        no 32-bit numbers. Raised here, not at the first batch.
      TypeError: prompts that are not a sequence of strings.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
      raise TypeError(f"prompts must be a sequence of strings, not {prompts!r}")
    prompts = list(prompts)
    if not prompts:
      raise ValueError("prompts is empty")
    settings = self.resolve(settings)
    if isinstance(seed, int | np.integer):
      check_seed(int(seed), len(prompts))
      seeds = int(seed) + np.arange(len(prompts), dtype=np.int64)
    else:
      seeds = np.asarray(seed)
      if seeds.shape != (len(prompts),) or not np.issubdtype(seeds.dtype, np.integer):
        raise ValueError(
          f"seed must be an integer, or {len(prompts)} of them, one for each prompt"
        )
      check_seed(int(seeds.min()), 1)
      check_seed(int(seeds.max()), 1)
      seeds = seeds.astype(np.int64)
    rows = batch_rows(batch_size, len(prompts), self.mesh.size)
    return self._stream(prompts, seeds, settings, rows, progress)

  def resolve(self, settings: Settings | None = None) -> Settings:
    """`resolve` for this pipeline's models."""
    return resolve(
      self.folder,
      Settings() if settings is None else settings,
      self.reward_folders,
      own_reward=self._reward_fn is not None,
    )

  def schedule(self, settings: Settings) -> sample.Schedule:
    """The steps, at the folder's noise levels."""
    settings = self.resolve(settings)
    cost = {} if settings.mode is None else self._cost(settings)
    return settings.schedule(self._sigmas(settings.num_steps), **cost)

  def evaluations(self, settings: Settings | None = None) -> float:
    """What one image costs, in passes of the generator: see `explore.evaluations`.

    A score counts by its floating-point operations; a user's own function is free.
    """
    settings = self.resolve(settings)
    cost = self._cost(settings)
    passes = explore_lib.evaluations(
      self.schedule(settings), settings.explore, guided=settings.guided, **cost
    )
    if settings.best_of > 1:
      passes = settings.best_of * (passes + cost["scoring"])
    return passes

  def _cost(self, settings: Settings) -> dict[str, float]:
    """`scoring` and `shared` of `explore.evaluations`; settings are resolved."""
    height, width = self._latent(settings)[:2]
    length = text.CLIP_LENGTH + self._t5_length
    tokens = flops.image_tokens(self._denoiser.config, height, width)
    whole = flops.mmdit(self._denoiser.config, tokens, length)
    parts = [part.config for part in self._denoiser.rewards.values()]
    scoring = sum(flops.reward(c, height, width, length) for c in parts)
    shared = 0
    if self._shares_prefix:
      shared = flops.mmdit(parts[0].backbone, tokens, length)
    return {"scoring": scoring / whole, "shared": shared / whole}

  def free(self, *parts: str) -> None:
    """Lets go of `text` or `vae` parameters, which are read again when needed.

    Raises:
      ValueError: another name.
    """
    for part in parts:
      if part not in ("text", "vae"):
        raise ValueError(f"free({part!r}): use 'text' or 'vae'")
      setattr(self, f"_{part}_part", None)

  # -- a run --

  def _stream(self, prompts, seeds, settings, rows, progress) -> Iterator[Generated]:
    schedule = self.schedule(settings)
    num_batches = -(-len(prompts) // rows)
    # Elsewhere than on a terminal each update is a line.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm.tqdm(
      total=num_batches * settings.best_of * settings.num_steps,
      disable=not progress,
      desc="generate",
      unit="step",
      mininterval=interval,
      maxinterval=interval,
    ) as bar:
      held: dict[str, features.Cond] = {}
      uncond = None
      if settings.guided:
        uncond = self._encode([settings.negative_prompt], rows)
        with self._computing():
          uncond = self._embed_uncond_jit(
            self._denoiser.params, jax.device_put(uncond[0], self._copied)
          )
      for start in range(0, len(prompts), rows):
        # Padded with the last image, so that every batch runs the same program.
        taken = np.minimum(np.arange(start, start + rows), len(prompts) - 1)
        batch = [prompts[i] for i in taken]
        # Prompts of several images in a row are encoded once.
        distinct = list(dict.fromkeys(batch))
        new = [prompt for prompt in distinct if prompt not in held]
        encoded = dict(zip(new, self._encode(new, rows), strict=True)) if new else {}
        held = {prompt: (held | encoded)[prompt] for prompt in distinct}
        cond = jax.tree.map(
          lambda *a: np.concatenate(a), *(held[prompt] for prompt in batch)
        )
        made = self._make(batch, seeds[taken], cond, uncond, settings, schedule, bar)
        count = min(rows, len(prompts) - start)
        bar.set_postfix_str(f"{start + count} images", refresh=False)
        yield _first(made, count)

  def _make(self, prompts, seeds, cond, uncond, settings, schedule, bar) -> Generated:
    """One batch."""
    program = _Program(settings.explore, settings.sampler_name, settings.guided)
    tries = []
    with self._computing():
      params = self._denoiser.params
      given = _Given(
        params=params,
        embedded=self._embed_jit(params, jax.device_put(cond, self._split)),
        uncond=uncond,
        guidance_scale=np.float32(settings.guidance_scale),
        weights={name: np.float32(w) for name, w in self.weights.items()},
      )
      own, *keys = self._keys_jit(
        jax.device_put(seeds.astype(np.uint32), self._split), n=settings.best_of
      )
      latent = self._latent(settings)
      for of_try in keys:
        carry = self._start_jit(given, of_try, program=program, latent=latent)
        steps = []
        for i in range(len(schedule)):
          at = schedule[i : i + 1]
          carry, step = self._step_jit(given, carry, at, of_try, program=program)
          # The step before is waited for, so that the device never waits for us.
          if steps:
            jax.block_until_ready(steps[-1])
            bar.update()
          steps.append(step)
        sigma = schedule.sigma_next[-1]
        x, beam = self._finish_jit(given, carry, sigma, program=program)
        raw = self._score_jit(given, x, own)
        tries.append(jax.device_get((x, beam, raw, steps)))
        bar.update()

    totals = np.stack([self._total(raw, len(seeds)) for _, _, raw, _ in tries], axis=1)
    best = np.argmax(np.where(np.isfinite(totals), totals, -np.inf), axis=1)

    def kept(values, axis=0):
      """Of each image the best try's, from the values of all."""
      each = [np.take(values[t], [i], axis=axis) for i, t in enumerate(best)]
      return np.concatenate(each, axis=axis)

    latents = kept([x for x, *_ in tries])
    raw = {name: kept([r[name] for _, _, r, _ in tries]) for name in self.weights}
    steering = [_lineage(steps, beam, settings.explore) for _, beam, _, steps in tries]
    bad = [np.concatenate([bad for *_, bad in steps]) for *_, steps in tries]
    return Generated(
      prompts=tuple(prompts),
      seeds=seeds,
      images=self._images(latents),
      latents=latents,
      raw=raw,
      reported={name: self._report(name, scores) for name, scores in raw.items()},
      steering=kept(steering, axis=1),
      bad=kept(bad, axis=1),
      finite=np.isfinite(latents).all(axis=(1, 2, 3)),
      best_of=totals if settings.best_of > 1 else None,
      chosen=best,
    )

  def _total(self, raw: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """(b) weighted sum of raw final scores; zeros without rewards."""
    weighted = [np.float32(self.weights[name]) * scores for name, scores in raw.items()]
    return sum(weighted, np.zeros(count, np.float32))

  def _report(self, name: str, raw: np.ndarray) -> np.ndarray:
    if name not in self._denoiser.rewards:
      return raw
    return scorer_lib.report(raw, self._denoiser.rewards[name].scoring)

  def _latent(self, settings: Settings) -> tuple[int, int, int]:
    """(h, w, C)."""
    side = _config(self.folder, "vae").downsampling
    return (
      settings.height // side,
      settings.width // side,
      self._denoiser.config.in_channels,
    )

  # -- the programs that run on the devices --
  # Parameters are arguments, never constants; so are guidance scale, weights, noise
  # levels and windows, so that other values compile nothing.

  @contextlib.contextmanager
  def _computing(self, *, exact: bool = False):
    """The mesh; and float32 models in float32: GPUs and TPUs default to fewer bits."""
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.set_mesh(self.mesh))
      if exact or self._dtype == "float32":
        stack.enter_context(jax.default_matmul_precision("highest"))
      yield

  @property
  def _shares_prefix(self) -> bool:
    """Whether the one reward reads the generator's own tokens."""
    return self._reward_fn is None and list(self.sharing.values()) == ["prefix"]

  def _embed(self, params, cond):
    """What the networks are given of the prompts, by what it belongs to."""
    embedded = self._denoiser.embed(params, cond)
    return embedded if self._reward_fn is None else embedded | {REWARD_FN: cond}

  def _embed_uncond(self, params, cond):
    return self._denoiser.embed(params, cond)[denoiser_lib.GENERATOR]

  def _reward_inputs(self, embedded):
    own = {} if self._reward_fn is None else {REWARD_FN: embedded[REWARD_FN]}
    return self._denoiser.reward_inputs(embedded) | own

  def _reward_fns(self, params):
    own = {} if self._reward_fn is None else {REWARD_FN: self._reward_fn}
    fns = {
      name: self._denoiser.reward_fn(params, name) for name in self._denoiser.rewards
    }
    return fns | own

  def _networks(self, given: "_Given", program: "_Program"):
    """The functions that steer and are steered, and the inputs of both."""
    denoiser, params, weights = self._denoiser, given.params, given.weights
    cond = inputs = given.embedded[denoiser_lib.GENERATOR]
    if program.guided:
      repeat = lambda a: jnp.broadcast_to(a, (len(cond.pooled), *a.shape[1:]))  # noqa: E731
      inputs = (cond, jax.tree.map(repeat, given.uncond))
    if program.exploring and self._shares_prefix:
      (name,) = denoiser.rewards
      head = denoiser.head_fn(params, name)
      networks = explore_lib.SharedPrefix(
        denoiser.prefix_fn(params),
        denoiser.tail_fn(params),
        lambda inputs, tokens: weights[name] * head(inputs, tokens),
        given.guidance_scale if program.guided else None,
      )
      return networks, inputs, cond
    velocity = denoiser.velocity_fn(params)
    if program.guided:
      velocity = sample.guide(velocity, given.guidance_scale)
    if not program.exploring:
      return explore_lib.Apart(velocity, _no_reward), inputs, ()
    terms = {name: (weights[name], f) for name, f in self._reward_fns(params).items()}
    networks = explore_lib.Apart(velocity, rewards_lib.weighted_sum(terms))
    return networks, inputs, self._reward_inputs(given.embedded)

  def _start(self, given, keys, *, program, latent):
    networks, inputs, _ = self._networks(given, program)
    x = sample.initial_noise(keys, latent)
    return self._placed(explore_lib.start(networks, inputs, x, program.explore))

  def _step(self, given, carry, at, keys, *, program):
    networks, inputs, reward_inputs = self._networks(given, program)
    carry, steps = explore_lib.advance(
      networks,
      inputs,
      reward_inputs,
      carry,
      at,
      program.explore,
      keys=keys,
      sampler=sample.find_sampler(program.sampler),
    )
    return self._placed(carry), (steps.scores, steps.chosen, steps.bad)

  def _finish(self, given, carry, sigma, *, program):
    """x (b h w C), and (b,) which of the beams it was."""
    networks, _, reward_inputs = self._networks(given, program)
    return explore_lib.finish(networks, reward_inputs, carry, sigma, program.explore)

  def _score(self, given, x, keys):
    """Final raw scores: name -> (b,), with noise from each image's own key."""
    fns = self._reward_fns(given.params)
    inputs = self._reward_inputs(given.embedded)
    scores = {}
    for name, reward_fn in fns.items():
      if name in self._final_levels:
        noisy, sigma = scorer_lib.at_level(self._final_levels[name], x, keys)
      else:
        noisy, sigma = x, jnp.zeros(len(x), jnp.float32)
      scores[name] = reward_fn(inputs[name], noisy, sigma).astype(jnp.float32)
    return scores

  def _placed(self, carry: explore_lib.Carry) -> explore_lib.Carry:
    """Images split over the devices, so that each step finds them as the last did."""

    def place(a):
      sharding = self._split if a.ndim else self._copied
      return jax.lax.with_sharding_constraint(a, sharding)

    return jax.tree.map(place, carry)

  # -- prompts and pixels --

  def _encode(self, prompts: Sequence[str], rows: int) -> list[features.Cond]:
    """Each prompt's context (1 l d) and pooled (1 e), on the host."""
    if self._text_part is None:
      self._text_part = encoders.TextEncoder(
        self.folder,
        t5_length=self._t5_length,
        context_dim=self._denoiser.config.context_dim,
        dtype=self._dtype,
        sharding=self._copied,
      )
    part = self._text_part
    size = min(rows, PROMPTS_PER_DEVICE * self.mesh.size)
    ids = part.tokenize(prompts)
    conds = []
    for start in range(0, len(prompts), size):
      taken = np.minimum(np.arange(start, start + size), len(prompts) - 1)
      with self._computing():
        batch = jax.device_put({k: v[taken] for k, v in ids.items()}, self._split)
        cond = jax.device_get(part(batch))
      count = min(size, len(prompts) - start)
      conds += [jax.tree.map(lambda a, i=i: a[i : i + 1], cond) for i in range(count)]
    return conds

  def _images(self, latents: np.ndarray) -> np.ndarray:
    """(b H W 3) uint8 pixels, a bounded number of images at a time."""
    if self._vae_part is None:
      model = build.load_vae(self.folder)
      params = build.to_device(model.params, self._copied)
      self._vae_part = dataclasses.replace(model, params=params)
    if self._decode_jit is None:
      model = self._vae_part
      self._decode_jit = jax.jit(
        functools.partial(encoders.decode_latents, model.graphdef, model.config)
      )
    b, height, width, _ = latents.shape
    pixels = height * width * self._vae_part.config.downsampling**2
    size = min(b, self.mesh.size * max(1, DECODE_PIXELS // pixels))
    images = []
    with self._computing(exact=True):
      for start in range(0, b, size):
        taken = np.minimum(np.arange(start, start + size), b - 1)
        batch = jax.device_put(latents[taken], self._split)
        images.append(self._decode_jit(self._vae_part.params, batch))
    return np.concatenate(jax.device_get(images))[:b]


def check_weights(
  names: Sequence[str], weights: Mapping[str, float] | None
) -> dict[str, float]:
  """A weight for each reward; 1 where none are given.

  Raises:
    ValueError: weights of other names, or that are not finite.
  """
  if weights is None:
    return dict.fromkeys(names, 1.0)
  if set(weights) != set(names):
    raise ValueError(
      f"weights for {sorted(weights)}, but the rewards are {sorted(names)}: give one "
      "for each"
    )
  for name, weight in weights.items():
    if not math.isfinite(weight):
      raise ValueError(f"the weight {weight} of the reward {name!r} is not finite")
  return {name: float(weights[name]) for name in names}


def _keys(seeds: jax.Array, *, n: int):
  """Each image's own key (b,), and that of each of its n tries."""
  keys = jax.vmap(jax.random.key)(seeds)
  tries = explore_lib.sample_keys(keys, n)
  return keys, *(tries[:, i] for i in range(n))


def _no_reward(inputs, x, sigma):
  raise ValueError("a plain sampler scores nothing")


def _lineage(
  steps: Sequence[tuple], beam: np.ndarray, options: explore_lib.Explore
) -> np.ndarray:
  """(T b) scores that the states on the way to the winning beam were chosen by.

  Args:
    steps: T times scores (1 b n), chosen (1 b m), and what is not read.
    beam: (b).
  """
  at = np.array(beam)  # (b,) the beam that leads to the winner
  rows = np.arange(len(at))
  scores = []
  for of_step, kept, _ in reversed(steps):
    chosen = kept[0][rows, at]
    scores.append(of_step[0][rows, chosen])
    at = chosen // options.candidates
  return np.stack(scores[::-1])


def _first(made: Generated, count: int) -> Generated:
  """The first images of a batch."""
  axes = {"steering": 1, "bad": 1}

  def first(name):
    value = getattr(made, name)
    if name == "prompts":
      return value[:count]
    if value is None:
      return None
    axis = axes.get(name, 0)
    return jax.tree.map(lambda a: a.take(np.arange(count), axis=axis), value)

  return Generated(**{f.name: first(f.name) for f in dataclasses.fields(Generated)})
