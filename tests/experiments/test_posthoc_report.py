"""The post-hoc experiment: arms known by what they read, a page from rows alone, generations that are written once."""

import json
import pathlib

import pytest

from experiments import posthoc
from experiments.pretrained import Given
from experiments.sweep.runner import Code
from experiments.sweep.runs import Run
from mtpd_jax import frontdoor
from tests.experiments.rows import made_up_row

DIGESTS = {"backbone": "b" * 64, "text": "t" * 64, "held_out": "h" * 64}


def runs_of(scale, digests=DIGESTS, where="-"):
    inputs = posthoc.Inputs(where, where, where)
    made = posthoc.scale_of(scale, Given(where, where, where, None, digests))
    return {variant.name: Run(variant, 0, made) for variant in posthoc.MATRICES[scale](inputs, posthoc.SIZES[scale])}


@pytest.mark.parametrize("scale", posthoc.SIZES)
def test_an_arm_is_known_by_what_it_reads_and_not_where_that_lies(scale):
    runs = runs_of(scale)
    keys = {name: run.key() for name, run in runs.items()}
    assert len(set(keys.values())) == len(keys)
    assert {name: run.key() for name, run in runs_of(scale, where="/elsewhere").items()} == keys
    for name in DIGESTS:
        other = runs_of(scale, {**DIGESTS, name: "other"})
        assert all(other[arm].key() != key for arm, key in keys.items())


def test_the_matrix_is_whole_and_the_main_arm_is_varied_one_thing_at_a_time():
    assert len(runs_of("stories_656k")) == 3 * 2 * 3 * 2
    main, *others = (name.split() for name in runs_of("stories_19m"))
    # "both" on own text differs in what follows the first stage, which alone is the main arm.
    changed = {" ".join(words): sum(a != b for a, b in zip(main, words, strict=True)) for words in others}
    assert {name for name, number in changed.items() if number != 1} == {"shared kl both own"}


@pytest.mark.parametrize("scale", posthoc.SIZES)
def test_every_arm_can_be_run_and_second_stages_begin_with_the_heads_of_first_ones(scale):
    for name, run in runs_of(scale).items():
        config, (kind, loss, stage, data) = run.config(), name.split()
        assert config.objective.mode == "posthoc" and config.heads.num_heads == 3 and run.family == "posthoc"
        assert (config.heads.kind == "cascade") is (kind == "cascade")
        assert (config.heads.cache == "shared") is (kind == "shared")
        alpha, beta = config.objective.coefficients(3)
        assert (any(alpha), any(beta)) == ((False, True) if loss == "kl" else (True, False))
        assert (config.data.source == "generations") is (data == "own")
        assert (config.objective.initial_heads == "source") is (stage == "both") is (run.start is not None)
        if run.start is not None:
            assert run.start.variant.name == f"{kind} {loss} pre text"


def written_page(monkeypatch, tmp_path, arms, seeds):
    """The page, its path, and the names of all arms; rows are made up for some of them."""
    monkeypatch.setattr(posthoc, "RESULTS", tmp_path)
    folder = tmp_path / "stories_19m"
    folder.mkdir()
    (folder / "inputs.json").write_text(json.dumps({"posthoc": DIGESTS}))
    runs = runs_of("stories_19m")
    rows = []
    for name in arms or runs:
        of_arm = runs[name]
        for seed in seeds if of_arm.variant.seeds is None else (0,):
            quality = 0.5 if " lm " in name else 0.8
            rows.append(made_up_row(Run(of_arm.variant, seed, of_arm.scale), quality).to_json())
    (folder / "posthoc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("experiments.sweep.experiment.Code", lambda: Code(lambda family: "made up"))
    monkeypatch.setattr("sys.argv", ["x", "--scale=stories_19m"])
    assert frontdoor.status_of(posthoc.main) == 0
    return (folder / "posthoc.md").read_text(), list(runs)


def test_the_page_is_written_from_rows_and_what_they_are_known_by_alone(monkeypatch, tmp_path):
    text, names = written_page(monkeypatch, tmp_path, None, (0, 1, 2))
    assert "Left out" not in text and "b" * 16 in text and "nan" not in text
    assert all(f"| {name} |" in text for name in names)
    changes = [line.split(" | ") for line in text.splitlines() if line.startswith("| KL in place of LM loss")]
    assert [cells[1] for cells in changes] == ["shared kl pre text"] * 2  # greedy, and at temperature 1
    # Tokens per pass are made up alike for all; acceptance is not.
    assert all(cells[4].startswith("+0.00 (") for cells in changes)
    assert (tmp_path / "stories_19m" / "posthoc.png").stat().st_size > 10_000


def test_the_page_says_which_runs_it_lacks(monkeypatch, tmp_path):
    text, names = written_page(monkeypatch, tmp_path, ["shared kl pre text", "shared lm pre text"], (0, 2))
    without = [name for name in names if name not in ("shared kl pre text", "shared lm pre text")]
    (line,) = [line for line in text.splitlines() if line.startswith("Left out: ")]
    assert "seed 1 of shared kl pre text, shared lm pre text" in line
    assert "seeds 0 and 1 and 2 of shared kl pre own" in line
    assert f"seed 0 of {', '.join(name for name in without if name != 'shared kl pre own')}" in line


def test_generations_are_of_different_beginnings_and_are_written_once(monkeypatch, tmp_path):
    stories = ["One day a cat sat on a mat and ate", "One day a cat sat on a mat and slept", "Two dogs ran off", "x"]
    text, asked = tmp_path / "text.txt", []
    text.write_text("<|endoftext|>".join(stories))
    monkeypatch.setattr(posthoc.corpus, "run", lambda *given, **options: asked.append((given, options)))
    sizes = posthoc.Sizes(learning_rate=1.0, generations=2, characters=26, written=7)
    folder = posthoc.write_generations("backbone", str(text), tmp_path / "root", sizes)
    ((given, options),) = asked
    assert given[0] == "backbone" and given[2] == folder and options["max_new_tokens"] == 7
    prompts = [json.loads(line)["prompt"] for line in pathlib.Path(given[1]).read_text().splitlines()]
    assert prompts == ["One day a cat sat on a", "Two dogs ran"]


def test_bad_flags_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(posthoc, "RESULTS", tmp_path)
    for arguments, word in (
        ([], "--scale"),
        (["--scale=cpu"], "--scale"),
        (["--scale=stories_19m", "--text=a"], "--backbone is missing"),
        (["--scale=stories_19m", "--seeds=0"], "--workdir"),
        (["--scale=stories_19m"], "there are no rows"),
    ):
        monkeypatch.setattr("sys.argv", ["x", *arguments])
        assert frontdoor.status_of(posthoc.main) == 2
        errors = capsys.readouterr().err
        assert word in errors and len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
