"""Which samples make up which batch: a pure function of seed and step.

Every batch holds samples of one bucket, so it has one shape. All hosts compute the
same plan and read their own rows of each batch; nothing is communicated, and the plan
does not depend on how many hosts there are.

A bucket is a stream: its samples in the order of epoch 0, then of epoch 1, and so on,
cut into batches. Where the batch size does not divide the bucket, the batch at an
epoch's end takes its remaining rows from the next epoch: every sample comes exactly
once per epoch, none is dropped and none is repeated to fill up.
"""

import functools

from jaxtyping import Int
import numpy as np

PADDING = -1  # stands for no sample, in the last batches of a plan that ends

# What a random generator is for; part of its seed.
_SAMPLES, _BATCHES = 0, 1


class BatchPlan:
  """`plan.batch(step)`: indices (batch_size,) of the samples of batch 0, 1, ...

  Args:
    bucket: (n,) integers, the bucket of each sample.
    block: (n,) integers, storage blocks. With `window`, samples are shuffled within
      windows of that many blocks, so that a reader with a small cache reads each block
      once per epoch; blocks come in random order. None: no such structure.
    batch_size: samples per batch, over all hosts.
    shuffle: samples and batches in random order; else buckets one after another, each
      in the order of its samples.
    reshuffle: another order in every epoch; False repeats the first one, as
      DiNa-LRM's released training code does.
    window: blocks per shuffle window; None shuffles over the whole bucket.
    num_epochs: the plan ends after so many (its last batches are filled up with
      PADDING); None never ends.

  Raises:
    ValueError: no samples, a batch size, window or number of epochs below 1.
  """

  def __init__(
    self,
    bucket: Int[np.ndarray, " n"],
    block: Int[np.ndarray, " n"] | None = None,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    reshuffle: bool = True,
    window: int | None = None,
    num_epochs: int | None = None,
  ):
    if not len(bucket):
      raise ValueError("there are no samples to plan batches of")
    if block is not None and len(block) != len(bucket):
      raise ValueError(f"{len(block)} blocks for {len(bucket)} samples")
    for name, value in (
      ("batch_size", batch_size),
      ("shuffle_window", window),
      ("num_epochs", num_epochs),
    ):
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be 1 or more")
    self.batch_size = batch_size
    self.num_epochs = num_epochs
    self._seed = seed
    self._shuffle = shuffle
    self._reshuffle = reshuffle
    self._window = window
    self._members = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
    self._blocks = None if block is None else [block[m] for m in self._members]
    self._sizes = np.array([len(m) for m in self._members], np.int64)
    # Grain's threads ask for one sample at a time: the work is done once per batch,
    # and at an epoch's end batches of both epochs are in flight.
    self.batch = functools.lru_cache(maxsize=64)(self._batch)
    self._epoch_order = functools.lru_cache(maxsize=2)(self._make_epoch_order)
    self._order = functools.lru_cache(maxsize=2 * len(self._sizes) + 2)(
      self._make_order
    )
    self._args = (bucket, block)

  def __reduce__(self):
    # The caches stay behind: a worker process fills its own.
    options = dict(
      batch_size=self.batch_size,
      seed=self._seed,
      shuffle=self._shuffle,
      reshuffle=self._reshuffle,
      window=self._window,
      num_epochs=self.num_epochs,
    )
    return _rebuild, (*self._args, options)

  @property
  def num_samples(self) -> int:
    return int(self._sizes.sum())

  @property
  def num_batches(self) -> int | None:
    """Batches in all; None for a plan that never ends."""
    return None if self.num_epochs is None else self.epoch_start(self.num_epochs)

  def epoch_start(self, epoch: int) -> int:
    """Number of batches that begin before this epoch's first."""
    return int(self._batches_before(epoch).sum())

  def epoch_of(self, step: int) -> int:
    """The epoch in whose share of the plan a batch lies."""
    # A first guess that is never too high, then upwards: epochs differ in their
    # number of batches by at most one per bucket.
    epoch = max(0, (step - len(self._sizes)) * self.batch_size // self.num_samples)
    while self.epoch_start(epoch + 1) <= step:
      epoch += 1
    return epoch

  def bucket_of(self, step: int) -> int:
    """Which of the sorted distinct buckets a batch is made of."""
    return int(self._locate(step)[0])

  def _batches_before(self, epoch: int) -> np.ndarray:
    """Full batches of each bucket's first `epoch` epochs."""
    total = epoch * self._sizes
    if self.num_epochs is not None and epoch >= self.num_epochs:
      return -(-total // self.batch_size)  # the rest, filled up
    return total // self.batch_size

  def _locate(self, step: int) -> tuple[int, int]:
    """(bucket, number of the batch in the bucket's stream) of a batch."""
    if step < 0 or (self.num_batches is not None and step >= self.num_batches):
      raise IndexError(f"batch {step} of {self.num_batches}")
    epoch = self.epoch_of(step)
    bucket, number = self._epoch_order(epoch)
    row = step - self.epoch_start(epoch)
    return int(bucket[row]), int(number[row])

  def _make_epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Bucket and number in its stream of each of the epoch's batches, in order."""
    first, last = self._batches_before(epoch), self._batches_before(epoch + 1)
    bucket = np.repeat(np.arange(len(first)), last - first)
    if self._shuffle:
      # Buckets in random order; each bucket's own batches keep theirs, which is
      # random already, so that storage blocks are finished one after another.
      bucket = self._rng(_BATCHES, epoch, 0).permutation(bucket)
    number = np.empty_like(bucket)
    for b in range(len(first)):
      number[bucket == b] = np.arange(first[b], last[b])
    return bucket, number

  def _batch(self, step: int) -> np.ndarray:
    bucket, number = self._locate(step)
    size = int(self._sizes[bucket])
    position = number * self.batch_size + np.arange(self.batch_size)
    epochs = position // size
    indices = np.full(self.batch_size, PADDING, np.int64)
    for epoch in np.unique(epochs):
      if self.num_epochs is not None and epoch >= self.num_epochs:
        continue
      rows = epochs == epoch
      indices[rows] = self._order(int(epoch), bucket)[position[rows] - epoch * size]
    return indices

  def _make_order(self, epoch: int, bucket: int) -> np.ndarray:
    """A bucket's samples in the order of an epoch."""
    members = self._members[bucket]
    if not self._shuffle:
      return members
    rng = self._rng(_SAMPLES, epoch, bucket)
    if self._window is None or self._blocks is None:
      return rng.permutation(members)
    # Blocks in random order, in windows; a random number in [0, 1) added to the
    # window's number sorts the samples by window and at random within.
    _, inverse = np.unique(self._blocks[bucket], return_inverse=True)
    place = rng.permutation(inverse.max() + 1)[inverse]
    return members[np.argsort(place // self._window + rng.random(len(members)))]

  def _rng(self, *key: int) -> np.random.Generator:
    purpose, epoch, bucket = key
    return np.random.default_rng(
      [self._seed, purpose, epoch if self._reshuffle else 0, bucket]
    )


def _rebuild(bucket, block, options) -> BatchPlan:
  return BatchPlan(bucket, block, **options)
