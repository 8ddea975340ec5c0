"""What tests of a model's own answers share: prompts, and what was written after them."""

import json
import pathlib
import random

from mtpd_jax import corpus
from mtpd_jax.decoding.sampling import Sampling

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "big", "dog", "run", "by"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAMPLED = Sampling(temperature=1.0)


def texts(number, longest=5):
    rng = random.Random(0)
    return [{"id": f"p{k}", "prompt": " ".join(rng.choices(WORDS, k=1 + k % longest))} for k in range(number)]


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def written(folder):
    return [json.loads(line) for path in sorted(pathlib.Path(folder).glob("gen*")) for line in path.open()]


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name != "lock"}


def write(workdir, prompts, output, **options):
    options = {"max_new_tokens": 10, "sampling": SAMPLED, "batch_size": 4, **options}
    return corpus.run(str(workdir), str(prompts), str(output), **options)


def say(role, content):
    return {"role": role, "content": content}
