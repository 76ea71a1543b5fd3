"""Sampling along the flow: transitions between noise levels, and a `lax.scan` of them.

Nothing here knows a model: `velocity_fn(inputs, x, sigma) -> v` with any pytree of
inputs, x (b H W C) and sigma (b,). A transition is a Gaussian over the next state,
`(x, v, sigma, sigma_next, noise_level) -> (mean, std)`: the same function draws it and
gives its likelihood. All of it is float32, whatever the network computes in: bfloat16
would move log-probabilities by twenty times the clip range of the policy gradients
that use them.

Axes: b samples, T steps, H W latent pixels, C latent channels.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
import numpy as np

VelocityFn = Callable[[Any, jax.Array, jax.Array], jax.Array]
Transition = Callable[..., tuple[jax.Array, jax.Array]]
LogProb = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

NOISE_LEVEL = 0.7  # Flow-GRPO's a
# What a sample's key is folded with, so that its streams of numbers are independent.
INITIAL, STEPS, SELECTION = 0, 1, 2


# --- transitions -------------------------------------------------------------------


def euler(
  x: ArrayLike,
  v: ArrayLike,
  sigma: ArrayLike,
  sigma_next: ArrayLike,
  noise_level: ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The probability-flow ODE: `mean = x + v dt`, `std = 0`.

  Args:
    x: (b H W C) at noise level sigma.
    v: (b H W C) velocity there.
    sigma, sigma_next: scalars or (b,); sigma_next < sigma.
    noise_level: not used; an ODE has none.

  Returns: mean (b H W C), and std (a scalar, or (b 1 1 1)) of the next state, float32.
  """
  del noise_level
  x, v, sigma, sigma_next = _float32(x, v, sigma, sigma_next)
  return x + v * (sigma_next - sigma), jnp.zeros_like(sigma)


def flow_sde(
  x: ArrayLike,
  v: ArrayLike,
  sigma: ArrayLike,
  sigma_next: ArrayLike,
  noise_level: ArrayLike = NOISE_LEVEL,
) -> tuple[jax.Array, jax.Array]:
  """The SDE with the ODE's marginals, by an Euler-Maruyama step (Flow-GRPO).

  `s = a sqrt(sigma / (1 - sigma))`, `std = s sqrt(-dt)`. At sigma = 1 the root takes
  the next noise level for the one in its denominator, as the original does with the
  table's second entry. A noise level a of 0 is the Euler step.

  Args, returns: as `euler`; noise_level is a scalar or (b,).
  """
  x, v, sigma, sigma_next, a = _float32(x, v, sigma, sigma_next, noise_level)
  dt = sigma_next - sigma
  s = a * jnp.sqrt(sigma / (1 - jnp.where(sigma == 1, sigma_next, sigma)))
  drift = s**2 / (2 * sigma)
  mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
  return mean, s * jnp.sqrt(-dt)


def cps(
  x: ArrayLike,
  v: ArrayLike,
  sigma: ArrayLike,
  sigma_next: ArrayLike,
  noise_level: ArrayLike = NOISE_LEVEL,
) -> tuple[jax.Array, jax.Array]:
  """The coefficients-preserving step: signal and total noise are those of the ODE.

  Of the next state's noise sigma', a part `sigma' sin(a pi / 2)` is fresh and
  `sigma' cos(a pi / 2)` is the predicted one. (Flow-CPS, an option of Flow-GRPO.)
  That keeps coefficients, not marginals: the predicted noise is a mean, which varies
  less than the noise. With Gaussian data the result's deviation is `cos(a pi / 4)`
  times the data's however many steps there are (0.85 at 0.7), where the SDE's is
  right.

  Args, returns: as `euler`; noise_level in [0, 1], a scalar or (b,).
  """
  x, v, sigma, sigma_next, a = _float32(x, v, sigma, sigma_next, noise_level)
  angle = a * (math.pi / 2)
  x0_hat, x1_hat = x - sigma * v, x + (1 - sigma) * v
  mean = (1 - sigma_next) * x0_hat + sigma_next * jnp.cos(angle) * x1_hat
  return mean, sigma_next * jnp.sin(angle)


def gaussian_log_prob(
  x_next: ArrayLike, mean: ArrayLike, std: ArrayLike
) -> Float[Array, " b"]:
  """Log-density of N(mean, std^2), averaged over the latent's axes.

  Averages, not sums: the clip ranges of the policy gradients presume them. Where std
  is 0 the step is no draw, and the result is 0 with a gradient of 0.
  """
  x_next, mean, std = (jnp.asarray(a, jnp.float32) for a in (x_next, mean, std))
  safe = jnp.where(std > 0, std, 1)
  log_prob = -((x_next - mean) ** 2) / (2 * safe**2) - jnp.log(safe)
  log_prob = jnp.where(std > 0, log_prob - 0.5 * math.log(2 * math.pi), 0)
  return jnp.mean(log_prob, axis=tuple(range(1, log_prob.ndim)))


def cps_log_prob(
  x_next: ArrayLike, mean: ArrayLike, std: ArrayLike
) -> Float[Array, " b"]:
  """`-(x' - mean)^2` averaged over the latent's axes: no constants, no variance.

  What Flow-GRPO uses with `cps`. As in `gaussian_log_prob`, a step without noise
  (std 0) gives 0 with a gradient of 0.
  """
  error = jnp.asarray(x_next, jnp.float32) - jnp.asarray(mean, jnp.float32)
  squares = jnp.where(std > 0, error**2, 0)
  return -jnp.mean(squares, axis=tuple(range(1, error.ndim)))


def sde_kl_std(std: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
  """s, the deviation without its `sqrt(-dt)`: what Flow-GRPO's KL divides by."""
  dt = jnp.asarray(sigma_next, jnp.float32) - jnp.asarray(sigma, jnp.float32)
  return std / jnp.sqrt(-dt).reshape(jnp.shape(std))


def cps_kl_std(std: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
  """The deviation itself."""
  del sigma, sigma_next
  return jnp.asarray(std)


class Sampler(NamedTuple):
  """A transition, and what policy gradients need to know of it.

  Attributes:
    log_prob: `(x_next, mean, std) -> (b,)`; None if there is none.
    kl_std: `(std, sigma, sigma_next) -> std` of the KL divergence; likewise.
  """

  transition: Transition
  log_prob: LogProb | None = None
  kl_std: Transition | None = None


SAMPLERS = {
  "euler": Sampler(euler),
  "sde": Sampler(flow_sde, gaussian_log_prob, sde_kl_std),
  "cps": Sampler(cps, cps_log_prob, cps_kl_std),
}
SDE = SAMPLERS["sde"]


def find_sampler(name: str) -> Sampler:
  """A sampler by name.

  Raises:
    ValueError: an unknown name.
  """
  if name not in SAMPLERS:
    raise ValueError(f"sampler {name!r}: use one of {', '.join(SAMPLERS)}")
  return SAMPLERS[name]


def likelihood(
  sampler: Sampler,
  x: ArrayLike,
  x_next: ArrayLike,
  v: ArrayLike,
  sigma: ArrayLike,
  sigma_next: ArrayLike,
  noise_level: ArrayLike = NOISE_LEVEL,
) -> tuple[Float[Array, " b"], jax.Array, jax.Array]:
  """Log-probability of a stored transition under a velocity, by what drew it.

  Returns: log_prob (b,), and the transition's mean and std.

  Raises:
    ValueError: the sampler is deterministic.
  """
  if sampler.log_prob is None:
    raise ValueError("a deterministic sampler has no log-probabilities")
  mean, std = sampler.transition(x, v, sigma, sigma_next, noise_level)
  return sampler.log_prob(x_next, mean, std), mean, std


# --- schedules ---------------------------------------------------------------------


@struct.dataclass
class Schedule:
  """T steps. Leaves are (T,), so that some steps of a schedule are a schedule.

  Attributes:
    sigma, sigma_next: float32 noise levels that a step goes between.
    noise_level: float32 a of the transition; 0 where the step is deterministic.
    explore: bool, whether candidates are compared in this step (`explore.py`).
    index: int32 number of the step, which its random numbers depend on.
  """

  sigma: Any
  sigma_next: Any
  noise_level: Any
  explore: Any
  index: Any

  def __len__(self) -> int:
    return len(self.sigma)

  def __getitem__(self, steps: slice) -> "Schedule":
    return jax.tree.map(lambda a: a[steps], self)


def make_schedule(
  sigmas: ArrayLike | Sequence[float],
  *,
  noise_level: ArrayLike | Sequence[float] = NOISE_LEVEL,
  sde_window: tuple[int, int] | None = None,
  explore_window: tuple[int, int] | None = None,
) -> Schedule:
  """A schedule as host arrays; new values of equal length compile nothing anew.

  Args:
    sigmas: (T+1,) decreasing within [0, 1], as `flow.sampling_sigmas` gives them.
    noise_level: a scalar in [0, 1], or (T,) of them, one per step.
    sde_window: steps `start <= i < stop` that draw noise; the others are Euler steps.
      None: all (Flow-GRPO-Fast trains on a window of a few).
    explore_window: steps in which candidates are compared. None: all.

  Raises:
    ValueError: noise levels that do not decrease, a window outside 0..T, and whatever
      else is impossible.
  """
  sigmas = np.asarray(sigmas, np.float32)
  if sigmas.ndim != 1 or len(sigmas) < 2:
    raise ValueError(f"sigmas of shape {sigmas.shape} must be (num_steps + 1,)")
  if not (sigmas[0] <= 1 and sigmas[-1] >= 0 and np.all(np.diff(sigmas) < 0)):
    raise ValueError(f"sigmas must decrease within [0, 1], got {sigmas.tolist()}")
  num_steps = len(sigmas) - 1
  levels = np.asarray(noise_level, np.float32)
  if levels.shape not in ((), (num_steps,)) or not np.all(
    (levels >= 0) & (levels <= 1)
  ):
    raise ValueError(
      f"noise_level={levels.tolist()} must be in [0, 1], one or {num_steps} of them"
    )
  index = np.arange(num_steps, dtype=np.int32)
  return Schedule(
    sigma=sigmas[:-1],
    sigma_next=sigmas[1:],
    noise_level=levels * _within(index, sde_window, "SDE window"),
    explore=_within(index, explore_window, "exploring window"),
    index=index,
  )


def _within(index: np.ndarray, window: tuple[int, int] | None, name: str) -> np.ndarray:
  if window is None:
    return np.ones(len(index), bool)
  start, stop = window
  if not 0 <= start <= stop <= len(index):
    raise ValueError(
      f"the {name} {start}:{stop} is outside the schedule of {len(index)} steps"
    )
  return (index >= start) & (index < stop)


def window_of(
  sigmas: ArrayLike | Sequence[float], low: float, high: float
) -> tuple[int, int]:
  """The steps that arrive at a noise level in [low, high], as `(start, stop)`.

  Raises:
    ValueError: no step does.
  """
  arrive = np.asarray(sigmas, np.float32)[1:]
  steps = np.flatnonzero((arrive >= low) & (arrive <= high))
  if not len(steps):
    raise ValueError(f"no step arrives in [{low}, {high}], only at {arrive.tolist()}")
  return int(steps[0]), int(steps[-1]) + 1


# --- noise -------------------------------------------------------------------------


def initial_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> jax.Array:
  """Standard normal float32 (b *shape), each sample's from its own key of `keys`."""
  return jax.vmap(
    lambda key: jax.random.normal(jax.random.fold_in(key, INITIAL), shape)
  )(keys)


def step_noise(
  keys: Key[Array, " b"],
  index: ArrayLike,
  candidates: ArrayLike,
  shape: tuple[int, ...],
) -> jax.Array:
  """Standard normal float32 (b n *shape) of one step.

  It depends on a sample's key, the step and the candidate's number only: not on the
  batch, the devices, or how many candidates there are.

  Args:
    keys: (b,).
    index: number of the step.
    candidates: (n,) numbers of the candidates.
  """

  def draw(key, candidate):
    return jax.random.normal(jax.random.fold_in(key, candidate), shape)

  def of_sample(key):
    key = jax.random.fold_in(jax.random.fold_in(key, STEPS), index)
    return jax.vmap(draw, in_axes=(None, 0))(key, jnp.asarray(candidates))

  return jax.vmap(of_sample)(keys)


# --- rollouts ----------------------------------------------------------------------


def guide(velocity_fn: VelocityFn, guidance_scale: float | jax.Array) -> VelocityFn:
  """Classifier-free guidance in one batched call.

  The guided function takes inputs `(cond, uncond)`, two pytrees of equal structure
  with leading axis b.
  """

  def guided(inputs, x, sigma):
    v = velocity_fn(twice(*inputs), twice(x, x), twice(sigma, sigma))
    return combine(v, guidance_scale)

  return guided


def twice(cond: Any, uncond: Any) -> Any:
  """Two pytrees with leading axis b as one with 2b: each row beside its own.

  Interleaved, because one behind the other would move a batch that is split over
  devices: row 0's unconditional twin would land on another one.
  """
  interleave = lambda c, u: jnp.stack([c, u], 1).reshape(-1, *c.shape[1:])  # noqa: E731
  return jax.tree.map(interleave, cond, uncond)


def combine(v: jax.Array, guidance_scale: float | jax.Array) -> jax.Array:
  """`v_uncond + scale (v_cond - v_uncond)`, of `twice`'s rows: float32 (b ...).

  Ho and Salimans 2022, eq. 6, in the convention where a scale of 1 is no guidance.
  """
  pairs = v.astype(jnp.float32).reshape(-1, 2, *v.shape[1:])
  v_cond, v_uncond = pairs[:, 0], pairs[:, 1]
  return v_uncond + guidance_scale * (v_cond - v_uncond)


@struct.dataclass
class Trajectory:
  """What a rollout went through.

  Attributes:
    x: (T+1 b H W C) float32 states; the first is the noise, the last the result.
    log_prob: (T b) of each transition; None if the sampler is deterministic.
  """

  x: jax.Array
  log_prob: jax.Array | None


def rollout(
  velocity_fn: VelocityFn,
  inputs: Any,
  x: Float[Array, "b H W C"],
  schedule: Schedule,
  *,
  sampler: Sampler = SDE,
  keys: Key[Array, " b"] | None = None,
  trajectory: bool = False,
) -> tuple[jax.Array, Trajectory | None]:
  """Samples as one `lax.scan` over the schedule.

  Args:
    x: noise at level `schedule.sigma[0]`.
    keys: (b,), one per sample; only a deterministic sampler does without.
    trajectory: also return the states and their log-probabilities.

  Returns: x (b H W C) float32 at `schedule.sigma_next[-1]`, and the trajectory or
    None.

  Raises:
    ValueError: a stochastic sampler without keys.
  """
  if keys is None and sampler.log_prob is not None:
    raise ValueError("this sampler draws noise: pass keys, one per sample")

  def step(x, at: Schedule):
    v = velocity_fn(inputs, x, jnp.broadcast_to(at.sigma, x.shape[:1]))
    mean, std = sampler.transition(x, v, at.sigma, at.sigma_next, at.noise_level)
    if sampler.log_prob is None:
      return mean, (mean, None) if trajectory else None
    x = mean + std * step_noise(keys, at.index, jnp.arange(1), x.shape[1:])[:, 0]
    return x, (x, sampler.log_prob(x, mean, std)) if trajectory else None

  x = x.astype(jnp.float32)
  last, seen = jax.lax.scan(step, x, schedule)
  if not trajectory:
    return last, None
  xs, log_prob = seen
  return last, Trajectory(jnp.concatenate([x[None], xs]), log_prob)


def _float32(x: ArrayLike, v: ArrayLike, *scalars: ArrayLike) -> list[jax.Array]:
  """All in float32, and (b,) arrays shaped so that they broadcast against x."""
  x, v = jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32)
  wide = [jnp.asarray(a, jnp.float32) for a in scalars]
  wide = [a.reshape(-1, *(1,) * (x.ndim - 1)) if a.ndim else a for a in wide]
  return [x, v, *wide]
