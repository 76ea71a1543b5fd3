"""The policy: adapters over a denoiser, however it is cut, against a whole model."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, denoiser, policy, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import lora, mmdit, qformer_head, reward
from tests import golden_models, helpers

FULL = mmdit.MMDiTConfig(
  num_layers=3,
  num_heads=2,
  head_dim=8,
  dual_layers=(0, 1),
  in_channels=3,
  out_channels=3,
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=9,
  pos_embed_base=9,
)
LORA = lora.LoRAConfig(rank=3, alpha=6, targets=lora.JOINT_ATTENTION)
# depth and adapters of the reward that shares blocks with the generator
CUTS = {"whole": (None, None), "in a stack": (1, None), "between stacks": (2, LORA)}


def write_generator(path, config=FULL):
  """A model folder with a random transformer."""
  params = golden_models.random_model(golden_models.make_mmdit(config), seed=5).params
  with folder_lib.write_atomically(path, force=False) as out:
    folder_lib.save_params(out / "transformer", weights.flatten(params))
    entry = {"config": build.config_to_dict(config)}
    folder_lib.write_config(out, {"components": {"transformer": entry}})
  return path


def write_reward(path, base, depth, adapters=None):
  """A random reward on the first `depth` blocks of the generator `base`."""
  full = build.config_from_dict(folder_lib.find(base, "transformer")[1]["config"])
  backbone = full.truncate(
    depth, has_output=False, image_taps=(depth,), text_taps=(depth,)
  )
  head = qformer_head.QFormerHeadConfig(
    token_dim=full.width, width=16, num_image_taps=1, num_text_taps=1, num_heads=4
  )
  config = reward.RewardConfig(backbone, head, adapters)
  params = golden_models.random_model(lambda: build.make_reward(config)).params
  leaves = {
    p: a
    for p, a in weights.flatten(params).items()
    if not p.startswith("backbone/") or "/lora_" in p
  }
  with folder_lib.write_atomically(path, force=False) as out:
    scoring = reward.ScoringConfig(offset=0.0)
    entry = build.save_reward(out, leaves, config, scoring, stacked=True)
    folder_lib.write_config(out, {"components": {"reward": entry}, "base": str(base)})
  return path


def write_adapters(path, base, adapters, config=LORA):
  """A model folder with the adapters of a policy on `base`."""
  with folder_lib.write_atomically(path, force=False) as out:
    entry = build.save_lora(out, adapters, config)
    folder_lib.write_config(out, {"components": {"lora": entry}, "base": str(base)})
  return path


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """`load(cut, scan_blocks, ...)`: a denoiser that is cut at one of CUTS."""
  path = tmp_path_factory.mktemp("models")
  generator = write_generator(path / "generator")
  rewards = {
    name: {} if depth is None else {"r": write_reward(path / name, generator, depth, a)}
    for name, (depth, a) in CUTS.items()
  }

  @functools.cache
  def load(cut="whole", scan_blocks=True, dtype="float32"):
    return denoiser.load(
      generator, rewards[cut], scan_blocks=scan_blocks, dtype=dtype
    ).to_device()

  load.generator = generator
  return load


def random_adapters(made, seed=3):
  """None of them zero."""
  adapters = golden_models.random_params(weights.unflatten(made.like), seed)
  return {p: 3 * a for p, a in weights.flatten(adapters).items()}


def both(made, params, adapters, inputs):
  """Velocities of the policy and of its reference."""
  x, sigma, cond = jax.tree.map(jnp.asarray, inputs)
  embedded = made.denoiser.embed(params, cond)["generator"]
  return (
    made.velocity_fn(params, adapters)(embedded, x, sigma),
    made.denoiser.velocity_fn(params)(embedded, x, sigma),
  )


def run(made, adapters, inputs):
  """`both` under jit."""
  program = jax.jit(lambda *args: both(made, *args))
  return program(made.denoiser.params, adapters, inputs)


def with_gradients(velocities):
  """`adapters -> (policy, reference), gradients of the policy`, jitted."""

  def loss(adapters):
    v, other = velocities(adapters)
    direction = np.random.default_rng(0).standard_normal(v.shape, np.float32)
    return jnp.sum(direction * v), (v, other)

  def run(adapters):
    grads, both = jax.grad(loss, has_aux=True)(adapters)
    return both, grads

  return jax.jit(run)


INPUTS = golden_models.random_inputs(FULL)


@pytest.fixture(scope="module")
def whole(load):
  """Random adapters; velocities and gradients of the whole model, written apart."""

  def make(adapted):
    model = mmdit.MMDiT(FULL, rngs=nnx.Rngs(0))
    if adapted:
      lora.add_adapters(model, LORA, rngs=nnx.Rngs(0))
    return model

  (adapted, like), (plain, _) = (
    weights.abstract(functools.partial(make, a)) for a in (True, False)
  )
  base = weights.flatten(build.load_transformer(load.generator).params)
  adapters = random_adapters(policy.make(load(), LORA))
  assert {**base, **adapters}.keys() == weights.flatten(like).keys()

  def velocities(adapters):
    x, sigma, cond = jax.tree.map(jnp.asarray, INPUTS)
    models = (
      nnx.merge(adapted, weights.unflatten({**base, **adapters})),
      nnx.merge(plain, weights.unflatten(base)),
    )
    return [model(x, 1000 * sigma, cond)[0] for model in models]

  shapes = {p: s for p, s in weights.shapes(like).items() if "/lora_" in p}
  return shapes, adapters, with_gradients(velocities)(adapters)


# --- starting ---------------------------------------------------------------------


def test_a_fresh_policy_is_the_reference(load):
  """To the last bit, outside of jit."""
  made = policy.make(load("in a stack", False), LORA)
  adapters = made.init(jax.random.key(0))
  ours, reference = both(made, made.denoiser.params, adapters, INPUTS)
  np.testing.assert_array_equal(ours, reference)
  assert ours.dtype == jnp.float32


def test_init(load, whole):
  """A ~ N(0, 1/r^2), B = 0; the same draws however the generator is cut."""
  key = jax.random.key(1)
  first = policy.make(load(), LORA).init(key)
  assert weights.shapes(first) == whole[0]
  for path, leaf in first.items():
    assert leaf.dtype == jnp.float32
    if path.endswith("lora_b"):
      np.testing.assert_array_equal(leaf, 0)
    else:
      assert 0.8 < LORA.rank * float(jnp.std(leaf)) < 1.2, path
  draws = [np.asarray(a).tobytes() for p, a in first.items() if p.endswith("lora_a")]
  assert len(set(draws)) == len(draws) == len(first) / 2

  cut = policy.make(load("in a stack", False), LORA)
  jax.tree.map(np.testing.assert_array_equal, cut.init(key), first)
  other = jax.jit(cut.init)(jax.random.key(2))
  assert all(np.any(other[p] != a) for p, a in first.items() if p.endswith("lora_a"))
  fewer = dataclasses.replace(LORA, targets=("attn/out",))
  for path, leaf in policy.make(load(), fewer).init(key).items():
    np.testing.assert_array_equal(leaf, first[path])


# --- the same function, however it is cut -----------------------------------------


@pytest.mark.parametrize(
  "cut, scan_blocks, remat",
  [
    ("whole", False, "none"),
    ("in a stack", True, "full"),
    ("in a stack", False, "attention"),
    ("between stacks", True, "attention"),
  ],
)
def test_velocity_and_gradients(load, whole, cut, scan_blocks, remat):
  """The whole model's under the same adapters; every layer gets a gradient."""
  made = policy.make(load(cut, scan_blocks), LORA, remat=remat)
  program = with_gradients(lambda a: both(made, made.denoiser.params, a, INPUTS))
  _, adapters, (velocities, gradients) = whole
  found, found_gradients = program(adapters)
  for a, b in zip(found, velocities, strict=True):
    assert helpers.rel_err(a, b) <= 1e-5
  assert helpers.rel_err(*found) > 1e-2
  assert found_gradients.keys() == adapters.keys()
  for path, leaf in found_gradients.items():
    assert leaf.dtype == jnp.float32
    assert helpers.rel_err(leaf, gradients[path]) <= 1e-4, path
    assert all(map(np.any, leaf)), path

  found, found_gradients = program(made.init(jax.random.key(0)))
  assert helpers.rel_err(*found) <= 1e-6
  for path, leaf in found_gradients.items():
    assert [bool(np.any(a)) for a in leaf] == [path.endswith("lora_b")] * len(leaf)


def test_remat_is_of_the_policy_only(load):
  made = policy.make(load("in a stack"), LORA, remat="full")
  adapters = made.init(jax.random.key(0))
  x, sigma, cond = jax.tree.map(jnp.asarray, INPUTS)
  params = made.denoiser.params
  inputs = made.denoiser.embed(params, cond)["generator"]
  for network, expected in (
    (made.velocity_fn(params, adapters), True),
    (made.denoiser.velocity_fn(params), False),
  ):
    jaxpr = jax.make_jaxpr(network)(inputs, x, sigma).jaxpr
    assert products_in_remat(jaxpr) == expected


def products_in_remat(jaxpr, inside=False) -> bool:
  """Whether a product is run again (activations always are)."""
  for eqn in jaxpr.eqns:
    if inside and eqn.primitive.name == "dot_general":
      return True
    again = inside or eqn.primitive.name in ("checkpoint", "remat", "remat2")
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      if products_in_remat(inner, again):
        return True
  return False


def test_one_copy_of_the_weights(load):
  """A program of policy and reference takes the generator once, and the adapters."""
  made = policy.make(load("in a stack"), LORA)
  assert made.denoiser is load("in a stack")
  args = (
    {name: made.denoiser.params[name] for name in ("prefix", "tail")},
    made.init(jax.random.key(0)),
    INPUTS,
  )
  compiled = jax.jit(lambda *args: both(made, *args)).lower(*args).compile()
  size = sum(a.nbytes for a in jax.tree.leaves(args))
  assert compiled.memory_analysis().argument_size_in_bytes == size


def test_bfloat16(load, whole):
  """A bfloat16 generator under float32 adapters, with float32 gradients."""
  made = policy.make(load(dtype="bfloat16"), LORA)
  _, adapters, ((want, _), gradients) = whole
  params, x, sigma, cond = made.denoiser.params, *jax.tree.map(jnp.asarray, INPUTS)

  def velocities(adapters):
    inputs = made.denoiser.embed(params, cond)["generator"]
    return made.velocity_fn(params, adapters)(inputs, x, sigma), None

  (velocity, _), found = with_gradients(velocities)(adapters)
  assert velocity.dtype == jnp.float32
  assert 1e-4 < helpers.rel_err(velocity, want) < 0.05
  for path, leaf in found.items():
    assert leaf.dtype == jnp.float32, path
    assert helpers.rel_err(leaf, gradients[path]) < 0.2, path


# --- where adapters are -----------------------------------------------------------


def test_targets_on_one_side_of_the_cut(load):
  """All dual blocks are before it: the tail has no attn2."""
  config = lora.LoRAConfig(2, 4, targets=("attn2/qkv",))
  cut = policy.make(load("between stacks", False), config)
  uncut = policy.make(load(), config)
  assert cut.like == uncut.like
  adapters = random_adapters(cut)
  ours, reference = run(cut, adapters, INPUTS)
  assert helpers.rel_err(ours, run(uncut, adapters, INPUTS)[0]) <= 1e-5
  assert helpers.rel_err(ours, reference) > 1e-3


def test_without_the_last_blocks_text(load):
  """They start at zero; see test_lora.py for why they stay there."""
  made = policy.make(load("in a stack"), dataclasses.replace(LORA, last_context=False))
  everywhere = policy.make(load(), LORA).init(jax.random.key(0))
  for path, leaf in made.init(jax.random.key(0)).items():
    zero = path.startswith("blocks/1/attn/context_qkv/")
    np.testing.assert_array_equal(leaf, 0 if zero else everywhere[path], err_msg=path)


# --- errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
  "targets, message",
  [
    ((r"attn/qkv", r"context_embed"), r"match context_embed: adapters can only be in"),
    ((r"out",), r"match out: adapters can only be in the blocks"),
    ((r"up",), r"match text_embed/up, time_embed/up: .* start a target with blocks/"),
    ((r"attn/query",), r"LoRA targets \['attn/query'\] match no layer"),
    ((), r"LoRAConfig.targets=\(\) has no layers"),
  ],
)
def test_targets_that_cannot_be(load, targets, message):
  with pytest.raises(ValueError, match=message):
    policy.make(load("in a stack"), lora.LoRAConfig(2, 4, targets=targets))


def test_unknown_remat(load):
  with pytest.raises(
    ValueError, match="remat='some': use one of none, attention, full"
  ):
    policy.make(load(), LORA, remat="some")


def test_continuing_from_saved_adapters(load, tmp_path):
  """The folder with them is no start for others; on its base they go on."""
  made = policy.make(load("in a stack"), LORA)
  adapters = random_adapters(made)
  path = write_adapters(tmp_path / "tuned", load.generator, adapters)
  with pytest.raises(ValueError, match="adapters already .* Policy.fit"):
    policy.make(denoiser.load(path, {}), LORA)

  saved = folder_lib.load_params(folder_lib.find(path, "lora")[0])
  back = policy.make(load("between stacks", False), LORA).fit(saved)
  assert back.keys() == adapters.keys()
  for name, leaf in back.items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, adapters[name])

  other = policy.make(load(), dataclasses.replace(LORA, rank=2))
  with pytest.raises(folder_lib.FolderError, match="saved adapters: 14 problem"):
    other.fit(saved)


# --- export -----------------------------------------------------------------------


def test_export(tmp_path):
  """Into diffusers' pipeline, and into a folder that loads as a generator."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  from tests import conversion, torch_models

  sd35 = torch_models.make_sd35_folder(tmp_path / "sd35", layers=3)
  base = tmp_path / "base"
  conversion.to_flax(base, "--sd35", sd35, "--only", "transformer")
  rewards = {"r": write_reward(tmp_path / "reward", base, 1)}
  model = denoiser.load(base, rewards, scan_blocks=False).to_device()
  assert model.tail is not None
  made = policy.make(model, LORA)
  adapters = random_adapters(made)
  tuned = write_adapters(tmp_path / "tuned", base, jax.device_put(adapters))
  conversion.to_torch(tuned, "lora", tmp_path / "lora.safetensors")

  config = model.config
  inputs = conversion.inputs(
    context_dim=config.context_dim, pooled_dim=config.pooled_dim
  )
  x, sigma, cond = conversion.as_ours(*inputs)
  sigma = sigma.astype(np.float32)
  ours, reference = run(made, adapters, (x, sigma, cond))

  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd35)
  x_torch, t, context, pooled = inputs
  with torch.no_grad():
    plain = pipe.transformer(x_torch, context, pooled, t).sample
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = pipe.transformer(x_torch, context, pooled, t).sample
  assert helpers.rel_err(helpers.nchw(reference), plain) <= 1e-4
  assert helpers.rel_err(helpers.nchw(ours), theirs) <= 1e-4
  assert helpers.rel_err(plain, theirs) > 1e-2

  loaded = denoiser.load(tuned, {})

  @jax.jit
  def velocity(params, x, sigma, cond):
    inputs = loaded.embed(params, cond)["generator"]
    return loaded.velocity_fn(params)(inputs, x, sigma)

  assert helpers.rel_err(velocity(loaded.params, x, sigma, cond), ours) <= 1e-5
