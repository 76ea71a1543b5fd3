"""On the path of training processes: no torch, which TensorBoardX would import."""

raise ImportError("tests hide torch from training: it takes a second of each start")
