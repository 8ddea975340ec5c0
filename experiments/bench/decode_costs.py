"""Timing the rounds of decoding and their parts, for one model and one batch size."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import base
from experiments.bench.decode_programs import Parts, Program, bare_products, iterations
from experiments.bench.timing import interleaved
from mtpd_jax.config import Config
from mtpd_jax.decoding.network import Network
from mtpd_jax.evaluation.speed import RoundCosts
from mtpd_jax.model.backbone import LanguageModel, build_model
from mtpd_jax.platform import platform_of

# What ``Network`` takes for ``scanned``.
LAYOUTS = {"chosen": None, "scanned": True, "unrolled": False}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: a name, a model and its parameters."""

    name: str
    model: LanguageModel
    parameters: Any


def random_subject(size: str, vocabulary: int, heads: int) -> Subject:
    """A model of ``WIDTHxLAYERS`` in the quickstart's proportions, heads of 64 or at least four of them.

    Raises:
      ValueError: the size does not read so, or the width is no multiple of 32.
    """
    try:
        width, layers = (int(part) for part in size.split("x"))
    except ValueError as error:
        raise ValueError(f"--sizes={size}: expected WIDTHxLAYERS, such as 256x24") from error
    if width % 32 or width < 32 or layers < 1:
        raise ValueError(f"--sizes={size}: expected a width that is a multiple of 32, and at least one layer")
    query_heads = max(4, width // 64)
    tree: Any = base.get_config()
    tree.model.update(
        vocabulary_size=vocabulary, width=width, layers=layers, query_heads=query_heads, kv_heads=query_heads // 2,
        head_size=width // query_heads, mlp_width=3 * width,
    )  # fmt: skip
    tree.heads.num_heads = heads
    model = build_model(Config.build(tree.to_dict()), platform_of(jax.devices()[0]))
    dummy = jnp.ones((1, heads + 2), jnp.int32)
    return Subject(size, model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), dummy, dummy, dummy))["params"])


@dataclasses.dataclass(frozen=True)
class Study:
    """What is timed.

    Attributes:
      heads: numbers of heads, beside none.
      widths: tokens per verify pass.
      parts: the numbers of heads whose rounds are timed in parts, too; None: all.
      products: whether the bare products of rounds of one row are timed, too.
      prompt, new_tokens: see ``Parts``.
      layout: of the layers, a name in ``LAYOUTS``.
      repeats: rounds of measuring.
      in_turn: whether all programs take turns, which needs memory for the states of all of them; else those with the
        same number of heads do, one number after the other.
    """

    heads: Sequence[int]
    widths: Sequence[int]
    parts: Sequence[int] | None = None
    products: bool = True
    prompt: int = 64
    new_tokens: int = 128
    layout: str = "chosen"
    repeats: int = 9
    in_turn: bool = True

    def network(self, subject: Subject) -> Network:
        """What is timed, as it is laid out."""
        return Network(subject.model, platform_of(jax.devices()[0]), LAYOUTS[self.layout])

    def programs(self, subject: Subject, rows: int) -> Iterator[dict[tuple[str, int], Program]]:
        """All that is timed for a batch size, by part and number of heads or width; what takes turns comes together."""
        network = self.network(subject)
        parameters = jax.jit(network.parameters)(subject.parameters)
        parts = Parts(network, parameters, rows, self.prompt, self.new_tokens)
        cache = parts.cache(max(self.widths))
        together: dict[tuple[str, int], Program] = {
            ("verify", width): parts.verify(width, cache) for width in self.widths
        }
        del cache  # which only the programs hold from here on
        for heads in (0, *self.heads):
            if not self.in_turn:
                yield together
                together = {}
            together["round", heads] = parts.round(heads)
            if not heads or self.parts is None or heads in self.parts:
                together["bookkeeping", heads] = parts.bookkeeping(heads)
                if heads:
                    together["draft", heads] = parts.draft(heads)
        if rows == 1 and self.products:
            unrolled = Network(subject.model, platform_of(jax.devices()[0]), scanned=False)
            written_out = jax.jit(unrolled.parameters)(subject.parameters)
            for heads in (0, *self.heads):
                together["products", heads] = bare_products(network, written_out, rows, heads)
        yield together


def _seconds(programs: dict[tuple[str, int], Program], rows: int, repeats: int, label: str) -> dict[Any, list[float]]:
    """Seconds of one iteration of each, in every round of measuring."""
    number = iterations(rows)
    times = {(key, count): lambda program=program, count=count: program(count)
             for key, program in programs.items() for count in (0, number)}  # fmt: skip
    taken = interleaved(times, repeats, label)
    return {
        key: [(whole - start) / number for whole, start in zip(taken[key, number], taken[key, 0], strict=True)]
        for key in programs
    }


def measure(subject: Subject, rows: int, study: Study) -> tuple[list[dict[str, Any]], RoundCosts]:
    """Times all parts for one batch size, taking turns."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for programs in study.programs(subject, rows):
        seconds |= _seconds(programs, rows, study.repeats, f"{subject.name}, batch {rows}")
        programs.clear()  # and with them their states
    scanned = study.network(subject).scanned
    medians = {key: max(0.0, statistics.median(each)) for key, each in seconds.items()}  # less than nothing: noise
    found = [
        {
            "model": subject.name,
            "batch": rows,
            "part": part,
            "heads" if part != "verify" else "width": count,
            "seconds": medians[part, count],
            "seconds_min": min(each),
            "seconds_max": max(each),
            "over_plain": medians[part, count] / medians["round", 0] if medians["round", 0] else None,
            "scanned": scanned,
        }
        for (part, count), each in seconds.items()
    ]
    by_part = {
        part: {count: value for (name, count), value in medians.items() if name == part}
        for part in ("verify", "draft", "bookkeeping")
    }
    return found, RoundCosts(rows, **by_part)
