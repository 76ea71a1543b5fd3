"""Explore and select: a reward model steers the SDE, step by step (DRM, section 4).

At each step the network is asked for one velocity; k candidates for the next state
are drawn from it, scored at their own, new noise level, and the best one carries on.
With a beam, m states are kept of the m k that they lead to.

Nothing here knows a model, see `sample.py`; `reward_fn(inputs, x, sigma) -> (n,)` with
any pytree of inputs whose leading axis is n.

Axes: b samples, m beams, k candidates of a beam, n = m k candidates of a sample, T
steps, H W latent pixels, C latent channels.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key
import numpy as np

from lrm_jax import sample

RewardFn = Callable[[Any, jax.Array, jax.Array], jax.Array]

SELECTIONS = ("best", "softmax", "random")
MODES = ("full", "cheap")
# Cheap mode: as many of the noisy steps explore as this many times the plain sampler's
# cost pays for. Per scoring the noisy steps bring the most (docs/generation.md).
BUDGET = 1.6
# One score, as a fraction of a pass of SD3.5-Medium at 512 px with 333 text tokens: a
# Q-Former head on the first 12 of its 24 blocks; and these blocks alone.
SCORING, SHARED = 0.578, 0.562


@dataclasses.dataclass(frozen=True)
class Explore:
  """How candidates are drawn and chosen. Where: `sample.make_schedule`.

  Attributes:
    candidates: k per state; 1 is the plain sampler, which scores nothing.
    select: `best`; `softmax`: drawn with probability ~ exp(score / temperature);
      `random`: drawn evenly (Step-GRPO's rollout).
    temperature: of the softmax, in units of the score.
    beam: m states kept.
    chunk: candidates of a sample that are scored at a time, so that memory does not
      grow with k; must divide k m. None: all at once.
  """

  candidates: int = 6
  select: str = "best"
  temperature: float = 1.0
  beam: int = 1
  chunk: int | None = None

  def __post_init__(self):
    for name in ("candidates", "beam"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
    if self.select not in SELECTIONS:
      raise ValueError(f"select={self.select!r}: use one of {', '.join(SELECTIONS)}")
    if not self.temperature > 0:
      raise ValueError(f"temperature={self.temperature} must be > 0")
    if self.chunk is not None and (self.chunk < 1 or self.num % self.chunk):
      raise ValueError(f"chunk={self.chunk} must divide candidates x beam = {self.num}")

  @property
  def num(self) -> int:
    """n: candidates of a sample in a step."""
    return self.candidates * self.beam


def mode_window(
  mode: str,
  num_steps: int,
  options: Explore,
  *,
  guided: bool = True,
  scoring: float = SCORING,
  shared: float = SHARED,
) -> tuple[int, int]:
  """The exploring window of a mode, for `sample.make_schedule`.

  Args:
    mode: `full`: all steps. `cheap`: the first, noisy ones, as many as cost no more
      than BUDGET times the plain sampler (with as many beams); one step or more.
    guided, scoring, shared: costs, as of `evaluations`.

  Raises:
    ValueError: an unknown mode.
  """
  if mode not in MODES:
    raise ValueError(f"exploring mode {mode!r}: use one of {', '.join(MODES)}")
  if mode == "full":
    return 0, num_steps
  sigmas = np.linspace(1, 0, num_steps + 1)

  def cost(stop: int) -> float:
    schedule = sample.make_schedule(sigmas, explore_window=(0, stop))
    return evaluations(schedule, options, guided=guided, scoring=scoring, shared=shared)

  affordable = [n for n in range(num_steps + 1) if cost(n) <= BUDGET * cost(0)]
  return 0, max(1, *affordable)


# --- networks ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Apart:
  """A generator and a reward that have nothing in common."""

  velocity_fn: sample.VelocityFn
  reward_fn: RewardFn

  def no_tokens(self, inputs: Any, x: jax.Array) -> None:
    return None

  def velocity(self, inputs, x, sigma, tokens, known):
    del tokens, known
    return self.velocity_fn(inputs, x, sigma)

  def score(self, inputs, x, sigma):
    return self.reward_fn(inputs, x, sigma), None


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
  """A generator whose first blocks are the reward's, frozen.

  What those blocks made of the winner, when it was scored, is what the next step's
  conditional pass would compute first: it starts behind them. One scoring per
  explored step is free.

  Attributes:
    prefix_fn: `(inputs, x, sigma) -> (tokens, taps)`, pytrees with leading axis b: the
      state behind the first blocks, and what else the head reads of them.
    tail_fn: `tokens -> v`.
    head_fn: `(reward_inputs, (tokens, taps)) -> (n,)`.
    guidance_scale: None without guidance; else inputs are `(cond, uncond)`, and the
      reward scores cond. Reward inputs are prefix_fn's inputs.
  """

  prefix_fn: Callable[[Any, jax.Array, jax.Array], tuple[Any, Any]]
  tail_fn: Callable[[Any], jax.Array]
  head_fn: Callable[[Any, Any], jax.Array]
  guidance_scale: float | jax.Array | None = None

  @property
  def velocity_fn(self) -> sample.VelocityFn:
    """The whole generator."""
    whole = lambda *args: self.tail_fn(self._tokens(*args))  # noqa: E731
    if self.guidance_scale is None:
      return whole
    return sample.guide(whole, self.guidance_scale)

  def _tokens(self, inputs, x, sigma):
    return self.prefix_fn(inputs, x, sigma)[0]

  def no_tokens(self, inputs: Any, x: jax.Array) -> Any:
    """Zeros in the shape of tokens."""
    cond = inputs if self.guidance_scale is None else inputs[0]
    shapes = jax.eval_shape(self._tokens, cond, x, jnp.zeros(len(x), jnp.float32))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  def velocity(self, inputs, x, sigma, tokens, known):
    if self.guidance_scale is None:
      tokens = jax.lax.cond(
        known, lambda: tokens, lambda: self._tokens(inputs, x, sigma)
      )
      return self.tail_fn(tokens)
    cond, uncond = inputs
    tokens = jax.lax.cond(
      known,
      lambda: sample.twice(tokens, self._tokens(uncond, x, sigma)),
      lambda: self._tokens(
        sample.twice(cond, uncond), sample.twice(x, x), sample.twice(sigma, sigma)
      ),
    )
    return sample.combine(self.tail_fn(tokens), self.guidance_scale)

  def score(self, inputs, x, sigma):
    tokens, taps = self.prefix_fn(inputs, x, sigma)
    return self.head_fn(inputs, (tokens, taps)), tokens


Networks = Apart | SharedPrefix


# --- the loop ----------------------------------------------------------------------


@struct.dataclass
class Carry:
  """Where a sampling run stands between two steps.

  Attributes:
    x: (b m H W C) float32.
    tokens: (b*m ...) of a SharedPrefix for x; None without.
    known: whether tokens are those of x.
  """

  x: jax.Array
  tokens: Any
  known: jax.Array


@struct.dataclass
class Steps:
  """What happened in T steps.

  Attributes:
    scores: (T b n) float32; NaN in a step that did not explore.
    chosen: (T b m) int32, which candidates carried on.
    bad: (T b) int32, how many candidates had a score that is not finite. They never
      win against one that has; if all are bad the first carries on.
    x: (T b m H W C) states that the steps started from; on request only, else None.
    candidates: (T b n H W C), likewise.
    log_prob: (T b n) of the candidates, given the state that they come from; likewise,
      and None if the sampler is deterministic.
  """

  scores: jax.Array
  chosen: jax.Array
  bad: jax.Array
  x: jax.Array | None = None
  candidates: jax.Array | None = None
  log_prob: jax.Array | None = None


def start(networks: Networks, inputs: Any, x: jax.Array, options: Explore) -> Carry:
  """The carry before the first step; see `explore`.

  Raises:
    ValueError: x has another number of beams.
  """
  if x.ndim == 4:
    x = jnp.repeat(x[:, None], options.beam, axis=1)
  if x.shape[1] != options.beam:
    raise ValueError(f"x of shape {x.shape} has {x.shape[1]} beams, not {options.beam}")
  x = x.astype(jnp.float32)
  tokens = networks.no_tokens(repeat_rows(inputs, options.beam), _flat(x))
  return Carry(x, tokens, jnp.zeros((), bool))


def advance(
  networks: Networks,
  inputs: Any,
  reward_inputs: Any,
  carry: Carry,
  schedule: sample.Schedule,
  options: Explore,
  *,
  keys: Key[Array, " b"],
  sampler: sample.Sampler = sample.SDE,
  trajectory: bool = False,
) -> tuple[Carry, Steps]:
  """Some steps, as one `lax.scan`: any partition of a schedule gives the same.

  Args, raises: as `explore`.
  """
  if options.num == 1:
    return _plain(networks, inputs, carry, schedule, keys, sampler, trajectory)
  if sampler.log_prob is None:
    raise ValueError("a deterministic sampler has no candidates to choose from")
  b, m = carry.x.shape[:2]
  k, n, latent = options.candidates, options.num, carry.x.shape[2:]
  # Outside the loop, where it happens once.
  inputs = repeat_rows(inputs, m)
  scored_inputs = repeat_rows(reward_inputs, options.chunk or n)

  def step(carry: Carry, at: sample.Schedule):
    x = _flat(carry.x)
    v = networks.velocity(
      inputs, x, jnp.broadcast_to(at.sigma, b * m), carry.tokens, carry.known
    )
    mean, std = sampler.transition(x, v, at.sigma, at.sigma_next, at.noise_level)

    def draw(numbers, per_beam):
      """(b m per_beam H W C) next states."""
      noise = sample.step_noise(keys, at.index, numbers, latent)
      noise = noise.reshape(b, m, per_beam, *latent)
      return mean.reshape(b, m, 1, *latent) + std * noise

    def plain():
      """Each beam's first candidate, unscored."""
      numbers = k * jnp.arange(m)
      x_next = draw(numbers, 1)
      scores = jnp.full((b, n), jnp.nan, jnp.float32)
      chosen = jnp.broadcast_to(numbers.astype(jnp.int32), (b, m))
      every = jnp.repeat(x_next, k, axis=2) if trajectory else None
      return Carry(x_next[:, :, 0], carry.tokens, jnp.zeros((), bool)), (
        scores,
        chosen,
        every,
      )

    def compare():
      every = draw(jnp.arange(n), k)
      candidates = every.reshape(b, n, *latent)
      scores, tokens = score_candidates(
        networks, scored_inputs, candidates, at.sigma_next, options
      )
      chosen = choose(scores, options, keys=keys, index=at.index)
      x_next = _take(candidates, chosen)
      tokens = jax.tree.map(lambda a: _flat(_take(a, chosen)), tokens)
      every = every if trajectory else None
      return Carry(x_next, tokens, jnp.ones((), bool)), (scores, chosen, every)

    # Candidates of a step without noise are all the same.
    explored = at.explore & (std > 0)
    carry_next, (scores, chosen, every) = jax.lax.cond(explored, compare, plain)
    bad = jnp.sum(~jnp.isfinite(scores), axis=1, dtype=jnp.int32) * explored
    steps = Steps(scores, chosen, bad)
    if trajectory:
      means = jnp.repeat(mean, k, axis=0)
      log_prob = sampler.log_prob(every.reshape(b * n, *latent), means, std)
      steps = steps.replace(
        x=carry.x,
        candidates=every.reshape(b, n, *latent),
        log_prob=log_prob.reshape(b, n),
      )
    return carry_next, steps

  return jax.lax.scan(step, carry, schedule)


def _plain(networks, inputs, carry: Carry, schedule, keys, sampler, trajectory):
  """`advance` where there is nothing to choose: the sampler itself, to the last bit."""
  x, seen = sample.rollout(
    networks.velocity_fn,
    inputs,
    carry.x[:, 0],
    schedule,
    sampler=sampler,
    keys=keys,
    trajectory=trajectory,
  )
  shape = (len(schedule), len(x), 1)
  steps = Steps(
    scores=jnp.full(shape, jnp.nan, jnp.float32),
    chosen=jnp.zeros(shape, jnp.int32),
    bad=jnp.zeros(shape[:2], jnp.int32),
  )
  if seen is not None:
    log_prob = None if seen.log_prob is None else seen.log_prob[..., None]
    steps = steps.replace(
      x=seen.x[:-1, :, None], candidates=seen.x[1:, :, None], log_prob=log_prob
    )
  return carry.replace(x=x[:, None]), steps


def finish(
  networks: Networks,
  reward_inputs: Any,
  carry: Carry,
  sigma: ArrayLike,
  options: Explore,
) -> tuple[Float[Array, "b H W C"], Int[Array, " b"]]:
  """The result, and which beam it was: the one that scores best at its noise level."""
  if options.beam == 1:
    return carry.x[:, 0], jnp.zeros(len(carry.x), jnp.int32)
  inputs = repeat_rows(reward_inputs, options.beam)
  scores, _ = score_candidates(
    networks, inputs, carry.x, sigma, dataclasses.replace(options, chunk=None)
  )
  best = jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf), axis=1)
  return _take(carry.x, best[:, None])[:, 0], best.astype(jnp.int32)


def explore(
  networks: Networks,
  inputs: Any,
  reward_inputs: Any,
  x: jax.Array,
  schedule: sample.Schedule,
  options: Explore,
  *,
  keys: Key[Array, " b"],
  sampler: sample.Sampler = sample.SDE,
  trajectory: bool = False,
) -> tuple[Float[Array, "b H W C"], Steps]:
  """Samples that a reward steers.

  Args:
    inputs: the velocity's, leading axis b; `(cond, uncond)` under guidance.
    reward_inputs: the reward's, leading axis b. They are repeated, not recomputed,
      for the candidates: put into them what does not depend on x.
    x: (b H W C) noise, or (b m H W C) one for each beam.
    schedule: where to explore, and with which noise.
    keys: (b,), one per sample. Candidate j of a step has the same noise whatever k.
    trajectory: also return states, candidates and log-probabilities of every step.

  Returns: x (b H W C) float32 at the schedule's last noise level, and the Steps.

  Raises:
    ValueError: several candidates of a deterministic sampler.
  """
  carry = start(networks, inputs, x, options)
  carry, steps = advance(
    networks,
    inputs,
    reward_inputs,
    carry,
    schedule,
    options,
    keys=keys,
    sampler=sampler,
    trajectory=trajectory,
  )
  last = schedule.sigma_next[-1]
  x, _ = finish(networks, reward_inputs, carry, last, options)
  return x, steps


def choose(
  scores: Float[Array, "b n"], options: Explore, *, keys: Key[Array, " b"], index: Any
) -> Array:
  """Which candidates carry on: (b m) int32, the best of them first.

  One with a score that is not finite is chosen only when there are too few others.
  """
  finite = jnp.isfinite(scores)
  merit = scores.astype(jnp.float32)
  if options.select != "best":
    # Gumbel-max: the m largest are m draws without replacement.
    def gumbel(key):
      key = jax.random.fold_in(jax.random.fold_in(key, sample.SELECTION), index)
      return jax.random.gumbel(key, scores.shape[1:])

    scaled = 0.0 if options.select == "random" else merit / options.temperature
    merit = scaled + jax.vmap(gumbel)(keys)
  merit = jnp.where(finite, merit, -jnp.inf)
  # Not top_k: XLA gathers the scores of all devices for it.
  order = jnp.argsort(merit, axis=1, descending=True)
  return order[:, : options.beam].astype(jnp.int32)


def score_candidates(
  networks: Networks,
  inputs: Any,
  candidates: Float[Array, "b n H W C"],
  sigma: ArrayLike,
  options: Explore,
) -> tuple[Float[Array, "b n"], Any]:
  """Scores (b n) float32 of candidates (b n H W C), and their tokens (b n ...).

  Args:
    inputs: each row as often as candidates are scored at a time: `options.chunk`
      times, or n (`repeat_rows`).
    sigma: scalar, their noise level.

  Raises:
    ValueError: the reward returned another shape.
  """
  b, n, *latent = candidates.shape
  chunk = options.chunk or n

  def score(x):  # (b chunk H W C)
    scores, tokens = networks.score(
      inputs, _flat(x), jnp.full(b * chunk, sigma, jnp.float32)
    )
    if scores.shape != (b * chunk,):
      raise ValueError(
        f"the reward returned shape {scores.shape} for {b * chunk} latents: it must "
        "return one score each"
      )
    split = lambda a: a.reshape(b, chunk, *a.shape[1:])  # noqa: E731
    return split(scores.astype(jnp.float32)), jax.tree.map(split, tokens)

  if chunk == n:
    return score(candidates)
  groups = candidates.reshape(b, n // chunk, chunk, *latent).swapaxes(0, 1)
  made = jax.lax.map(score, groups)  # (groups b chunk ...)
  return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(b, n, *a.shape[3:]), made)


def repeat_rows(tree: Any, times: int) -> Any:
  """Each row `times` in a row."""
  if times == 1:
    return tree
  return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), tree)


def _flat(x: jax.Array) -> jax.Array:
  """(b m ...) -> (b*m ...)."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _take(a: jax.Array, chosen: jax.Array) -> jax.Array:
  """(b n ...), (b m) -> (b m ...)."""
  return jnp.take_along_axis(a, chosen.reshape(*chosen.shape, *(1,) * (a.ndim - 2)), 1)


# --- the honest competitor, and what things cost -----------------------------------


@struct.dataclass
class BestOfN:
  """Attributes: x (b H W C) the winners; scores (b n); chosen (b,) int32."""

  x: jax.Array
  scores: jax.Array
  chosen: jax.Array


def sample_keys(keys: Key[Array, " b"], n: int) -> Key[Array, "b n"]:
  """(b n) keys; the first of each is the sample's own, so that n = 1 is the sampler."""

  def of_sample(key):
    others = jax.vmap(lambda j: jax.random.fold_in(key, j))(
      jnp.arange(n, dtype=jnp.uint32) + jnp.uint32(1 << 16)
    )
    data = jax.random.key_data(others).at[0].set(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

  return jax.vmap(of_sample)(keys)


def best_of_n(
  networks: Networks,
  inputs: Any,
  reward_inputs: Any,
  latent: tuple[int, int, int],
  schedule: sample.Schedule,
  n: int,
  *,
  keys: Key[Array, " b"],
  sampler: sample.Sampler = sample.SDE,
) -> BestOfN:
  """n independent samples of each prompt; the one with the best final score is kept.

  One after another, so that memory does not grow with n.

  Args:
    latent: (H, W, C).
    others: as `explore`; `schedule.explore` is not read.
  """
  once = Explore(candidates=1)

  def draw(keys):
    x = sample.initial_noise(keys, latent)
    x, _ = explore(
      networks, inputs, reward_inputs, x, schedule, once, keys=keys, sampler=sampler
    )
    scores, _ = score_candidates(
      networks, reward_inputs, x[:, None], schedule.sigma_next[-1], once
    )
    return x, scores[:, 0]

  xs, scores = jax.lax.map(draw, jnp.swapaxes(sample_keys(keys, n), 0, 1))
  xs, scores = jnp.swapaxes(xs, 0, 1), scores.T
  best = jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf), axis=1)
  return BestOfN(_take(xs, best[:, None])[:, 0], scores, best.astype(jnp.int32))


def evaluations(
  schedule: sample.Schedule,
  options: Explore,
  *,
  guided: bool,
  scoring: float,
  shared: float = 0.0,
) -> float:
  """What one sample costs, in passes of the whole generator.

  Args:
    guided: a velocity takes two passes.
    scoring: one score, as a fraction of a pass.
    shared: with a SharedPrefix, the fraction that it is of a pass; the step behind an
      explored one saves so much.
  """
  explored = np.asarray(schedule.explore) & (np.asarray(schedule.noise_level) > 0)
  explored = explored & (options.num > 1)
  passes = (1 + guided) * options.beam * len(schedule)
  passes += scoring * options.num * explored.sum()
  if options.beam > 1:
    passes += scoring * options.beam  # `finish`
  passes -= shared * options.beam * explored[:-1].sum()
  return float(passes)
