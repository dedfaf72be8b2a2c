"""Fuzz every target for a while: ``python e2e/fuzz/fuzz_run.py [seconds] [target…]``.

With atheris, if it is there, which sees what the code does with its input; else with mutations of
the seeds at random. A case that breaks a promise is shown, and becomes an ordinary test.
"""

import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE.parents[1]))


def main() -> None:
    arguments = sys.argv[1:]
    seconds = float(arguments.pop(0)) if arguments and arguments[0][:1].isdigit() else 60.0
    from e2e.fuzz.fuzz_targets import TARGETS

    names = arguments or list(TARGETS)
    failed = []
    for name in names:
        print(f"--- {name}, {seconds / len(names):.0f} s", flush=True)
        share = str(seconds / len(names))
        one = [sys.executable, __file__, "--one", name, share]
        if subprocess.run(one).returncode:
            failed.append(name)
    print(f"{len(names) - len(failed)} of {len(names)} targets keep their promise", *failed)
    raise SystemExit(bool(failed))


def one(name: str, seconds: float) -> None:
    """Fuzz one target in this process; it ends with a status that is not 0 at the first case."""
    if importlib.util.find_spec("atheris") is None:
        _mutate(name, seconds)
        return
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["trio_gateway", "wsproto", "jwt"]):
        from e2e.fuzz import fuzz_targets
    fuzz_targets.quiet()
    target, seeds = fuzz_targets.TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        for n, seed in enumerate(seeds):
            Path(folder, str(n)).write_bytes(seed)
        flags = [
            f"-max_total_time={max(1, round(seconds))}", "-max_len=5000", "-verbosity=0",
            "-print_final_stats=1", "-timeout=5", f"-artifact_prefix={tempfile.gettempdir()}/",
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *flags, folder], target)
        atheris.Fuzz()


def _mutate(name: str, seconds: float) -> None:
    from e2e.fuzz import fuzz_targets

    fuzz_targets.quiet()
    target, seeds = fuzz_targets.TARGETS[name]
    dice, until, runs = random.Random(), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        data = mutated(dice, seeds)
        try:
            target(data)
        except BaseException:
            print(repr(data), file=sys.stderr)
            raise
        runs += 1
    print(f"{runs} runs")


def mutated(dice: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with a few bytes changed, left out, put in or taken from another."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.choice([0, 1, 1, 2, 4, 16])):
        at = dice.randrange(len(data) + 1)
        size = dice.choice([1, 1, 2, 8])
        other = dice.choice(seeds)
        start = dice.randrange(len(other) + 1)
        piece = dice.choice(
            [dice.randbytes(size), other[start : start + 4 * size], b"", b"\0", b'"']
        )
        data[at : at + dice.choice([0, size])] = piece
    return bytes(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], float(sys.argv[3]))
    else:
        main()
