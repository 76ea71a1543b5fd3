"""Pairs of three sizes, no two alike, for the tests of the stored formats."""

import numpy as np

SIZES = ((2, 3), (4, 4), (3, 2))


def make(i, size=None, **changes):
  h, w = size or SIZES[i % len(SIZES)]
  rng = np.random.default_rng(i)
  record = dict(
    prompt=f"prompt {i} é",
    chosen=rng.standard_normal((h, w, 4)).astype(np.float32),
    rejected=rng.standard_normal((h, w, 4)).astype(np.float32),
    model1=f"model {i % 2}",
    model2="other",
    detailed_results=f'{{"votes": {i}}}',
    image1_path=f"a/{i}.png",
    image2_path=f"b/{i}.png",
    preference=0.5 if i % 4 == 3 else 1.0,
    kind=("plain", "hard")[i % 2],
  )
  return record | changes


RECORDS = [make(i) for i in range(20)]


def assert_pair(source, i, record):
  pair = source[i]
  for name in ("chosen", "rejected"):
    assert pair[name].dtype == np.float32 and pair[name].flags.c_contiguous
    np.testing.assert_array_equal(pair[name], record[name])
  assert pair["prompt"] == record["prompt"]
  assert source.kind_names[pair["kind"]] == record["kind"]
  assert pair["preference"] == record["preference"] and pair["index"] == i
  assert source.latent_shapes[source.bucket[i]] == record["chosen"].shape


def assert_pairs(source, expected):
  assert len(source) == len(expected)
  for i, record in enumerate(expected):
    assert_pair(source, i, record)
