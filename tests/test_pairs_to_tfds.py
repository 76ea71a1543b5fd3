"""Parquet pairs rewritten as ArrayRecord hold the same pairs."""

import numpy as np
import pairs_to_tfds
import pytest

from lrm_jax.data import parquet, tfds_pairs
from tests import runs


def test_all_pairs_in_order(tmp_path, capsys):
  runs.make_pairs(tmp_path)
  args = ["--out", str(tmp_path / "out")]
  for name in ("train", "held_out"):
    args += ["--pairs", f"{name}={tmp_path / name}"]
  pairs_to_tfds.main(args)
  assert f"{tmp_path}/out:train  48 pairs" in capsys.readouterr().out
  for name in ("train", "held_out"):
    before = parquet.ParquetPairs(tmp_path / name)
    after = tfds_pairs.TfdsPairs(tmp_path / "out", name)
    assert len(before) == len(after)
    for i in range(len(before)):
      assert before[i]["prompt"] == after[i]["prompt"]
      np.testing.assert_array_equal(before[i]["chosen"], after[i]["chosen"])
      np.testing.assert_array_equal(before[i]["rejected"], after[i]["rejected"])
  with pytest.raises(SystemExit, match="exists"):
    pairs_to_tfds.main(args)


@pytest.mark.parametrize("pairs", ["train", "=x", "train="])
def test_what_is_no_split(pairs, tmp_path, capsys):
  with pytest.raises(SystemExit):
    pairs_to_tfds.main(["--out", str(tmp_path / "out"), "--pairs", pairs])
  assert "is not SPLIT=FOLDER" in capsys.readouterr().err


def test_a_split_given_twice_and_a_folder_that_is_not_there(tmp_path, capsys):
  out = ["--out", str(tmp_path / "out")]
  with pytest.raises(SystemExit):
    pairs_to_tfds.main([*out, "--pairs", "a=x", "--pairs", "a=y"])
  assert "given twice" in capsys.readouterr().err
  with pytest.raises(SystemExit, match="error: .*nowhere"):
    pairs_to_tfds.main([*out, "--pairs", "a=nowhere"])
