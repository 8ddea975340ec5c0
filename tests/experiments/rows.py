"""Rows of runs that never ran, for what is computed from rows."""

import numpy as np

from experiments.sweep.rows import Row
from experiments.sweep.runs import Run

TEXTS = 12
ENVIRONMENT = {
    "device": "cpu", "devices": 1, "cpu_cores": 2, "python": "3.11", "packages": {"jax": "0"}, "backend": "cpu"
}  # fmt: skip


def made_up_row(run: Run, quality: float = 0.7) -> Row:
    """A row in which every head agrees, and is accepted, with a probability of ``quality``."""
    heads = run.config().heads.num_heads
    rng = np.random.default_rng([run.seed, heads])
    most = max(run.heads())

    def counts(total):
        return rng.binomial(total, quality, TEXTS).tolist()

    def decoded(number):
        tried = [[int(30 * quality**k)] * TEXTS for k in range(number)]  # the last heads: never
        part = {"tokens": [65] * TEXTS, "passes": [64 // (1 + number // 2)] * TEXTS, "seconds": [0.1] * TEXTS,
                "distinct_4grams": 0.5, "ties": 0, "different": 0}  # fmt: skip
        return part | {"tried": tried, "accepted": [counts(row[0]) for row in tried]}

    return Row.of({
        "config": run.key(), "seed": run.seed, "code": "made up", "variant": run.variant.name, "seconds": 60.0,
        "steps": 10, "tokens": 1000, "parameters": 5000, "head_parameters": 100 * heads, "training_flops": 1e9,
        "curve": [
            {"step": step, "eval/main/ce": 3.0, **{f"eval/head_{k}/agreement": quality for k in range(1, heads + 1)}}
            for step in (5, 10)
        ],
        "text": {
            "bytes": [300] * TEXTS, "nats": (400 + rng.normal(size=TEXTS)).tolist(), "weight": [100] * TEXTS,
            "heads": [
                {"weight": [90] * TEXTS, "nats": [400.0] * TEXTS, "kl": [9.0] * TEXTS, "agreed": counts(90)}
                for _ in range(heads)
            ],
        },
        "decoding": {
            mode: {
                "agreed": [counts(60) for _ in range(most)], "counted": [[60] * TEXTS for _ in range(most)],
                **{str(number): decoded(number) for number in run.heads()},
            }
            for mode in ("greedy", "sampled")
        },
        "environment": ENVIRONMENT,
    })  # fmt: skip
