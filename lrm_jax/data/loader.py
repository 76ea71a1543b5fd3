"""Planned batches of preference pairs, by Grain: read, batched, ahead of the device.

Axes: b rows of this host, h w c latent, l text tokens, d context width, e pooled width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from lrm_jax.data import plan as plan_lib
from lrm_jax.data import source as source_lib

Batch = dict[str, Any]
TextFn = Callable[[list[str]], Mapping[str, Any]]

_NEVER_ENDS = 2**40  # batches; a length is needed, its end is not reached


class PlannedPairs(grain.sources.RandomAccessDataSource):
  """Single pairs in the order of a plan: element i is row i % b of batch i // b.

  Prompt dropout depends on the seed and the place in the plan alone, so it is the
  same on any number of hosts and after a resume.
  """

  def __init__(
    self,
    source: source_lib.PairSource,
    plan: plan_lib.BatchPlan,
    rows: Sequence[int],
    *,
    seed: int,
    prompt_dropout: float,
    allow_ties: bool,
  ):
    self._source = source
    self._plan = plan
    self._rows = tuple(rows)
    self._seed = seed
    self._prompt_dropout = prompt_dropout
    self._allow_ties = allow_ties

  def __len__(self) -> int:
    batches = self._plan.num_batches
    return len(self._rows) * (_NEVER_ENDS if batches is None else batches)

  def __getitem__(self, place: int) -> dict[str, Any]:
    step, row = divmod(int(place), len(self._rows))
    row = self._rows[row]
    batch = self._plan.batch(step)
    index = int(batch[row])
    weight = np.float32(index != plan_lib.PADDING)
    if index == plan_lib.PADDING:  # any sample of the batch has the right shape
      index = int(batch[0])
    pair: dict[str, Any] = dict(self._source[index])
    if not self._allow_ties and pair["preference"] != source_lib.PREFERRED:
      raise source_lib.DataError(
        f"{self._source.name}: pair {index} is a tie (preference "
        f"{float(pair['preference'])}), which this loss cannot use: choose "
        "loss.name='pairwise_cross_entropy' or leave ties out of the data"
      )
    if self._prompt_dropout:
      rng = np.random.default_rng([self._seed, step, row])
      if rng.random() < self._prompt_dropout:
        pair["prompt"] = ""
    return pair | {"weight": weight}


def make_loader(
  source: source_lib.PairSource,
  plan: plan_lib.BatchPlan,
  rows: Sequence[int],
  *,
  text_fn: TextFn,
  seed: int = 0,
  prompt_dropout: float = 0.0,
  allow_ties: bool = True,
  num_threads: int = 2,
  prefetch: int = 4,
) -> grain.IterDataset:
  """This host's rows of a plan's batches, as an iterable.

  A batch has `chosen (b h w c)`, `rejected (b h w c)`, `preference (b)`, `kind (b)`,
  `index (b)`, `weight (b)` (0 for padding, else 1) and whatever `text_fn` makes of its
  b prompts. `iter(loader)` has `get_state` and `set_state`: a small dict from which the
  batches continue exactly.

  Args:
    rows: of each global batch (see `local_rows`).
    text_fn: prompts to arrays, e.g. `cached_text`; runs in the reading threads.
    prompt_dropout: probability with which a prompt becomes the empty one.
    num_threads: each reads one batch at a time.
    prefetch: batches in memory ahead of their use, `num_threads` or more.

  Raises:
    ValueError: a value out of range.
  """
  if not 0 <= prompt_dropout <= 1:
    raise ValueError(f"prompt_dropout={prompt_dropout} must lie in [0, 1]")
  if num_threads < 1:
    raise ValueError(f"num_threads={num_threads} must be 1 or more")
  if prefetch < num_threads:
    raise ValueError(
      f"prefetch={prefetch} must be at least num_threads={num_threads}: a thread works "
      "on one batch, so the others would have nothing to do"
    )
  elements = PlannedPairs(
    source,
    plan,
    rows,
    seed=seed,
    prompt_dropout=prompt_dropout,
    allow_ties=allow_ties,
  )

  def add_text(batch: Batch) -> Batch:
    prompts = [str(p) for p in batch.pop("prompt")]
    return {**batch, **text_fn(prompts)}

  dataset = grain.MapDataset.source(elements)
  dataset = dataset.batch(len(rows), drop_remainder=False).map(add_text)
  # Batches wait in memory: Grain's own default of 500 would be many gigabytes.
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  return dataset.to_iter_dataset(options)


def cached_text(cache: Any) -> TextFn:
  """A `text_fn` that looks embeddings up: `context (b l d)` and `pooled (b e)`.

  Args:
    cache: `cache[prompt]` is (context (l d), pooled (e)); a PromptCache, or a dict.
  """

  def look_up(prompts: list[str]) -> dict[str, np.ndarray]:
    context, pooled = zip(*(cache[p] for p in prompts), strict=True)
    return {"context": np.stack(context), "pooled": np.stack(pooled)}

  return look_up


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, ...]:
  """The rows of a global batch that this process's devices hold."""
  held = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows: set[int] = set()
  for (index,) in held:
    rows.update(range(*index.indices(batch_size)))
  return tuple(sorted(rows))


def put(batch: Batch, sharding: jax.sharding.Sharding, names: Sequence[str]) -> Batch:
  """The named host arrays (rows of this process) as global device arrays."""
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(batch[name]))
    for name in names
  }


def device_prefetch(
  iterator: Any, prepare: Callable[[Batch], Any], *, depth: int
) -> Iterator[tuple[Any, dict]]:
  """(prepared batch, iterator state after it), `depth` batches ahead of their use.

  `prepare` copies a batch to the devices; copies are asynchronous, so they overlap
  with the step that is running. The state belongs to the batch it comes with: a
  checkpoint written after that batch's step continues with the next one.
  """
  ready: deque = deque()
  exhausted = False
  while True:
    while not exhausted and len(ready) <= depth:
      try:
        batch = next(iterator)
      except StopIteration:
        exhausted = True
        break
      ready.append((prepare(batch), iterator.get_state()))
    if not ready:
      return
    yield ready.popleft()
