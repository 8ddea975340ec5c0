"""The benchmark of training steps: what it compares, and that it runs."""

import json

import pytest

from experiments.bench import checkpoints, decode, interop, interop_parity, throughput, training
from experiments.sweep.scale import SCALES
from tests.evaluation.test_report import check_all_is_there
from tests.experiments.test_sweep import tiny_scale


def test_every_scale_has_its_cases():
    for scale in SCALES.values():
        configs = training.cases(scale, [0, 1, 2, 4])
        names = ["joint 0", "joint 1", "joint 2", "joint 4", "loop 1 to 2", "loop 2 to 4", "recurrent 4"]
        names += ["standalone, hard", "standalone, soft", "standalone, ground truth"]
        assert list(configs) == names
        trained = [configs[name].objective.trained_heads(configs[name].heads) for name in ("loop 2 to 4", "joint 4")]
        assert trained == [2, 4]


def test_a_batch_needs_as_many_prompts(tmp_path):
    """A row for 64 prompts is not measured with three."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n' * 3)
    flags = ["--workdir=nowhere", f"--prompts={prompts}"]
    with pytest.raises(ValueError, match="--batches=64: expected at most the 3 prompts"):
        decode.main([*flags, "--batches=1,64"])
    with pytest.raises(ValueError, match="holds no run"):
        decode.main([*flags, "--batches=1,3"])


INTEROP = {"program": "transformers", "heads": 4, "tokens_per_second": 1234.5, "conditional_acceptance": [0.5] * 4}
PARITY = {"model": "/models/tinystories-656k", "format": "exaone_moe", "heads": 4, "logits_apart": 1.2e-6}
COUNTED = {"prompts": 32, "same_text": 31, "rounds": 1234, "drafts": 2345, "same": True}
WAY = {"heads": 4, "batch": 16, "temperature": 1.0, "rounds": 1234, "seconds": 1234.5, "tokens": 123_456}
PARTS = [
    {"batch": 64, "part": part, "heads": heads, "width": width, "seconds": 0.123, "over_plain": 1.23}
    for part, heads, width in (
        ("round", 0, None), ("bookkeeping", 0, None), *(("verify", None, width) for width in range(1, 12))
    )
]  # fmt: skip
PREDICTED = {"batch": 64, "drafter": "lookup", "tokens_per_pass": 2.3, "predicted": 12345.0, "measured": 12345.0}
STEP = {
    "case": "standalone, ground truth", "tokens": 16384, "seconds": 1234.5, "over_first": 1.5, "model_flops": 1e12,
    "temp_bytes": 1e11, "state_bytes": 1e11,
}  # fmt: skip
TABLES = {
    "interop": lambda: interop.table([
        INTEROP | COUNTED | {"program": program, "heads": heads}
        for program in (interop.OURS, interop.THEIRS) for heads in (0, 4)
    ]),
    "parity": lambda: interop_parity.table([PARITY | COUNTED]),
    "throughput": lambda: throughput.table([
        WAY | COUNTED | {"way": way, "heads": heads, "predicted_seconds": 1234.5}
        for way in ("batches", "queue") for heads in (0, 4)
    ]),
    "rounds": lambda: decode.rounds_table("stories", PARTS),
    "verify": lambda: decode.verify_table("stories", PARTS, list(range(1, 12))),
    "predictions": lambda: decode.prediction_table([PREDICTED | {"temperature": 1.0, "heads": 0}]),
    "training": lambda: training.table_of([STEP]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_a_terminal(name):
    check_all_is_there(TABLES[name](), 80)


@pytest.mark.slow
def test_it_measures_steps(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training.SCALES, "cpu", tiny_scale(text_file))
    assert training.main(["--scale=cpu", "--heads=0,1,2", "--repeats=2", f"--json={tmp_path / 'rows.json'}"]) == 0
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["joint 0"]["over_first"] == 1 and rows["joint 2"]["seconds_min"] <= rows["joint 2"]["seconds"]
    assert rows["joint 0"]["model_flops"] < rows["loop 1 to 2"]["model_flops"] < rows["joint 2"]["model_flops"]
    # The recurrent head has fewer parameters and as much to compute.
    assert rows["recurrent 2"]["state_bytes"] < rows["joint 2"]["state_bytes"]
    assert rows["recurrent 2"]["model_flops"] == rows["joint 2"]["model_flops"]
    assert "loop 1 to 2" in capsys.readouterr().out


@pytest.mark.slow
def test_every_checkpoint_is_measured(workdir, tmp_path, capsys):
    """All that there are, oldest first, each with the tokens that it was trained on."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog ran"}\n')
    flags = [f"--workdir={workdir}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=6"]
    outputs = [f"--json={tmp_path / 'rows.json'}", f"--figure={tmp_path / 'curve.png'}"]
    assert checkpoints.main([*flags, *outputs]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["step"], row["tokens"], row["mode"]) for row in rows] == [(10, 2560, "greedy"), (10, 2560, "sampled")]
    assert rows[0]["identical"] is True and rows[0]["tokens_per_pass"]["mean"] >= 1
    assert (tmp_path / "curve.png").stat().st_size > 1000 and "2,560" in capsys.readouterr().out
