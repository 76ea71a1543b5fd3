"""The quickstart's data: real 8x8 handwritten digits as prompts, latents and pairs.

The digits are the 1,797 that scikit-learn carries (`load_digits`; UCI "Optical
recognition of handwritten digits"), so nothing is downloaded. Functions that need
scikit-learn import it when called; it belongs to the `quickstart` extra.

Axes: n images or pairs, h w pixels (8 8), c latent channels, l words (6), d context
width, e pooled width. Images are float32; real ones lie in [-1, 1], -1 is paper.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import os
from typing import Any, Literal

from jaxtyping import Bool, Float, Float32, Int, UInt8
import numpy as np
from PIL import Image

Images = Float32[np.ndarray, "n 8 8"]
Labels = Int[np.ndarray, " n"]

NUM_DIGITS = 10
SIZE_A, SIZE_B, SIZE_C = 900, 497, 400


# ---------------------------------------------------------------- images and splits


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Images with a digit each: what is drawn, or what a sample was prompted with."""

  images: Images
  labels: Labels

  def __post_init__(self):
    if len(self.images) != len(self.labels):
      raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Splits:
  """Three disjoint parts of the digits, each with all classes in proportion."""

  train: Labelled  # A, 900: generator, annotator and reward model
  oracle: Labelled  # B, 497: the oracle only
  held_out: Labelled  # C, 400: evaluation only


def load_splits(seed: int) -> Splits:
  """Splits the digits into A = 900, B = 497 and C = 400, stratified by class."""
  digits = _import("sklearn.datasets").load_digits()
  split = _import("sklearn.model_selection").train_test_split
  images = (digits.images / 8 - 1).astype(np.float32)  # stored as 0..16
  labels = digits.target.astype(np.int64)
  rest, c = split(
    np.arange(len(labels)), test_size=SIZE_C, stratify=labels, random_state=seed
  )
  a, b = split(
    rest,
    train_size=SIZE_A,
    test_size=SIZE_B,
    stratify=labels[rest],
    random_state=seed,
  )
  return Splits(*(Labelled(images[part], labels[part]) for part in (a, b, c)))


def to_latent(images: Images, channels: int) -> Float32[np.ndarray, "n 8 8 c"]:
  """Repeats an image over the channels: more channels, more signal at one sigma."""
  return np.repeat(images[..., None], channels, axis=-1)


def from_latent(latents: Float[np.ndarray, "n 8 8 c"]) -> Images:
  """Averages the channels; undoes `to_latent`."""
  return latents.mean(axis=-1, dtype=np.float32)


def to_pixels(latents: Float[np.ndarray, "n 8 8 c"]) -> UInt8[np.ndarray, "n 8 8 3"]:
  """As a picture has them: ink dark, values beyond [-1, 1] cut."""
  images = np.clip(from_latent(latents), -1, 1)
  grey = np.round(127.5 * (1 - images)).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def from_pixels(pixels: UInt8[np.ndarray, "n 8 8 3"]) -> Images:
  """Undoes `to_pixels`, to 1/255."""
  return (1 - pixels[..., 0].astype(np.float32) / 127.5).astype(np.float32)


# ------------------------------------------------------------------------- prompts

DIGIT_WORDS = (
  "zero",
  "one",
  "two",
  "three",
  "four",
  "five",
  "six",
  "seven",
  "eight",
  "nine",
)
TEMPLATES = (
  "a handwritten digit {}",
  "the number {}",
  "a picture of the digit {}",
  "{} written by hand",
)
# Prompt 0 is the empty one; then the templates, digit by digit.
PROMPTS = ("", *(t.format(word) for word in DIGIT_WORDS for t in TEMPLATES))
# The digit that each of PROMPTS asks for; -1 for the empty prompt.
PROMPT_DIGITS = (-1, *(d for d in range(NUM_DIGITS) for _ in TEMPLATES))
NUM_WORDS = 6
_VOCABULARY = tuple(sorted({word for prompt in PROMPTS for word in prompt.split()}))


def prompt_id(digit: int | np.integer, template: int | np.integer) -> int:
  """Index in PROMPTS of a digit in one of the TEMPLATES."""
  if not (0 <= digit < NUM_DIGITS and 0 <= template < len(TEMPLATES)):
    raise ValueError(f"no prompt for digit {digit} and template {template}")
  return int(1 + digit * len(TEMPLATES) + template)


def prompts_for(digit: int) -> tuple[str, ...]:
  """The prompts that ask for a digit, one per template."""
  return tuple(PROMPTS[prompt_id(digit, t)] for t in range(len(TEMPLATES)))


class WordEmbedder:
  """A stand-in for text encoders: a fixed random vector for each word.

  Prompts fill up to 6 places with zeros, so the empty prompt is all zeros. The tables
  are standard normal, and the same for the same widths and seed.
  """

  def __init__(self, d_context: int, d_pooled: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    size = len(_VOCABULARY)
    self._context = _zero_row_first(rng.standard_normal((size, d_context)))
    self._pooled = _zero_row_first(rng.standard_normal((size, d_pooled)))

  def context(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n l d"]:
    """The words' vectors, one after the other."""
    return self._context[tokenize(prompts)]

  def pooled(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
    """The words' vectors summed, over the root of their number (unit variance)."""
    ids = tokenize(prompts)
    num = np.maximum((ids > 0).sum(axis=1, keepdims=True), 1)
    return (self._pooled[ids].sum(axis=1) / np.sqrt(num)).astype(np.float32)


def tokenize(prompts: Sequence[str]) -> Int[np.ndarray, "n 6"]:
  """Word ids from 1 on, 0 where a prompt has ended.

  Raises ValueError on a word that no template uses, or on more than 6 words.
  """
  ids = np.zeros((len(prompts), NUM_WORDS), np.int64)
  for row, prompt in zip(ids, prompts, strict=True):
    words = prompt.split()
    if len(words) > NUM_WORDS:
      raise ValueError(
        f"prompt {prompt!r} has {len(words)} words, the most is {NUM_WORDS}"
      )
    for i, word in enumerate(words):
      if word not in _VOCABULARY:
        raise ValueError(
          f"unknown word {word!r} in prompt {prompt!r}; known: {', '.join(_VOCABULARY)}"
        )
      row[i] = 1 + _VOCABULARY.index(word)
  return ids


def _zero_row_first(table: np.ndarray) -> np.ndarray:
  return np.pad(table, ((1, 0), (0, 0))).astype(np.float32)


# --------------------------------------------------------------------- degradations


def _blur(image: np.ndarray, strength: str, rng: np.random.Generator) -> np.ndarray:
  # A [s, 1 - 2 s, s] smoothing along both axes, some number of times.
  s, times = {"mild": (0.15, 1), "strong": (0.25, 3)}[strength]
  for _ in range(times):
    for axis in (0, 1):
      pad = [(1, 1) if a == axis else (0, 0) for a in (0, 1)]
      wide = np.pad(image, pad, "edge")
      neighbours = np.take(wide, range(8), axis) + np.take(wide, range(2, 10), axis)
      image = (1 - 2 * s) * image + s * neighbours
  return image


def _noise(image: np.ndarray, strength: str, rng: np.random.Generator) -> np.ndarray:
  std = {"mild": 0.15, "strong": 0.7}[strength]
  return image + std * rng.standard_normal(image.shape)


def _occlusion(
  image: np.ndarray, strength: str, rng: np.random.Generator
) -> np.ndarray:
  # Mid-grey, so that it shows on paper and on ink.
  side = {"mild": 2, "strong": 5}[strength]
  top, left = rng.integers(0, 8 - side + 1, size=2)
  image = image.copy()
  image[top : top + side, left : left + side] = 0
  return image


def _contrast(image: np.ndarray, strength: str, rng: np.random.Generator) -> np.ndarray:
  keep = {"mild": 0.75, "strong": 0.25}[strength]
  return image.mean() + keep * (image - image.mean())


DEGRADATIONS = {
  "blur": _blur,
  "noise": _noise,
  "occlusion": _occlusion,
  "contrast": _contrast,
}


def degrade(
  images: Images,
  strength: Literal["mild", "strong"],
  rng: np.random.Generator,
  kind: str | None = None,
) -> Images:
  """Spoils each image by one of DEGRADATIONS, drawn per image unless `kind` is given.

  The result stays within [-1, 1].
  """
  if strength not in ("mild", "strong"):
    raise ValueError(f"strength must be 'mild' or 'strong', got {strength!r}")
  if kind is not None and kind not in DEGRADATIONS:
    raise ValueError(f"unknown kind {kind!r}, choose from {', '.join(DEGRADATIONS)}")
  functions = list(DEGRADATIONS.values()) if kind is None else [DEGRADATIONS[kind]]
  spoilt = [
    functions[rng.integers(len(functions))](image, strength, rng) for image in images
  ]
  return np.clip(np.array(spoilt), -1, 1).astype(np.float32).reshape(images.shape)


# ---------------------------------------------------------------------------- pairs

KIND_NAMES = ("wrong_digit", "degraded", "early_sample", "ranked_samples")


@dataclasses.dataclass(frozen=True)
class PairRecords:
  """Preference pairs in pixels; `prompt_id` indexes PROMPTS, `kind` KIND_NAMES."""

  chosen: Images
  rejected: Images
  prompt_id: Labels
  kind: Labels

  def __len__(self) -> int:
    return len(self.kind)


def make_pairs(
  real: Labelled,
  early: Labelled,
  samples: Labelled,
  *,
  annotator: Callable[[Images, Labels], Float[np.ndarray, " n"]],
  num: int,
  rng: np.random.Generator,
) -> PairRecords:
  """Draws `num` preference pairs, in equal parts of four kinds, under random prompts.

  wrong_digit     a real image of the prompt's digit over a real one of another digit
  degraded        a real image mildly degraded over the same one strongly degraded
  early_sample    a real image over an early generator's sample of that digit
  ranked_samples  two of the final generator's `samples` of one digit, in the order of
                  `annotator(images, digits)` (see fit_annotator)

  Held-out pairs must come from held-out images and freshly drawn samples: give this
  function only those, and `check_no_leak` the outcome. Raises ValueError where an
  input lacks images of some digit, or holds the same sample twice.
  """
  if num % len(KIND_NAMES):
    raise ValueError(f"num={num} does not split into {len(KIND_NAMES)} equal kinds")
  n = num // len(KIND_NAMES)
  real_of = _by_digit("real", real, 1)
  early_of = _by_digit("early", early, 1)
  samples_of = _by_digit("samples", samples, 2)
  digits = rng.integers(NUM_DIGITS, size=(len(KIND_NAMES), n))
  others = (digits[0] + rng.integers(1, NUM_DIGITS, size=n)) % NUM_DIGITS

  def draw(images_of: Sequence[np.ndarray], wanted: np.ndarray) -> np.ndarray:
    return np.stack([rng.choice(images_of[digit]) for digit in wanted])

  good = draw(real_of, digits[1])
  two = [rng.choice(samples_of[digit], 2, replace=False) for digit in digits[3]]
  first, second = np.array(two).swapaxes(0, 1)
  gap = annotator(first, digits[3]) - annotator(second, digits[3])
  if not gap.all():
    tied = digits[3][np.flatnonzero(gap == 0)[0]]
    raise ValueError(f"samples: two of digit {tied} score the same; are they copies?")
  wins = (gap > 0)[:, None, None]
  chosen = [
    draw(real_of, digits[0]),
    degrade(good, "mild", rng),
    draw(real_of, digits[2]),
    np.where(wins, first, second),
  ]
  rejected = [
    draw(real_of, others),
    degrade(good, "strong", rng),
    draw(early_of, digits[2]),
    np.where(wins, second, first),
  ]
  templates = rng.integers(len(TEMPLATES), size=num)
  prompts = zip(digits.reshape(-1), templates, strict=True)
  return PairRecords(
    chosen=np.concatenate(chosen),
    rejected=np.concatenate(rejected),
    prompt_id=np.array([prompt_id(digit, t) for digit, t in prompts]),
    kind=np.repeat(np.arange(len(KIND_NAMES)), n),
  )


def check_no_leak(train: PairRecords, held_out: PairRecords) -> None:
  """Raises ValueError if any image of a held-out pair is also in a training pair."""

  def images(pairs: PairRecords) -> set[bytes]:
    both = np.concatenate([pairs.chosen, pairs.rejected])
    return {image.tobytes() for image in both}

  shared = len(images(train) & images(held_out))
  if shared:
    raise ValueError(f"{shared} images are in both the training and held-out pairs")


def _by_digit(name: str, data: Labelled, at_least: int) -> list[np.ndarray]:
  images_of = [data.images[data.labels == digit] for digit in range(NUM_DIGITS)]
  for digit, images in enumerate(images_of):
    if len(images) < at_least:
      raise ValueError(f"{name}: {len(images)} images of {digit}, need {at_least}")
  return images_of


# --------------------------------------------------------- judges and distributions


def fit_annotator(
  data: Labelled,
) -> Callable[[Images, Labels], Float[np.ndarray, " n"]]:
  """Fits the stand-in for a human judge: logistic regression on pixels.

  Returns `annotator(images, digits) -> (n,)`, the log-probability that an image shows
  its digit. The logarithm ranks like the probability and does not saturate at 1.
  """
  linear_model = _import("sklearn.linear_model")
  model = linear_model.LogisticRegression(C=0.1, max_iter=2000)
  model.fit(_flat(data.images), data.labels)

  def annotator(images: np.ndarray, digits: np.ndarray) -> np.ndarray:
    return _log_prob(model.decision_function(_flat(images)), digits)

  return annotator


class Oracle:
  """The judge that no model is trained against; fit it on split B only."""

  def __init__(self, data: Labelled, seed: int = 0):
    kernel = _import("sklearn.kernel_approximation")
    linear_model = _import("sklearn.linear_model")
    pipeline = _import("sklearn.pipeline")
    svm = _import("sklearn.svm")
    pixels = _flat(data.images)
    self._svm = svm.SVC(C=10.0, gamma="scale").fit(pixels, data.labels)
    # SVC's own probabilities are a calibration on few points; these are smooth.
    # gamma is SVC's "scale": one over dimensions times variance.
    self._prob = pipeline.make_pipeline(
      kernel.Nystroem(
        gamma=1 / (pixels.shape[1] * pixels.var()),
        n_components=min(300, len(data)),
        random_state=seed,
      ),
      linear_model.LogisticRegression(C=10.0, max_iter=2000),
    ).fit(pixels, data.labels)

  def correct(self, images: Images, digits: Labels) -> Bool[np.ndarray, " n"]:
    """Whether each image is read as its digit (RBF support vector machine)."""
    return self._svm.predict(_flat(images)) == digits

  def prob(self, images: Images, digits: Labels) -> Float[np.ndarray, " n"]:
    """Probability that each image shows its digit (Nystroem, logistic regression)."""
    return np.exp(_log_prob(self._prob.decision_function(_flat(images)), digits))


@functools.cache
def _default_oracle() -> Oracle:
  return Oracle(load_splits(0).oracle)


def oracle_probability(
  images: UInt8[np.ndarray, "n 8 8 3"], prompts: Sequence[str]
) -> Float[np.ndarray, " n"]:
  """A reward on pixels, for train/align.py: `Oracle.prob` of the prompts' digits.

  Raises:
    ValueError: a prompt that is not one of PROMPTS, or the empty one.
  """
  if unknown := sorted(set(prompts) - set(PROMPTS[1:])):
    raise ValueError(f"the oracle knows no digit of the prompts {unknown}")
  labels = np.array([PROMPT_DIGITS[PROMPTS.index(prompt)] for prompt in prompts])
  return _default_oracle().prob(from_pixels(images), labels)


def frechet_distance(
  a: Float[np.ndarray, "n 8 8"], b: Float[np.ndarray, "m 8 8"]
) -> float:
  """Squared Frechet distance between Gaussians fit to two sets of images, in pixels.

  `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, covariances with ddof 1
  (Dowson and Landau 1982), so 0 for equal sets; float64.
  """
  a, b = _flat(a), _flat(b)
  if min(len(a), len(b)) < 2:
    raise ValueError(f"need two images or more on each side, got {len(a)} and {len(b)}")
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  # tr (S_a S_b)^(1/2) = tr (R S_b R)^(1/2) with R = S_a^(1/2): symmetric, so that no
  # complex root can come up, and the eigenvalues' rounding errors can be cut off.
  values, vectors = np.linalg.eigh(cov_a)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
  shift = a.mean(axis=0) - b.mean(axis=0)
  return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def diversity(images: Float[np.ndarray, "n 8 8"], prompts: Labels) -> float:
  """Mean Euclidean distance between two samples of one prompt, mean over prompts.

  `prompts` holds any integer per image: samples with the same one belong together.
  """
  means = []
  for prompt in np.unique(prompts):
    x = _flat(images[prompts == prompt])
    if len(x) < 2:
      raise ValueError(f"prompt {prompt} has one sample only; diversity needs two")
    i, j = np.triu_indices(len(x), k=1)
    means.append(np.linalg.norm(x[i] - x[j], axis=1).mean())
  return float(np.mean(means))


def save_grid(path: str | os.PathLike, images: Images, columns: int = 10) -> None:
  """Saves images as one PNG, row by row, ink dark; values beyond [-1, 1] are cut."""
  if not len(images):
    raise ValueError("no images to save")
  rows = -(-len(images) // columns)
  # One pixel of mid-grey around each digit keeps neighbours apart.
  tiles = np.zeros((rows * columns, 9, 9), np.float32)
  tiles[: len(images), :8, :8] = images
  grid = tiles.reshape(rows, columns, 9, 9).swapaxes(1, 2).reshape(rows * 9, -1)
  grey = np.round(127.5 * (1 - np.clip(grid, -1, 1))).astype(np.uint8)
  Image.fromarray(grey.repeat(6, axis=0).repeat(6, axis=1)).save(path, format="png")


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float64)


def _log_prob(logits: np.ndarray, digits: np.ndarray) -> np.ndarray:
  """log softmax(logits)[digit] = -log1p(sum of the others' exp(l_i - l_digit)).

  This form keeps apart what would both round to a probability of 1.
  """
  rows = np.arange(len(digits))
  differences = logits - logits[rows, digits][:, None]
  differences[rows, digits] = -np.inf
  top = np.maximum(differences.max(axis=1), 0)
  total = np.exp(differences - top[:, None]).sum(axis=1)
  return np.where(top > 0, -(top + np.log(total + np.exp(-top))), -np.log1p(total))


def _import(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"the digits need {module.split('.')[0]}: install lrm_jax with its `quickstart` "
      "extra"
    ) from e
