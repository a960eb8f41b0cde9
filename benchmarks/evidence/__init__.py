"""Does training gain from what is selected? Pools x ratios x shares x ways x seeds, a training each.

    python -m benchmarks.evidence --packages FOLDER --out lines.jsonl --ways random labels   # power first
    python -m benchmarks.evidence --packages FOLDER --out lines.jsonl --pools rare_photos --figure gains.png

A long-tailed pool is cut from labelled collections; SimCLR trains a very small network at 16 pixels on what a
way selects, for the same number of steps whatever its size; its frozen features are evaluated by 5-NN and
logistic regression that are fitted to a balanced bank of images outside the pool, on a balanced test set: the
mean over all classes and over the rarest third. So what differs between ways is the features alone. Beside
them is 5-NN with the selection as the labelled bank, which is another question. Gains are over a random
selection of the same size, paired by seed, which is that of selection, weights, order and views; the cut and
the order of classes are the same for all seeds.

Each training is a line of the file; a run that was killed goes on with those that are missing.
"""
