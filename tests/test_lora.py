"""Adapters: their arithmetic, where they go, and PEFT's file of them."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrm_jax import weights
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import lora as keymap
from lrm_jax.models import features, layers, lora, mmdit
from tests import golden_models, helpers

CONFIG = mmdit.MMDiTConfig(
  num_layers=3,
  num_heads=2,
  head_dim=8,
  dual_layers=(0, 1),
  last_context_pre_only=False,
  has_output=False,
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=8,
  pos_embed_base=8,
  image_taps=(1, 3),
  text_taps=(2, 3),
)
GROUPS = {"qkv": 3, "context_qkv": 3}


def make(lora_config, config=CONFIG, **kw):
  def build():
    model = mmdit.MMDiT(config, rngs=nnx.Rngs(0), **kw)
    lora.add_adapters(model, lora_config, rngs=nnx.Rngs(1))
    return model

  return build


def is_adapter(path):
  return path.endswith(("/lora_a", "/lora_b"))


def without_adapters(params):
  flat = weights.flatten(params)
  return weights.unflatten({p: a for p, a in flat.items() if not is_adapter(p)})


# --- one layer --------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_dense_with_adapter(groups):
  """y_g += alpha/r (x A_g) B_g, each group with its own pair."""
  rng = np.random.default_rng(0)
  dense = layers.Dense(6, 4 * groups, groups=groups, rngs=nnx.Rngs(0))
  rank, scale = 2, 1.5
  a = rng.standard_normal((6, groups * rank), np.float32)
  b = rng.standard_normal((rank, 4 * groups), np.float32)
  x = jnp.asarray(rng.standard_normal((5, 6), np.float32))
  before = np.asarray(dense(x))
  dense.lora_a, dense.lora_b = layers.LoRAParam(a), layers.LoRAParam(b)
  dense.lora_scale = scale
  want = before.copy()
  for g in range(groups):
    part = x @ a[:, rank * g : rank * (g + 1)] @ b[:, 4 * g : 4 * (g + 1)]
    want[:, 4 * g : 4 * (g + 1)] += scale * part
  np.testing.assert_allclose(dense(x), want, atol=1e-5)


def test_gradients_of_grouped_adapters_are_those_of_apart_ones():
  """The written backward pass, for any number of leading axes."""
  rng = np.random.default_rng(2)
  for lead in [(5,), (2, 5)]:
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    z, b = draw(*lead, 3, 2), draw(2, 3, 4)
    g = [draw(*lead, 4) for _ in range(3)]
    y, vjp = jax.vjp(layers._grouped_products, z, b)
    plain = lambda z, b: [z[..., i, :] @ b[:, i] for i in range(3)]  # noqa: E731
    want, plain_vjp = jax.vjp(plain, z, b)
    for got, expected in zip((*y, *vjp(g)), (*want, *plain_vjp(g)), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_groups_must_divide():
  with pytest.raises(ValueError, match="d_out=8 is not a multiple of groups=3"):
    layers.Dense(4, 8, groups=3, rngs=nnx.Rngs(0))


# --- attaching --------------------------------------------------------------------


def test_fresh_adapters_change_nothing():
  config = dataclasses.replace(
    CONFIG, num_layers=1, dual_layers=(0,), image_taps=(1,), text_taps=(1,)
  )
  x, sigma, cond = golden_models.random_inputs(config)
  base = golden_models.random_model(golden_models.make_mmdit(config))
  model = golden_models.fresh_model(make(lora.LoRAConfig(rank=4, alpha=8), config))
  fresh = {p: a for p, a in weights.flatten(model.params).items() if is_adapter(p)}
  for path, leaf in fresh.items():
    if path.endswith("lora_b"):
      np.testing.assert_array_equal(leaf, 0)
    else:  # N(0, 1/r^2)
      assert 0.18 < float(jnp.std(leaf)) < 0.32, path
  params = weights.unflatten({**weights.flatten(base.params), **fresh})
  _, want = base.run(x, 1000 * sigma, cond)
  _, got = model.run(x, 1000 * sigma, cond, params=params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.parametrize(
  "targets, count",
  [(lora.ALL_ATTENTION, 6 + 4), (lora.JOINT_ATTENTION, 4 + 4), ((r"attn/qkv",), 2)],
  ids=str,
)
def test_targets(targets, count):
  """Per segment (dual, plain): qkv and out of each stream, and of attn2."""
  _, like = weights.abstract(make(lora.LoRAConfig(2, 4, targets=targets)))
  adapted = {p for p in weights.flatten(like) if p.endswith("lora_a")}
  assert len(adapted) == count
  assert all("attn2" not in p for p in adapted) == (targets != lora.ALL_ATTENTION)
  shapes = weights.shapes(like)
  assert shapes["blocks/0/attn/qkv/lora_a"] == (2, 16, 6)
  assert shapes["blocks/0/attn/qkv/lora_b"] == (2, 2, 48)


def test_unknown_target():
  config = lora.LoRAConfig(2, 4, targets=(r"attn/qkv", r"attn/query", r"qk"))
  message = r"LoRA targets \['attn/query', 'qk'\] match no layer"
  with pytest.raises(ValueError, match=message):
    make(config)()


def test_rank_must_be_positive():
  with pytest.raises(ValueError, match="LoRAConfig.rank=0 must be >= 1"):
    lora.LoRAConfig(0, 4)


def test_adapters_keep_their_own_dtype():
  """float32 adapters on a bfloat16 layer compute in bfloat16."""
  half = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  _, like = weights.abstract(make(lora.LoRAConfig(2, 4), **half))
  for path, leaf in weights.flatten(like).items():
    if "attn/" in path:
      assert leaf.dtype == (jnp.float32 if is_adapter(path) else jnp.bfloat16), path
  dense = layers.Dense(4, 4, **half, rngs=nnx.Rngs(0))
  dense.lora_a = layers.LoRAParam(jnp.ones((4, 2)))
  dense.lora_b = layers.LoRAParam(jnp.ones((2, 4)))
  dense.lora_scale = 2.0
  assert dense(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


# --- merging ----------------------------------------------------------------------


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_merged_kernels_compute_the_same(scan_blocks):
  config = lora.LoRAConfig(rank=3, alpha=6)
  model = golden_models.random_model(make(config))
  x, sigma, cond = golden_models.random_inputs(CONFIG)
  _, want = model.run(x, 1000 * sigma, cond)
  _, base = golden_models.Loaded(
    CONFIG,
    weights.abstract(golden_models.make_mmdit(CONFIG))[0],
    without_adapters(model.params),
  ).run(x, 1000 * sigma, cond)
  params = model.params if scan_blocks else mmdit.unstack_params(model.params)
  merged = lora.merge(params, config.alpha / config.rank, GROUPS)
  graphdef, like = weights.abstract(
    golden_models.make_mmdit(CONFIG, scan_blocks=scan_blocks)
  )
  assert weights.shapes(merged) == weights.shapes(like)
  _, got = golden_models.Loaded(CONFIG, graphdef, merged).run(x, 1000 * sigma, cond)
  for tokens, expected, plain in zip(
    (*got.image, *got.text),
    (*want.image, *want.text),
    (*base.image, *base.text),
    strict=True,
  ):
    assert helpers.rel_err(tokens, expected) <= 1e-5
    assert helpers.rel_err(plain, expected) > 1e-2  # the adapters do something


# --- training ---------------------------------------------------------------------


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_left_out_text_adapters_stay_zero(scan_blocks):
  """Also where the loss reads that block's text tokens."""
  config = lora.LoRAConfig(rank=2, alpha=4, last_context=False)
  short = dataclasses.replace(
    CONFIG, num_layers=2, dual_layers=(), image_taps=(2,), text_taps=(2,)
  )
  model = golden_models.fresh_model(make(config, short, scan_blocks=scan_blocks))
  frozen = weights.flatten(golden_models.random_params(model.params))
  start = {p: a for p, a in weights.flatten(model.params).items() if is_adapter(p)}
  x, sigma, cond = jax.tree.map(jnp.asarray, golden_models.random_inputs(short))
  tx = optax.adamw(1e-2, weight_decay=0.1)

  @jax.jit
  def step(adapters, opt_state):
    def loss(adapters):
      params = weights.unflatten({**frozen, **adapters})
      _, feats = nnx.merge(model.graphdef, params)(x, 1000 * sigma, cond)
      return sum(jnp.mean(jnp.sin(a)) for a in (*feats.image, *feats.text))

    updates, opt_state = tx.update(jax.grad(loss)(adapters), opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state

  trained, opt_state = step(start, tx.init(start))
  trained, _ = step(trained, opt_state)
  if not scan_blocks:
    start, trained = (
      weights.flatten(mmdit.stack_params(weights.unflatten(a)))
      for a in (start, trained)
    )
  assert len(trained) == 2 * 4
  for path, after in trained.items():
    before, after = np.asarray(start[path]), np.asarray(after)
    assert np.any(before[0] != after[0]), path
    if "/context_" in path:
      np.testing.assert_array_equal(after[1], 0, err_msg=path)
    else:
      assert np.any(before[1] != after[1]), path


# --- PEFT -------------------------------------------------------------------------

IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LAST = 2


@pytest.mark.parametrize(
  "targets, exclude",
  [
    ((*IMAGE, *TEXT), ()),
    ((*IMAGE, *TEXT), tuple(f"transformer_blocks.{LAST}.attn.{n}" for n in TEXT)),
    (("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *TEXT), ()),
  ],
  ids=["all", "last text excluded", "joint attention only"],
)
def test_peft_parity(targets, exclude):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  from tests import torch_models

  transformer = torch_models.make_transformer(seed=4)
  base = helpers.numpy_state(transformer)
  config = mmdit.MMDiTConfig.from_diffusers(transformer.config)
  theirs = peft.get_peft_model(
    transformer,
    peft.LoraConfig(
      r=3,
      lora_alpha=5,
      target_modules=list(targets),
      exclude_modules=list(exclude) or None,
    ),
  ).eval()
  g = torch.Generator().manual_seed(0)
  for name, p in theirs.named_parameters():
    if "lora_" in name:
      p.data = 0.3 * torch.randn(p.shape, generator=g)
  adapters = {k: v.numpy() for k, v in peft.get_peft_model_state_dict(theirs).items()}

  table = keymap.peft(config, targets, exclude)
  names = keymap.modules(config, targets, exclude)
  lora_config = lora.LoRAConfig(3, 5, targets=keymap.targets_of(names))
  graphdef, like = weights.abstract(make(lora_config, config))
  shapes = {p: s for p, s in weights.shapes(like).items() if is_adapter(p)}
  source = {k: (v.shape, v.dtype) for k, v in adapters.items()}
  found = engine.fill(table, source, shapes, adapters.__getitem__)
  plain = golden_models.load_mmdit(config, base)
  params = weights.unflatten({**weights.flatten(plain.params), **found})
  model = golden_models.Loaded(config, graphdef, params)

  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, 16, 6, 8), np.float32)
  t = np.array([100.0, 800.0], np.float32)
  context = rng.standard_normal((2, 5, 32), np.float32)
  pooled = rng.standard_normal((2, 28), np.float32)
  with torch.no_grad():
    want = theirs(*map(torch.from_numpy, (x, context, pooled, t))).sample
  args = helpers.nhwc(x), t, features.Cond(context, pooled)
  got, _ = model.run(*args)
  assert helpers.rel_err(helpers.nchw(got), want) <= 1e-5
  unadapted, _ = plain.run(*args)
  assert helpers.rel_err(unadapted, got) > 1e-2

  back = dict(engine.export(table, found))
  assert back.keys() == adapters.keys()
  for key, array in adapters.items():
    np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_peft_keys_that_do_not_belong():
  """An adapter in a module that the config excludes is an error, not ignored."""
  table = keymap.peft(CONFIG, IMAGE, ())
  _, like = weights.abstract(make(lora.LoRAConfig(2, 4)))
  shapes = {p: s for p, s in weights.shapes(like).items() if is_adapter(p)}
  state = {
    key: np.zeros(slot.transform.torch_shape(slot.shape(shapes[slot.path])))
    for key, slot in engine.torch_keys(table, shapes).items()
  }
  source = {k: (v.shape, v.dtype) for k, v in state.items()}
  with pytest.raises(engine.ConversionError, match="unexpected key .*add_q_proj"):
    engine.fill(table, source, shapes, state.__getitem__)
  kept = {k: v for k, v in source.items() if not table.leaves_out(k)}
  engine.fill(table, kept, shapes, state.__getitem__)
  del kept["base_model.model.transformer_blocks.1.attn2.to_k.lora_B.weight"]
  with pytest.raises(engine.ConversionError, match="missing key .*attn2.to_k.lora_B"):
    engine.fill(table, kept, shapes, state.__getitem__)


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    lora.LoRAConfig(2, 4).rank = 3
