"""One piece in this process: what ``python -m experiments.accelerator`` starts for each, and ends when time is up."""

import os
import pathlib
import signal
import sys
import threading

import jax
import rich.console

from experiments.accelerator import decoding, device, exactness, loss, profile, trained, training
from experiments.accelerator.battery import Piece, Place, Results, run_case
from mtpd_jax import frontdoor
from mtpd_jax.runs.interruption import leave

# In the order of what their results are worth.
PIECES: dict[str, Piece] = {
    piece.name: piece
    for piece in (
        device.PIECE, exactness.PIECE, loss.PIECE, training.PIECE, profile.PIECE, trained.PIECE, decoding.PIECE
    )
}  # fmt: skip
# The exit status that asks for a new process for the cases that are left.
FAILED = 3


def _end_with_parent() -> None:
    """Asks this process to stop when the one that started it is gone, which closes the pipe between them."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Runs the cases that were asked for."""
    parser = frontdoor.Parser(prog="python -m experiments.accelerator.piece", description=__doc__)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--out", required=True, help="the folder of results")
    parser.add_argument("--workdir", required=True, help="the folder of what does not leave the machine")
    parser.add_argument("--cases", required=True, nargs="+", help="to run, in order")
    parser.add_argument("--until", type=float, default=float("inf"), help="the time at which all has to be over")
    parser.add_argument("--seed", type=int, default=0, help="of what is trained (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--started", action="store_true", help="end with the process that started this one")
    flags = parser.parse_args(arguments)
    if flags.started:
        _end_with_parent()
    piece = PIECES[flags.piece]
    place = Place(pathlib.Path(flags.out), pathlib.Path(flags.workdir), flags.tiny, flags.seed)
    results, cases = Results(place.out, place.tiny), {case.name: case for case in piece.cases(place)}
    unknown = [name for name in flags.cases if name not in cases]
    if unknown:
        raise ValueError(f"--cases={unknown[0]}: expected some of {', '.join(cases)}")
    results.check_device(jax.devices()[0].device_kind)
    if jax.default_backend() == "cpu" and not place.tiny:
        raise ValueError("JAX finds no accelerator here, only the CPU, for which there is --tiny")
    console = rich.console.Console(stderr=True, highlight=False)
    for number, name in enumerate(flags.cases, 1):
        measured = run_case(piece, cases[name], place, flags.until)
        if measured is None:
            return 0
        row = results.rows()[piece.name, name]
        said = piece.summary(row["result"]) if measured else row["error"]
        console.print(
            f"  {name} ({number}/{len(flags.cases)}, {row['seconds']:.0f} s): {said}", markup=False, soft_wrap=True
        )
        if not measured:
            return FAILED
    return 0


if __name__ == "__main__":
    leave(frontdoor.status_of(lambda: main(sys.argv[1:])))  # at once: libraries may crash on the way out
