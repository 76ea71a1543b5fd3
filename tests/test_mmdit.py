"""The transformer: goldens, diffusers, scanning, taps, truncation, counts, errors."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import weights
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import mmdit as keymap
from lrm_jax.models import features, layers, lora, mmdit, qformer_head
from tests import golden_models, helpers

SMALL = mmdit.MMDiTConfig(
  num_layers=4,
  num_heads=2,
  head_dim=8,
  dual_layers=(0, 1, 2),
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=9,
  pos_embed_base=9,
)

# layers, heads, head_dim, dual, side of the position table, latent (H, W), text length
SIZES = [
  (3, 2, 8, (0, 1), 16, (8, 12), 5),
  (4, 3, 8, (0, 2), 9, (6, 10), 7),  # not contiguous; odd table, odd grid
  (5, 2, 12, (), 8, (10, 6), 4),  # as Large; the crop's margin is odd
  (2, 4, 4, (1,), 7, (14, 2), 1),  # the table's full height
]


# --- goldens ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
  return golden_models.transformer(), helpers.golden("dina/expected")


def test_golden_velocity(golden):
  model, e = golden
  cond = features.Cond(e["prompt_embeds"], e["pooled_prompt_embeds"])
  x, t = helpers.nhwc(e["transformer/latents"]), e["transformer/timesteps"]
  velocity, _ = model.run(x, t, cond)
  assert velocity.dtype == jnp.float32
  assert helpers.rel_err(helpers.nchw(velocity), e["transformer/velocity"]) <= 1e-5


# --- diffusers --------------------------------------------------------------------


def diffusers_pair(size):
  """(our model, diffusers', inputs x t context pooled as NCHW numpy)."""
  pytest.importorskip("diffusers")
  from tests import torch_models

  num, heads, head_dim, dual, table, (h, w), length = size
  theirs = torch_models.make_transformer(
    seed=num,
    layers=num,
    heads=heads,
    head_dim=head_dim,
    dual=dual,
    pos_embed_max_size=table,
  )
  config = mmdit.MMDiTConfig.from_diffusers(theirs.config)
  every = tuple(range(num + 1))
  config = dataclasses.replace(config, image_taps=every, text_taps=every)
  rng = np.random.default_rng(0)
  inputs = (
    rng.standard_normal((3, 16, h, w), np.float32),
    np.array([0.0, 300.0, 1000.0], np.float32),
    rng.standard_normal((3, length, 32), np.float32),
    rng.standard_normal((3, 28), np.float32),
  )
  return config, theirs, inputs


@pytest.mark.parametrize("layout", ["diffusers", "stability"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(size, layout):
  config, theirs, inputs = diffusers_pair(size)
  import torch
  import torch_reference

  from tests import torch_models

  table = keymap.diffusers(config)
  state = helpers.numpy_state(theirs)
  if layout == "stability":
    table = keymap.stability(config)
    state = torch_models.to_stability_layout(theirs.state_dict())
    state = {key: tensor.numpy() for key, tensor in state.items()}
  ours = golden_models.load_mmdit(config, state, table)
  with torch.no_grad():
    x, t, context, pooled = map(torch.from_numpy, inputs)
    want = theirs(x, context, pooled, t).sample
    temb, image, text = torch_reference.Backbone(theirs, config.num_layers)(
      x, t, context, pooled
    )

  x, t, context, pooled = inputs
  velocity, feats = ours.run(helpers.nhwc(x), t, features.Cond(context, pooled))
  assert helpers.rel_err(helpers.nchw(velocity), want) <= 1e-5
  assert feats.grid == (x.shape[2] // 2, x.shape[3] // 2)
  assert helpers.rel_err(feats.temb, temb) <= 1e-5
  for ours_i, theirs_i in zip(feats.image, image, strict=True):
    assert helpers.rel_err(ours_i, theirs_i) <= 1e-5
  # The full model's last block does not update the text: ours passes it through.
  for ours_i, theirs_i in zip(feats.text[:-1], text[:-1], strict=True):
    assert helpers.rel_err(ours_i, theirs_i) <= 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "stability"])
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_export_round_trip(size, layout):
  config, theirs, _ = diffusers_pair(size)
  from tests import torch_models

  state = theirs.state_dict()
  table = keymap.diffusers(config)
  if layout == "stability":
    table = keymap.stability(config)
    state = torch_models.to_stability_layout(state)
  state = {key: tensor.numpy() for key, tensor in state.items()}
  helpers.assert_round_trip(golden_models.make_mmdit(config), table, state)


def test_config_of_diffusers_and_back():
  config, theirs, _ = diffusers_pair(SIZES[1])
  plain = dataclasses.replace(config, image_taps=(), text_taps=())
  fields = plain.to_diffusers()
  assert mmdit.MMDiTConfig.from_diffusers(fields) == plain
  theirs = dict(theirs.config)
  for name, value in fields.items():
    if name != "_class_name":
      found = theirs[name]
      assert (list(found) if isinstance(found, tuple) else found) == value, name


# --- scan, remat, taps ------------------------------------------------------------


def everything(model, params, inputs):
  """Velocity, features and the gradient of a scalar of all of them."""

  def loss(params, x, t, cond):
    velocity, feats = nnx.merge(model.graphdef, params)(x, t, cond)
    leaves = jax.tree.leaves((velocity, feats))
    return sum(jnp.sum(jnp.sin(a)) for a in leaves), (velocity, feats)

  params, table = split_table(params)
  x, sigma, cond = inputs
  (_, out), grads = jax.jit(
    jax.value_and_grad(lambda p, *a: loss({**p, **table}, *a), has_aux=True)
  )(params, x, 1000 * sigma, cond)
  return out, grads


def split_table(params):
  return (
    {k: v for k, v in params.items() if k != "pos_embed"},
    {"pos_embed": params["pos_embed"]},
  )


def assert_close(a, b, tol=1e-5):
  a, b = weights.flatten(a), weights.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    # Not rel_err: the last block's text queries have gradient 0, nobody reads them.
    error = np.linalg.norm(np.asarray(a[path]) - np.asarray(b[path]))
    assert error <= tol * np.linalg.norm(b[path]), path


@pytest.mark.parametrize(
  "flags",
  [dict(scan_blocks=False), dict(remat="attention"), dict(remat="full")],
  ids=str,
)
def test_scanned_unrolled_and_remat_agree(flags):
  """Values and gradients."""
  config = dataclasses.replace(
    SMALL, num_layers=3, dual_layers=(0, 1), image_taps=(1, 3), text_taps=(0, 2)
  )
  plain = golden_models.random_model(golden_models.make_mmdit(config))
  inputs = golden_models.random_inputs(config)
  out, grads = everything(plain, plain.params, inputs)

  graphdef, like = weights.abstract(golden_models.make_mmdit(config, **flags))
  unroll = not flags.get("scan_blocks", True)
  params = mmdit.unstack_params(plain.params) if unroll else plain.params
  assert weights.shapes(params) == weights.shapes(like)
  other = golden_models.Loaded(config, graphdef, params)
  out2, grads2 = everything(other, params, inputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, out2)
  assert_close(grads, mmdit.stack_params(grads2) if unroll else grads2, tol=1e-4)


@pytest.mark.parametrize("kind", [np, jnp], ids=["numpy", "jax"])
def test_stack_and_unstack_are_inverse(kind):
  model = golden_models.random_model(golden_models.make_mmdit(SMALL))
  params = jax.tree.map(kind.asarray, model.params)
  back = mmdit.stack_params(mmdit.unstack_params(params))
  assert weights.shapes(back) == weights.shapes(params)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
    assert isinstance(b, np.ndarray if kind is np else jax.Array)
    np.testing.assert_array_equal(a, b)


@functools.cache
def unrolled_features():
  """All tokens of a 7-block backbone, computed without scan."""
  every = tuple(range(8))
  config = dataclasses.replace(
    SMALL, num_layers=7, dual_layers=(0, 1, 2, 3), image_taps=every, text_taps=every
  ).truncate(6, has_output=False, image_taps=every[:7], text_taps=every[:7])
  scanned = golden_models.random_model(golden_models.make_mmdit(config), seed=3)
  graphdef, _ = weights.abstract(golden_models.make_mmdit(config, scan_blocks=False))
  x, sigma, cond = inputs = golden_models.random_inputs(config)
  model = golden_models.Loaded(config, graphdef, mmdit.unstack_params(scanned.params))
  return config, scanned.params, inputs, model.run(x, 1000 * sigma, cond)[1]


@pytest.mark.parametrize(
  "image_taps, text_taps",
  [
    ((2, 4, 6), (2, 4, 6)),  # even: a scan of scans
    ((1, 6), (3, 5)),  # uneven, different per stream
    ((0, 6), (0,)),  # the embeddings
    ((6,), ()),  # no text
    ((), (1, 2)),  # nothing at the end
    ((), ()),
  ],
  ids=str,
)
def test_taps(image_taps, text_taps):
  config, params, (x, sigma, cond), every = unrolled_features()
  config = dataclasses.replace(config, image_taps=image_taps, text_taps=text_taps)
  graphdef, _ = weights.abstract(golden_models.make_mmdit(config))
  model = golden_models.Loaded(config, graphdef, params)
  velocity, feats = model.run(x, 1000 * sigma, cond)
  assert velocity is None and feats.grid == (3, 4)
  for taps, found, all_tokens in (
    (image_taps, feats.image, every.image),
    (text_taps, feats.text, every.text),
  ):
    assert len(found) == len(taps)
    for tap, tokens in zip(taps, found, strict=True):
      assert helpers.rel_err(tokens, all_tokens[tap]) <= 1e-5, tap


@pytest.mark.parametrize("kept", [2, 3, 5])
def test_truncation_is_a_prefix_of_the_full_model(kept):
  """Also where the cut falls inside a run of equal blocks; the output layer stays."""
  full = dataclasses.replace(SMALL, num_layers=5, image_taps=(kept,), text_taps=(kept,))
  model = golden_models.random_model(golden_models.make_mmdit(full))
  x, sigma, cond = golden_models.random_inputs(full)
  velocity, want = model.run(x, 1000 * sigma, cond)

  for has_output in (True, False):
    config = full.truncate(
      kept, has_output=has_output, image_taps=(kept,), text_taps=(kept,)
    )
    graphdef, like = weights.abstract(golden_models.make_mmdit(config))
    params = mmdit.truncate_params(model.params, full, config)
    assert weights.shapes(params) == weights.shapes(like)
    short = golden_models.Loaded(config, graphdef, params)
    v, found = short.run(x, 1000 * sigma, cond)
    assert (v is not None) == has_output
    assert helpers.rel_err(found.image[0], want.image[0]) <= 1e-6
    assert helpers.rel_err(found.text[0], want.text[0]) <= 1e-6
    if has_output and kept == 5:
      assert helpers.rel_err(v, velocity) <= 1e-6
    assert config.dual_layers == tuple(i for i in (0, 1, 2) if i < kept)
    assert config.last_context_pre_only == (kept == 5)


# --- position table, patches ------------------------------------------------------


def test_patchify_and_back():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 4, 6, 3), np.float32))
  tokens, grid = mmdit.patchify(x, 2)
  assert tokens.shape == (2, 6, 12) and grid == (2, 3)
  # The second token of the second row: rows 2-3, columns 2-3, channels last.
  np.testing.assert_array_equal(tokens[0, 4], x[0, 2:4, 2:4].reshape(-1))
  np.testing.assert_array_equal(mmdit.unpatchify(tokens, grid, 2), x)


def test_position_table_is_diffusers_in_factors():
  """Built at initialisation as diffusers builds it, and separable."""
  pytest.importorskip("diffusers")
  from tests import torch_models

  theirs = torch_models.make_transformer(pos_embed_max_size=7)
  want = helpers.numpy_state(theirs)["pos_embed.pos_embed"]
  config = mmdit.MMDiTConfig.from_diffusers(theirs.config)
  factors = mmdit.sincos_table(
    config.pos_embed_size, config.pos_embed_base, config.width
  )
  back = keymap.POS_TABLE.to_torch(factors)
  assert helpers.rel_err(back, want) <= 1e-6
  np.testing.assert_array_equal(
    keymap.POS_TABLE.to_torch(keymap.POS_TABLE.to_flax(want)), want
  )


@pytest.mark.parametrize("channel", [0, -1], ids=["column part", "row part"])
def test_table_that_does_not_separate(channel):
  table = keymap.POS_TABLE.to_torch(mmdit.sincos_table(5, 5, 16)).copy()
  table[0, 13, channel] += 0.01
  with pytest.raises(engine.ConversionError, match="row 2 does not separate"):
    keymap.POS_TABLE.to_flax(table)


@pytest.mark.parametrize(
  "hw, message",
  [
    ((20, 4), "latent of 10x2 patches exceeds the position table of 9x9"),
    ((4, 20), "latent of 2x10 patches exceeds"),
    ((7, 8), "latent of 7x8 is not a multiple of patch size 2"),
  ],
)
def test_impossible_latents(hw, message):
  model = golden_models.random_model(golden_models.make_mmdit(SMALL))
  x, sigma, cond = golden_models.random_inputs(SMALL, hw=hw)
  with pytest.raises(ValueError, match=message):
    model.run(x, sigma, cond)


# --- numerics ---------------------------------------------------------------------


def test_bfloat16_compute_is_close():
  config = dataclasses.replace(SMALL, image_taps=(3,))
  model = golden_models.random_model(golden_models.make_mmdit(config))
  x, sigma, cond = golden_models.random_inputs(config, hw=(8, 8))
  want, _ = model.run(x, 1000 * sigma, cond)
  half = jnp.bfloat16
  graphdef, like = weights.abstract(
    golden_models.make_mmdit(config, dtype=half, param_dtype=half)
  )
  params = jax.tree.map(lambda a, s: jnp.asarray(a, s.dtype), model.params, like)
  assert like["patch_embed"]["kernel"].dtype == half
  got, feats = golden_models.Loaded(config, graphdef, params).run(x, 1000 * sigma, cond)
  assert got.dtype == jnp.float32 and feats.image[0].dtype == half
  assert 1e-4 < helpers.rel_err(got, want) < 0.05


def test_fresh_model_is_the_identity_of_its_blocks():
  """adaLN-Zero: blocks pass tokens on, and the velocity is 0."""
  config = dataclasses.replace(
    SMALL, num_layers=2, dual_layers=(0,), image_taps=(0, 2), text_taps=(0, 2)
  )
  model = golden_models.fresh_model(golden_models.make_mmdit(config))
  x, sigma, cond = golden_models.random_inputs(config)
  velocity, feats = model.run(x, 1000 * sigma, cond)
  np.testing.assert_array_equal(velocity, 0)
  np.testing.assert_array_equal(*feats.image)
  np.testing.assert_array_equal(*feats.text)


# --- published sizes --------------------------------------------------------------


def num_params(make, kind=nnx.Param) -> int:
  state = nnx.state(nnx.eval_shape(make), kind)
  return weights.count(nnx.to_pure_dict(state))


@pytest.mark.parametrize(
  "config, count",
  [
    (mmdit.MMDiTConfig.sd35_medium(), 2_243_171_520),
    (mmdit.MMDiTConfig.sd35_large(), 8_056_627_520),
    (mmdit.MMDiTConfig.sd35_medium().truncate(12, has_output=False), 1_232_739_840),
    (mmdit.MMDiTConfig.sd35_medium().truncate(21, has_output=False), 2_014_094_720),
  ],
  ids=["medium", "large", "medium-12", "medium-21"],
)
def test_parameter_count(config, count):
  assert num_params(golden_models.make_mmdit(config)) == count


def test_lora_parameter_count():
  config = mmdit.MMDiTConfig.sd35_medium().truncate(12, has_output=False)

  def make():
    model = golden_models.make_mmdit(config)()
    lora.add_adapters(model, lora.LoRAConfig(rank=64, alpha=128), rngs=nnx.Rngs(0))
    return model

  assert num_params(make, layers.LoRAParam) == 28_311_552


def test_qformer_head_parameter_count():
  config = qformer_head.QFormerHeadConfig()
  assert (
    num_params(lambda: qformer_head.QFormerHead(config, rngs=nnx.Rngs(0)))
    == 139_296_003
  )


def test_segments():
  """Runs of equal blocks: Medium is 13 dual, 10 plain and the last."""
  medium = mmdit.MMDiTConfig.sd35_medium()
  assert medium.segments == (13, 10, 1)
  assert medium.truncate(12, has_output=False).segments == (12,)
  assert medium.truncate(21, has_output=True).segments == (13, 8)
  assert mmdit.MMDiTConfig.sd35_large().segments == (37, 1)


# --- configuration ----------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_layers=0), "MMDiTConfig.num_layers=0 must be >= 1"),
    (dict(num_heads=0), "MMDiTConfig.num_heads=0 must be >= 1"),
    (dict(patch_size=-1), "MMDiTConfig.patch_size=-1"),
    (dict(image_taps=(2, 1)), r"image_taps=\(2, 1\) must be increasing"),
    (dict(text_taps=(1, 1)), r"text_taps=\(1, 1\) must be increasing"),
    (dict(image_taps=(5,)), "must lie within 0..num_layers=4"),
    (dict(text_taps=(-1, 2)), "must lie within"),
    (dict(num_heads=1, head_dim=6), "width 6 must be a multiple of 4"),
    (dict(dual_layers=(0, 4)), "dual_layers"),
  ],
  ids=str,
)
def test_invalid_config(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize("kept", [0, 5])
def test_impossible_truncation(kept):
  with pytest.raises(ValueError, match=f"cannot keep {kept} of 4 blocks"):
    SMALL.truncate(kept, has_output=False)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(qk_norm=None), "qk_norm=None; SD3.5 has 'rms_norm'"),
    (dict(caption_projection_dim=8), "caption_projection_dim=8 differs from the width"),
    (dict(sample_size=...), "transformer config lacks sample_size"),
  ],
)
def test_unsupported_diffusers_config(change, message):
  fields = {**SMALL.to_diffusers(), **change}
  fields = {k: v for k, v in fields.items() if v is not ...}
  with pytest.raises(ValueError, match=message):
    mmdit.MMDiTConfig.from_diffusers(fields)
