"""Known answers for the accuracy of pairs and its interval, and their figures."""

import numpy as np
import pytest

from lrm_jax import metrics, plots


def test_pair_accuracy_counts_ties_half():
  chosen = np.array([1.0, 0.0, 2.0, 5.0])
  rejected = np.array([0.0, 1.0, 2.0, -5.0])
  assert metrics.pair_accuracy(chosen, rejected) == 2.5 / 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pair_accuracy_refuses_non_finite_scores(bad):
  scores = np.array([1.0, 2.0, bad])
  with pytest.raises(ValueError, match="r_rejected: 1 of 3 .* at pair 2"):
    metrics.pair_accuracy(np.zeros(3), scores)
  with pytest.raises(ValueError, match="non-empty"):
    metrics.pair_accuracy(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(
  "successes, n, low, high",
  [
    # Newcombe 1998, table I, method 3 (score without continuity correction).
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_interval_published_values(successes, n, low, high):
  interval = metrics.wilson_interval(successes, n, z=1.959964)
  np.testing.assert_allclose(interval, (low, high), atol=5e-5)


def test_wilson_interval_is_symmetric_and_bounded():
  low, high = metrics.wilson_interval(20, 20)
  assert high == 1 and low == pytest.approx(1 - metrics.wilson_interval(0, 20)[1])
  with pytest.raises(ValueError, match="5 of 4"):
    metrics.wilson_interval(5, 4)


def test_accuracy_table_by_sigma_and_kind():
  chosen = np.array([[1.0, 1, 1, 1], [0, 1, 0, 1]])
  rejected = np.array([[0.0, 0, 0, 0], [1, 0, 0, 0]])
  rows = metrics.accuracy_table(
    chosen,
    rejected,
    sigmas=[0.0, 0.4],
    kind=np.array([0, 0, 2, 2]),
    kind_names=["a", "unused", "b"],
  )
  assert [(row["sigma"], row["kind"], row["n"], row["acc"]) for row in rows] == [
    (0.0, "all", 4, 1.0),
    (0.0, "a", 2, 1.0),
    (0.0, "b", 2, 1.0),
    (0.4, "all", 4, 0.625),
    (0.4, "a", 2, 0.5),
    (0.4, "b", 2, 0.75),
  ]
  assert all(row["lo"] <= row["acc"] <= row["hi"] for row in rows)
  named = metrics.named_accuracies(rows, "val")
  assert named["val/acc@sigma=0.4"] == 0.625
  assert named["val/acc/b@sigma=0.4"] == 0.75
  assert len(named) == len(rows)


def test_accuracy_table_refuses_a_kind_without_a_name():
  scores = np.zeros((1, 2))
  with pytest.raises(ValueError, match="there are 1 names"):
    metrics.accuracy_table(
      scores, scores, sigmas=[0.0], kind=np.array([0, 1]), kind_names=["a"]
    )


def test_figures_are_written(tmp_path):
  image = pytest.importorskip("matplotlib.image")
  accuracy = {"pretrained": ([0, 0.4], [0.9, 0.8], [0.88, 0.77], [0.92, 0.83])}
  plots.accuracy_vs_sigma(tmp_path / "accuracy.png", accuracy)
  loss = {"train": (np.arange(5), np.array([5.0, 4, 3, 2, 1]))}
  plots.loss_curve(tmp_path / "loss.png", loss, window=2)
  for name in ("accuracy.png", "loss.png"):
    assert image.imread(tmp_path / name).std() > 0.01  # something is drawn
  with pytest.raises(ValueError, match="curve 'a'"):
    plots.accuracy_vs_sigma(tmp_path / "bad.png", {"a": ([0], [1], [1], [1, 2])})
  mean = plots._running_mean(np.array([5.0, 4, 3, 2]), 2)
  np.testing.assert_allclose(mean, [5, 4.5, 3.5, 2.5])
