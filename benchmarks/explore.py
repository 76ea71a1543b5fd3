"""What explore-and-select costs, beside its ideal and beside PyTorch in the same run.

Guided samples with k candidates per step, for SD3.5-Medium's depth (24 blocks, 13 with
dual attention) and three scorers:

  drm    the first 21 blocks with weights of their own, convolutional head
  dina   the generator's first 12 blocks under adapters, Q-Former head
  cheap  the generator's first 12 blocks as they are, Q-Former head, k = 4
         and 6 in the cheap mode's window; the winner's tokens start the next
         conditional pass

Each case runs in jitted JAX and as a plain loop over diffusers' modules that does the
same (scoring repeats the prompt embeddings and computes everything anew). Both hold the
same random weights in processes of their own, and take turns case by case. Before
anything is timed they get the same noise and must arrive at the same latents through
the same candidates (float32; in bfloat16 the differences are only reported).

The ideal is made of two times that are measured in the same run: T x (one guided
velocity + the share of steps that explore x one scoring of k).

A narrow model on a CPU (minutes; on a busy machine pin it, `taskset -c 1`), full size
on a GPU (set JAX_COMPILATION_CACHE_DIR to compile once), and full-size programs
compiled for a device that is not there:

  python benchmarks/explore.py --out benchmarks/results/explore_cpu.json
  python benchmarks/explore.py --full --torch eager blocks --rounds 3 --out gpu.json
  python benchmarks/explore.py --aot h200 --target-config h200.txtpb --out h200.json

Exit code 1: the two disagree, or something compiled after the warm-up; 3: the compiler
for the device of --aot is not installed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import model_sizes
import numpy as np
import protocol
import side_by_side

from lrm_jax import (
  aot,
  build,
  compilation,
  denoiser,
  explore,
  flops,
  flow,
  sample,
  sharding,
  weights,
)
from lrm_jax.models import attention, features, mmdit

PUBLISHED = 3.41  # DRM (arXiv 2605.25661): k = 6 to k = 1, all steps explore
AGREE = 1e-3  # relative difference of float32 latents that counts as agreement
GUIDANCE = 4.5
SHIFT = 3.0
NOT_INSTALLED = 3


# --- what is run -------------------------------------------------------------------

Sizes = model_sizes.Sizes


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to sample. `scorer`: None scores nothing (k = 1)."""

  scorer: str | None
  candidates: int
  chunk: int | None = None
  batch: int = 1

  @property
  def mode(self) -> str:
    return "cheap" if self.scorer == "cheap" else "full"

  @property
  def options(self) -> explore.Explore:
    return explore.Explore(candidates=self.candidates, chunk=self.chunk)

  @property
  def name(self) -> str:
    """Without the batch."""
    if self.scorer is None:
      return "plain"
    chunk = "" if self.chunk is None else f"-chunk{self.chunk}"
    return f"{self.scorer}-{self.candidates}{chunk}"


PLAIN = Case(None, 1)
CASES = {
  case.name: case
  for case in (
    PLAIN,
    *(Case("drm", k) for k in (2, 4, 6, 12)),
    *(Case("dina", k) for k in (2, 4, 6)),
    *(Case("cheap", k) for k in (4, 6)),
    *(Case("drm", k, chunk=2) for k in (6, 12)),
  )
}
TIMED = [name for name in CASES if "12" not in name]
COMPILED = "plain drm-6 dina-6 cheap-6 drm-6-chunk2 drm-12 drm-12-chunk2".split()


def make_schedule(sizes: Sizes, case: Case, **kw) -> sample.Schedule:
  """The case's steps."""
  kw.setdefault(
    "explore_window", explore.mode_window(case.mode, sizes.steps, case.options)
  )
  return sample.make_schedule(flow.sampling_sigmas(sizes.steps, SHIFT), **kw)


def relative_flops(sizes: Sizes, case: Case) -> float:
  """What a case costs by formula, in units of the plain sampler."""
  config, side = sizes.generator, sizes.latent
  n = flops.image_tokens(config, side, side)
  one = flops.mmdit(config, n, sizes.text_tokens)
  scoring = shared = 0.0
  if case.scorer is not None:
    scorer = sizes.rewards[case.scorer]
    scoring = flops.reward(scorer, side, side, sizes.text_tokens) / one
    if case.scorer == "cheap":
      shared = flops.mmdit(scorer.backbone, n, sizes.text_tokens) / one
  return _relative(sizes, case, scoring, shared)


def teraflops(sizes: Sizes, case: Case) -> float:
  """Of all samples of a case."""
  config, side = sizes.generator, sizes.latent
  n = flops.image_tokens(config, side, side)
  plain = 2 * sizes.steps * flops.mmdit(config, n, sizes.text_tokens)
  return case.batch * plain * relative_flops(sizes, case) / 1e12


def relative_attention(sizes: Sizes, case: Case) -> float:
  """The same of attention only, without that of a Q-Former head."""
  config, scoring = sizes.generator, 0.0
  n = flops.image_tokens(config, sizes.latent, sizes.latent)
  one = flops.attention(config, n, sizes.text_tokens)
  if case.scorer is not None:
    backbone = sizes.rewards[case.scorer].backbone
    scoring = flops.attention(backbone, n, sizes.text_tokens) / one
  return _relative(sizes, case, scoring, scoring if case.scorer == "cheap" else 0.0)


def _relative(sizes: Sizes, case: Case, scoring: float, shared: float) -> float:
  """Of one scoring and of what it shares, in units of an unguided velocity."""
  passes = explore.evaluations(
    make_schedule(sizes, case),
    case.options,
    guided=True,
    scoring=scoring,
    shared=shared,
  )
  return passes / (2 * sizes.steps)


def make_inputs(sizes: Sizes, batch: int, seed: int) -> tuple:
  """(cond, uncond) float32 numpy arrays and (b,) keys, of random prompts."""
  rng = np.random.default_rng(1000 + seed)
  config = sizes.generator

  def prompt():
    return features.Cond(
      rng.standard_normal((batch, sizes.text_tokens, config.context_dim), np.float32),
      rng.standard_normal((batch, config.pooled_dim), np.float32),
    )

  keys = jax.vmap(jax.random.key)(jnp.arange(batch) + 100 * seed)
  return prompt(), prompt(), keys


# --- weights -----------------------------------------------------------------------


def abstract_denoiser(
  sizes: Sizes, scorer: str | None, attention_impl: str = "auto"
) -> denoiser.Denoiser:
  """With one scorer or none; cut in the same place, so that all share their arrays."""
  return denoiser.abstract(
    sizes.generator,
    {} if scorer is None else {scorer: sizes.rewards[scorer]},
    on_generator=() if scorer in (None, "drm") else (scorer,),
    depth=sizes.dina_layers,
    dtype=sizes.dtype,
    scan_blocks=sizes.scan,
    attention_impl=attention_impl,
  )


def denoisers_with(
  sizes: Sizes, ours: Mapping[str, dict]
) -> dict[str | None, denoiser.Denoiser]:
  """One for each scorer (and none), on the device; the generator's are the same arrays.

  Args:
    ours: what `model_sizes.make_weights` returns.
  """

  def place(params, like):
    if not sizes.scan and "blocks" in params:
      params = mmdit.unstack_params(params)
    elif not sizes.scan and "backbone" in params:
      backbone = mmdit.unstack_params(params["backbone"])
      params = {**params, "backbone": backbone}
    return build.to_device(build.fit(params, like, name="random weights"))

  made = {name: abstract_denoiser(sizes, name) for name in (None, *sizes.rewards)}
  prefix, tail = mmdit.split_params(
    ours["generator"], sizes.generator, sizes.dina_layers
  )
  like = made[None].params
  shared = {"prefix": place(prefix, like["prefix"]), "tail": place(tail, like["tail"])}
  for name, one in made.items():
    own = {n: place(ours[n], like) for n, like in one.params["rewards"].items()}
    made[name] = dataclasses.replace(one, params={**shared, "rewards": own})
  return made


# --- our side ----------------------------------------------------------------------


def make_networks(
  made: denoiser.Denoiser, params: Any, scorer: str | None, guidance: Any
) -> explore.Networks:
  """The pieces that `explore.explore` takes."""
  if scorer == "cheap":
    return explore.SharedPrefix(
      made.prefix_fn(params),
      made.tail_fn(params),
      made.head_fn(params, scorer),
      guidance,
    )
  velocity_fn = sample.guide(made.velocity_fn(params), guidance)
  no_reward = lambda inputs, x, sigma: jnp.zeros(len(x))  # noqa: E731
  return explore.Apart(
    velocity_fn, made.reward_fn(params, scorer) if scorer else no_reward
  )


def make_program(made: denoiser.Denoiser, case: Case) -> Callable[..., tuple]:
  """`(params, cond, uncond, x, schedule, keys, guidance) -> (x, chosen)`, for jit."""

  def program(params, cond, uncond, x, schedule, keys, guidance):
    embedded = made.embed(params, cond)
    inputs = (
      embedded[denoiser.GENERATOR],
      made.embed(params, uncond)[denoiser.GENERATOR],
    )
    scored = made.reward_inputs(embedded)[case.scorer] if case.scorer else inputs[0]
    networks = make_networks(made, params, case.scorer, guidance)
    x, steps = explore.explore(
      networks, inputs, scored, x, schedule, case.options, keys=keys
    )
    return x, steps.chosen[:, :, 0]

  return program


def prompt_products(jaxpr: Any, tokens: int, context_dim: int) -> tuple[int, int]:
  """How many products read raw prompt embeddings: (outside, inside) of loops."""
  counts = [0, 0]

  def walk(jaxpr, inside):
    for eqn in jaxpr.eqns:
      shapes = [v.aval.shape for v in eqn.invars]
      if eqn.primitive.name == "dot_general":
        counts[inside] += any(s[1:] == (tokens, context_dim) for s in shapes)
      looping = inside or eqn.primitive.name in ("scan", "while")
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(inner, looping)

  walk(jaxpr, False)
  return counts[0], counts[1]


class JaxSide(protocol.JaxSide):
  """Our programs, compiled and timed; lives in a process of its own."""

  def __init__(self, sizes: Sizes):
    super().__init__(sizes)
    self.compiles = compilation.CompileCount()
    self.denoisers = denoisers_with(sizes, model_sizes.make_weights(sizes))
    self.programs: dict[Case, Any] = {}
    self.pieces: dict[tuple, Callable] = {}

  def _arguments(self, case: Case, seed: int = 0, **schedule) -> tuple:
    cond, uncond, keys = make_inputs(self.sizes, case.batch, seed)
    dtype = build.dtype(self.sizes.dtype)
    cond, uncond = jax.tree.map(lambda a: jnp.asarray(a, dtype), (cond, uncond))
    config, side = self.sizes.generator, self.sizes.latent
    x = sample.initial_noise(keys, (side, side, config.in_channels))
    steps = make_schedule(self.sizes, case, **schedule)
    guidance = np.float32(GUIDANCE + seed)
    return jax.device_put((cond, uncond, x, steps, keys, guidance))

  def compile_all(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Compile time, bytes, and where the prompts' products are; many at a time."""

    def one(lowered):
      start = time.perf_counter()
      compiled = lowered.compile()
      return compiled, time.perf_counter() - start

    rows, jobs, config = [], [], self.sizes.generator
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
      for case in cases:
        made = self.denoisers[case.scorer]
        program = jax.jit(make_program(made, case))
        args = (made.params, *self._arguments(case))
        start = time.perf_counter()
        traced = program.trace(*args)
        lowered = traced.lower()
        seconds = time.perf_counter() - start
        outside, inside = prompt_products(
          traced.jaxpr.jaxpr, self.sizes.text_tokens, config.context_dim
        )
        row = {"lower_s": seconds, "prompt_products_outside_loops": outside}
        rows.append(row | {"prompt_products_in_loops": inside})
        jobs.append((program, args, pool.submit(one, lowered)))
    for row, case, (program, args, job) in zip(rows, cases, jobs, strict=True):
      compiled, row["compile_s"] = job.result()
      memory = aot.memory_of(compiled)
      row |= {
        "temporary_bytes": memory.temporaries,
        "argument_bytes": memory.arguments,
      }
      self.programs[case] = program, args, compiled
    return rows

  def first_run(self, case: Case) -> dict[str, Any]:
    """Result of the first call (which may compile), and the device's peak bytes."""
    before = self._peak()
    x, chosen = self._call(case)
    return {
      "x": np.asarray(x),
      "chosen": np.asarray(chosen).T,  # (b T)
      "peak_bytes": self._peak(),
      "peak_bytes_before": before,
    }

  def noise(self, batch: int, candidates: int, path: str) -> None:
    """Writes the start and each step's noise: (b H W C), (T b k H W C)."""
    _, _, x, _, keys, _ = self._arguments(dataclasses.replace(PLAIN, batch=batch))
    draw = jax.jit(
      lambda at: sample.step_noise(keys, at, jnp.arange(candidates), x.shape[1:])
    )
    steps = np.stack([np.asarray(draw(t)) for t in range(self.sizes.steps)])
    np.savez(path, x=np.asarray(x), steps=steps)

  def _call(self, case: Case):
    _, args, compiled = self.programs[case]
    return compiled(*args)

  def _peak(self) -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None

  def changed(self, variants: int = 2) -> dict[str, int]:
    """Runs every case with other prompts, seeds, windows, noise levels and guidance.

    Returns: how many calls, and how many compilations they caused.
    """
    steps = self.sizes.steps
    ready = [
      (
        program,
        params,
        self._arguments(
          case,
          seed,
          noise_level=np.linspace(0.3, 0.2 + 0.2 * seed, steps),
          sde_window=(0, steps - seed % 2),
          explore_window=(min(seed, steps - 1), steps),
        ),
      )
      for case, (program, (params, *_), _) in self.programs.items()
      for seed in range(1, 1 + variants)
    ]
    for program, args, _ in self.programs.values():
      jax.block_until_ready(program(*args))  # the program has a cache of its own
    before = self.compiles.count
    for program, params, args in ready:
      jax.block_until_ready(program(params, *args))
    return {"calls": len(ready), "compilations": self.compiles.count - before}

  # -- the ideal's pieces --

  def prepare_pieces(self, cases: Sequence[Case]) -> None:
    for case in cases:
      for piece in _pieces(self.sizes, case):
        if piece not in self.pieces:
          self.pieces[piece] = self._make_piece(*piece)
    # They compile in their first call: many at a time.
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
      jobs = [pool.submit(call) for call in self.pieces.values()]
      for job in jobs:
        jax.block_until_ready(job.result())

  def piece_seconds(self, case: Case, calls: int) -> dict[tuple, float]:
    """Seconds per call of each piece of a case, in a group of calls."""
    seconds = {}
    for piece in _pieces(self.sizes, case):
      call = self.pieces[piece]
      start = time.perf_counter()
      results = [call() for _ in range(calls)]
      jax.block_until_ready(results)
      seconds[piece] = (time.perf_counter() - start) / calls
    return seconds

  def _make_piece(self, what: str, scorer: str | None, num: int) -> Callable[[], Any]:
    """A call: `velocity` of num samples, `known`: with a winner's tokens, `score`."""
    made = self.denoisers[scorer]
    params = made.params
    cond, uncond, x, _, _, guidance = self._arguments(
      dataclasses.replace(PLAIN, batch=num)
    )
    sigma = jnp.full(num, 0.7, jnp.float32)

    @jax.jit
    def embed(params, cond, uncond):
      embedded = made.embed(params, cond)
      empty = made.embed(params, uncond)[denoiser.GENERATOR]
      return embedded, (embedded[denoiser.GENERATOR], empty)

    embedded, inputs = embed(params, cond, uncond)
    if what == "score":
      inputs = made.reward_inputs(embedded)[scorer]

    def piece(params, inputs, x, sigma, guidance, tokens):
      networks = make_networks(made, params, scorer, guidance)
      if what == "score":
        return networks.score(inputs, x, sigma)[0]
      return networks.velocity(inputs, x, sigma, tokens, what == "known")

    tokens = None
    if what == "known":
      tokens = jax.jit(
        lambda p, *a: make_networks(made, p, scorer, guidance).score(*a)[1]
      )(params, inputs[0], x, sigma)
    call = jax.jit(piece)
    return lambda: call(params, inputs, x, sigma, guidance, tokens)


def _pieces(sizes: Sizes, case: Case) -> dict[tuple, float]:
  """The pieces that a case is made of, and how often they run."""
  explored = int(make_schedule(sizes, case).explore.sum()) if case.scorer else 0
  size = case.chunk or case.candidates
  pieces = {("velocity", None, case.batch): float(sizes.steps)}
  if explored:
    num = explored * case.candidates / size
    pieces["score", case.scorer, case.batch * size] = num
  if case.scorer == "cheap":
    known = min(explored, sizes.steps - 1)  # steps behind an explored one
    pieces["velocity", None, case.batch] -= known
    pieces["known", "cheap", case.batch] = float(known)
  return pieces


# --- PyTorch's side ----------------------------------------------------------------


class TorchSide(protocol.TorchSide):
  """A loop over diffusers' modules, as one would write it; in its own process."""

  def __init__(self, sizes: Sizes, how: str):
    super().__init__(sizes, how)
    self.dtype = getattr(self.torch, sizes.dtype)
    ours, config = model_sizes.make_weights(sizes), sizes.generator
    self.transformer = self._ready(
      side_by_side.torch_transformer(config, ours["generator"], device=self.device)
    )
    self.scorers = {}
    for name, scorer in sizes.rewards.items():
      params = ours[name]
      if name != "drm":
        first = mmdit.truncate_params(ours["generator"], config, scorer.backbone)
        flat = {f"backbone/{p}": a for p, a in weights.flatten(first).items()}
        params = weights.unflatten({**flat, **weights.flatten(params)})
      self.scorers[name] = self._ready(
        side_by_side.torch_reward(scorer, params, self.device)
      )
    self.inputs: dict[int, tuple] = {}

  def _ready(self, model):
    model = model.to(self.device, self.dtype).eval().requires_grad_(False)
    return self.fast(model)

  def first_run(self, case: Case, noise: str) -> dict[str, Any]:
    """Result with the given noise (and of compiling), and the device's peak bytes."""
    torch = self.torch
    with np.load(noise) as stored:
      x = torch.from_numpy(np.ascontiguousarray(stored["x"].transpose(0, 3, 1, 2)))
      steps = torch.from_numpy(stored["steps"])
    x = x.to(self.device)

    def draw(step, num, shape):
      del shape
      return steps[step, :, :num].permute(0, 1, 4, 2, 3).to(self.device)

    if self.device == "cuda":
      torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    x, chosen = self._sample(case, x, draw)
    self._wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
    return {
      "x": x.permute(0, 2, 3, 1).cpu().numpy(),
      "chosen": chosen.cpu().numpy(),
      "peak_bytes": peak,
      "seconds": seconds,
    }

  def run(self, case: Case, calls: int = 1) -> float:
    """Seconds of one call, which draws its own noise."""
    del calls
    torch, side = self.torch, self.sizes.latent
    shape = (case.batch, self.sizes.generator.in_channels, side, side)
    x = torch.randn(shape, device=self.device)

    def draw(step, num, shape):
      del step
      return torch.randn(shape[0], num, *shape[1:], device=self.device)

    self._wait()
    start = time.perf_counter()
    self._sample(case, x, draw)
    self._wait()
    return time.perf_counter() - start

  def _prompts(self, batch: int) -> tuple:
    """(context, pooled) of both halves, the conditional one first."""
    if batch not in self.inputs:
      cond, uncond, _ = make_inputs(self.sizes, batch, 0)
      self.inputs[batch] = tuple(
        self.torch.from_numpy(np.concatenate(pair)).to(self.device, self.dtype)
        for pair in (
          (cond.context, uncond.context),
          (cond.pooled, uncond.pooled),
        )
      )
    return self.inputs[batch]

  def _sample(self, case: Case, x, draw):
    """The loop: x (b C H W) float32 -> the same, and chosen (b T)."""
    torch, b, k = self.torch, case.batch, case.candidates
    steps = make_schedule(self.sizes, case)
    context, pooled = self._prompts(b)
    rows, picked = torch.arange(b, device=self.device), []
    with torch.inference_mode():
      for i in range(len(steps)):
        sigma, sigma_next = float(steps.sigma[i]), float(steps.sigma_next[i])
        v = self.transformer(
          torch.cat([x, x]).to(self.dtype),
          timestep=torch.full((2 * b,), 1000 * sigma, device=self.device),
          encoder_hidden_states=context,
          pooled_projections=pooled,
          return_dict=False,
        )[0].float()
        v_cond, v_uncond = v.chunk(2)
        v = v_uncond + GUIDANCE * (v_cond - v_uncond)

        mean, std, _ = side_by_side.sde_moments(
          x, v, sigma, sigma_next, float(steps.noise_level[i])
        )

        num = k if steps.explore[i] else 1
        candidates = mean[:, None] + std * draw(i, num, x.shape)
        if num == 1:
          x = candidates[:, 0]
          picked.append(torch.zeros_like(rows))
          continue
        scores = []
        for part in candidates.split(case.chunk or k, dim=1):
          n = part.shape[1]
          score = self.scorers[case.scorer](
            part.flatten(0, 1).to(self.dtype),
            torch.full((b * n,), 1000 * sigma_next, device=self.device),
            context[:b].repeat_interleave(n, dim=0),
            pooled[:b].repeat_interleave(n, dim=0),
          )
          scores.append(score.float().view(b, n))
        best = torch.cat(scores, dim=1).argmax(dim=1)
        x = candidates[rows, best]
        picked.append(best)
    return x, torch.stack(picked, dim=1)


# --- both in one run ---------------------------------------------------------------


def agreement(ours: Mapping, theirs: Mapping) -> dict[str, Any]:
  """How far the results of the same noise are apart.

  Raises:
    ValueError: results that are not numbers, or all the same number.
  """
  for name, x in (("jax", ours["x"]), ("torch", theirs["x"])):
    if not np.isfinite(x).all() or x.std() < 1e-3:
      raise ValueError(f"{name}'s latents are not finite, or constant")
  return {
    "relative_error": side_by_side.relative_error(ours["x"], theirs["x"]),
    "same_choices": float(np.mean(ours["chosen"] == theirs["chosen"])),
    "distinct_choices": len(np.unique(ours["chosen"])),
  }


def measure(
  sizes: Sizes,
  cases: Sequence[Case],
  ours: Any,
  theirs: Mapping[str, Any],
  *,
  rounds: int,
  calls: int,
  progress: Callable[[str], None] = lambda text: None,
  done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
  """Compiles, compares, and times everything.

  Args:
    ours, theirs: JaxSide, and TorchSides by name, or Remotes of them.
    done: is given the report after every round, which may be the last one there is
      time for.

  Returns: `rows`, one per case, and what concerns all.
  """
  most = max(case.candidates for case in cases)
  with tempfile.TemporaryDirectory() as folder:
    paths = {b: f"{folder}/{b}.npz" for b in {case.batch for case in cases}}
    for b, path in paths.items():
      ours.noise(b, most, path)

    def first_runs(name, side):
      found = [side.first_run(case, paths[case.batch]) for case in cases]
      progress(f"{name}: ready")
      return found

    # torch.compile compiles in its first run.
    calls_of = {n: lambda n=n, s=side: first_runs(n, s) for n, side in theirs.items()}
    found = protocol.each(calls_of | {"jax": lambda: ours.compile_all(cases)})
  compiled = found.pop("jax")
  progress("jax: all compiled")
  rows = {
    case: {
      "case": case.name,
      "candidates": case.candidates,
      "batch": case.batch,
      "flops_to_plain": relative_flops(sizes, case),
      "full_size_flops_to_plain": relative_flops(Sizes.full(), case),
      **row,
    }
    for case, row in zip(cases, compiled, strict=True)
  }
  # A device's peak only ever rises: smallest first.
  for case in sorted(cases, key=lambda c: rows[c]["temporary_bytes"]):
    first, row = ours.first_run(case), rows[case]
    row["peak_bytes"] = first["peak_bytes"]
    row["peak_bytes_before"] = first["peak_bytes_before"]
    for name, results in found.items():
      other = results[cases.index(case)]
      row[name] = {
        "first_run_s": other["seconds"],
        "peak_bytes": other["peak_bytes"],
        **agreement(first, other),
      }
  ours.prepare_pieces(cases)
  ours.product()
  progress("compared")

  seconds: dict[Any, list[float]] = {}
  matmuls = []
  for number in range(rounds):
    product, operations = ours.product()
    matmuls.append(product)
    for case in cases:
      for piece, value in ours.piece_seconds(case, calls).items():
        seconds.setdefault((*piece, case), []).append(value)
      for name, side in (("jax", ours), *theirs.items()):
        seconds.setdefault((name, case), []).append(side.run(case, 1))
    _summarise(sizes, rows, seconds, theirs, number + 1)
    peak = operations / statistics.median(matmuls)
    for case, row in rows.items():
      row["teraflops"] = teraflops(sizes, case)
      for name in ("jax", *theirs):
        rate = 1e12 * row["teraflops"] / row[name]["median"]
        row[name]["of_product"] = rate / peak
    report = {
      "rows": list(rows.values()),
      "rounds": number + 1,
      "matmul_s": matmuls,
      "peak_rss_bytes": {
        name: side.peak_rss() for name, side in (("jax", ours), *theirs.items())
      },
      **ours.about(),
      **{k: v for side in theirs.values() for k, v in side.about().items()},
    }
    done(report)
    progress(f"round {number + 1} of {rounds}")
  return report | {"recompiled": ours.changed()}


def _summarise(sizes, rows, seconds, theirs, rounds) -> None:
  """Medians, and ratios within each round."""

  def divided(a, b):
    return protocol.spread([x / y for x, y in zip(a, b, strict=True)])

  for case, row in rows.items():
    plain = dataclasses.replace(PLAIN, batch=case.batch)
    pieces = {p: seconds[*p, case] for p in _pieces(sizes, case)}
    ideal = [
      sum(num * pieces[p][i] for p, num in _pieces(sizes, case).items())
      for i in range(rounds)
    ]
    mine = seconds["jax", case]
    row["jax"] = {
      "seconds": mine,
      **protocol.spread(mine),
      "ideal_s": statistics.median(ideal),
      "to_ideal": divided(mine, ideal),
      "to_plain": divided(mine, seconds["jax", plain]),
    }
    velocity = pieces["velocity", None, case.batch]
    row["ideal_to_plain"] = divided(ideal, [sizes.steps * v for v in velocity])
    row["pieces_s"] = {" ".join(map(str, p)): v for p, v in pieces.items()}
    for name in theirs:
      other = seconds[name, case]
      row[name] |= {
        "seconds": other,
        **protocol.spread(other),
        "to_plain": divided(other, seconds[name, plain]),
        "jax_to_it": divided(mine, other),
      }


def problems(report: Mapping[str, Any], names: Sequence[str], dtype: str) -> list[str]:
  """What makes a run invalid, one line each."""
  bad = []
  if report["recompiled"]["compilations"]:
    bad.append(f"{report['recompiled']} after the warm-up")
  for row in report["rows"]:
    where = f"{row['case']}, batch {row['batch']}"
    if row["prompt_products_in_loops"] or not row["prompt_products_outside_loops"]:
      bad.append(f"{where}: prompts are projected inside of the loop")
    for name in names:
      error, same = row[name]["relative_error"], row[name]["same_choices"]
      if dtype == "float32" and not (error <= AGREE and same == 1):
        bad.append(
          f"{where}: {name} differs by {error:.1e}, {same:.0%} of its choices are ours"
        )
  return bad


def table(report: Mapping[str, Any], names: Sequence[str]) -> str:
  """The rows as a Markdown table."""
  head = ["case", "batch", "FLOP ratio (full size)", "jax to k = 1", "ideal to k = 1"]
  head += ["jax to its ideal", *(f"{name} to k = 1" for name in names)]
  head += [f"jax to {name}" for name in names]
  head += [f"{name}, of the product's rate" for name in ("jax", *names)]
  head += ["temporary, MiB", *(f"difference to {name}" for name in names)]
  lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  ranged = lambda s: f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"  # noqa: E731
  for row in report["rows"]:
    cells = [
      row["case"],
      str(row["batch"]),
      f"{row['flops_to_plain']:.2f} ({row['full_size_flops_to_plain']:.2f})",
      ranged(row["jax"]["to_plain"]),
      f"{row['ideal_to_plain']['median']:.2f}",
      ranged(row["jax"]["to_ideal"]),
      *(f"{row[name]['to_plain']['median']:.2f}" for name in names),
      *(ranged(row[name]["jax_to_it"]) for name in names),
      *(f"{row[name]['of_product']:.0%}" for name in ("jax", *names)),
      f"{row['temporary_bytes'] / 2**20:.1f}",
      *(f"{row[name]['relative_error']:.1e}" for name in names),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def details(report: Mapping[str, Any], names: Sequence[str]) -> str:
  """What the table leaves out: absolute times, bytes, counts."""
  lines = []
  for row in report["rows"]:
    text = (
      f"{row['case']}, batch {row['batch']}: jax {row['jax']['median']:.3f} s "
      f"(ideal {row['jax']['ideal_s']:.3f}; lowering {row['lower_s']:.1f}, compiling "
      f"{row['compile_s']:.1f})"
    )
    if row["peak_bytes"] is not None:
      rose = "" if row["peak_bytes"] > row["peak_bytes_before"] else "at most "
      text += f", peak {rose}{row['peak_bytes'] / aot.GIB:.2f} GiB"
    for name in names:
      other = row[name]
      text += (
        f"; {name} {other['median']:.3f} s (first call {other['first_run_s']:.1f})"
      )
      if other["peak_bytes"] is not None:
        text += f", peak {other['peak_bytes'] / aot.GIB:.2f} GiB"
    lines.append(text)
  rss = ", ".join(
    f"{name} {size / aot.GIB:.2f} GiB"
    for name, size in report["peak_rss_bytes"].items()
  )
  drift = max(report["matmul_s"]) / min(report["matmul_s"])
  lines += [
    f"peak resident size of each process (weights are made there): {rss}",
    "peaks of a device include the weights of all scorers",
    f"a fixed product between the rounds: slowest / fastest {drift:.2f}",
    f"calls with other prompts, seeds, windows, noise and guidance: "
    f"{report['recompiled']['calls']}, compilations: "
    f"{report['recompiled']['compilations']}",
    f"published for 21 blocks, k = 6: {PUBLISHED} times k = 1",
  ]
  return "\n".join(lines)


# --- compiled without the device ---------------------------------------------------


def compile_for(target: aot.Target, sizes: Sizes, case: Case) -> dict[str, Any]:
  """One full-size sampler, `case.batch` images per chip: what each chip would need."""
  impl = attention.resolve("auto", build.dtype(sizes.dtype), target.kind)
  made = abstract_denoiser(sizes, case.scorer, impl)
  mesh = sharding.make_mesh(1, target.devices)
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  of_steps = sharding.batch_sharding(mesh, leading=1)  # (T b)

  def placed(tree, place):
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    return jax.tree.map(lambda a: struct(a.shape, a.dtype), tree)

  images, config, side = case.batch * mesh.size, sizes.generator, sizes.latent
  dtype = build.dtype(sizes.dtype)

  # Of one image: these are made, and all of them together are too large for a host.
  cond, uncond, keys = jax.eval_shape(lambda: make_inputs(sizes, 1, 0))
  cond, uncond = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((images, *a.shape[1:]), dtype), (cond, uncond)
  )
  keys = jax.ShapeDtypeStruct((images,), keys.dtype)
  x = jax.ShapeDtypeStruct((images, side, side, config.in_channels), jnp.float32)
  cond, uncond, x, keys = placed((cond, uncond, x, keys), split)
  params, schedule, guidance = placed(
    (made.params, make_schedule(sizes, case), np.float32(GUIDANCE)), whole
  )
  n = flops.image_tokens(config, side, side)
  passes = images * 2 * sizes.steps
  in_kernels = passes * flops.attention(config, n, sizes.text_tokens)
  report = aot.report(
    jax.jit(make_program(made, case), out_shardings=(split, of_steps)),
    (params, cond, uncond, x, schedule, keys, guidance),
    target,
    flops_per_step=passes
    * flops.mmdit(config, n, sizes.text_tokens)
    * relative_flops(sizes, case),
    kernel_flops=in_kernels * relative_attention(sizes, case)
    if target.kind == "tpu"
    else 0.0,
  )
  memory, program = report.memory, report.program
  return {
    "case": case.name,
    "batch": case.batch,
    "chips": report.num_chips,
    "blocks": "scanned" if sizes.scan else "unrolled",
    "teraflops": report.model_flops / 1e12,
    "argument_gib": memory.arguments / aot.GIB,
    "temporary_gib": memory.temporaries / aot.GIB,
    "total_gib": memory.total / aot.GIB,
    "compiler_peak_gib": memory.compiler_peak and memory.compiler_peak / aot.GIB,
    "fits": report.fits,
    "spare_gib": report.spare / aot.GIB,
    "collective_bytes": program and sum(program.collective_bytes.values()),
    "attention_kernels": sum(
      calls
      for name, calls in (program.custom_calls if program else {}).items()
      if name.startswith(("__cudnn$fmha", "splash"))
    ),
    "estimate_s": report.compiler_seconds,
    "kernels_s": report.kernel_seconds,
    "at_least_s": report.lower_bound,
    "lower_s": report.lower_seconds,
    "compile_s": report.compile_seconds,
  }


def aot_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    "| case | chips | batch per chip | blocks | TFLOP | at least, s | arguments, GiB "
    "| temporaries, GiB | total, GiB | spare, GiB | collectives, bytes "
    "| estimate + kernels, s | compiling, s |",
    "|" + "---|" * 13,
  ]
  for r in rows:
    sent = "-" if r["collective_bytes"] is None else f"{r['collective_bytes']:,}"
    estimate = "-"
    if r["estimate_s"] is not None:
      estimate = f"{r['estimate_s']:.2f} + {r['kernels_s']:.2f}"
    lines.append(
      f"| {r['case']} | {r['chips']} | {r['batch']} | {r['blocks']} "
      f"| {r['teraflops']:.0f} | {r['at_least_s']:.2f} | {r['argument_gib']:.2f} "
      f"| {r['temporary_gib']:.2f} | {r['total_gib']:.2f} | {r['spare_gib']:+.1f} "
      f"| {sent} | {estimate} | {r['compile_s']:.0f} |"
    )
  return "\n".join(lines)


# --- the command -------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Sizes, list[Case]]:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--full", action="store_true", help="SD3.5-Medium, 512 px, bfloat16, unrolled"
  )
  sizes = ("layers", "heads", "head_dim", "latent", "text_tokens", "steps")
  for name in sizes:
    parser.add_argument(f"--{name.replace('_', '-')}", type=int)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"])
  parser.add_argument("--scan", action=argparse.BooleanOptionalAction)
  parser.add_argument(
    "--batch", type=int, nargs="+", help="default: 1; with --full or --aot 1 and 8"
  )
  parser.add_argument(
    "--cases",
    nargs="+",
    choices=list(CASES),
    help=f"default: {' '.join(TIMED)}; with --aot {' '.join(COMPILED)}",
  )
  parser.add_argument("--torch", nargs="*", choices=protocol.HOWS, default=["eager"])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--calls", type=int, default=3, help="of each piece, per round")
  parser.add_argument("--aot", help="compile for h200, v5e:2x2, ...; nothing runs")
  parser.add_argument("--target-config", help="GPU description for --aot (text proto)")
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)
  if args.layers is not None and args.layers < 24:
    parser.error("--layers: the scorers need 24 blocks or more")

  large = args.full or args.aot is not None
  base = Sizes.full() if large else Sizes()
  given = {
    name: getattr(args, name)
    for name in (*sizes, "dtype", "scan")
    if getattr(args, name) is not None
  }
  if args.aot is not None and args.aot != "h200":
    given.setdefault("scan", True)  # TPUs compile unrolled blocks slowly
  names = args.cases or (TIMED if args.aot is None else COMPILED)
  if PLAIN.name not in names and args.aot is None:
    names = [PLAIN.name, *names]
  batches = args.batch or ([1, 8] if large else [1])
  cases = [dataclasses.replace(CASES[n], batch=b) for b in batches for n in names]
  return args, dataclasses.replace(base, **given), cases


def main(argv: list[str] | None = None) -> int:
  args, sizes, cases = parse(argv)
  protocol.prepare_processes()
  print(
    f"{sizes.layers} blocks of width {sizes.generator.width}, latent {sizes.latent}x"
    f"{sizes.latent}, {sizes.text_tokens} text tokens, {sizes.steps} steps, guidance "
    f"{GUIDANCE}, {sizes.dtype}, blocks {'scanned' if sizes.scan else 'unrolled'}",
    flush=True,
  )
  result = {
    **dataclasses.asdict(sizes),
    "width": sizes.generator.width,
    "guidance_scale": GUIDANCE,
    "machine": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }
  if args.aot is not None:
    try:
      target = aot.target(args.aot, args.target_config)
    except (aot.NotInstalledError, aot.TargetError) as e:
      print(f"explore: {e}", file=sys.stderr)
      return NOT_INSTALLED if isinstance(e, aot.NotInstalledError) else 2
    rows = []
    for case in cases:
      rows.append(compile_for(target, sizes, case))
      print(aot_table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{aot_table(rows)}")
    report = result | {"device": args.aot, "jax": jax.__version__, "rows": rows}
    write(args.out, report)
    return 0

  names = [f"torch-{how}" for how in args.torch]
  theirs = {  # whose jax only makes the weights
    f"torch-{how}": protocol.Remote(TorchSide, sizes, how, platform="cpu")
    for how in args.torch
  }
  start = time.perf_counter()
  measured = measure(
    sizes,
    cases,
    protocol.Remote(JaxSide, sizes),
    theirs,
    rounds=args.rounds,
    calls=args.calls,
    progress=lambda text: print(
      f"[{time.perf_counter() - start:.0f} s] {text}", file=sys.stderr, flush=True
    ),
    done=lambda report: write(args.out, result | report),
  )
  report = result | measured
  print(f"\n{table(report, names)}\n\n{details(report, names)}")
  write(args.out, report)
  bad = problems(report, names, sizes.dtype)
  for line in bad:
    print(f"explore: {line}", file=sys.stderr)
  return 1 if bad else 0


def write(path: str | None, report: Mapping[str, Any]) -> None:
  if path is not None:
    pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(main())
