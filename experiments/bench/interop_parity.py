"""Whether a real model is the same there and here: logits, text, and every draft of every round.

``python -m experiments.bench.interop_parity --workdir=DIR --prompts=FILE`` exports a run in each of ``--formats`` and
decodes the prompts in transformers and here; ``--folder=FOLDER`` imports somebody's model instead, and compares logits
and token ids. Exit status 1 if anything differs. It needs transformers and PyTorch: PYTHONPATH=.cache/transformers.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tokenizers

from experiments.bench.decode import on_one_device
from experiments.bench.peer import Peer, our_rounds, same_rounds
from experiments.environment import environment
from mtpd_jax import frontdoor
from mtpd_jax.conversion import from_hf, to_hf
from mtpd_jax.data.prompts import prompts_of
from mtpd_jax.evaluation.report import new_table, number, write_json
from mtpd_jax.model.backbone import unembedding_of
from mtpd_jax.model.layers import apply
from mtpd_jax.run import Run
from mtpd_jax.runs.progress import Progress

# What logits may differ by, as a share of the largest.
_TOLERANCE = 1e-4


def logits_apart(opened: Run, peer: Peer, texts: Sequence[np.ndarray]) -> float:
    """The largest difference of the main head's logits, as a share of the largest logit."""
    import torch  # pyright: ignore[reportMissingImports]

    apart = 0.0
    for ids in texts:
        row = jnp.asarray(ids, jnp.int32)[None]
        hidden = apply(opened.trained.model, opened.parameters, row, jnp.ones_like(row), jnp.arange(len(ids))[None])
        ours = np.asarray(hidden.main[0] @ unembedding_of(opened.parameters).astype(jnp.float32).T)
        with torch.no_grad():
            theirs = peer.model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        apart = max(apart, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return apart


def exported(opened: Run, prompts: Sequence[np.ndarray], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per format and number of heads."""
    rows, steps = [], len(flags.formats) * len(flags.heads) * len(prompts)
    with tempfile.TemporaryDirectory() as place, Progress("comparing", steps) as progress:
        for format in flags.formats:
            folder = pathlib.Path(place) / format
            to_hf(flags.workdir, str(folder), format=format)
            peer = Peer(folder)
            apart = logits_apart(opened, peer, prompts)
            for heads in flags.heads:
                rounds, drafts, texts, alike = 0, 0, 0, 0
                for prompt in prompts:
                    text, ours = our_rounds(
                        opened.trained.model, opened.parameters, prompt.tolist(), flags.max_new_tokens, heads
                    )
                    peer.drafts.clear()
                    theirs = peer.generate(prompt.tolist(), flags.max_new_tokens, heads)
                    texts += text == theirs
                    alike += same_rounds(ours, peer.drafts)
                    rounds, drafts = rounds + len(ours), drafts + sum(map(len, peer.drafts))
                    progress.advance()
                rows.append(
                    {
                        "model": flags.workdir, "format": format, "heads": heads, "prompts": len(prompts),
                        "logits_apart": apart, "same_text": texts, "same_drafts": alike, "rounds": rounds,
                        "drafts": drafts, "same": texts == alike == len(prompts) and apart <= _TOLERANCE,
                    }
                )  # fmt: skip
    return rows


def imported(prompts: Sequence[str], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: logits and token ids of an imported model."""
    with tempfile.TemporaryDirectory() as place:
        from_hf(flags.folder, f"{place}/run")
        opened = on_one_device(f"{place}/run")
        library = tokenizers.Tokenizer.from_file(f"{flags.folder}/tokenizer.json")
        encoded = [opened.encode(prompt) for prompt in prompts]
        same = sum(ids.tolist() == library.encode(prompt).ids for ids, prompt in zip(encoded, prompts, strict=True))
        apart = logits_apart(opened, Peer(flags.folder), encoded)
    return [
        {
            "model": flags.folder, "format": "imported", "heads": 0, "prompts": len(prompts), "logits_apart": apart,
            "same_ids": same, "same": apart <= _TOLERANCE and same == len(prompts),
        }
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """What was compared, and whether it was the same."""
    columns = ("model", "format", "heads", "logits apart", "same text or ids", "rounds", "drafts", "same")
    made = new_table("", columns, left=("model", "format"))
    for row in rows:
        texts = row.get("same_text", row.get("same_ids"))
        made.add_row(
            pathlib.Path(row["model"]).name, row["format"], str(row["heads"]), f"{row['logits_apart']:.1e}",
            f"{texts}/{row['prompts']}", number(row.get("rounds"), 0),
            number(row.get("drafts"), 0), "yes" if row["same"] else "NO",
        )  # fmt: skip
    return made


def main(arguments: list[str]) -> int:
    """Parses flags, compares, prints the table, and writes JSON."""
    parser = frontdoor.Parser(prog="python -m experiments.bench.interop_parity", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="a trained run with heads")
    which.add_argument("--folder", help="somebody's model")
    parser.add_argument("--prompts", required=True, help='JSON lines with a field "prompt"')
    parser.add_argument("--number", type=int, default=8, help="of prompts (default: 8)")
    parser.add_argument("--heads", type=frontdoor.integers, help="that draft, such as 1,2,4 (default: all)")
    parser.add_argument("--formats", type=frontdoor.names, default=["hf"], help="such as hf,glm4_moe (default: hf)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="per prompt (default: 64)")
    parser.add_argument("--json", help="write the rows here")
    flags = parser.parse_args(arguments)
    frontdoor.check_output_path(flags.json)
    texts = [prompt for prompt in prompts_of(flags.prompts) if isinstance(prompt, str)]
    if flags.folder:
        rows = imported(texts[: flags.number], flags)
    else:
        opened = on_one_device(flags.workdir)
        most = opened.config.heads.num_heads
        flags.heads = flags.heads or [most]
        # transformers cannot draft after prompts that are shorter than a round.
        encoded = [ids for ids in map(opened.encode, texts) if len(ids) >= most][: flags.number]
        rows = exported(opened, encoded, flags)
    rich.console.Console().print(table(rows))
    if flags.json:
        write_json(flags.json, {"environment": environment(), "rows": rows})
    return int(not all(row["same"] for row in rows))


if __name__ == "__main__":
    frontdoor.guarded(lambda: main(sys.argv[1:]))
