"""Tables and figures: every number is computed from rows, and missing rows leave gaps, not errors."""

import json
import re
import shlex

import pytest

from experiments import ablations, decay, distillation, freezing, head_count, looped
from experiments.sweep import experiment as command_line
from experiments.sweep.arms import Arm
from experiments.sweep.experiment import arms_of, run
from experiments.sweep.report import per_seed, points, share, verdict
from experiments.sweep.rows import ModeCounts, WayCounts
from experiments.sweep.runner import Code
from experiments.sweep.runs import Run, decided
from experiments.sweep.scale import SCALES
from experiments.variants import mtp_d
from mtpd_jax import frontdoor
from mtpd_jax.config import Config
from mtpd_jax.evaluation.statistics import Interval
from tests.experiments.rows import made_up_row

ALL = (distillation, ablations, looped, head_count, decay, freezing)
MODULES = {module.EXPERIMENT.name: module.EXPERIMENT for module in ALL}
CPU = SCALES["cpu"]


CODE = Code(lambda family: "made up")


def rows_of(experiment, seeds=(0, 1), names=None, quality=0.7):
    variants = [variant for variant in experiment.variants(CPU) if names is None or variant.name in names]
    return [made_up_row(Run(variant, seed, CPU), quality) for seed in seeds for variant in variants]


def write_rows(folder, name, rows):
    path = folder / "cpu" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", MODULES)
def test_a_report_is_written_from_rows_alone(name, tmp_path, capsys):
    path = write_rows(tmp_path, name, rows_of(MODULES[name]))
    run(MODULES[name], CPU, None, results=tmp_path, code=CODE)
    text = path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "made up" in text and "nan" not in text and "inf" not in text
    tables = re.findall(r"(?:^\|.*\|$\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for variant in MODULES[name].variants(CPU):
        assert f"| {variant.name} | 0 1 |" in text
    assert MODULES[name].name in capsys.readouterr().out  # and shown


@pytest.mark.parametrize("name", MODULES)
def test_a_report_needs_not_all_variants(name, tmp_path):
    names = [variant.name for variant in MODULES[name].variants(CPU)]
    for present in (names[:1], names[-1:], names[1::2]):
        write_rows(tmp_path, name, rows_of(MODULES[name], names=present, seeds=[0]))
        run(MODULES[name], CPU, None, results=tmp_path, code=CODE)


def test_a_gain_is_that_of_the_rows(tmp_path):
    """MTP-D's rows made up with more agreement than MTP's: the table says by how much, and that it is better."""
    experiment = distillation.EXPERIMENT
    rows = rows_of(experiment, names=["mtp_4"], quality=0.5) + rows_of(experiment, names=["mtp_d_4"], quality=0.9)
    arms = arms_of(rows, experiment.variants(CPU), CPU)
    table = experiment.report(arms, CPU).tables[0]
    row = next(row for row in table.rows if row[:3] == ["4", "agreement, teacher-forced", "2"])
    counted = {
        name: [sum(row.text.heads[1].agreed) / sum(row.text.heads[1].weight) for row in arm.rows]
        for name, arm in arms.items()
    }
    expected = [after - before for before, after in zip(counted["mtp_4"], counted["mtp_d_4"], strict=True)]
    assert row[3].startswith(f"{50 * sum(counted['mtp_4']):.1f} ")
    assert row[5].startswith(f"+{50 * sum(expected):.1f} (") and row[7] == "yes"
    assert row[6] == per_seed(expected)


def test_arms_that_cannot_be_paired_are_left_out_or_refused(tmp_path):
    experiment = distillation.EXPERIMENT
    apart = rows_of(experiment, seeds=[0], names=["mtp_4"]) + rows_of(experiment, seeds=[1], names=["mtp_d_4"])
    arms = arms_of(apart, experiment.variants(CPU), CPU)
    assert not experiment.report(arms, CPU).tables[0].rows
    rows = rows_of(experiment)
    rows[1].text.bytes[0] = 299
    with pytest.raises(ValueError, match="other texts"):
        experiment.report(arms_of(rows, experiment.variants(CPU), CPU), CPU)


def test_verdicts():
    assert verdict(Interval(0.1, 0.05, 0.2), 3) == "yes"
    assert verdict(Interval(-0.1, -0.2, -0.05), 1) == "no (one seed)"
    assert verdict(Interval(0.1, -0.05, 0.2), 3) == "undecided" == verdict(Interval(None, None, None), 3)
    assert per_seed([0.1, float("nan")]) == "+10.0, –"
    assert points(Interval(0.1, -0.05, 0.2)) == "+10.0 (-5.0 to +20.0)"
    assert share(Interval(None, None, None)) == "–"


def test_figures_of_an_arm():
    """Counts by hand: acceptance, its product, tokens without the one from prefill, and speed."""
    plain = WayCounts([5, 7], [4, 6], [1.0, 1.0], [], [], 0.5)
    drafted = WayCounts([5, 7], [2, 3], [0.5, 0.5], [[2, 3], [1, 2]], [[1, 2], [1, 0]], 0.5)
    row = made_up_row(Run(mtp_d(4), 0, CPU))
    row.decoding["greedy"] = ModeCounts([[3, 4]], [[4, 6]], {0: plain, 2: drafted})
    arm = Arm("made up", [row])
    assert arm.conditional("greedy", 2, 1).of_seeds() == pytest.approx(3 / 5)
    assert arm.conditional_of("greedy", 2, [1, 2]).of_seeds() == pytest.approx(4 / 8)
    assert arm.cumulative("greedy", 2, 2).of_seeds() == pytest.approx(3 / 5 * 1 / 3)
    assert arm.tokens_per_pass("greedy", 2).of_seeds() == pytest.approx(10 / 5)
    assert arm.speed_over("greedy", 2, 0).of_seeds() == pytest.approx(2)
    assert arm.agreement_on_output("greedy", 1).of_seeds() == pytest.approx(7 / 10)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MODULES)
def test_every_config_is_valid_at_every_scale(name, scale, tmp_path):
    for variant in MODULES[name].variants(SCALES[scale]):
        config = Run(variant, 0, SCALES[scale]).config()
        assert config.heads.num_heads <= 16
        assert max(Run(variant, 0, SCALES[scale]).heads()) <= 16


@pytest.mark.parametrize("name", MODULES)
def test_the_paper_scale_writes_configs_and_their_order(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--scale=paper", f"--workdir={tmp_path}"])
    assert command_line.main(MODULES[name], "") == 0
    script = (tmp_path / name / "launch.sh").read_text()
    commands = [shlex.split(line)[3:] for line in script.splitlines() if line.startswith("python")]
    trained = []
    for variant, command in zip(MODULES[name].variants(SCALES["paper"]), commands, strict=True):
        flags = frontdoor.parse_config_flags(command, "")
        config, workdir = Config.of(flags.config), flags.workdir
        expected = Run(variant, 0, SCALES["paper"]).config()
        assert (config.heads, config.optimizer, config.model) == (expected.heads, expected.optimizer, expected.model)
        assert decided(config) == decided(expected) and config.training == expected.training
        assert config.objective.source_run is None or config.objective.source_run in trained
        trained.append(workdir)
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "")


def test_bad_flags_are_one_line(monkeypatch, capsys, tmp_path):
    for arguments, word in (
        ([], "--scale"),
        (["--scale=tpu"], "--scale"),
        (["--scale=paper"], "--workdir"),
        (["--scale=cpu", f"--workdir={tmp_path}", "--only=mtp_5"], "mtp_5"),
        (["--scale=cpu", "--only=mtp_4"], "--only"),
        (["--scale=cpu", "--workdir=gs://bucket"], "local folder"),
    ):
        monkeypatch.setattr("sys.argv", ["x", *arguments])
        status = frontdoor.status_of(lambda: command_line.main(distillation.EXPERIMENT, ""))
        errors = capsys.readouterr().err
        assert status == 2 and word in errors and len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
