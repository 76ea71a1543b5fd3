"""SD3's autoencoder against diffusers and the golden vectors."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import weights
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import vae as keymap
from lrm_jax.models import vae
from tests import helpers

# (widths, layers per block, latent channels, norm groups)
SIZES = [
  ((16, 32), 1, 16, 4),
  ((8, 16, 16, 24), 2, 4, 8),
  ((12,), 1, 3, 3),
]


def diffusers_config(widths, num, latent, groups) -> dict:
  return dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * len(widths),
    up_block_types=["UpDecoderBlock2D"] * len(widths),
    block_out_channels=list(widths),
    layers_per_block=num,
    act_fn="silu",
    latent_channels=latent,
    norm_num_groups=groups,
    sample_size=32,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )


def make(config):
  return lambda: vae.VAE(config, rngs=nnx.Rngs(0))


def random_state(config, seed=0) -> dict[str, np.ndarray]:
  """A state dict in diffusers' layout, made without torch."""
  _, abstract = weights.abstract(make(config))
  slots = engine.torch_keys(keymap.diffusers(config), weights.shapes(abstract))
  rng = np.random.default_rng(seed)
  shapes = weights.shapes(abstract)
  state = {}
  for key, slot in slots.items():
    shape = slot.transform.torch_shape(slot.shape(shapes[slot.path]))
    state[key] = (0.2 * rng.standard_normal(shape)).astype(np.float32)
  return state


def to_stability(state, num_levels) -> dict[str, np.ndarray]:
  """diffusers' names and shapes -> those of the single files, by plain renaming."""
  out = {}
  for key, array in state.items():
    half, _, key = key.partition(".")
    for i in range(num_levels):
      key = key.replace(f"down_blocks.{i}.", f"down.{i}.")
      key = key.replace(f"up_blocks.{i}.", f"up.{num_levels - 1 - i}.")
    for old, new in (
      ("mid_block.resnets.0", "mid.block_1"),
      ("mid_block.resnets.1", "mid.block_2"),
      ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
      ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
      ("mid_block.attentions.0.to_", "mid.attn_1."),
      ("resnets", "block"),
      ("downsamplers.0", "downsample"),
      ("upsamplers.0", "upsample"),
      ("conv_shortcut", "nin_shortcut"),
      ("conv_norm_out", "norm_out"),
    ):
      key = key.replace(old, new)
    if "attn_1" in key and array.ndim == 2:
      array = array[:, :, None, None]
    out[f"first_stage_model.{half}.{key}"] = array
  return out


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(size):
  torch = pytest.importorskip("torch")
  from diffusers import AutoencoderKL

  from tests import torch_models

  fields = diffusers_config(*size)
  theirs = torch_models.draw_weights(AutoencoderKL(**fields), seed=0).eval()
  state = helpers.numpy_state(theirs)
  config = vae.VAEConfig.from_diffusers(fields)
  graphdef, params = helpers.load(make(config), keymap.diffusers(config), state)

  rng = np.random.default_rng(1)
  image = rng.uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
  with torch.no_grad():
    posterior = theirs.encode(torch.from_numpy(image)).latent_dist
    decoded = theirs.decode(posterior.mean).sample

  encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))
  decode = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))
  mean, logvar = encode(params, helpers.nhwc(image))
  assert helpers.rel_err(helpers.nchw(mean), posterior.mean) <= 1e-4
  assert helpers.rel_err(helpers.nchw(logvar), posterior.logvar) <= 1e-4
  got = decode(params, helpers.nhwc(posterior.mean))
  assert helpers.rel_err(helpers.nchw(got), decoded) <= 1e-4


def test_golden():
  config = vae.VAEConfig.from_diffusers(helpers.golden_config("dina/sd35/vae/config"))
  state = helpers.golden("dina/sd35/vae/diffusion_pytorch_model")
  graphdef, params = helpers.load(make(config), keymap.diffusers(config), state)
  want = helpers.golden("dina/expected")

  encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))
  mean, logvar = encode(params, helpers.nhwc(want["vae/image"]))
  assert helpers.rel_err(helpers.nchw(mean), want["vae/mean"]) <= 1e-4
  assert helpers.rel_err(helpers.nchw(logvar), want["vae/logvar"]) <= 1e-4
  scaled = vae.scale_latents(jnp.asarray(helpers.nhwc(want["vae/mean"])), config)
  assert helpers.rel_err(helpers.nchw(scaled), want["vae/latents_scaled"]) <= 1e-5

  decode = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))
  z = vae.unscale_latents(scaled, config)
  assert helpers.rel_err(helpers.nchw(z), want["vae/mean"]) <= 1e-5
  decoded = decode(params, z)
  assert helpers.rel_err(helpers.nchw(decoded), want["vae/decoded"]) <= 1e-4


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_round_trips(size):
  config = vae.VAEConfig.from_diffusers(diffusers_config(*size))
  state = random_state(config)
  helpers.assert_round_trip(make(config), keymap.diffusers(config), state)

  single = to_stability(state, len(size[0]))
  assert len(single) == len(state)
  helpers.assert_round_trip(make(config), keymap.stability(config), single)
  # Both layouts fill the same model.
  _, a = helpers.load(make(config), keymap.diffusers(config), state)
  _, b = helpers.load(make(config), keymap.stability(config), single)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_single_file_is_what_diffusers_reads():
  torch = pytest.importorskip("torch")
  from diffusers.loaders import single_file_utils

  fields = diffusers_config(*SIZES[1])
  config = vae.VAEConfig.from_diffusers(fields)
  state = random_state(config)
  _, params = helpers.load(make(config), keymap.diffusers(config), state)
  single = {
    key: torch.from_numpy(array)
    for key, array in engine.export(keymap.stability(config), weights.flatten(params))
  }
  back = single_file_utils.convert_ldm_vae_checkpoint(single, fields)
  assert back.keys() == state.keys()
  for key, array in state.items():
    np.testing.assert_array_equal(back[key].numpy(), array, err_msg=key)


def test_full_size():
  config = vae.VAEConfig.sd3()
  _, params = weights.abstract(make(config))
  assert weights.count(params["encoder"]) == 34_274_208
  assert weights.count(params["decoder"]) == 49_545_475

  torch = pytest.importorskip("torch")
  from diffusers import AutoencoderKL

  fields = diffusers_config((128, 256, 512, 512), 2, 16, 32)
  assert vae.VAEConfig.from_diffusers(fields) == config
  with torch.device("meta"):
    theirs = AutoencoderKL(**fields)
  source = {k: (tuple(v.shape), np.float32) for k, v in theirs.state_dict().items()}
  _, problems = engine.match(keymap.diffusers(config), source, weights.shapes(params))
  assert not problems


def test_attention_in_chunks_is_the_same(monkeypatch):
  config = vae.VAEConfig.from_diffusers(diffusers_config(*SIZES[0]))
  state = random_state(config)
  graphdef, params = helpers.load(make(config), keymap.diffusers(config), state)
  z = jax.random.normal(jax.random.key(0), (2, 6, 5, 16))

  def decode(params):
    return jax.jit(lambda p: nnx.merge(graphdef, p).decode(z))(params)

  whole = decode(params)
  monkeypatch.setattr(vae, "QUERY_CHUNK", 12)  # 2 of the 6 rows of 5 cells
  assert helpers.rel_err(decode(params), whole) < 1e-5


def test_sample():
  mean = jnp.full((1, 64, 64, 16), 3.0)
  z = vae.sample(mean, jnp.full_like(mean, 2 * np.log(0.5)), jax.random.key(0))
  assert abs(float(z.mean()) - 3) < 0.02
  assert abs(float(z.std()) - 0.5) < 0.01


def test_logvar_is_clipped():
  config = vae.VAEConfig.from_diffusers(diffusers_config(*SIZES[2]))
  state = random_state(config)
  state["encoder.conv_out.bias"] = np.array([0, 0, 0, 1e3, -1e3, 1], np.float32)
  graphdef, params = helpers.load(make(config), keymap.diffusers(config), state)
  encode = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(x))
  _, logvar = encode(params, jnp.zeros((1, 4, 4, 3)))
  np.testing.assert_array_equal(logvar[..., 0], 20)
  np.testing.assert_array_equal(logvar[..., 1], -30)


def test_bad_image_size():
  config = vae.VAEConfig.from_diffusers(diffusers_config(*SIZES[1]))
  graphdef, params = weights.abstract(make(config))
  with pytest.raises(ValueError, match="width 20 must be multiples of 8"):
    jax.eval_shape(
      lambda p, x: nnx.merge(graphdef, p).encode(x),
      params,
      jax.ShapeDtypeStruct((1, 16, 20, 3), jnp.float32),
    )


@pytest.mark.parametrize(
  "change, message",
  [
    ({"use_quant_conv": True}, "use_quant_conv=True is not supported"),
    ({"use_post_quant_conv": None}, "use_post_quant_conv"),
    ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
    ({"latents_mean": [0.0]}, "latents_mean"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types"),
    ({"shift_factor": None}, "shift_factor is missing"),
    ({"norm_num_groups": 5}, "not a multiple"),
    ({"extra": 1}, "extra=1 is not a known field"),
  ],
)
def test_unsupported_config(change, message):
  fields = {**diffusers_config(*SIZES[0]), **change}
  with pytest.raises(ValueError, match=message):
    vae.VAEConfig.from_diffusers(fields)


def test_quant_convs_are_diffusers_default():
  fields = diffusers_config(*SIZES[0])
  del fields["use_quant_conv"]
  with pytest.raises(ValueError, match="use_quant_conv"):
    vae.VAEConfig.from_diffusers(fields)
