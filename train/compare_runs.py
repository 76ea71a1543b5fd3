"""Sets the held-out accuracies of several reward runs side by side.

  python train/compare_runs.py runs/quickstart/reward runs/quickstart/reward_random \\
      --out runs/quickstart/comparison.png

Reads each run's `accuracy.json`; prints a table and draws one curve per run.
"""

import argparse
import json
import pathlib

from lrm_jax import plots


def load(run: pathlib.Path) -> list[dict]:
  """Rows of a run over all kinds of pairs, by noise level; its ensembles are left out.

  Raises:
    FileNotFoundError: the run has not been evaluated.
  """
  path = run / "accuracy.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist: train it with train/reward.py")
  rows = json.loads(path.read_text())
  return [row for row in rows if row["kind"] == "all" and row["sigma"] is not None]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", type=pathlib.Path, nargs="+", help="run folders")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG")
  args = parser.parse_args(argv)
  try:
    rows = {run.name: load(run) for run in args.runs}
    if len(rows) < len(args.runs):
      raise ValueError(f"two runs have the same name: {[str(r) for r in args.runs]}")
    levels = [[row["sigma"] for row in mine] for mine in rows.values()]
    if any(level != levels[0] for level in levels):
      raise ValueError(f"the runs were evaluated at different noise levels: {levels}")
  except (OSError, ValueError) as e:
    raise SystemExit(f"error: {e}") from e
  print(f"{'held-out accuracy at sigma':28s}" + "".join(f"{s:>8g}" for s in levels[0]))
  for name, mine in rows.items():
    print(f"{name:28s}" + "".join(f"{row['acc']:8.3f}" for row in mine))
  plots.accuracy_vs_sigma(
    args.out,
    {
      name: tuple([row[c] for row in mine] for c in ("sigma", "acc", "lo", "hi"))
      for name, mine in rows.items()
    },
  )
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
