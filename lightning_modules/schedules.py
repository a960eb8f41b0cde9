"""Schedules as pure functions of the step: nothing to save, so nothing to lose when a run resumes."""

import math


def steps_of_run(estimated: float) -> int:
    """Optimiser steps of a run, by what the Trainer says in `estimated_stepping_batches`.

    Raises:
        ValueError: infinity, or Lightning's -1 for epochs of a loader without a length: no schedule can end.
    """
    if estimated == math.inf:
        raise ValueError(
            "the learning rate's schedule needs an end: give the Trainer max_epochs or max_steps"
        )
    if estimated < 0:
        raise ValueError(
            "the learning rate's schedule needs an end, and the training loader has no length: give the "
            "Trainer max_steps, or limit_train_batches, the batches of an epoch"
        )
    return int(estimated)


def warmup_cosine(step: int, *, total: int, peak: float, final: float = 0.0, warmup: int = 0) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `final` (Loshchilov and Hutter 2017).

    The first step of a warm-up is `peak / warmup`, not 0: a step at rate 0 is a step lost.

    Args:
        step: 0 .. total - 1; later steps keep the last value.
        total: steps in all, warm-up included.
        warmup: steps of the warm-up; the step after it has the rate `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total=total - warmup, start=peak, final=final)


def cosine(step: int, *, total: int, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at step `total`."""
    progress = min(max(step / max(total, 1), 0.0), 1.0)
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * progress))


def linear(step: int, *, total: int, start: float, final: float) -> float:
    """A line from `start` at step 0 to `final` at step `total`, constant from there."""
    return start + (final - start) * min(step / total, 1.0) if total > 0 else final


def scaled_learning_rate(
    rate: float, batch_size: int, *, reference: int = 256, rule: str = "linear"
) -> float:
    """A base rate for `reference` samples, scaled to the global batch.

    Args:
        batch_size: samples an optimiser step, over all ranks and accumulated batches.
        rule: "linear" (Goyal et al. 2017), "sqrt" (better for small batches and for Adam), or "none".
    """
    factor = batch_size / reference
    scales = {"linear": factor, "sqrt": math.sqrt(factor), "none": 1.0}
    if rule not in scales:
        raise ValueError(f"learning_rate_scaling {rule!r}: expected one of {sorted(scales)}")
    return rate * scales[rule]
