"""`Scorer`: scores latents and images with the reward model of a folder.

docs/scoring.md explains noise levels, what a score means, ensembles and image sizes.

Axes: b samples, k noise levels, H W latent pixels, C latent channels, p prompts,
l text tokens, d width.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lrm_jax import build, encoders, flow, text
from lrm_jax import folder as folder_lib
from lrm_jax.data import buckets
from lrm_jax.data import images as images_lib
from lrm_jax.models import attention, features, qformer_head, reward, vae

DTYPES = ("float32", "bfloat16")
ENSEMBLE_MODES = ("tokens", "mean")
BATCH_SIZE = 8
PROMPT_BATCH = 8
# The autoencoder's widest activations take 512 bytes per pixel: 2 GiB per 4 megapixels.
ENCODE_PIXELS = 1 << 22


# --- the programs that run on the device -------------------------------------------
# Parameters are arguments, never constants of the program; noise levels are arrays, so
# that another level compiles nothing.


def noised(x0, key, ids, u_bits, nth, sigma):
  """Each latent at noise level sigma, with its own noise.

  The noise of a sample depends on the key, the sample's id, u, and how often this u
  came before in the list: not on the batch that the sample is in, nor on the other
  levels that are asked for.

  Args:
    x0: (b H W C) clean latents.
    ids: (b) uint32.
    u_bits: uint32, the bits of the float32 u.
    nth: uint32, how often this u came before.
    sigma: (b).
  """
  key = jax.random.fold_in(jax.random.fold_in(key, u_bits), nth)

  def draw(i):
    return jax.random.normal(jax.random.fold_in(key, i), x0.shape[1:], jnp.float32)

  return flow.add_noise(x0, jax.vmap(draw)(ids), sigma)


def _score(graphdef, params, x, sigma, cond):
  return nnx.merge(graphdef, params)(x, sigma, cond)


def _ensemble(graphdef, params, xs, sigmas, cond):
  return nnx.merge(graphdef, params).ensemble(xs, sigmas, cond)


def _batch_rows(n: int, batch_size: int) -> int:
  """How many rows each batch has: `batch_size`, or fewer where n is small.

  Small ones are powers of two: so a program is compiled for few batch sizes, and
  little work is wasted.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be >= 1")
  return min(batch_size, 1 << (n - 1).bit_length())


def _batches(n: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
  """Rows of each batch, padded to `size` with the last row; how many of them count."""
  for start in range(0, n, size):
    yield np.minimum(np.arange(start, start + size), n - 1), min(size, n - start)


def _take(tree: Any, rows: np.ndarray) -> Any:
  """Rows of every array; the arrays themselves where that is all of them in order."""

  def take(a):
    same = len(rows) == a.shape[0] and np.array_equal(rows, np.arange(len(rows)))
    return a if same else a[rows]

  return jax.tree.map(take, tree)


# --- the interface -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores:
  """What `Scorer.score_images` returns: n scored (image, prompt) pairs.

  Attributes:
    image, prompt: (n) index of each pair's image and prompt in what was given.
    size: (n 2) height and width, in pixels, at which the image was scored.
    u, sigma: (k) noise levels as asked for, and as looked up.
    raw, reported: (k n) the model's score, and as `Scorer.report` gives it.
    ensemble_raw, ensemble_reported: (n) one score of all noise levels together, or
      None.
  """

  image: np.ndarray
  prompt: np.ndarray
  size: np.ndarray
  u: np.ndarray
  sigma: np.ndarray
  raw: np.ndarray
  reported: np.ndarray
  ensemble_raw: np.ndarray | None
  ensemble_reported: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Vae:
  config: vae.VAEConfig
  params: Any
  encode: Callable


class Scorer:
  """A reward model, with the text encoders and the autoencoder of its folder.

  The reward model is loaded at once, the other two when they are first needed; they
  stay on the device until `free` is called. Make one with `Scorer.load`.

  Attributes:
    folder: the model folder.
    config: reward.RewardConfig.
    scoring: reward.ScoringConfig, how this model is meant to be asked.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    model: build.Model,
    scoring: reward.ScoringConfig,
    *,
    sigma_table: np.ndarray | None,
    dtype: str,
    t5_length: int,
  ):
    """`model.params` on the device; `sigma_table` where `scoring.table` asks for it."""
    self.folder = folder
    self.config: reward.RewardConfig = model.config
    self.scoring = scoring
    self._params = model.params
    self._sigma_table = sigma_table
    self._dtype = dtype
    self._t5_length = t5_length
    self._text_part: encoders.TextEncoder | None = None
    self._vae_part: _Vae | None = None
    self._noised_jit = jax.jit(noised)
    self._score_jit = jax.jit(functools.partial(_score, model.graphdef))
    self._ensemble_jit = jax.jit(functools.partial(_ensemble, model.graphdef))

  @classmethod
  def load(
    cls,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    scan_blocks: bool | None = None,
    attention_impl: str = "auto",
    t5_length: int = 256,
    exact_levels: bool = False,
  ) -> "Scorer":
    """Reads the reward model of a folder and puts it on the default device.

    Args:
      folder: made by convert/torch_to_flax.py or by training.
      dtype: `float32` (exact: matmuls in full precision on every device) or
        `bfloat16` (on accelerators several times faster, half the memory); noise,
        scores and the autoencoder are float32 in both.
      scan_blocks: blocks under `lax.scan` (compiles fast) or unrolled (runs faster on
        a GPU). None: unrolled on a GPU, else scanned.
      attention_impl: `auto`, `xla` or `cudnn`.
      t5_length: tokens of T5 that prompts are padded or cut to, 1 to 512.
      exact_levels: take every u as the noise level itself, also where the model was
        published with a lookup.

    Raises:
      FolderError: no such folder, or it holds no reward model.
      ValueError: an argument that is none of the above.
    """
    if dtype not in DTYPES:
      raise ValueError(f"dtype={dtype!r}: use one of {DTYPES}")
    if not 1 <= t5_length <= text.T5_MAX_LENGTH:
      raise ValueError(f"t5_length={t5_length} is not in 1..{text.T5_MAX_LENGTH}")
    attention.resolve(attention_impl, build.dtype(dtype))
    if scan_blocks is None:
      scan_blocks = jax.default_backend() != "gpu"
    folder = pathlib.Path(folder)
    require(folder, ("reward",), "scoring")
    model, scoring = build.load_reward(
      folder,
      dtype=build.dtype(dtype),
      scan_blocks=scan_blocks,
      attention_impl=attention_impl,
    )
    if exact_levels:
      scoring = dataclasses.replace(scoring, table=False)
    table = sigma_table(folder, scoring)
    model = dataclasses.replace(model, params=build.to_device(model.params))
    return cls(
      folder, model, scoring, sigma_table=table, dtype=dtype, t5_length=t5_length
    )

  # -- prompts and images --

  def encode_prompts(self, prompts: Sequence[str]) -> features.Cond:
    """What the model is conditioned on, one row per prompt.

    Each distinct prompt is encoded once; "" is the empty prompt. In a folder without
    T5 its tokens are zeros, as in diffusers. Prompts longer than the encoders take
    are cut, with a warning.

    Returns: context (p l d), l = 77 + t5_length, and pooled (p d), on the device and
      in the scorer's dtype.

    Raises:
      FolderError: the folder has no text encoders or tokenizers.
      TypeError, ValueError: prompts that are not strings, or none.
    """
    distinct, rows = _distinct(prompts)
    conds = list(self._encode_distinct(distinct))
    cond = jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *conds)
    return _take(cond, rows)

  def _encode_distinct(self, prompts: list[str]) -> Iterator[features.Cond]:
    """`encode_prompts` in batches, in order."""
    part = self._text()
    ids = part.tokenize(prompts)
    for rows, count in _batches(len(prompts), _batch_rows(len(prompts), PROMPT_BATCH)):
      with self._precision():
        cond = part(_take(ids, rows))
      yield _take(cond, np.arange(count))

  def encode_images(
    self,
    images: Sequence[images_lib.ImageLike] | np.ndarray | jax.Array,
    *,
    key: jax.Array | None = None,
    batch_size: int = BATCH_SIZE,
  ) -> jax.Array:
    """Scaled latents of images of one size.

    Args:
      images: PIL images or paths, or (b height width 3) floats in [-1, 1]; sides
        multiples of the autoencoder's downsampling (8). `score_images` takes any
        sizes.
      key: a draw from the autoencoder's posterior, of its own for each image; None
        takes the mean.
      batch_size: at most so many images at a time, large images fewer.

    Returns: (b H W C) float32, as the model takes them: shifted and scaled.

    Raises:
      FolderError: the folder has no autoencoder.
      ValueError: no images, different sizes, or values outside [-1, 1].
    """
    part = self._vae()
    images = images_lib.as_batch(images)
    pixels = images.shape[1] * images.shape[2]
    limit = max(1, min(batch_size, ENCODE_PIXELS // pixels))
    latents = []
    for rows, count in _batches(len(images), _batch_rows(len(images), limit)):
      with jax.default_matmul_precision("highest"):
        out = part.encode(part.params, _take(images, rows), key, rows)
      latents.append(out[:count])
    return jnp.concatenate(latents)

  def prepare(
    self, image: images_lib.ImageLike, *, name: str = "", resize: bool = True
  ) -> Image.Image:
    """An image at the size at which `score_images` would score it.

    Args:
      name: what an error calls an image that is no path.

    Raises:
      ImageError: it cannot be read, or is too small or too large for the model.
      FolderError: the folder has no autoencoder.
    """
    opened = images_lib.open_image(image)
    is_path = not isinstance(image, Image.Image)
    self._target_size(opened, str(image) if is_path else name, resize)
    return self._prepare(opened, resize)

  def free(self, *parts: str) -> None:
    """Lets go of `text` or `vae` parameters, which are read again when needed.

    Raises:
      ValueError: another name.
    """
    for part in parts:
      if part not in ("text", "vae"):
        raise ValueError(f"free({part!r}): use 'text' or 'vae'")
      setattr(self, f"_{part}_part", None)

  # -- scores --

  def sigmas(self, u: Sequence[float]) -> np.ndarray:
    """(k) noise levels that several u stand for.

    Raises:
      ValueError: u outside [0, 1], or none.
    """
    return noise_levels(u, self._sigma_table)[1]

  def score(
    self,
    latents: np.ndarray | jax.Array,
    cond: features.Cond,
    *,
    u: float | Sequence[float] | None = None,
    key: jax.Array | None = None,
    noise: np.ndarray | jax.Array | None = None,
    generated: bool = True,
    indices: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
  ) -> np.ndarray:
    """Raw scores of clean latents at one or several noise levels.

    The score of a sample depends on its latent, its prompt, u, the key and its index;
    not on the other samples, the batch size or the other levels.

    Args:
      latents: (b H W C) clean, shifted and scaled (as `encode_images` returns them,
        and as a sampler ends with).
      cond: b prompts, or one for all latents.
      u: noise level in [0, 1], or several. None: what the model was published with.
      key: seeds the noise. Not needed where none is added (u = 0 of DRM).
      noise: (b H W C) or (k b H W C) standard normal, used instead of drawing it.
      generated: which published level `u=None` stands for: that of generated latents,
        or (False) that of encoded images.
      indices: (b) what the noise of each sample is drawn by, 0..b-1 by default; equal
        indices share their noise.
      batch_size: samples scored at a time.

    Returns: (b) float32 on the host, or (k b) if u is a sequence. `report` puts them
      on the published scale.

    Raises:
      ValueError: shapes that do not fit, latents that are not finite, u outside
        [0, 1], neither key nor noise where noise is needed.
      FloatingPointError: a score that is not finite.
    """
    if u is None:
      u = self.scoring.u_generated if generated else self.scoring.u_image
    us, sigmas = noise_levels(u, self._sigma_table)
    data = self._check(latents, cond, noise, indices, len(us))
    self._check_noise(us, sigmas, key, noise)
    rows = _batch_rows(data.num, batch_size)
    raw = _finite(self._score_rows(data, us, sigmas, key, rows))
    return raw[0] if np.ndim(u) == 0 else raw

  def ensemble(
    self,
    latents: np.ndarray | jax.Array,
    cond: features.Cond,
    us: Sequence[float],
    *,
    key: jax.Array | None = None,
    noise: np.ndarray | jax.Array | None = None,
    mode: str = "tokens",
    indices: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
  ) -> np.ndarray:
    """One raw score per latent from several noise levels.

    Args:
      us: k noise levels in [0, 1].
      mode: `tokens`: one pass of the head over the tokens of all levels (Q-Former
        heads, as DiNa-LRM does it); `mean` of the levels' scores.
      Others: as in `score`; `batch_size` counts latents times levels.

    Returns: (b) float32 on the host.

    Raises:
      ValueError: as `score`; another mode; `tokens` with a head that has none.
      FloatingPointError: a score that is not finite.
    """
    self._check_mode(mode)
    if np.ndim(us) != 1:
      raise ValueError(f"us={us!r} must be a sequence of noise levels")
    us, sigmas = noise_levels(us, self._sigma_table)
    data = self._check(latents, cond, noise, indices, len(us))
    self._check_noise(us, sigmas, key, noise)
    rows = _batch_rows(data.num, batch_size)
    return _finite(self._ensemble_rows(data, us, sigmas, key, mode, rows))

  def score_noisy(
    self,
    x: np.ndarray | jax.Array,
    sigma: float | np.ndarray | jax.Array,
    cond: features.Cond,
    *,
    batch_size: int = BATCH_SIZE,
  ) -> np.ndarray:
    """Raw scores of latents that are noisy already, e.g. from within a sampler.

    Args:
      x: (b H W C) at noise level sigma.
      sigma: exact noise level in [0, 1], or (b) of them; nothing is looked up.
      cond: b prompts, or one for all.

    Returns: (b) float32 on the host.

    Raises:
      ValueError, FloatingPointError: as `score`.
    """
    data = self._check(x, cond, None, None, 1)
    sigma = np.asarray(sigma, np.float32)
    if sigma.shape not in ((), (data.num,)) or not np.all((sigma >= 0) & (sigma <= 1)):
      raise ValueError(
        f"sigma={sigma.tolist()} must be one noise level in [0, 1], or {data.num}"
      )
    sigma = np.broadcast_to(sigma, (data.num,))
    out = []
    for rows, count in _batches(data.num, _batch_rows(data.num, batch_size)):
      with self._precision():
        raw = self._score_jit(
          self._params, data.latents(rows), sigma[rows], data.cond(rows)
        )
      out.append(raw[:count])
    return _finite(_fetch(out))

  def report(self, raw: np.ndarray) -> np.ndarray:
    """Raw scores on the scale that the model's authors report: (raw + offset) / scale.

    DiNa-LRM: (raw + 10) / 10. DRM: raw.
    """
    return report(raw, self.scoring)

  def score_images(
    self,
    images: Sequence[images_lib.ImageLike],
    prompts: str | Sequence[str],
    *,
    us: float | Sequence[float] | None = None,
    ensemble: str | None = None,
    all_pairs: bool = False,
    resize: bool = True,
    key: jax.Array,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[str], None] | None = None,
  ) -> Scores:
    """Scores images of any sizes.

    Each image is brought to its bucket (`data.buckets.prepare`) and encoded once;
    images of one size are scored together. The noise of an image is drawn by its
    index, whatever it is scored together with, and is the same for all prompts.

    Args:
      images: PIL images or paths. All are opened before anything is computed.
      prompts: one for all images, or as many as images (the i-th with the i-th).
      us: as `u` of `score`; None is the published level for images.
      ensemble: `tokens` or `mean`: also one score of all levels together.
      all_pairs: every prompt with every image, prompts in the outer order.
      resize: to the buckets; False only crops to a multiple of a patch.
      key: seeds the noise.
      batch_size: samples scored at a time.
      progress: called with a line of text after each batch of images.

    Returns: Scores, in the order of the input.

    Raises:
      ImageError: an image that is missing or cannot be read.
      FolderError: the folder has no text encoders or autoencoder.
      ValueError: numbers of prompts and images that do not fit, and as `score`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pairs = pair_up(len(images), len(prompts), all_pairs)
    us, sigmas = noise_levels(
      self.scoring.u_image if us is None else us, self._sigma_table
    )
    self._check_noise(us, sigmas, key, None)
    if ensemble is not None:
      self._check_mode(ensemble)
    sizes = self._target_sizes(images, resize)
    self._vae(), self._text()  # an incomplete folder is an error before any work

    distinct, prompt_rows = _distinct(prompts)
    # On the host, because a full-size prompt takes megabytes.
    conds = [jax.device_get(cond) for cond in self._encode_distinct(distinct)]
    cond = jax.tree.map(lambda *a: np.concatenate(a), *conds)
    if progress is not None:
      progress(f"encoded {len(distinct)} prompt(s)")

    raw = np.empty((len(us), len(pairs)), np.float32)
    together = None if ensemble is None else np.empty(len(pairs), np.float32)
    done = 0
    for size in dict.fromkeys(sizes):
      of_size = np.array([i for i, s in enumerate(sizes) if s == size])
      num_pairs = int(np.isin(pairs[:, 0], of_size).sum())
      pair_rows = _batch_rows(num_pairs, batch_size)
      for rows, count in _batches(len(of_size), _batch_rows(len(of_size), batch_size)):
        held = of_size[rows[:count]]
        pixels = np.stack(
          [images_lib.to_array(self._prepare(images[i], resize)) for i in held]
        )
        # Padded here, so that the autoencoder too sees one batch size per image size.
        latents = self.encode_images(
          _take(pixels, rows - rows[0]), batch_size=batch_size
        )
        self._check_channels(latents)
        of_held = np.flatnonzero(np.isin(pairs[:, 0], held))
        data = _Rows(
          latents,
          cond,
          latent_rows=np.searchsorted(held, pairs[of_held, 0]),
          cond_rows=prompt_rows[pairs[of_held, 1]],
          ids=pairs[of_held, 0].astype(np.uint32),
        )
        raw[:, of_held] = self._score_rows(data, us, sigmas, key, pair_rows)
        if together is not None:
          together[of_held] = self._ensemble_rows(
            data, us, sigmas, key, ensemble, pair_rows
          )
        done += count
        if progress is not None:
          progress(f"scored {done} of {len(images)} image(s)")
    _finite(raw)
    if together is not None:
      _finite(together)
    return Scores(
      image=pairs[:, 0],
      prompt=pairs[:, 1],
      size=np.array(sizes)[pairs[:, 0]],
      u=us,
      sigma=sigmas,
      raw=raw,
      reported=self.report(raw),
      ensemble_raw=together,
      ensemble_reported=None if together is None else self.report(together),
    )

  # -- inside --

  def _precision(self):
    """Float32 models in float32: GPUs and TPUs default to fewer bits."""
    if self._dtype == "float32":
      return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()

  def _text(self) -> encoders.TextEncoder:
    if self._text_part is None:
      require(self.folder, ("clip_l", "clip_g", "tokenizers"), "encoding prompts")
      self._text_part = encoders.TextEncoder(
        self.folder,
        t5_length=self._t5_length,
        context_dim=self.config.backbone.context_dim,
        dtype=self._dtype,
      )
    return self._text_part

  def _vae(self) -> _Vae:
    if self._vae_part is None:
      require(self.folder, ("vae",), "encoding images")
      model = build.load_vae(self.folder)
      encode = functools.partial(encoders.encode_image, model.graphdef, model.config)
      self._vae_part = _Vae(
        model.config, build.to_device(model.params), jax.jit(encode)
      )
    return self._vae_part

  def _check(self, latents, cond, noise, indices, num_levels: int) -> "_Rows":
    if not isinstance(latents, jax.Array):
      latents = np.asarray(latents)
    if np.ndim(latents) != 4 or not len(latents):
      raise ValueError(
        f"latents of shape {np.shape(latents)} must be (batch, height, width, channels)"
      )
    self._check_channels(latents)
    finite = np.asarray(jnp.isfinite(latents).all(axis=(1, 2, 3)))
    if not finite.all():
      raise ValueError(f"latents[{int(np.argmin(finite))}] holds NaN or infinity")
    num = len(latents)
    if noise is not None:
      noise = jnp.asarray(noise, jnp.float32)
      if noise.shape not in (latents.shape, (num_levels, *latents.shape)):
        raise ValueError(
          f"noise of shape {noise.shape} does not fit latents of shape {latents.shape}"
          f" and {num_levels} noise level(s)"
        )
      noise = jnp.broadcast_to(noise, (num_levels, *latents.shape))

    backbone = self.config.backbone
    context, pooled = cond.context, cond.pooled
    if (
      context.ndim != 3
      or context.shape[-1] != backbone.context_dim
      or pooled.shape != (context.shape[0], backbone.pooled_dim)
    ):
      raise ValueError(
        f"cond has context {context.shape} and pooled {pooled.shape}; the model needs "
        f"(b, l, {backbone.context_dim}) and (b, {backbone.pooled_dim})"
      )
    if len(context) not in (1, num):
      raise ValueError(
        f"{len(context)} prompts for {num} latents: give one for all, or one each"
      )
    ids = np.arange(num) if indices is None else np.asarray(indices)
    if ids.shape != (num,) or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
      raise ValueError(f"indices={indices!r} must be {num} non-negative integers")
    return _Rows(
      latents,
      cond,
      latent_rows=np.arange(num),
      cond_rows=np.arange(num) if len(context) == num else np.zeros(num, int),
      ids=ids.astype(np.uint32),
      noise=noise,
    )

  def _check_channels(self, latents) -> None:
    channels, patch = self.config.backbone.in_channels, self.config.backbone.patch_size
    shape = np.shape(latents)
    if shape[-1] != channels:
      hint = ""
      if shape[1] == channels:
        hint = "; this looks like PyTorch's order, transpose it by (0, 2, 3, 1)"
      raise ValueError(
        f"latents of shape {shape} have {shape[-1]} channels, the model needs "
        f"(batch, height, width, {channels}){hint}"
      )
    if shape[1] % patch or shape[2] % patch:
      raise ValueError(
        f"latents of shape {shape}: height and width must be multiples of {patch}"
      )

  def _check_noise(self, us, sigmas, key, noise) -> None:
    if key is not None and noise is not None:
      raise ValueError("pass either key or noise, not both")
    if key is None and noise is None and self.scoring.add_noise and np.any(sigmas > 0):
      raise ValueError(
        f"noise is added at u={us.tolist()}: pass key=jax.random.key(seed), or noise"
      )

  def _check_mode(self, mode: str) -> None:
    if mode not in ENSEMBLE_MODES:
      raise ValueError(f"ensemble mode {mode!r}: use one of {ENSEMBLE_MODES}")
    head = self.config.head
    if mode == "tokens" and not isinstance(head, qformer_head.QFormerHeadConfig):
      raise ValueError(
        f"ensemble mode 'tokens' needs a Q-Former head, this model has a "
        f"{type(head).__name__.removesuffix('Config')}: use mode 'mean'"
      )

  def _target_sizes(
    self, images: Sequence[images_lib.ImageLike], resize: bool
  ) -> list[tuple[int, int]]:
    """Opens every image, and says at which size it will be scored."""
    sizes = []
    for i, image in enumerate(images):
      opened = images_lib.open_image(image)
      name = f"number {i}" if isinstance(image, Image.Image) else str(image)
      sizes.append(self._target_size(opened, name, resize))
    return sizes

  def _target_size(
    self, image: Image.Image, name: str, resize: bool
  ) -> tuple[int, int]:
    multiple = self._multiple
    largest = multiple * self.config.backbone.pos_embed_size
    try:
      size = buckets.target_size(
        image.height, image.width, multiple=multiple, resize=resize
      )
      if max(size) > largest:
        raise ValueError(
          f"it would be scored at {size[0]}x{size[1]} pixels, but the model's "
          f"position table ends at {largest}: make it smaller"
        )
    except ValueError as e:
      raise images_lib.ImageError(f"image {name}: {e}") from e
    return size

  def _prepare(self, image: images_lib.ImageLike, resize: bool) -> Image.Image:
    return buckets.prepare(
      images_lib.open_image(image), multiple=self._multiple, resize=resize
    )

  @functools.cached_property
  def _multiple(self) -> int:
    """Pixels per patch: 16 for SD3.5. From the config, without loading the VAE."""
    require(self.folder, ("vae",), "encoding images")
    entry = folder_lib.find(self.folder, "vae")[1]
    config = build.config_from_dict(entry["config"])
    return config.downsampling * self.config.backbone.patch_size

  def _noisy(self, data: "_Rows", rows, level: int, us, sigmas, key) -> jax.Array:
    """(b H W C) rows of the latents at one of the levels."""
    x0 = data.latents(rows)
    if not self.scoring.add_noise or sigmas[level] == 0:
      return x0
    sigma = np.full(len(rows), sigmas[level], np.float32)
    if data.noise is not None:
      return flow.add_noise(x0, _take(data.noise[level], rows), sigma)
    nth = np.uint32(np.sum(us[:level] == us[level]))
    u_bits = us[level].view(np.uint32)
    return self._noised_jit(x0, key, data.ids[rows], u_bits, nth, sigma)

  def _score_rows(self, data: "_Rows", us, sigmas, key, size) -> np.ndarray:
    """(k b), in batches of `size`."""
    scores = []
    for rows, count in _batches(data.num, size):
      cond = data.cond(rows)
      for level in range(len(us)):
        x = self._noisy(data, rows, level, us, sigmas, key)
        sigma = np.full(len(rows), sigmas[level], np.float32)
        with self._precision():
          scores.append(self._score_jit(self._params, x, sigma, cond)[:count])
    levels = [_fetch(scores[level :: len(us)]) for level in range(len(us))]
    return np.stack(levels)

  def _ensemble_rows(self, data: "_Rows", us, sigmas, key, mode, size) -> np.ndarray:
    """(b), in batches of `size` latents at one level each."""
    if mode == "mean":
      return self._score_rows(data, us, sigmas, key, size).mean(axis=0)
    scores = []
    for rows, count in _batches(data.num, max(1, size // len(us))):
      xs = jnp.stack(
        [self._noisy(data, rows, i, us, sigmas, key) for i in range(len(us))]
      )
      levels = np.broadcast_to(sigmas[:, None], (len(us), len(rows)))
      with self._precision():
        raw = self._ensemble_jit(self._params, xs, levels, data.cond(rows))
      scores.append(raw[:count])
    return _fetch(scores)


class _Rows:
  """Samples to be scored: row i pairs a latent with a prompt, and has an id."""

  def __init__(self, latents, cond, *, latent_rows, cond_rows, ids, noise=None):
    self._latents, self._cond = latents, cond
    self._latent_rows, self._cond_rows = latent_rows, cond_rows
    self.ids, self.noise, self.num = ids, noise, len(ids)

  def latents(self, rows: np.ndarray) -> jax.Array:
    # Float32 whatever they were kept in: noise is added to them.
    return jnp.asarray(_take(self._latents, self._latent_rows[rows]), jnp.float32)

  def cond(self, rows: np.ndarray) -> features.Cond:
    return _take(self._cond, self._cond_rows[rows])


def _fetch(scores: list[jax.Array]) -> np.ndarray:
  """Scores of consecutive batches, on the host."""
  return np.concatenate([np.asarray(s, np.float32) for s in scores])


def _finite(scores: np.ndarray) -> np.ndarray:
  """The scores (b) or (k b), if they are all finite.

  Raises:
    FloatingPointError: one is not.
  """
  if not np.isfinite(scores).all():
    bad = np.argwhere(~np.isfinite(scores))[0]
    raise FloatingPointError(
      f"the score of sample {bad[-1]} is {scores[tuple(bad)]}: its latent is far from "
      "what the model knows, or the parameters are damaged"
    )
  return scores


def require(folder: str | os.PathLike, names: Sequence[str], purpose: str) -> None:
  """Checks that a folder or its bases hold all of these components.

  Raises:
    FolderError: one is missing; `purpose` says what needs it.
  """
  folder_lib.read_config(folder)
  for name in names:
    try:
      folder_lib.find(folder, name)
    except folder_lib.FolderError as e:
      raise folder_lib.FolderError(
        f"{purpose} needs {name!r}, but {e}: convert again, from a checkpoint that "
        "holds it"
      ) from e


def sigma_table(
  folder: str | os.PathLike, scoring: reward.ScoringConfig
) -> np.ndarray | None:
  """The noise levels that u is looked up among; None where it is taken as it is.

  Raises:
    FolderError: the folder has no scheduler.
  """
  if not scoring.table:
    return None
  require(folder, ("scheduler",), "looking up noise levels")
  schedule = folder_lib.find(folder, "scheduler")[1]
  return flow.train_sigmas(schedule["shift"], schedule["num_train_timesteps"])


def noise_levels(
  u: float | Sequence[float], table: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """(k) u and the (k) sigma that they stand for, float32; see `sigma_table`.

  Raises:
    ValueError: u outside [0, 1], or none.
  """
  # Adding zero turns -0 into 0, which has other bits.
  us = np.atleast_1d(np.asarray(u, np.float32)) + np.float32(0)
  if us.ndim != 1 or not us.size or not np.all((us >= 0) & (us <= 1)):
    raise ValueError(f"u={u!r} must be a noise level in [0, 1], or a list of them")
  if table is None:
    return us, us
  return us, np.asarray(flow.nearest_sigma(us, table))


@dataclasses.dataclass(frozen=True)
class Level:
  """The level at which a reward was published for generated latents.

  Attributes:
    u_bits: of u, see `noised`.
    sigma: the noise level that u stands for.
    add_noise: noise is mixed into the latent; False only tells the model the level.
  """

  u_bits: np.uint32
  sigma: np.float32
  add_noise: bool

  @classmethod
  def of(cls, folder: str | os.PathLike, scoring: reward.ScoringConfig) -> "Level":
    """That of the reward in a folder.

    Raises:
      FolderError: u is to be looked up, and the folder has no scheduler.
    """
    table = sigma_table(folder, scoring)
    us, sigmas = noise_levels(scoring.u_generated, table)
    return cls(us[0].view(np.uint32), sigmas[0], scoring.add_noise)


def at_level(
  level: Level, x0: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Clean latents at a level: x (b H W C) and sigma (b,), for use inside jit.

  Each with the noise that `Scorer.score(..., key=keys[i], indices=[0])` gives it.
  """
  sigma = jnp.full(len(x0), level.sigma, jnp.float32)
  if not level.add_noise or level.sigma == 0:
    return x0, sigma

  def draw(x0, key):
    ids = jnp.zeros(1, jnp.uint32)
    return noised(x0[None], key, ids, level.u_bits, np.uint32(0), sigma[:1])[0]

  return jax.vmap(draw)(x0, keys), sigma


def report(raw: np.ndarray, scoring: reward.ScoringConfig) -> np.ndarray:
  """Raw scores on the scale that the model's authors report."""
  return (np.asarray(raw) + scoring.offset) / scoring.scale


def _distinct(prompts: Sequence[str]) -> tuple[list[str], np.ndarray]:
  """Each prompt once, and where each of the given ones is among them."""
  if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
    raise TypeError(f"prompts must be a sequence of strings, not {prompts!r}")
  if not prompts:
    raise ValueError("prompts is empty")
  distinct = list(dict.fromkeys(prompts))
  place = {prompt: i for i, prompt in enumerate(distinct)}
  return distinct, np.array([place[p] for p in prompts])


def pair_up(num_images: int, num_prompts: int, all_pairs: bool) -> np.ndarray:
  """(n 2) indices of image and prompt."""
  if not num_images or not num_prompts:
    raise ValueError(f"{num_images} images and {num_prompts} prompts: nothing to score")
  if all_pairs:
    return np.array([(i, p) for p in range(num_prompts) for i in range(num_images)])
  if num_prompts not in (1, num_images):
    raise ValueError(
      f"{num_prompts} prompts for {num_images} images: give one for all images, one "
      "each, or ask for all pairs"
    )
  return np.array([(i, i if num_prompts > 1 else 0) for i in range(num_images)])
