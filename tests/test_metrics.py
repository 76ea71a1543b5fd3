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


def test_ensembles_get_rows_of_their_own():
  sides = np.array([[1.0, 1]]), np.array([[0.0, 2]])
  rows = metrics.accuracy_table(
    *sides,
    sigmas=[0.4],
    kind=np.array([0, 1]),
    kind_names=["a", "b"],
    ensembles={"ensemble": (np.array([3.0, 3]), np.array([0.0, 0]))},
  )
  assert [(row["level"], row["sigma"], row["kind"], row["acc"]) for row in rows] == [
    ("sigma=0.4", 0.4, "all", 0.5),
    ("sigma=0.4", 0.4, "a", 1.0),
    ("sigma=0.4", 0.4, "b", 0.0),
    ("ensemble", None, "all", 1.0),
    ("ensemble", None, "a", 1.0),
    ("ensemble", None, "b", 1.0),
  ]
  named = metrics.named_accuracies(rows, "val")
  assert named["val/acc@ensemble"] == 1.0 and named["val/acc/b@sigma=0.4"] == 0.0


# --- ranked lists ------------------------------------------------------------------


def lists_of(*lists, clusters=None, items=None):
  """RankedLists from the ranks of each list."""
  of = np.repeat(np.arange(len(lists)), [len(ranks) for ranks in lists])
  ranks = np.concatenate([np.array(ranks, float) for ranks in lists])
  return metrics.ranked_lists(of, ranks, clusters=clusters, items=items)


def means(lists, scores):
  found = metrics.list_statistics(lists, np.array(scores, float))
  return {name: a.sum() / b.sum() for name, (a, b) in found.items()}


def test_pairs_of_lists():
  # Images of two lists interleaved: 0 and 2 with 3 in one, 1 and 4 in the other.
  lists = metrics.ranked_lists(
    np.array([0, 1, 0, 0, 1]), np.array([2.0, 5.0, 1.0, 2.0, 4.0])
  )
  assert lists.num_lists == 2 and lists.sizes.tolist() == [3, 2]
  pairs = set(zip(lists.better.tolist(), lists.worse.tolist(), strict=True))
  assert pairs == {(2, 0), (2, 3), (4, 1)}
  assert sorted(lists.tied[0].tolist()) == [0, 3] and len(lists.tied) == 1
  assert not lists.independent


def test_kendalls_tau_b_by_hand():
  # Pairs: 6. People tie (1, 2); the scores tie (2, 3). Concordant: 01, 02, 03, 13;
  # discordant: none. tau-b = 4 / sqrt((6 - 1) (6 - 1)).
  lists = lists_of([0, 1, 1, 2])
  assert means(lists, [4, 3, 2, 2])["tau_b"] == pytest.approx(4 / 5)
  assert means(lists, [1, 2, 3, 4])["tau_b"] == pytest.approx(-5 / np.sqrt(5 * 6))
  assert means(lists, [1, 1, 1, 1])["tau_b"] == 0


def test_list_statistics_against_scipy():
  stats = pytest.importorskip("scipy.stats")
  rng = np.random.default_rng(0)
  ranks = [rng.integers(0, 4, size) for size in rng.integers(2, 7, 60)]
  scores = [rng.integers(0, 4, len(r)).astype(float) for r in ranks]
  got = means(lists_of(*ranks), np.concatenate(scores))
  tau, rho = [], []
  for r, s in zip(ranks, scores, strict=True):
    if len(set(r)) > 1:  # where all ranks are equal there is nothing to agree with
      constant = len(set(s)) == 1
      tau.append(0 if constant else stats.kendalltau(-r, s).statistic)
      rho.append(0 if constant else stats.spearmanr(-r, s).statistic)
  assert got["tau_b"] == pytest.approx(np.mean(tau))
  assert got["rank_corr"] == pytest.approx(np.mean(rho))


def test_accuracy_and_top1_of_lists_by_hand():
  lists = lists_of([0, 1, 2], [0, 0], [1, 0], [0, 0, 1])
  scores = [3, 1, 2, 0, 1, 5, 5, 7, 8, 7]
  # List 0: 01 and 02 right, 12 wrong. List 1: a tie. List 2: equal scores, one half.
  # List 3: 0 over 2 equal, 1 over 2 right.
  got = means(lists, scores)
  assert got["acc"] == pytest.approx((2 + 0.5 + 1.5) / (3 + 1 + 2))
  assert got["acc_by_list"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
  # Highest scores: rank 0; one of both; image 1, of rank 0. The tied list has no say.
  assert got["top1"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_agreement_chooses_its_interval():
  ranks = [[0, 1]] * 20
  scores = np.tile([1.0, 0.0, 0.0, 1.0], 10)
  row = metrics.agreement(lists_of(*ranks), scores)
  assert row["interval"] == "wilson" and row["num_pairs"] == 20 and row["acc"] == 0.5
  assert (row["lo"], row["hi"]) == metrics.wilson_interval(10, 20)
  assert row["tau_b"] is None  # no more than 2 acc - 1
  # An image in two pairs: they are no longer independent.
  items = [0, *range(1, 39), 0]
  assert (
    metrics.agreement(lists_of(*ranks, items=items), scores)["interval"] == "bootstrap"
  )
  lists = lists_of(*ranks, [0, 1, 2])
  row = metrics.agreement(lists, np.append(scores, [3, 2, 1]), num_resamples=200)
  assert row["interval"] == "bootstrap" and row["acc"] == pytest.approx(13 / 23)
  assert row["lo"] < row["acc"] < row["hi"]
  assert row["tau_b_lo"] <= row["tau_b"] <= row["tau_b_hi"]
  forced = metrics.agreement(lists, np.append(scores, [3, 2, 1]), interval="wilson")
  assert (forced["lo"], forced["hi"]) == metrics.wilson_interval(13, 23)


def test_agreement_without_ranked_pairs():
  row = metrics.agreement(lists_of([0, 0], [1, 1, 1]), np.arange(5.0))
  assert (row["num_pairs"], row["num_ties"], row["acc"], row["lo"]) == (
    0,
    4,
    None,
    None,
  )
  one = metrics.agreement(lists_of([0, 1, 2]), np.arange(3.0))
  assert one["acc"] == 0 and one["lo"] is None  # a single cluster has no spread


def test_bootstrap_covers_the_truth():
  """Of 200 data sets with a known mean, about 95 % of the intervals hold it."""
  rng = np.random.default_rng(0)
  covered, widths = 0, []
  for i in range(200):
    size = rng.integers(1, 4, 80)
    right = rng.binomial(size, 0.7).astype(float)
    (low,), (high,) = metrics.bootstrap_interval(
      right[:, None],
      size[:, None].astype(float),
      np.arange(80),
      num_resamples=200,
      seed=i,
    )
    covered += low <= 0.7 <= high
    widths.append(high - low)
  assert 0.89 <= covered / 200 <= 0.99
  # The normal interval for as many trials.
  assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 160), rel=0.1)


def test_bootstrap_draws_whole_clusters():
  # Each cluster holds 10 equal lists: the spread is that of 20 values, not of 200.
  values = np.repeat(np.tile([0.0, 1.0], 10), 10)[:, None]
  clusters = np.repeat(np.arange(20), 10)
  ones = np.ones_like(values)
  low, high = metrics.bootstrap_interval(values, ones, clusters, seed=3)
  assert high[0] - low[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 20), rel=0.15)
  again = metrics.bootstrap_interval(values, ones, clusters, seed=3)
  np.testing.assert_array_equal([low, high], again)


@pytest.mark.parametrize(
  ("of", "ranks", "kwargs", "message"),
  [
    ([0, 0, 1], [0, 1, 0], {}, "list 1 has 1"),
    ([0, 0, 2, 2], [0, 1, 0, 1], {}, "list 1 has 0"),
    ([], [], {}, "there is none"),
    ([0, 0], [0, np.nan], {}, "NaN"),
    ([0, 0], [0, 1], {"clusters": [1]}, "1 clusters for 2 images"),
  ],
)
def test_ranked_lists_errors(of, ranks, kwargs, message):
  with pytest.raises(ValueError, match=message):
    metrics.ranked_lists(np.array(of, int), np.array(ranks, float), **kwargs)


def test_agreement_errors():
  lists = lists_of([0, 1])
  with pytest.raises(ValueError, match="3 scores for 2 images"):
    metrics.agreement(lists, np.zeros(3))
  with pytest.raises(ValueError, match="image 1 is not finite"):
    metrics.agreement(lists, np.array([0.0, np.inf]))
  with pytest.raises(ValueError, match="interval='exact'"):
    metrics.agreement(lists, np.zeros(2), interval="exact")


# --- ties --------------------------------------------------------------------------


def test_accuracy_with_ties_by_hand():
  # Gaps (better - worse): 3, -1, 0.2; human ties: 0.5, 2.
  lists = lists_of([0, 1], [0, 1], [0, 1], [0, 0], [0, 0])
  scores = np.array([3, 0, 0, 1, 0.2, 0, 0.5, 0, 0, 2])
  assert metrics.tie_accuracy(lists, scores, threshold=0.0) == (2 / 5, 0.0)
  assert metrics.tie_accuracy(lists, scores, threshold=0.5) == (2 / 5, 0.5)
  # Pick-a-Pic: half a point where only one side ties.
  half = metrics.tie_accuracy(lists, scores, threshold=0.5, credit=0.5)
  assert half == (pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5), 0.5)
  # Best: ties up to 2 cost nothing but the right one at 0.2: 3 and both ties.
  assert metrics.tie_accuracy(lists, scores) == (3 / 5, 2.0)


@pytest.mark.parametrize("credit", [0.0, 0.5])
def test_best_tie_threshold_is_the_best(credit):
  rng = np.random.default_rng(1)
  lists = lists_of(*rng.integers(0, 3, (40, 3)))
  scores = rng.integers(0, 9, 120) / 4
  best, threshold = metrics.tie_accuracy(lists, scores, credit=credit)
  every = [
    metrics.tie_accuracy(lists, scores, threshold=t, credit=credit)[0]
    for t in np.arange(0, 3, 0.125)
  ]
  assert best == pytest.approx(max(every))
  found = metrics.tie_accuracy(lists, scores, threshold=threshold, credit=credit)
  assert found[0] == pytest.approx(best)
  with pytest.raises(ValueError, match="threshold=-1"):
    metrics.tie_accuracy(lists, scores, threshold=-1.0)


# --- calibration -------------------------------------------------------------------


def simulated(scale, num=20000, seed=0):
  """Gaps of preferred minus other, where P = sigmoid(scale gap)."""
  rng = np.random.default_rng(seed)
  gaps = rng.normal(0, 1.5, num)
  return np.where(rng.random(num) < 1 / (1 + np.exp(-scale * gaps)), gaps, -gaps)


@pytest.mark.parametrize("scale", [0.3, 2.5])
def test_scale_is_recovered(scale):
  found, note = metrics.fit_scale(simulated(scale))
  assert found == pytest.approx(scale, rel=0.05) and note is None
  # In other units of the score it is another number, and the same fit.
  assert metrics.fit_scale(simulated(scale) * 1e-3)[0] == pytest.approx(found * 1e3)


def test_scale_by_hand():
  # Three right and one wrong, all by 1: sigmoid(scale) = 3/4.
  assert metrics.fit_scale(np.array([1.0, 1, 1, -1]))[0] == pytest.approx(np.log(3))
  # Gaps of 0 say nothing.
  assert metrics.fit_scale(np.array([1.0, 1, 1, -1, 0, 0]))[0] == pytest.approx(
    np.log(3)
  )


def test_scale_of_data_without_a_maximum():
  scale, note = metrics.fit_scale(np.full(8, 2.0))
  assert scale == pytest.approx(np.log(9) / 2)  # sigmoid(2 scale) = 9 / 10
  assert "order all 8 pairs as people do" in note and "one pair in 10" in note
  scale, note = metrics.fit_scale(np.full(8, -2.0))
  assert scale == pytest.approx(-np.log(9) / 2) and "against what people do" in note
  scale, note = metrics.fit_scale(np.zeros(3))
  assert scale == 0 and "all scores are equal" in note
  scale, note = metrics.fit_scale(np.array([1.0, -2.0]))
  assert scale < 0 and "not positive" in note
  for bad in ([], [np.nan]):
    with pytest.raises(ValueError, match="finite"):
      metrics.fit_scale(np.array(bad))


def test_calibration_mends_overconfidence():
  gaps = simulated(0.4, 4000)
  found = metrics.calibrate(10 * gaps, np.arange(4000) // 2)
  assert found["scale"] == pytest.approx(0.04, rel=0.1)
  assert len(found["fold_scales"]) == 5 and len(set(found["fold_scales"])) == 5
  before, after = found["before"], found["after"]
  assert before["ece"] > 0.2 > 0.03 > after["ece"]
  assert before["log_loss"] > np.log(2) > after["log_loss"]
  assert before["brier"] > 0.25 > after["brier"]
  assert metrics.calibrate(10 * gaps, np.arange(4000) // 2) == found


def test_probability_scores_by_hand():
  p = np.array([0.9, 0.8, 0.3, 0.5])
  found = metrics.probability_scores(np.log(p / (1 - p)), num_bins=5)
  assert found["log_loss"] == pytest.approx(-np.log(p).mean())
  assert found["brier"] == pytest.approx(((1 - p) ** 2).mean())
  # Bins of width 0.1 from 0.5: {0.5: half right}, {0.7: wrong}, {0.8}, {0.9}.
  assert [b["n"] for b in found["bins"]] == [1, 1, 1, 1]
  assert [b["acc"] for b in found["bins"]] == [0.5, 0, 1, 1]
  assert found["ece"] == pytest.approx((0 + 0.7 + 0.2 + 0.1) / 4)
  one = metrics.probability_scores(np.log(p / (1 - p)), num_bins=1)
  assert one["ece"] == pytest.approx(abs((0.9 + 0.8 + 0.7 + 0.5) / 4 - 2.5 / 4))


def test_calibration_of_hard_cases_is_finite():
  for gaps in (np.full(6, 1.0), np.zeros(6), np.array([1e6, -1e-6, 3, 2, 1, 5.0])):
    found = metrics.calibrate(gaps, np.arange(6), num_folds=50)
    figures = [found[w][f] for w in ("before", "after") for f in ("log_loss", "ece")]
    assert np.isfinite([found["scale"], *figures, *found["fold_scales"]]).all()
    assert len(found["fold_scales"]) == 6
  with pytest.raises(ValueError, match=r"1 group\(s\)"):
    metrics.calibrate(np.ones(4), np.zeros(4, int))
  with pytest.raises(ValueError, match="1 fold"):
    metrics.calibrate(np.ones(4), np.arange(4), num_folds=1)


def test_figures_are_written(tmp_path):
  image = pytest.importorskip("matplotlib.image")
  accuracy = {"pretrained": ([0, 0.4], [0.9, 0.8], [0.88, 0.77], [0.92, 0.83])}
  plots.accuracy_vs_sigma(tmp_path / "accuracy.png", accuracy)
  together = {"pretrained": (0.9, 0.8, 0.95), "other": (0.6, np.nan, np.nan)}
  plots.accuracy_vs_sigma(tmp_path / "more.png", accuracy, ensembles=together)
  plots.accuracy_vs_sigma(tmp_path / "only.png", {}, ensembles=together)
  gaps = np.random.default_rng(0).normal(0.5, 1, (4, 50))
  panels = {f"u={i}": (row, row - 0.3) for i, row in enumerate(gaps)}
  plots.score_histograms(tmp_path / "histogram.png", panels)
  bins = metrics.probability_scores(gaps[0])["bins"]
  plots.reliability(tmp_path / "reliability.png", {"u=0": {"before": bins}})
  loss = {"train": (np.arange(5), np.array([5.0, 4, 3, 2, 1]))}
  plots.loss_curve(tmp_path / "loss.png", loss, window=2)
  written = list(tmp_path.iterdir())
  assert len(written) == 6
  for path in written:
    assert image.imread(path).std() > 0.01  # something is drawn
  with pytest.raises(ValueError, match="curve 'a'"):
    plots.accuracy_vs_sigma(tmp_path / "bad.png", {"a": ([0], [1], [1], [1, 2])})
  with pytest.raises(ValueError, match="no accuracies"):
    plots.accuracy_vs_sigma(tmp_path / "bad.png", {})
  with pytest.raises(ValueError, match="panel 'u'.*2 and 1 scores"):
    plots.score_histograms(tmp_path / "bad.png", {"u": ([1, 2], [1])})
  with pytest.raises(ValueError, match="panel 'u', curve 'before': no bins"):
    plots.reliability(tmp_path / "bad.png", {"u": {"before": []}})
  with pytest.raises(ValueError, match="without panels"):
    plots.score_histograms(tmp_path / "bad.png", {})
  assert not (tmp_path / "bad.png").exists()
  mean = plots._running_mean(np.array([5.0, 4, 3, 2]), 2)
  np.testing.assert_allclose(mean, [5, 4.5, 3.5, 2.5])
