"""Training from the first step to the last: everything around the step that is not mathematics."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from mtpd_jax.data.pipeline import Batch, TrainingData, put_on_devices
from mtpd_jax.methods.method import Method
from mtpd_jax.runs.checkpoint import Checkpointer
from mtpd_jax.runs.choice import RATING
from mtpd_jax.runs.interruption import StopRequest
from mtpd_jax.runs.metrics import MetricsLog, utilisation
from mtpd_jax.runs.processes import first_decides
from mtpd_jax.runs.progress import Progress
from mtpd_jax.shapes import Parameters
from mtpd_jax.sharding import batch_sharding
from mtpd_jax.training.optimizer import learning_rate_schedule
from mtpd_jax.training.state import DivergedError, TrainState
from mtpd_jax.training.step import StepResult

# Figures of heads beside each other in a log: three times as many fit on 80 columns. Our choice.
_SHOWN = 3

Step = Callable[[TrainState, Batch], tuple[TrainState, StepResult]]


class Evaluate(Protocol):
    """The evaluation of a run.

    Attributes:
      rates: whether it rates checkpoints: there is one wherever it is due, then.
    """

    rates: bool

    def __call__(self, parameters: Parameters, keep_going: Callable[[], bool]) -> Mapping[str, float | None] | None:
        """Metrics, ``eval/…`` and perhaps ``decoded/…``; None if it was told to stop."""
        ...


@dataclasses.dataclass
class _Meter:
    """Tokens per second since the last reading. Compilation, evaluation and saving are taken out by ``pause``."""

    tokens: int = 0
    seconds: float = 0.0
    since: float | None = None
    started: bool = False

    def run(self) -> None:
        self.started, self.since = True, time.monotonic()

    def resume(self) -> None:
        if self.started:
            self.run()

    def pause(self) -> None:
        if self.since is not None:
            self.seconds += time.monotonic() - self.since
        self.since = None

    def read(self) -> float | None:
        """The rate, from here on counted anew; None where nothing was timed."""
        self.pause()
        rate = self.tokens / self.seconds if self.seconds and self.tokens else None
        self.tokens, self.seconds = 0, 0.0
        self.run()
        return rate


class Trainer:
    """Runs steps from a restored or fresh state to the config's last step.

    Results are read one step late, so that the devices never wait for the host; before anything is saved they are
    all read, so that a checkpoint never holds parameters that came after a loss that is not finite.
    """

    def __init__(
        self,
        method: Method,
        step: Step,
        evaluate: Evaluate | None,
        data: TrainingData,
        checkpointer: Checkpointer,
        metrics: MetricsLog,
        stop: StopRequest,
        progress: Progress,
        about: Mapping[str, Any],
    ):
        """See ``train.run``.

        ``about`` is kept in every checkpoint: the digest of the tokenizer, and the origin (see ``origin.Origin``).
        ``evaluate`` is None where nothing is held out.
        """
        self._method, self._config, self._step = method, method.config, step
        self._schedule, self._sharding = learning_rate_schedule(method.config), batch_sharding(method.mesh)
        self._evaluate, self._data, self._checkpointer = evaluate, data, checkpointer
        self._metrics, self._stop, self._progress, self._about = metrics, stop, progress, about
        self._rates = evaluate is not None and evaluate.rates
        self._meter = _Meter()
        self._unread: collections.deque[tuple[int, StepResult]] = collections.deque()
        self._tokens = 0
        self._begin = time.monotonic()
        self._evaluated, self._evaluates = True, False

    def run(self, state: TrainState, done: int, tokens: int, seconds: float) -> int:
        """Trains until the last step or until asked to stop; returns the step reached.

        Args:
          state: after ``done`` steps, ``tokens`` tokens and ``seconds`` of earlier calls.

        Raises:
          DivergedError: naming the step and the last good checkpoint.
        """
        config, last = self._config, self._config.training.steps
        self._tokens, self._begin = tokens, time.monotonic() - seconds
        # A run that was stopped in the middle of an evaluation does it now.
        if self._evaluation_due(done) and first_decides(not self._metrics.has(done, "eval/main/ce")):
            self._run_evaluation(state, done)
        if done < last:
            self._progress.say("compiling the training step …")
        while done < last and not self._stop.asked():
            # One step, whose result is read while the next one runs.
            batch = put_on_devices(next(self._data), self._sharding)
            state, result = self._step(state, batch)
            done += 1
            self._unread.append((done, result))
            self._progress.advance()
            self._read_results(leave=1)
            if done % config.logging.every_steps == 0 or done == last:
                self._log(done)
            rated = self._rates and self._evaluation_due(done)
            if done % config.checkpoint.every_steps == 0 or done == last or rated:
                self._save(state, done)  # before an evaluation, which data may end and a resumed run makes up for
            if self._evaluation_due(done):
                self._run_evaluation(state, done)
        if self._checkpointer.newest != done:  # asked to stop in between
            self._save(state, done)
        self._checkpointer.wait()
        return done

    @property
    def tokens(self) -> int:
        """Non-padding tokens trained on, over all calls."""
        return self._tokens

    @property
    def seconds(self) -> float:
        """Wall time of training, compilation and evaluation included, over all calls."""
        return time.monotonic() - self._begin

    @property
    def evaluated(self) -> bool:
        """Whether no evaluation was cut short by being asked to stop."""
        return self._evaluated

    def _evaluation_due(self, done: int) -> bool:
        if self._evaluate is None or not done:
            return False
        return done % self._config.evaluation.every_steps == 0 or done == self._config.training.steps

    def _read_results(self, leave: int) -> StepResult | None:
        """Reads results off the devices, but for the newest ``leave``; returns the last one read."""
        result = None
        while len(self._unread) > leave:
            step, result = self._unread.popleft()
            loss, grad_norm, tokens = jax.device_get((result.loss, result.grad_norm, result.tokens))
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._checkpointer.wait()
                raise DivergedError(f"step {step}: loss {loss}, gradient norm {grad_norm}; {self._checkpointer.kept()}")
            self._tokens += int(tokens)
            if self._meter.since is None:  # the first result came with compilation, which is not training speed
                self._meter.run()
            else:
                self._meter.tokens += int(tokens)
        return result

    def _log(self, done: int) -> None:
        result = self._read_results(leave=0)
        if result is None:
            return
        rate = self._meter.read()
        # Sums and weights become means here, once.
        means = {name: term.mean() for name, term in self._method.terms(result.sums, result.weights).items()}
        values: dict[str, float | None] = {
            "tokens": self._tokens,
            "loss": float(result.loss),
            **means,
            "learning_rate": float(jax.device_get(self._schedule(done - 1))),
            "grad_norm": float(result.grad_norm),
            "tokens_per_second": rate,
            "mfu": None if rate is None else utilisation(self._method, rate),
        }
        self._metrics.write(done, values)
        agreement = [mean for name, mean in means.items() if name.endswith("/agreement") and mean is not None]
        heads = _in_line(agreement, 1, 2)
        self._progress.say(
            f"step {done}/{self._config.training.steps}  loss {values['loss']:.3f}  main ce {means['main/ce'] or 0:.3f}"
            + (f"  agreement {heads}" if heads else "")
            + (f"  {rate:,.0f} tokens/s" if rate else "")
            + f"  ETA {self._progress.remaining()}"
        )

    def _run_evaluation(self, state: TrainState, done: int) -> None:
        self._read_results(leave=0)
        self._meter.pause()
        assert self._evaluate is not None  # or none would be due
        parameters = self._method.merge(state.evaluated, state.frozen)
        if not self._evaluates:
            self._progress.show("compiling the evaluation …")
        self._evaluates = True
        scores = self._evaluate(parameters, lambda: not self._stop.asked())
        self._evaluated = scores is not None
        if scores is not None:
            self._metrics.write(done, scores)
            self._progress.say(f"step {done}  held out:  {_shown(scores)}")
            if (rating := scores.get(RATING)) is not None:
                self._checkpointer.rate(done, rating)
        self._meter.resume()

    def _save(self, state: TrainState, done: int) -> None:
        self._read_results(leave=0)
        self._meter.pause()
        counters = {"tokens": self._tokens, "seconds": self.seconds}
        progress = {"data": self._data.get_state(), **self._about, **counters}
        self._metrics.publish()  # first, so that no checkpoint is newer than the metrics
        self._checkpointer.save(done, state, self._config, progress)
        self._meter.resume()


def _shown(scores: Mapping[str, float | None]) -> str:
    """What is known of held-out text, as a line; and of heads, and of held-out prompts, as others."""

    def of_heads(name: str, factor: float, digits: int, unit: str = "") -> str:
        found = [value for key, value in scores.items() if key.startswith("eval/head_") and key.endswith(f"/{name}")]
        shown = _in_line(found, factor, digits)
        return shown and f"  {name} {shown}{unit}"

    ce, bits = (scores.get(f"eval/main/{name}") for name in ("ce", "bits_per_byte"))
    text = f"main ce {ce or 0:.3f}" + ("" if bits is None else f"  {bits:.3f} bits per byte")
    if heads := of_heads("ce", 1, 2) + of_heads("kl", 1, 2) + of_heads("agreement", 100, 0, " %"):
        text += f"\n  heads:{heads}"
    if "decoded/tokens_per_pass" not in scores:
        return text
    passes, alone = (scores[f"decoded/tokens_per_pass{end}"] or 0 for end in ("", "_without_bonus"))
    rates = [value for name, value in scores.items() if name.startswith("decoded/") and "conditional" in name]
    accepted = _in_line(rates, 100, 0)
    return f"{text}\n  decoded:  {passes:.2f} tokens per pass ({alone:.2f} without bonus), accepted {accepted} %"


def _in_line(figures: Sequence[float | None], factor: float, digits: int) -> str:
    """Figures of heads; of many the first ones and the last, for a line has to stay one. All are in the metrics."""
    shown = ["–" if one is None else f"{factor * one:.{digits}f}" for one in figures]
    return " ".join(shown if len(shown) <= _SHOWN else [*shown[: _SHOWN - 1], "…", shown[-1]])
