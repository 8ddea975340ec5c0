"""The texts of the story models: stories to train on, others that are held out, and their beginnings as prompts.

``python -m experiments.stories --file=TinyStories-valid.txt --output=data/tinystories`` cuts a file of stories, each
of which ends with ``<|endoftext|>``, into ``train.txt`` and ``held_out.txt``, none twice, and writes ``prompts.jsonl``.
"""

import json
import pathlib
from collections.abc import Iterator

from mtpd_jax import frontdoor
from mtpd_jax.data.files import read_text

_END = "<|endoftext|>"
# Bytes of text, our choice: what a model of 23 million parameters reads in an hour on two cores, and half as much.
SIZES = {"train": 5_800_000, "held_out": 2_500_000}
_PROMPTS, _PROMPT_CHARACTERS = 256, 160


def run(file: str, output: str) -> dict[str, int]:
    """Writes the three files.

    Returns:
      How many stories or prompts each has.

    Raises:
      ValueError: the file cannot be read, or has too few stories; or one of the three is there, or cannot be written.
    """
    stories = iter(dict.fromkeys(filter(None, map(str.strip, read_text(file, "--file").split(_END)))))
    parts = {name: _taken(stories, size) for name, size in SIZES.items()}
    if not parts["held_out"]:
        raise ValueError(f"--file={file}: expected more than {SIZES['train']:,} bytes of stories, to hold some out")
    beginnings = [story[:_PROMPT_CHARACTERS] for story in parts["held_out"][:_PROMPTS]]
    texts = {f"{name}.txt": "".join(f"{story}\n{_END}\n" for story in part) for name, part in parts.items()}
    texts["prompts.jsonl"] = "".join(json.dumps({"prompt": one}) + "\n" for one in beginnings)
    try:
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (pathlib.Path(output) / name).open("x", encoding="utf-8") as written:
                written.write(text)
    except OSError as error:
        raise ValueError(f"--output={output}: cannot be written to ({error.strerror or error})") from error
    return {**{name: len(part) for name, part in parts.items()}, "prompts": len(beginnings)}


def _taken(stories: Iterator[str], size: int) -> list[str]:
    """The next stories, until they come to so many bytes."""
    taken = []
    while size > 0 and (story := next(stories, None)) is not None:
        taken.append(story)
        size -= len(story.encode())
    return taken


def main() -> int:
    """Parses the flags, writes, says what."""
    parser = frontdoor.Parser(prog="python -m experiments.stories", description=__doc__)
    parser.add_argument("--file", required=True, help="stories, each of which ends with <|endoftext|>")
    parser.add_argument("--output", required=True, help="the folder of the three files, none of which may be there")
    flags = parser.parse_args()
    counts = run(flags.file, flags.output)
    print(f"{flags.output}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
