"""A model's own answers to a file of prompts, written as data for training (``data.generations``).

What is written of a prompt depends on the prompt, its id and the seed, and on nothing that happened before: prompts are
decoded in groups whose members follow from the ids alone, and a group that was not written as a whole is decoded again.
So a run that was killed, however often, leaves the same bytes as one that was not.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtpd_jax.data.chat import Message, Prompt
from mtpd_jax.data.documents import digest_of
from mtpd_jax.data.files import json_digest, read_json
from mtpd_jax.data.prompts import PromptRow
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.data.written import (
    FAILED,
    LEFT_OUT,
    MANIFEST,
    SKIPPED,
    Counts,
    LeftOut,
    Written,
    append,
    shard,
    shards_of,
    validate,
)
from mtpd_jax.decoding.decoder import Continuation
from mtpd_jax.decoding.options import Options, check_seed
from mtpd_jax.decoding.stops import transitions_of
from mtpd_jax.evaluation.generation import cut_before
from mtpd_jax.run import Run
from mtpd_jax.runs.digests import digests_of
from mtpd_jax.runs.lock import take_lock
from mtpd_jax.runs.workdir import Workdir, is_temporary, write_atomically
from mtpd_jax.validation import check_count

# Groups of prompts whose answers stand in one file, and batches in a group. Our choice.
_GROUPS_PER_SHARD, _BATCHES = 64, 4


@dataclasses.dataclass(frozen=True)
class _Task:
    """A prompt that is answered, turn by turn: each turn is what stands before an answer."""

    row: PromptRow
    turns: tuple[Prompt, ...]
    first: np.ndarray

    @property
    def hash(self) -> int:
        return digest_of(self.row.id.encode())


class Corpus:
    """Writes the answers of an open run to a file of prompts.

    Args:
      run: that answers.
      rows: the prompts.
      options: how they are decoded.
      seed: of sampling.
      stop: strings that end an answer.
      batch_size: prompts that are decoded together.

    Attributes:
      rows: the prompts.

    Raises:
      ValueError: an id stands twice; an option is out of range; there are conversations and no chat template, or one
        that does not say where answers begin.
    """

    def __init__(
        self, run: Run, rows: Sequence[PromptRow], options: Options, seed: int, stop: Sequence[str], batch_size: int
    ):
        check_seed(seed)
        check_count("batch_size", batch_size)
        # What holds for a short prompt; those that are too long are skipped.
        run.decoder.check([np.zeros(1, np.int32)] * batch_size, options, batch_size)
        self._run, self.rows, self._options, self._seed = run, rows, options, seed
        self._stop, self._batch = tuple(stop), batch_size
        self._transitions = transitions_of(run.tokenizer.token_bytes(), stop) if stop else None
        lines: dict[str, int] = {}
        for row in rows:
            if row.id in lines:
                raise ValueError(f"--prompts: lines {lines[row.id]} and {row.line} have the same id {row.id!r}")
            lines[row.id] = row.line
        if any(not isinstance(row.prompt, str) for row in rows):
            if run.template is None:
                raise ValueError("--prompts: holds conversations, and the model has no chat template to read them with")
            run.template.check_boundary()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self._run.tokenizer

    def note(self) -> str:
        """What has to be said of texts in which heads do not draft to the end; nothing where there is none."""
        tasks, _ = self._tasks()
        return self._run.note_of([task.first for task in tasks], self._options)

    def announce(self, say: Callable[[str], None]) -> None:
        """Has ``say`` told what is compiled, before that keeps everybody waiting."""
        self._run.decoder.on_compile = lambda options: say(f"compiling {options.words} …")

    def manifest(self) -> dict[str, Any]:
        """What decides every byte of the answers: another of any of these is another corpus."""
        prompts = sorted((row.id, json.dumps(row.prompt, sort_keys=True)) for row in self.rows)
        digests, _ = digests_of(self._run.parameters)
        template, config = self._run.template, self._run.config
        return {
            "weights": json_digest(digests),
            "step": self._run.step,
            "tokenizer": self._run.tokenizer.digest,
            "template": None if template is None else template.digest,
            "config": json_digest([dataclasses.asdict(section) for section in (config.model, config.tokenizer)]),
            "context": self._run.decoder.context,
            "prompts": json_digest(prompts),
            "rows": len(self.rows),
            "seed": self._seed,
            "stop": list(self._stop),
            "batch_size": self._batch,
            "decoding": dataclasses.asdict(self._options),
        }

    def write(self, folder: pathlib.Path, on_prompts: Callable[[int], None] = lambda prompts: None) -> Counts:
        """Writes what is not written yet.

        Args:
          folder: new, or of the same corpus.
          on_prompts: called with the number of prompts that were dealt with.

        Raises:
          ValueError: the folder holds another corpus, or something else; or another process writes it.
          OSError: something cannot be written.
        """
        _check_folder(folder, manifest := self.manifest())
        with take_lock(Workdir(epath.Path(folder))):
            begun = _check_folder(folder, manifest)  # again: another process may have begun meanwhile
            if not begun:
                (folder / LEFT_OUT).unlink(missing_ok=True)
            moment = self._stop_clock(folder if begun else None)
            write_atomically(epath.Path(folder / MANIFEST), json.dumps({**manifest, **moment}, indent=2) + "\n")
            tasks, skipped = self._tasks()
            written, left_out = Written.of(folder, mend=True), LeftOut(folder / LEFT_OUT, mend=True)
            for row, reason in skipped:
                left_out.add(row.id, SKIPPED, reason)
            on_prompts(len(skipped))
            for number, group in enumerate(self._groups(tasks)):
                if not all(task.row.id in written.ids or task.row.id in left_out.ids for task in group):
                    self._write_group(folder / shard(number // _GROUPS_PER_SHARD), group, written, left_out)
                on_prompts(len(group))
        return validate(folder)

    def preview(self, number: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Answers the first prompts that can be answered, without writing anything.

        Returns:
          Their rows, and by id why prompts have none: those that cannot be answered, and those that failed.
        """
        tasks, skipped = self._tasks()
        without = {row.id: reason for row, reason in skipped}
        first, rows = sorted(tasks, key=lambda task: task.row.line)[:number], []
        for task, answers in zip(first, self._answers(first), strict=True):
            if isinstance(answers, str):
                without[task.row.id] = answers
            else:
                rows += answers
        return rows, without

    def _stop_clock(self, begun: pathlib.Path | None) -> dict[str, str]:
        """Has the template write one day in all prompts, whenever they are answered; returns what the manifest keeps.

        ``begun`` is the folder of what was written before.
        """
        template = self._run.template
        if template is None or not template.reads_clock:
            return {}
        now = datetime.datetime.now().isoformat() if begun is None else read_json(begun / MANIFEST)["now"]
        template.stop_clock(datetime.datetime.fromisoformat(now))
        return {"now": now}

    def _tasks(self) -> tuple[list[_Task], list[tuple[PromptRow, str]]]:
        """What can be answered, and what cannot, with the reason."""
        tasks, skipped = [], []
        for row in self.rows:
            try:
                turns = turns_of(row.prompt)
                tasks.append(_Task(row, turns, self._encode(turns[0])))
            except ValueError as error:
                skipped.append((row, str(error)))
        return tasks, skipped

    def _encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt that can be answered.

        Raises:
          ValueError: it cannot, and why.
        """
        ids, room = self._run.encode(prompt), self._run.decoder.context - self._options.max_new_tokens
        if not prompt or not len(ids):  # a token that texts begin with says nothing
            raise ValueError("empty: there is nothing to continue")
        if len(ids) > room:
            raise ValueError(f"{len(ids)} tokens, and there is room for {room}")
        return ids

    def _groups(self, tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
        """Tasks whose first prompts have a length, in an order that follows from their ids."""

        def length(task: _Task) -> int:
            return self._run.decoder.padded_length(len(task.first))

        ordered, size = sorted(tasks, key=lambda task: (length(task), task.hash, task.row.id)), self._batch * _BATCHES
        for _, together in itertools.groupby(ordered, length):
            alike = list(together)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _write_group(self, path: pathlib.Path, group: Sequence[_Task], written: Written, left_out: LeftOut) -> None:
        lines = []
        for task, answers in zip(group, self._answers(group), strict=True):
            if isinstance(answers, str):
                left_out.add(task.row.id, FAILED, answers)
            elif task.row.id not in written.ids:
                lines += [json.dumps(row) + "\n" for row in answers]
                written.ids.add(task.row.id)
        append(path, "".join(lines))

    def _answers(self, group: Sequence[_Task]) -> list[list[dict[str, Any]] | str]:
        """For each prompt its rows, one per turn, or why there are none; turn by turn for all of them."""
        found: list[list[dict[str, Any]] | str] = [[] for _ in group]
        said: list[list[Message]] = [[] for _ in group]
        for turn in range(max((len(task.turns) for task in group), default=0)):
            asked: dict[int, np.ndarray] = {}
            for place, task in enumerate(group):
                if turn < len(task.turns) and not isinstance(found[place], str):
                    try:
                        prompt = task.turns[turn]
                        asked[place] = self._encode([*said[place], *_messages(prompt)]) if turn else task.first
                    except ValueError as error:
                        found[place] = f"turn {turn}: {error}"
            for place, answer in self._decode(asked, [task.hash for task in group], turn).items():
                task, rows = group[place], found[place]
                assert isinstance(rows, list)  # or it was not asked
                rows.append(self._row(task, turn, asked[place], answer))
                if not isinstance(task.row.prompt, str):
                    text = cut_before(self._run.tokenizer.text_after(asked[place])(answer.tokens), self._stop)
                    said[place] += [*_messages(task.turns[turn]), {"role": "assistant", "content": text}]
        return found

    def _decode(self, asked: dict[int, np.ndarray], hashes: Sequence[int], turn: int) -> dict[int, Continuation]:
        """Answers by place; prompts of a length together, few numbers of them, so that few programs are compiled."""
        by_length: dict[int, list[int]] = {}
        for place, ids in asked.items():
            by_length.setdefault(self._run.decoder.padded_length(len(ids)), []).append(place)
        found = {}
        for _, places in sorted(by_length.items()):
            batches = -(-len(places) // self._batch)
            size = self._batch << (batches - 1).bit_length()
            full = [*places, *[places[-1]] * (size - len(places))]
            keys = jax.random.key(self._seed)
            words = [(hashes[place] >> 32, hashes[place] % 2**32, turn) for place in full]
            keys = jax.vmap(_folded, (None, 0))(keys, jnp.asarray(words, jnp.uint32))
            answers = self._run.decoder.run(
                [asked[place] for place in full], self._options,
                rows=self._batch, transitions=self._transitions, keys=keys,
            )  # fmt: skip
            found |= dict(zip(places, answers, strict=False))
        return found

    def _row(self, task: _Task, turn: int, prompt: np.ndarray, answer: Continuation) -> dict[str, Any]:
        end = "end" if answer.tokens[-1] in self._run.tokenizer.end_ids else "stop"
        return {
            "id": task.row.id,
            "turn": turn,
            "turns": len(task.turns),
            "group": f"{digest_of(task.first.astype(np.int32).tobytes()):016x}",
            "ids": [*prompt.tolist(), *answer.tokens],
            "loss_mask": [0] * len(prompt) + [1] * len(answer.tokens),
            "finish": end if end == "end" or len(answer.tokens) < self._options.max_new_tokens else "length",
            "seed": self._seed,
        }


def turns_of(prompt: Prompt) -> tuple[Prompt, ...]:
    """What stands before each answer of a conversation, the answers themselves left out; a text is one turn.

    Raises:
      ValueError: nobody asks anything.
    """
    if isinstance(prompt, str):
        return (prompt,)
    turns: list[list[Message]] = []
    answered = True
    for message in prompt:
        if message["role"] == "assistant":
            answered = True
        elif answered and (not turns or any(one["role"] != "system" for one in turns[-1])):
            turns.append([message])
            answered = False
        else:
            turns[-1].append(message)
            answered = False
    asked = [turn for turn in turns if any(message["role"] != "system" for message in turn)]
    if not asked:
        raise ValueError("no message asks for an answer")
    return tuple(asked)


def _messages(turn: Prompt) -> Sequence[Message]:
    """A turn of a conversation."""
    assert not isinstance(turn, str)  # a text is one turn
    return turn


def _check_folder(folder: pathlib.Path, manifest: dict[str, Any]) -> bool:
    """Checks that a folder is new, or holds the same corpus; returns whether anything of it is written."""
    if not (folder / MANIFEST).exists():
        if folder.exists() and any(path.name != "lock" and not is_temporary(path) for path in folder.iterdir()):
            raise ValueError(f"{folder} exists and holds no generations: use a new or an empty folder")
        return False
    there = {name: value for name, value in read_json(folder / MANIFEST).items() if name != "now"}
    wanted = json.loads(json.dumps(manifest))
    changed = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    # Where no answer stands yet, nothing can be mixed.
    if changed and not shards_of(folder):
        return False
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        raise ValueError(f"{folder} holds other generations: {', '.join(changed)} {verb}; use another --output")
    return True


def _folded(key: jax.Array, words: jax.Array) -> jax.Array:
    """A key for the words of an id's hash, and the turn."""
    for word in words:
        key = jax.random.fold_in(key, word)
    return key
