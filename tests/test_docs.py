"""What the README and the manual say can be typed is what there is, and where their links lead something stands."""

import importlib
import json
import re
import runpy
import shutil
import tomllib

import pytest

from mtpd_jax import frontdoor, train
from mtpd_jax.conversion import to_hf
from tests.builders import tiny_config
from tests.commands import ALL, FRAGMENTS, OUTLINES, PAGES, ROOT, commands_of, fragments_of, prose_of

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# What is not run here, by the beginning of its words: it takes longer than twenty seconds, or needs what is not here.
LONG = (
    "make docs", "make lint", "make mutants", "make quickstart", "make soak", "make test", "make test-all",
    "pip install",
    "python -m pip install", "python -m pytest", "python -m experiments.ablations", "python -m experiments.accelerator",
    "python -m experiments.bench.attention_tpu", "python -m experiments.bench.decode",
    "python -m experiments.bench.interop", "python -m experiments.bench.interop_parity",
    "python -m experiments.bench.loss", "python -m experiments.bench.loss_tpu",
    "python -m experiments.bench.throughput", "python -m experiments.bench.training", "python -m experiments.decay",
    "python -m experiments.distillation", "python -m experiments.freezing", "python -m experiments.head_count",
    "python -m experiments.looped", "python -m experiments.posthoc", "python -m experiments.standalone",
    "python -m experiments.stories",
    "python -m experiments.sweep.fingerprint", "python -m mtpd_jax.train --config=configs/base.py",
)  # fmt: skip
# Those that are run in every test; the others are slow together.
QUICK = ("python -m mtpd_jax.reference", "--dry_run", "--html=report.html")


class Parsed(BaseException):
    """A parser took the flags; no command catches it."""


def module_of(words):
    return importlib.import_module(words[2])


def in_process(words, monkeypatch):
    """Runs ``python -m MODULE …`` in this process; returns its exit status."""
    monkeypatch.setattr("sys.argv", words[2:])
    module = module_of(words)
    return frontdoor.status_of(module.main)


def test_what_is_no_command_is_known():
    """An outline, of which blocks have one; all else that looks like a command is held to the parsers."""
    assert [line.split()[-2:] for line in OUTLINES] == [["[--config.section.field=value", "…]"]]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_is_one_that_there_is(command, monkeypatch):
    """Its flags are those of the real parser; one without any in a sentence is the name of a module."""
    _, *words = command
    if words[0] == "make":
        made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in made or re.match(r"(PYTHON|JAX|DEVICE|MINUTES|SEED)=", word) for word in words[1:])
        return
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", words[-1]))
        return
    if words[2] in ("pip", "pytest"):
        return
    module = module_of(words)
    if len(words) == 3:
        return

    def parse(parser, arguments=None, namespace=None):
        raise Parsed(original(parser, arguments, namespace))

    original = frontdoor.Parser.parse_args
    monkeypatch.setattr(frontdoor.Parser, "parse_args", parse)
    for name in ("run", "dry_run"):
        monkeypatch.setattr(train, name, lambda *_, **__: (_ for _ in ()).throw(Parsed()))
    monkeypatch.setattr(frontdoor, "guarded", lambda main: main())
    monkeypatch.setattr("sys.argv", words[2:])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        # As it is run, but for training, whose ``run`` is put in place of above.
        train.main() if module is train else runpy.run_module(words[2], run_name="__main__")


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=" ".join)
def test_every_flag_of_a_sentence_is_one_that_there_is(fragment, monkeypatch):
    name, *flags = fragment
    monkeypatch.setattr(frontdoor.Parser, "parse_args", lambda parser, *_: (_ for _ in ()).throw(Parsed(parser)))
    with pytest.raises(Parsed) as caught:
        importlib.import_module(name).main()
    help_text = caught.value.args[0].format_help()
    assert all(re.search(rf"{flag}\b", help_text) for flag in flags)


def test_what_is_long_is_named_once_and_stands_somewhere():
    lines = [" ".join(words) for _, *words in ALL]
    assert len(set(LONG)) == len(LONG) and all(any(line.startswith(one) for line in lines) for one in LONG)


SMALL = {
    "training.steps": 2, "training.batch_size": 8, "training.sequence_length": 32, "optimizer.warmup_steps": 1,
    "data.shuffle_window": 8, "data.validation_fraction": 0.2, "checkpoint.every_steps": 2,
    "evaluation.every_steps": 2, "evaluation.documents": 2, "logging.every_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, text_file):
    """A folder in which the names that the pages use are a tiny run, a tiny model and small files."""
    folder = tmp_path_factory.mktemp("world")
    of_text = {"data.source": "text", "data.paths": (text_file,)}
    small = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=4, model__context=256, mesh__data=1
    )
    train.run(small, str(folder / "runs" / "quickstart"))
    prompts = [{"prompt": "the cat"}, {"prompt": "a big dog"}]
    for place in (
        "prompts.jsonl",
        "runs/quickstart/prompts.jsonl",
        "runs/posthoc_19m/held_out.jsonl",
        "data/tinystories/prompts.jsonl",
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("".join(json.dumps(one) + "\n" for one in prompts))
    (folder / "docs").mkdir()  # where a picture is drawn
    for place in ("text/stories.txt", "stories/stories.txt", "stories.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(text_file, folder / place)
    plain = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=4, model__context=256, mesh__data=1,
        heads__num_heads=0,
    )  # fmt: skip
    train.run(plain, str(folder / "runs" / "small"))
    for name in ("FOLDER", "tinystories-656k"):
        to_hf(str(folder / "runs" / "small"), str(folder / name), format="backbone")
    (folder / "RUN").symlink_to(folder / "runs" / "heads")
    (folder / "DIR").symlink_to(folder / "runs" / "imported")
    # Config files of the same names: the real ones, but small.
    (folder / "configs").mkdir()
    sizes = dict(plain.to_dict()["model"])
    for name in ("quickstart", "stories", "posthoc", "standalone"):
        model = {f"model.{key}": value for key, value in sizes.items()} if name in ("quickstart", "stories") else {}
        beside = {"objective.k_max": 3} if name == "standalone" else {"evaluation.prompts": 2} if not model else {}
        changes = {**SMALL, **of_text, **model, **beside}
        (folder / "configs" / f"{name}.py").write_text(
            f"from configs import {name}\nfrom mtpd_jax.editing import change\n\n"
            f"def get_config():\n    config = {name}.get_config()\n    change(config, {changes!r})\n    return config\n"
        )
    return folder


def is_quick(words):
    return words[-1].startswith(QUICK) or " ".join(words) in QUICK


def is_long(words):
    """One of those, or the name of a module in a sentence."""
    return re.match(rf"({'|'.join(map(re.escape, LONG))})(?![\w.-])", " ".join(words)) or len(words) == 3


def test_the_quick_ones_run(world, monkeypatch):
    monkeypatch.chdir(world)
    quick = [words for _, *words in ALL if is_quick(words) and "reference" not in words[2]]
    assert len(quick) == 2
    for words in quick:
        assert in_process(words, monkeypatch) == 0, words


@pytest.mark.slow
def test_all_others_run_too(world, monkeypatch):
    """In the order in which a reader needs them: what trains or imports comes before what opens it."""
    monkeypatch.chdir(world)
    order = ("convert from_hf", "mtpd_jax.train", "mtpd_jax.corpus")
    chosen = {tuple(words): None for _, *words in ALL if not is_quick(words) and not is_long(words)}

    def place(words):
        line = " ".join(words)
        # The second stage learns from what the first one has written.
        later = 3 * ("generations" in line) + ("--preview" in line)
        return next((n for n, one in enumerate(order) if one in line), len(order)) + later

    ran = sorted(chosen, key=place)
    assert len(ran) > 12
    for words in ran:
        assert in_process(list(words), monkeypatch) == 0, " ".join(words)


@pytest.mark.slow
def test_the_lines_of_python_in_the_readme_run(world, monkeypatch, capsys):
    """With the quickstart's config made small."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    small = runpy.run_path(str(world / "configs" / "quickstart.py"))["get_config"]()
    monkeypatch.setattr("configs.quickstart.get_config", lambda: small)
    monkeypatch.chdir(world)
    exec(block, {})
    assert re.search(r"^nats per token: \d+\.\d+$", capsys.readouterr().out, re.MULTILINE)


def headings(page):
    """The anchors of a page: its headings as they are linked to, and those that it names itself."""
    text = prose_of(page.read_text())
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{page.name}: {link}"


def test_the_project_lives_at_one_address():
    """Whoever names it has it from pyproject.toml."""
    for file in [ROOT / "CITATION.cff", *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        addresses = set(re.findall(r"https://github\.com/[\w-]+/mtpd_jax", file.read_text()))
        assert addresses == {REPOSITORY}, file
    for page in PAGES:
        assert set(re.findall(r"https://[^/\s]+/[\w-]+/mtpd_jax", page.read_text())) <= {REPOSITORY}, page


def test_every_notebook_opens_in_colab():
    page, owner = (ROOT / "docs" / "notebooks.md").read_text(), REPOSITORY.removeprefix("https://github.com/")
    found = set(re.findall(r"\(https://colab\.research\.google\.com/github/(\S+)\)", page))
    assert found == {f"{owner}/blob/main/notebooks/{one.name}" for one in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_commands_are_found():
    """Between blocks of other languages, too, after variables, and by the names that sentences have for them."""
    text = (
        "`make a\nb` and\n```python\nmake = 1\n```\n`make d`\n```\npython -m x --y=1 \\\n    --z='a b'   # why\n"
        "print(1)\n```\n`python -m n.NAME` `A=b .venv/bin/python -m y` `mtpd_jax.evaluate --a=1\n--b` `generate it`\n"
        "```json\nmake e\n```\n```bash\nmake f\n```\n"
    )
    assert commands_of(text) == [
        ["python", "-m", "x", "--y=1", "--z=a b"], ["make", "f"], ["make", "a", "b"], ["make", "d"],
        ["python", "-m", "y"],
    ]  # fmt: skip
    assert fragments_of(text) == [("mtpd_jax.evaluate", "--a", "--b")]
    # Of a page with blocks of Python between its commands: what once was missed.
    shown = [" ".join(words) for words in commands_of((ROOT / "docs" / "running.md").read_text())]
    assert sum("mtpd_jax.generate" in line for line in shown) == 4 and any("--json=plan.json" in line for line in shown)
