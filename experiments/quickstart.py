"""The quickstart: train a small MTP-D model on Python's own source, decode held-out code with its heads, report.

``python -m experiments.quickstart --workdir=DIR`` leaves ``DIR/summary.json`` beside the run. Started again, training
goes on where it stopped, and a finished run is only measured.
"""

import dataclasses
import json
from typing import Any

import rich.console
import rich.table

from configs import quickstart
from experiments.sweep.measure import held_out_texts
from mtpd_jax import evaluate, frontdoor, train
from mtpd_jax.config import Config
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.evaluation.decoding import DecodingScore
from mtpd_jax.evaluation.report import decoding_table, new_table, number, percent, text_table, write_json
from mtpd_jax.evaluation.transcript import show
from mtpd_jax.run import open_run
from mtpd_jax.runs.workdir import open_workdir

PROMPTS = 10
PROMPT_TOKENS = 64
NEW_TOKENS = 128
# A few seconds of decoding are timed, which a machine that has other work would upset.
TURNS = 3


def summarise(scores: dict[str, DecodingScore]) -> dict[str, Any]:
    """The decoding part of summary.json: plain numbers, the flat ones for all heads, and the best K by wall clock."""

    def by_heads(score: DecodingScore) -> dict[str, Any]:
        return {
            "tokens_per_pass": score.tokens_per_pass.mean,
            "acceptance": {
                "conditional": [rate.mean for rate in score.acceptance.conditional],
                "cumulative": [rate.mean for rate in score.acceptance.cumulative],
            },
            "tokens_per_second": score.tokens_per_second.mean,
            "speedup": score.speedup_over_plain.mean,
        }

    drafting = {name: by_heads(score) for name, score in scores.items() if name != "0"}
    most = max(drafting, key=int)
    best = max(drafting, key=lambda name: drafting[name]["speedup"])
    everything = scores[most]
    return {
        "prompts": everything.prompts,
        "tokens_per_pass": drafting[most]["tokens_per_pass"],
        "acceptance": drafting[most]["acceptance"],
        "plain_tokens_per_second": scores["0"].tokens_per_second.mean,
        "speculative_tokens_per_second": drafting[most]["tokens_per_second"],
        "speedup": drafting[most]["speedup"],
        "identical": None if everything.identical is None else all(score.identical for score in scores.values()),
        "distinct_4grams": everything.distinct_4grams,
        "best_heads": int(best),
        "best_speedup": drafting[best]["speedup"],
        "by_heads": drafting,
    }


def summary_table(summary: dict[str, Any]) -> rich.table.Table:
    """The whole of the quickstart on one screen: what drafting brings with the best number of heads comes first."""
    parts = summary["decoding"], summary["decoding"]["sampled"]
    best = [part["by_heads"][str(part["best_heads"])] for part in parts]
    table = new_table("quickstart: summary", ("", "greedy", "sampled, temperature 1"), left=("",))
    table.add_row("best number of heads", *(str(part["best_heads"]) for part in parts), style="bold")
    table.add_row("times plain decoding", *(number(part["best_speedup"]) for part in parts), style="bold")
    table.add_row("tokens per pass", *(number(one["tokens_per_pass"]) for one in best))
    speeds = [
        (part["plain_tokens_per_second"], one["tokens_per_second"]) for part, one in zip(parts, best, strict=True)
    ]
    table.add_row("tokens/s, plain and so", *(f"{number(plain, 0)}, {number(own, 0)}" for plain, own in speeds))
    table.add_row("identical to plain decoding", "yes" if parts[0]["identical"] else "no", "(by distribution)")
    table.add_section()
    # What was trained, and what it makes of held-out text.
    table.add_row("trained", f"{summary['parameters']:,} parameters", f"{summary['train_seconds']:,.0f} s")
    main = summary["main"]
    table.add_row("held-out text, main head", f"CE {main['ce']:.3f} nats", f"{main['bits_per_byte']:.3f} bits per byte")
    for k, head in enumerate(summary["heads"], 1):
        table.add_row(
            f"held-out text, head {k}", f"CE {head['ce']:.3f} nats", f"agreement {percent(head['agreement'])}"
        )
    table.add_section()
    # Every head, and all together.
    for k, _ in enumerate(summary["heads"]):
        rates = [[part["acceptance"][name][k] for name in ("conditional", "cumulative")] for part in parts]
        table.add_row(f"head {k + 1}: accepted, cumulative", *(", ".join(map(percent, pair)) for pair in rates))
    for label, name in (("tokens per pass", "tokens_per_pass"), ("times plain", "speedup")):
        table.add_row(f"all heads: {label}", *(number(part[name]) for part in parts))
    table.add_row("distinct 4-grams", *(number(part["distinct_4grams"]) for part in parts))
    return table


def run(workdir: str) -> dict[str, Any]:
    """Trains, measures, prints, and returns what summary.json holds.

    Raises:
      ValueError: the workdir holds another run.
    """
    console = rich.console.Console(highlight=False)
    config = Config.build(quickstart.get_config().to_dict())
    result = train.run(config, workdir)
    if not result.finished or result.signal is not None:
        raise SystemExit(128 + (result.signal or 0))
    place = open_workdir(workdir).path
    opened = open_run(workdir)
    prompts = [opened.tokenizer.decode(text) for text in held_out_texts(opened, PROMPTS, PROMPT_TOKENS)]
    prompt_file = place / "prompts.jsonl"
    prompt_file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    console.print("scoring held-out files")
    text = evaluate.run(workdir, split_name="validation", batch_size=4).text
    console.print(text_table(text))
    heads = range(config.heads.num_heads + 1)
    parts = {}
    for name, sampling in (("greedy", GREEDY), ("sampled at temperature 1", Sampling(temperature=1.0))):
        console.print(f"decoding {len(prompts)} held-out prompts, {name}")
        report = evaluate.run(
            workdir,
            prompts=str(prompt_file),
            heads=list(heads),
            max_new_tokens=NEW_TOKENS,
            sampling=sampling,
            turns=TURNS,
        )
        parts[name] = report.decoding[str(prompt_file)].heads
        console.print(decoding_table(name, parts[name]))
    generation = opened.generate(prompts[:1], max_new_tokens=NEW_TOKENS, compare=True)[0]
    show(console, prompts[0], generation, opened.text_after(prompts[0]))
    greedy, sampled = (summarise(part) for part in parts.values())
    score = dataclasses.asdict(text["validation"])
    summary = {
        "train_seconds": result.seconds,
        "parameters": result.parameters,
        "main": score["main"],
        "heads": list(score["heads"]),
        "decoding": {**greedy, "sampled": sampled},
    }
    write_json(str(place / "summary.json"), summary)
    console.print(summary_table(summary))
    console.print(f"written to {open_workdir(workdir).shown}/summary.json")
    return summary


def main() -> int:
    """Parses the flag, runs."""
    parser = frontdoor.Parser(prog="python -m experiments.quickstart", description=__doc__)
    parser.add_argument("--workdir", required=True, help="where the run goes")
    run(parser.parse_args().workdir)
    return 0


if __name__ == "__main__":
    frontdoor.guarded(main)
