"""The commands' functions, as a notebook calls them: they answer as the commands do, and say nothing of their own."""

import json
import shutil
import subprocess
import sys
import textwrap
import warnings

from mtpd_jax import evaluate, generate, train
from tests.builders import tiny_config

# What is given from Python where something else is expected, and the words of the answer.
MISTAKES = (
    ("train.run(None, new)", "config = None: expected a Config"),
    ("train.run({**config, 'model': None}, new)", "config.model = None: expected a section"),
    ("train.run(config, 3)", "workdir = 3: expected the name of a folder"),
    ("train.run(config, '')", "workdir = '': expected the name of a folder"),
    ("train.run(config, new, checkpoint='ten')", "--checkpoint=ten: expected newest"),
    ("generate.run(run, ['a'], checkpoint=10.0)", "checkpoint = 10.0: expected an integer"),
    ("generate.run(run, ['a'], bit_exact='no')", "bit_exact = 'no': expected True or False"),
    (
        "train.run(dataclasses.replace(whole, model=dataclasses.replace(whole.model, width='32')), new)",
        "model.width = '32'",
    ),
    (
        "train.run({**config, 'data': {'source': 'text', 'paths': 'a.txt'}}, new)",
        "data.paths = 'a.txt': expected tuple",
    ),
    ("evaluate.run(run, text=[3])", "text = [3]: expected a list of files"),
    ("evaluate.run(run, split_name='validation', heads=3)", "heads = 3: expected a list of integers"),
    ("generate.run(run, 'Once')", "prompts = 'Once': expected a list of texts"),
    ("generate.run(run, [3])", "prompt 1 = 3: expected a text"),
    ("generate.run(run, None)", "prompts = None: expected a list"),
    ("generate.run(run, ['a'], sampling={})", "sampling = {}: expected a Sampling"),
    ("generate.run(run, ['a'], seed=-1)", "seed = -1: expected 0 to"),
    ("generate.run(run, ['a'], seed='1')", "seed = '1': expected an integer"),
    ("generate.run(run, ['a'], heads='2')", "heads = '2': expected an integer"),
    ("generate.run(run, ['a'], heads=True)", "heads = True: expected an integer"),
    ("generate.run(run, ['a'], max_new_tokens=4.0)", "max_new_tokens = 4.0: expected an integer"),
    ("generate.run(run, ['a'], sampling=Sampling('1'))", "temperature = '1': expected a number"),
    ("generate.run(run, ['a'], min_confidence=None)", "min_confidence = None: expected a number"),
    ("evaluate.run(run, text='a.txt')", "text = 'a.txt': expected a list of files"),
    ("evaluate.run(run, prompts=['a'])", "prompts = ['a']: expected the name of a file"),
    ("evaluate.run(run, split_name='validation', sampling={})", "sampling = {}: expected a Sampling"),
    ("evaluate.run(run, split_name='validation', heads=['2'])", "heads = '2': expected an integer"),
    ("evaluate.run(run, split_name='validation', batch_size='2')", "batch_size = '2': expected an integer"),
    ("evaluate.run(run, split_name='validation', turns=0)", "--turns=0: expected at least one"),
    ("evaluate.run(run, split_name='validation', seed=2**32)", "seed = 4294967296"),
)


def test_the_python_functions_answer_as_the_commands_do(workdir, tmp_path):
    """With ValueError; in a process whose annotations nobody checks, as users have it."""
    program = """
        import dataclasses, json, sys
        from mtpd_jax import evaluate, generate, train
        from mtpd_jax.config import Config
        from mtpd_jax.decoding.sampling import Sampling
        run, new, config, mistakes = json.loads(sys.argv[1])
        whole = Config.build(config)
        for expression, words in mistakes:
            try:
                eval(expression)
                print(expression, "is taken silently")
            except ValueError as error:
                if words not in str(error):
                    print(expression, "is answered with", error)
    """
    given = json.dumps([str(workdir), str(tmp_path / "w"), tiny_config().to_dict(), MISTAKES])
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(program), given], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not (tmp_path / "w").exists()


def test_the_python_functions_say_nothing_of_their_own(workdir, text_file, tmp_path, capsys):
    """A config may be nested mappings; libraries' warnings stay theirs, in figures of one prompt, too."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "the cat"}\n')
    config = tiny_config(data__source="text", data__paths=(text_file,), training__steps=10).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        assert train.run(config, str(shutil.copytree(workdir, tmp_path / "copy"))).finished
        assert len(capsys.readouterr().err.splitlines()) == 1
        evaluate.run(str(workdir), prompts=str(prompts), max_new_tokens=4)
        generate.run(str(workdir), ["the cat"], max_new_tokens=4)
        generate.run(str(workdir), ("the cat",), max_new_tokens=4, heads=0)
    assert capsys.readouterr().err == ""


def test_the_package_alone_is_enough_to_import():
    """In a process that has imported nothing else: the commands are modules of it that nobody asked for yet."""
    program = (
        "import mtpd_jax; print(mtpd_jax.corpus.run.__name__, mtpd_jax.train.run.__name__, mtpd_jax.open_run.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == ["run", "run", "open_run"], found.stderr
