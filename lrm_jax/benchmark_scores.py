"""Scores every image of a benchmark at every noise level.

Axes: k levels, b samples, h w image pixels or latent cells, c latent channels, l text
tokens, d e widths.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import itertools
from typing import Any
import zlib

import jax
import numpy as np

from lrm_jax import scorer
from lrm_jax.data import benchmarks, prompt_cache, score_files
from lrm_jax.data import images as images_lib
from lrm_jax.data.source import DataError
from lrm_jax.models import features

NOISE = ("shared", "independent")
PROMPTS_KEPT = 256  # at full size 1.4 GB in float32
LISTS_AHEAD = 16  # opened and decoded before the device asks for them
LOADERS = 4
MAX_WAITING = 256  # decoded images that wait for others of their size

Key = tuple[str, str]  # prompt and image


@dataclasses.dataclass(frozen=True)
class Plan:
  """What every image is asked.

  Attributes:
    us: noise levels, each on its own; at least one.
    ensembles: noise levels taken together, as many times.
    mode: of the ensembles, as `Scorer.ensemble` knows it.
    word: what the levels are, `u` or `sigma`.
    noise: whether images that are compared share it (`Benchmark.noise_group`).
    resize: to the buckets.
  """

  us: tuple[float, ...]
  ensembles: tuple[tuple[float, ...], ...]
  mode: str
  word: str
  noise: str
  seed: int
  batch_size: int
  resize: bool

  def levels(self, model: scorer.Scorer) -> tuple[score_files.Level, ...]:
    """Single levels first, as the rows of scores."""
    single = [
      score_files.Level(f"{self.word}={u:g}", u, round(float(sigma), 7))
      for u, sigma in zip(self.us, model.sigmas(self.us), strict=True)
    ]
    listed = [",".join(f"{u:g}" for u in us) for us in self.ensembles]
    together = [
      score_files.Level(f"{self.mode}({self.word}={us})", None, None) for us in listed
    ]
    return (*single, *together)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A benchmark's scores, and what could not be scored.

  Attributes:
    bad_images: `{image, prompt, lists, reason}` of each image that is missing or
      corrupt; `lists` is how many it was left out of.
    lost_pairs: pairs of images that were left out with them.
  """

  table: score_files.ScoreTable
  bad_images: list[dict[str, Any]]
  lost_pairs: int


@dataclasses.dataclass(frozen=True)
class _Sample:
  """An image that waits to be scored for its prompt."""

  key: Key
  content: np.ndarray  # (h w 3) uint8, or a latent (h w c) float32
  cond: features.Cond  # (l d), (e)
  noise_id: int


class Prompts:
  """Prompt embeddings on the host, from the model's encoders or from a cache."""

  def __init__(
    self,
    model: scorer.Scorer,
    cache: prompt_cache.PromptCache | None = None,
    dtype: Any = np.float32,
  ):
    """Raises ValueError: a cache of another model's embeddings."""
    self._model, self._cache, self._dtype = model, cache, dtype
    self._kept: OrderedDict[str, features.Cond] = OrderedDict()
    if cache is not None:
      backbone = model.config.backbone
      found = cache.context_shape[1], cache.pooled_dim
      if found != (backbone.context_dim, backbone.pooled_dim):
        raise ValueError(
          f"prompt cache {cache.name} has context and pooled widths {found}, the model "
          f"needs {(backbone.context_dim, backbone.pooled_dim)}: it is another model's"
        )

  def get(self, prompt: str, upcoming: Iterable[str]) -> features.Cond:
    """One prompt's (l d) and (e); those that come next are encoded along with it."""
    if prompt not in self._kept:
      fresh = dict.fromkeys(p for p in (prompt, *upcoming) if p not in self._kept)
      batch = list(fresh)[: scorer.PROMPT_BATCH]
      self._kept |= dict(zip(batch, self._encode(batch), strict=True))
      while len(self._kept) > PROMPTS_KEPT:
        self._kept.popitem(last=False)
    self._kept.move_to_end(prompt)
    return self._kept[prompt]

  def _encode(self, prompts: list[str]) -> list[features.Cond]:
    if self._cache is not None:
      found = [self._cache[prompt] for prompt in prompts]
      return [features.Cond(*(a.astype(self._dtype) for a in pair)) for pair in found]
    cond = jax.device_get(self._model.encode_prompts(prompts))
    return [
      features.Cond(*pair) for pair in zip(cond.context, cond.pooled, strict=True)
    ]


def score(
  benchmark: benchmarks.Benchmark,
  model: scorer.Scorer,
  plan: Plan,
  prompts: Prompts,
  *,
  limit: int | None = None,
  progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Scored:
  """Scores every image of a benchmark at every level.

  An image is decoded and encoded once, for all levels and all lists of its prompt, and
  a prompt is encoded once (again only after PROMPTS_KEPT others). What is scored
  together does not depend on how fast files are read.

  Args:
    limit: only the first lists.
    progress: called with the number of lists loaded, images scored and bad images.

  Raises:
    DataError: nothing is left to score.
    ValueError, FloatingPointError: what the model cannot take, or gives.
  """
  order = [int(i) for i in benchmark.order(limit)]
  lists: dict[int, benchmarks.RankedImages] = {}
  scores: dict[Key, np.ndarray] = {}
  bad: dict[Key, str] = {}
  waiting: dict[tuple[int, ...], list[_Sample]] = {}
  # A power of two, no larger than what may ever be there: few programs, little waste.
  size = min(plan.batch_size, 1 << (2 * len(order) - 1).bit_length())

  def flush(shape: tuple[int, ...]) -> None:
    samples = waiting.pop(shape)
    try:
      found = _score_batch(model, plan, samples, size, benchmark.is_latent)
    except (ValueError, FloatingPointError) as e:
      names = ", ".join(sample.key[1] for sample in samples)
      error = ValueError if isinstance(e, ValueError) else FloatingPointError
      raise error(f"{benchmark.name}: {e} (one of the images {names})") from e
    scores.update(zip((sample.key for sample in samples), found, strict=True))

  done = 0
  for i, items, upcoming in _loaded(benchmark, model, order, lists, plan.resize):
    prompt, group = lists[i].prompt, benchmark.noise_group(i)
    for name, item in items:
      if isinstance(item, images_lib.ImageError):
        bad[prompt, name] = str(item)
        continue
      noise_of = group if plan.noise == "shared" else f"{group}\0{name}"
      noise_id = zlib.crc32(noise_of.encode())
      cond = prompts.get(prompt, upcoming)
      same = waiting.setdefault(item.shape, [])
      same.append(_Sample((prompt, name), item, cond, noise_id))
      if len(same) == size:
        flush(item.shape)
      elif sum(map(len, waiting.values())) > MAX_WAITING:
        flush(max(waiting, key=lambda shape: len(waiting[shape])))
    done += 1
    progress(done, len(scores), len(bad))
  for shape in list(waiting):
    flush(shape)
  progress(done, len(scores), len(bad))
  return _collect(benchmark, model, plan, lists, scores, bad)


def _loaded(
  benchmark: benchmarks.Benchmark,
  model: scorer.Scorer,
  order: Sequence[int],
  lists: dict[int, benchmarks.RankedImages],
  resize: bool,
) -> Iterator[tuple[int, list[tuple[str, Any]], list[str]]]:
  """Lists in order: number, new images by name, prompts of those that come next.

  An image is the array to be scored, or its ImageError; one that an earlier list of the
  same prompt had is not loaded again. Fills `lists`.
  """
  claimed: set[Key] = set()

  def load(i: int, which: list[int]) -> list[Any]:
    items = benchmark.load(i, which)
    if benchmark.is_latent:
      return items
    names = [lists[i].images[j] for j in which]
    return [_prepared(model, *pair, resize) for pair in zip(items, names, strict=True)]

  ahead: deque[tuple[int, list[int], futures.Future]] = deque()
  todo = iter(order)
  pool = futures.ThreadPoolExecutor(LOADERS)
  try:
    while True:
      for i in itertools.islice(todo, LISTS_AHEAD - len(ahead)):
        lists[i] = benchmark[i]
        prompt, names = lists[i].prompt, lists[i].images
        which = []
        for j, name in enumerate(names):
          if (prompt, name) not in claimed:
            claimed.add((prompt, name))
            which.append(j)
        ahead.append((i, which, pool.submit(load, i, which)))
      if not ahead:
        return
      i, which, future = ahead.popleft()
      names = [lists[i].images[j] for j in which]
      upcoming = [lists[j].prompt for j, _, _ in ahead]
      yield i, list(zip(names, future.result(), strict=True)), upcoming
  finally:
    pool.shutdown(cancel_futures=True)


def _prepared(model, item, name: str, resize: bool) -> Any:
  """(h w 3) uint8 at the size at which it is scored, or what is wrong with it."""
  if isinstance(item, images_lib.ImageError):
    return item
  try:
    return np.asarray(model.prepare(item, name=name, resize=resize))
  except images_lib.ImageError as e:
    return e


def _score_batch(
  model: scorer.Scorer, plan: Plan, samples: list[_Sample], size: int, is_latent: bool
) -> np.ndarray:
  """(b k) raw scores of samples of one shape, padded to `size` with the last one."""
  padded = [*samples, *[samples[-1]] * (size - len(samples))]
  content = np.stack([sample.content for sample in padded])
  if not is_latent:
    pixels = content.astype(np.float32) / 127.5 - 1.0
    content = model.encode_images(pixels, batch_size=size)
  cond = features.Cond(
    np.stack([sample.cond.context for sample in padded]),
    np.stack([sample.cond.pooled for sample in padded]),
  )
  options = dict(
    key=jax.random.key(plan.seed),
    indices=[sample.noise_id for sample in padded],
    batch_size=size,
  )
  rows = list(model.score(content, cond, u=plan.us, **options))
  for us in plan.ensembles:
    rows.append(model.ensemble(content, cond, us, mode=plan.mode, **options))
  return np.stack(rows, axis=1)[: len(samples)]


def _collect(
  benchmark: benchmarks.Benchmark,
  model: scorer.Scorer,
  plan: Plan,
  lists: Mapping[int, benchmarks.RankedImages],
  scores: Mapping[Key, np.ndarray],
  bad: Mapping[Key, str],
) -> Scored:
  """One row per image of a list, lists in their own order."""
  rows, lost = [], 0
  missed: Counter[Key] = Counter()
  for _, ranked in sorted(lists.items()):
    n = len(ranked.images)
    good = [j for j in range(n) if (ranked.prompt, ranked.images[j]) in scores]
    missed.update(
      (ranked.prompt, name) for name in ranked.images if (ranked.prompt, name) in bad
    )
    lost += n * (n - 1) // 2 - len(good) * (len(good) - 1) // 2
    if len(good) > 1:
      rows += [(ranked, j) for j in good]
  if not rows:
    reason = next(iter(bad.values()), "there is none")
    raise DataError(
      f"{benchmark.name}: no two images of a list can be read, {len(bad)} are bad; the "
      f"first: {reason}. Is --images right?"
    )
  raw = np.stack([scores[r.prompt, r.images[j]] for r, j in rows], axis=1)
  table = score_files.ScoreTable(
    ids=tuple(r.id for r, _ in rows),
    prompts=tuple(r.prompt for r, _ in rows),
    images=tuple(r.images[j] for r, j in rows),
    ranks=np.array([r.ranks[j] for r, j in rows], float),
    levels=plan.levels(model),
    raw=raw.astype(np.float32),
    reported=model.report(raw).astype(np.float32),
  )
  bad_images = [
    dict(image=key[1], prompt=key[0], lists=missed[key], reason=reason)
    for key, reason in bad.items()
  ]
  return Scored(table, bad_images, lost)
