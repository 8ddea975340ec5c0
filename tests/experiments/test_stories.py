"""The story models' texts."""

import json

import pytest

from experiments import stories
from mtpd_jax.data.files import read_text


def file_of(tmp_path, number):
    """So many stories of 100 to 102 bytes, the first of them twice."""
    texts = [f"story {n} é ".ljust(99, "x") for n in range(number)]
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{text}\n<|endoftext|>\n" for text in [texts[0], *texts]), encoding="utf-8")
    return path, texts


def test_every_story_is_on_one_side(tmp_path, monkeypatch):
    """In the order of the file, until a part is full; prompts are beginnings of what is held out."""
    monkeypatch.setattr(stories, "SIZES", {"train": 1_000, "held_out": 250})
    path, texts = file_of(tmp_path, 20)
    counts = stories.run(str(path), str(tmp_path / "new" / "data"))
    parts = {
        name: [one.strip() for one in read_text(tmp_path / "new" / "data" / f"{name}.txt", "").split("<|endoftext|>")]
        for name in ("train", "held_out")
    }
    assert parts == {"train": [*texts[:10], ""], "held_out": [*texts[10:13], ""]}
    lines = (tmp_path / "new" / "data" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == texts[10:13]
    assert counts == {"train": 10, "held_out": 3, "prompts": 3}
    with pytest.raises(ValueError, match="--output=.*File exists"):  # and nothing is overwritten
        stories.run(str(path), str(tmp_path / "new" / "data"))


def test_too_few_stories_are_none(tmp_path):
    path, _ = file_of(tmp_path, 20)
    with pytest.raises(ValueError, match=r"expected more than 5,800,000 bytes of stories"):
        stories.run(str(path), str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"--file .*cannot be read"):
        stories.run(str(tmp_path / "none.txt"), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()
