"""Explore and select: against a plain loop, known answers, costs, and its errors."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import explore, flow, hlo, sample, sharding

LATENT = (4, 4, 2)
SIGMAS = flow.sampling_sigmas(5, 3.0)
ALL = sample.make_schedule(SIGMAS)


def rows(a, x):
  return jnp.asarray(a).reshape(-1, *(1,) * (x.ndim - 1))


def velocity(inputs, x, sigma):
  return jnp.tanh(x * rows(inputs, x)) + rows(sigma, x) * x


def reward(inputs, x, sigma):
  return x.mean(axis=(1, 2, 3)) * inputs - sigma


APART = explore.Apart(velocity, reward)


def make_keys(b):
  return jax.vmap(jax.random.key)(jnp.arange(b))


def make_inputs(b):
  return jnp.linspace(0.5, 1.5, b)


def run(options, *, b=3, networks=APART, schedule=ALL, keys=None, inputs=None, **kw):
  keys = make_keys(b) if keys is None else keys
  inputs = make_inputs(b) if inputs is None else inputs
  scored = inputs[0] if isinstance(inputs, tuple) else inputs
  x = sample.initial_noise(keys, LATENT)

  @jax.jit
  def program(inputs, scored, x, schedule, keys):
    return explore.explore(
      networks, inputs, scored, x, schedule, options, keys=keys, **kw
    )

  return program(inputs, scored, x, schedule, keys)


def plain(b=3, sampler="sde"):
  keys, inputs = make_keys(b), make_inputs(b)

  @jax.jit
  def program(inputs, x, schedule, keys):
    return sample.rollout(
      velocity, inputs, x, schedule, sampler=sample.SAMPLERS[sampler], keys=keys
    )[0]

  return np.asarray(program(inputs, sample.initial_noise(keys, LATENT), ALL, keys))


# --- what is drawn and chosen ------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "sde", "cps"])
def test_one_candidate_is_the_plain_sampler_bit_for_bit(sampler):
  x, steps = run(explore.Explore(1), sampler=sample.SAMPLERS[sampler])
  np.testing.assert_array_equal(x, plain(sampler=sampler))
  assert np.isnan(steps.scores).all() and not steps.bad.any()


def test_without_exploring_steps_it_is_the_plain_sampler():
  schedule = sample.make_schedule(SIGMAS, explore_window=(2, 2))
  x, steps = run(explore.Explore(4), schedule=schedule)
  np.testing.assert_allclose(x, plain(), rtol=1e-6, atol=1e-6)
  assert np.isnan(steps.scores).all() and not steps.chosen.any()


def by_hand(options, b, schedule, keys, inputs):
  """The definition: one sample after another, in Python."""
  k, m = options.candidates, options.beam
  out = []
  for i in range(b):
    key = keys[i : i + 1]
    beams = [sample.initial_noise(key, LATENT)[0]] * m
    for t in range(len(schedule)):
      at = jax.tree.map(lambda a, t=t: a[t], schedule)
      moments = []
      for x in beams:
        v = velocity(inputs[i : i + 1], x[None], at.sigma[None])
        moments.append(
          sample.flow_sde(x[None], v, at.sigma, at.sigma_next, at.noise_level)
        )
      noise = sample.step_noise(key, at.index, jnp.arange(k * m), LATENT)[0]
      every = [
        (moments[j // k][0] + moments[j // k][1] * noise[j])[0] for j in range(k * m)
      ]
      if at.explore:
        scores = [
          float(reward(inputs[i : i + 1], x[None], at.sigma_next[None])[0])
          for x in every
        ]
        order = sorted(range(k * m), key=lambda j: -scores[j])
        beams = [every[j] for j in order[:m]]
      else:
        beams = every[::k]
    final = [float(reward(inputs[i : i + 1], x[None], jnp.zeros(1))[0]) for x in beams]
    out.append(beams[int(np.argmax(final))] if m > 1 else beams[0])
  return np.stack(out)


@pytest.mark.parametrize("beam", [1, 2])
def test_equals_a_plain_loop(beam):
  schedule = sample.make_schedule(SIGMAS, noise_level=0.5, explore_window=(1, 4))
  options = explore.Explore(3, beam=beam)
  x, _ = run(options, b=2, schedule=schedule)
  want = by_hand(options, 2, schedule, make_keys(2), make_inputs(2))
  np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)


def test_the_best_candidate_carries_on_and_beats_the_mean():
  x, steps = run(explore.Explore(5), trajectory=True)
  scores, chosen = np.asarray(steps.scores), np.asarray(steps.chosen)[..., 0]
  won = np.take_along_axis(scores, chosen[..., None], -1)[..., 0]
  assert (won == scores.max(-1)).all() and (won > scores.mean(-1)).all()
  picked = np.take_along_axis(
    np.asarray(steps.candidates), chosen[..., None, None, None, None], 2
  )[:, :, 0]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  close(picked[:-1], steps.x[1:, :, 0])
  close(picked[-1], x)


def test_more_candidates_score_higher():
  finals = []
  for k in (1, 2, 6):
    x, _ = run(explore.Explore(k), b=16)
    finals.append(float(reward(make_inputs(16), x, 0.0).mean()))
  assert finals[0] + 0.02 < finals[1] < finals[2] - 0.02, finals


def test_candidates_do_not_depend_on_how_many_there_are():
  _, few = run(explore.Explore(2), trajectory=True)
  _, many = run(explore.Explore(6), trajectory=True)
  np.testing.assert_allclose(
    few.candidates[0], many.candidates[0][:, :2], rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize("beam", [1, 3])
def test_order_of_candidates_changes_nothing(beam):
  scores = jax.random.normal(jax.random.key(1), (4, 6))
  options = explore.Explore(6 // beam, beam=beam)
  order = np.random.default_rng(0).permutation(6)
  choose = functools.partial(explore.choose, options=options, keys=make_keys(4))
  here, there = choose(scores, index=0), choose(scores[:, order], index=0)
  np.testing.assert_array_equal(here, order[np.asarray(there)])


def test_softmax_draws_by_score():
  scores = jnp.array([[0.0, 1.0, 2.0]])
  options = explore.Explore(3, select="softmax", temperature=0.5)
  keys = make_keys(4000)
  drawn = explore.choose(
    jnp.broadcast_to(scores, (4000, 3)), options, keys=keys, index=3
  )
  counts = np.bincount(np.asarray(drawn)[:, 0], minlength=3) / 4000
  want = np.asarray(jax.nn.softmax(scores[0] / 0.5))
  np.testing.assert_allclose(counts, want, atol=4 * np.sqrt(0.25 / 4000))


def test_random_is_even_and_blind():
  scores = jnp.broadcast_to(jnp.array([[0.0, 100.0]]), (4000, 2))
  options = explore.Explore(2, select="random")
  drawn = explore.choose(scores, options, keys=make_keys(4000), index=0)
  assert abs(float(np.mean(drawn)) - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_beams_may_start_from_their_own_noise():
  x = jax.random.normal(jax.random.key(0), (2, 3, *LATENT))
  options = explore.Explore(1, beam=3)
  keys, inputs = make_keys(2), make_inputs(2)
  carry = explore.start(APART, inputs, x, options)
  np.testing.assert_array_equal(carry.x, x)
  out, steps = explore.explore(APART, inputs, inputs, x, ALL, options, keys=keys)
  assert out.shape == (2, *LATENT) and np.isfinite(steps.scores).all()
  with pytest.raises(ValueError, match="3 beams, not 2"):
    explore.start(APART, inputs, x, explore.Explore(1, beam=2))


# --- scores that are not finite ----------------------------------------------------


@pytest.mark.parametrize("select", ["best", "softmax", "random"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_never_wins(select, bad):
  def broken(inputs, x, sigma):
    scores = reward(inputs, x, sigma)
    return jnp.where(jnp.arange(len(scores)) % 4 != 2, bad, scores)

  networks = explore.Apart(velocity, broken)
  options = explore.Explore(4, select=select)
  _, steps = run(options, b=2, networks=networks)
  assert (np.asarray(steps.chosen) == 2).all()
  assert (np.asarray(steps.bad) == 3).all()


def test_if_all_scores_are_bad_the_first_candidate_carries_on():
  networks = explore.Apart(velocity, lambda inputs, x, sigma: jnp.full(len(x), jnp.nan))
  x, steps = run(explore.Explore(3), networks=networks)
  assert (np.asarray(steps.bad) == 3).all() and not np.asarray(steps.chosen).any()
  np.testing.assert_allclose(x, plain(), rtol=1e-6, atol=1e-6)


# --- what is computed --------------------------------------------------------------


def test_one_velocity_for_all_candidates_and_scoring_in_chunks():
  seen = collections.defaultdict(set)

  def counted(name, function):
    def call(inputs, x, sigma):
      seen[name].add((len(x), len(inputs), sigma.shape))
      return function(inputs, x, sigma)

    return call

  networks = explore.Apart(counted("v", velocity), counted("r", reward))
  whole, _ = run(explore.Explore(6), networks=networks)
  assert seen == {"v": {(3, 3, (3,))}, "r": {(18, 18, (18,))}}
  seen.clear()
  chunks, _ = run(explore.Explore(6, chunk=2), networks=networks)
  assert seen == {"v": {(3, 3, (3,))}, "r": {(6, 6, (6,))}}
  np.testing.assert_allclose(whole, chunks, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_schedule_in_parts_is_the_schedule(stride):
  options = explore.Explore(3, beam=2)
  keys, inputs = make_keys(3), make_inputs(3)
  want, want_steps = run(options)
  carry = explore.start(APART, inputs, sample.initial_noise(keys, LATENT), options)
  advance = jax.jit(
    lambda carry, part: explore.advance(
      APART, inputs, inputs, carry, part, options, keys=keys
    )
  )
  scores = []
  for i in range(0, len(ALL), stride):
    carry, steps = advance(carry, ALL[i : i + stride])
    scores.append(steps.scores)
  out, beam = explore.finish(APART, inputs, carry, SIGMAS[-1], options)
  np.testing.assert_array_equal(out, carry.x[jnp.arange(3), beam])
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.concatenate(scores), want_steps.scores, rtol=1e-5)


def test_windows_noise_and_noise_levels_compile_nothing_anew():
  traces = []
  options = explore.Explore(2)

  @jax.jit
  def program(x, schedule, keys):
    traces.append(1)
    inputs = make_inputs(2)
    return explore.explore(APART, inputs, inputs, x, schedule, options, keys=keys)[0]

  keys = make_keys(2)
  x = sample.initial_noise(keys, LATENT)
  outs = [
    program(x, sample.make_schedule(SIGMAS, **kw), keys)
    for kw in (
      dict(),
      dict(explore_window=(0, 2)),
      dict(noise_level=0.3),
      dict(sde_window=(1, 3)),
      dict(noise_level=np.linspace(0.1, 1, 5)),
    )
  ]
  assert len(traces) == 1
  assert len({np.asarray(out).tobytes() for out in outs}) == 5


def test_a_step_without_noise_is_not_scored():
  schedule = sample.make_schedule(SIGMAS, sde_window=(1, 3))
  _, steps = run(explore.Explore(2), schedule=schedule)
  scored = np.isfinite(steps.scores).all(axis=(1, 2))
  np.testing.assert_array_equal(scored, [False, True, True, False, False])
  _, steps = run(explore.Explore(2), sampler=sample.SAMPLERS["cps"])
  assert not np.isfinite(steps.scores[-1]).any()  # sigma' = 0: nothing fresh


def test_log_probs_are_those_of_the_candidates():
  _, steps = run(explore.Explore(3, select="random"), b=2, trajectory=True)
  for t in range(len(ALL)):
    at = jax.tree.map(lambda a, t=t: a[t], ALL)
    x = steps.x[t, :, 0]
    v = velocity(make_inputs(2), x, jnp.broadcast_to(at.sigma, 2))
    for j in range(3):
      want, _, _ = sample.likelihood(
        sample.SDE, x, steps.candidates[t, :, j], v, at.sigma, at.sigma_next
      )
      np.testing.assert_allclose(steps.log_prob[t, :, j], want, rtol=1e-5, atol=1e-5)


def test_over_eight_devices_as_on_one():
  mesh = sharding.make_mesh()
  keys, inputs = make_keys(8), make_inputs(8)
  options = explore.Explore(3, beam=2)
  want, want_steps = run(options, b=8)

  def program(inputs, x, schedule, keys):
    return explore.explore(APART, inputs, inputs, x, schedule, options, keys=keys)

  with jax.set_mesh(mesh):
    split = sharding.batch_sharding(mesh)
    x = sample.initial_noise(keys, LATENT)
    inputs, x, keys = jax.device_put((inputs, x, keys), split)
    out, steps = jax.jit(program)(inputs, x, ALL, keys)
  assert len(out.sharding.device_set) == 8
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(steps.chosen, want_steps.chosen)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("share", [False, True])
def test_devices_that_hold_whole_samples_send_nothing(share, chunk):
  """Guidance, candidates, their scores and choice stay where their sample is."""
  networks = (shared if share else apart)(3.0)
  options = explore.Explore(4, chunk=chunk)

  def program(inputs, x, schedule, keys):
    return explore.explore(
      networks, (inputs, -inputs), inputs, x, schedule, options, keys=keys
    )

  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    split = sharding.batch_sharding(mesh)
    keys, inputs = make_keys(8), make_inputs(8)
    x = sample.initial_noise(keys, LATENT)
    args = jax.device_put((inputs, x, keys), split)
    compiled = jax.jit(program).lower(*args[:2], ALL, args[2]).compile()
  assert hlo.parse(compiled.as_text()).collective_bytes == {}


# --- a shared prefix ---------------------------------------------------------------


def prefix(inputs, x, sigma):
  y = jnp.sin(x * rows(inputs, x)) + rows(sigma, x)
  return {"y": y, "s": sigma}, y.mean(axis=(1, 2, 3))


def tail(tokens):
  return tokens["y"] ** 2 - rows(tokens["s"], tokens["y"])


def head(inputs, made):
  tokens, tap = made
  return tap * inputs - tokens["s"]


def shared(guidance_scale, prefix_fn=prefix):
  return explore.SharedPrefix(prefix_fn, tail, head, guidance_scale)


def apart(guidance_scale):
  whole = lambda inputs, x, sigma: tail(prefix(inputs, x, sigma)[0])  # noqa: E731
  if guidance_scale is not None:
    whole = sample.guide(whole, guidance_scale)
  return explore.Apart(
    whole, lambda inputs, x, sigma: head(inputs, prefix(inputs, x, sigma))
  )


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize(
  "options",
  [explore.Explore(3), explore.Explore(4, chunk=2), explore.Explore(2, beam=2)],
  ids=["greedy", "chunks", "beam"],
)
def test_shared_prefix_changes_cost_not_results(guidance_scale, options):
  inputs = make_inputs(3)
  if guidance_scale is not None:
    inputs = (inputs, -inputs)
  schedule = sample.make_schedule(SIGMAS, explore_window=(1, 3))
  common = dict(inputs=inputs, schedule=schedule)
  want, want_steps = run(options, networks=apart(guidance_scale), **common)
  out, steps = run(options, networks=shared(guidance_scale), **common)
  np.testing.assert_array_equal(steps.chosen, want_steps.chosen)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("beam", [1, 2])
def test_evaluations_are_what_runs(guided, beam):
  """The prefix's rows are counted while the program runs, branches not taken not."""
  ran = collections.Counter()

  def counted(inputs, x, sigma):
    jax.debug.callback(lambda: ran.update(prefix=len(x)))
    return prefix(inputs, x, sigma)

  def counted_tail(tokens):
    jax.debug.callback(lambda: ran.update(tail=len(tokens["s"])))
    return tail(tokens)

  b, options = 2, explore.Explore(3, beam=beam)
  scale = 2.0 if guided else None
  networks = explore.SharedPrefix(counted, counted_tail, head, scale)
  inputs = make_inputs(b)
  schedule = sample.make_schedule(SIGMAS, explore_window=(1, 4))
  run(
    options,
    b=b,
    networks=networks,
    inputs=(inputs, inputs) if guided else inputs,
    schedule=schedule,
  )
  jax.effects_barrier()
  fraction = 0.25  # of a pass is the prefix, the rest the tail
  cost = fraction * ran["prefix"] + (1 - fraction) * ran["tail"]
  assert cost == b * explore.evaluations(
    schedule, options, guided=guided, scoring=fraction, shared=fraction
  )


def test_evaluations_of_the_published_recipe():
  """50 guided steps, 21 of 24 blocks, k = 6: 3.6 times the plain sampler (FLOPs)."""
  schedule = sample.make_schedule(flow.sampling_sigmas(50, 3.0))
  cost = functools.partial(explore.evaluations, guided=True, scoring=0.8974)
  ratio = cost(schedule, explore.Explore(6)) / cost(schedule, explore.Explore(1))
  assert abs(ratio - 3.69) < 0.01


@pytest.mark.parametrize("beam", [1, 2])
@pytest.mark.parametrize("candidates", [2, 3, 4, 6])
@pytest.mark.parametrize("num_steps", [10, 28, 50])
def test_cheap_mode_explores_what_it_can_pay_for(num_steps, candidates, beam):
  options = explore.Explore(candidates, beam=beam)
  costs = dict(guided=True, scoring=0.6, shared=0.5)
  start, stop = explore.mode_window("cheap", num_steps, options, **costs)
  sigmas = flow.sampling_sigmas(num_steps, 3.0)

  def cost(stop):
    schedule = sample.make_schedule(sigmas, explore_window=(0, stop))
    return explore.evaluations(schedule, options, **costs)

  assert start == 0 and cost(stop) <= 1.6 * cost(0)
  assert stop == num_steps or cost(stop + 1) > 1.6 * cost(0)


def test_modes():
  assert explore.mode_window("full", 10, explore.Explore(6)) == (0, 10)
  # SD3.5-Medium with a head on its first 12 blocks.
  assert explore.mode_window("cheap", 50, explore.Explore(4)) == (0, 34)
  assert explore.mode_window("cheap", 50, explore.Explore(6)) == (0, 20)
  assert explore.mode_window("cheap", 50, explore.Explore(3)) == (0, 50)
  assert explore.mode_window("cheap", 1, explore.Explore(6)) == (0, 1)
  dear = explore.mode_window("cheap", 50, explore.Explore(6), scoring=100.0)
  assert dear == (0, 1)
  with pytest.raises(ValueError, match="'dear'.*full, cheap"):
    explore.mode_window("dear", 10, explore.Explore(6))


# --- best of n ---------------------------------------------------------------------


def best_of(n, networks=APART, b=3):
  inputs, keys = make_inputs(b), make_keys(b)
  return jax.jit(
    lambda keys: explore.best_of_n(networks, inputs, inputs, LATENT, ALL, n, keys=keys)
  )(keys)


def test_best_of_one_is_the_sampler():
  made = best_of(1)
  np.testing.assert_allclose(made.x, plain(), rtol=1e-6, atol=1e-6)
  assert made.scores.shape == (3, 1) and not made.chosen.any()


def test_best_of_n_keeps_the_best():
  made = best_of(5)
  np.testing.assert_array_equal(made.chosen, np.argmax(made.scores, axis=1))
  np.testing.assert_allclose(
    reward(make_inputs(3), made.x, 0.0), made.scores.max(axis=1), rtol=1e-5
  )
  np.testing.assert_array_equal(best_of(2).scores, made.scores[:, :2])
  assert len(np.unique(made.scores)) == 15


def test_best_of_n_ignores_scores_that_are_not_finite():
  top = float(best_of(4).scores.max())

  def broken(inputs, x, sigma):
    scores = reward(inputs, x, sigma)
    return jnp.where(scores >= top - 1e-5, jnp.nan, scores)

  made = best_of(4, explore.Apart(velocity, broken))
  won = np.take_along_axis(np.asarray(made.scores), np.asarray(made.chosen)[:, None], 1)
  assert np.isnan(made.scores).sum() == 1 and np.isfinite(won).all()


# --- errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(candidates=0), "candidates=0 must be >= 1"),
    (dict(beam=0), "beam=0 must be >= 1"),
    (dict(select="worst"), "select='worst': use one of best, softmax, random"),
    (dict(temperature=0.0), "temperature=0.0 must be > 0"),
    (dict(temperature=float("nan")), "temperature=nan must be > 0"),
    (dict(candidates=6, chunk=4), "chunk=4 must divide candidates x beam = 6"),
  ],
)
def test_impossible_options(kwargs, message):
  with pytest.raises(ValueError, match=message):
    explore.Explore(**kwargs)


def test_an_ode_has_no_candidates():
  with pytest.raises(ValueError, match="deterministic"):
    run(explore.Explore(2), sampler=sample.SAMPLERS["euler"])


def test_a_reward_of_another_shape():
  networks = explore.Apart(velocity, lambda inputs, x, sigma: x.mean(axis=(1, 2)))
  with pytest.raises(ValueError, match=r"shape \(6, 2\) for 6 latents"):
    run(explore.Explore(2), networks=networks)
