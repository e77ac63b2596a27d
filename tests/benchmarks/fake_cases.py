"""Cases with known outcomes for the tests of the runner."""

import time

import torch

from benchmarks._case import Check, Counted, Floor, Paired, Peer, Skip, Timing, case, operator_timing

RIGHT = Check(0.0, 1e-6)


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def absent():
    import no_such_package_at_all

    return no_such_package_at_all


def square(x):
    return x * x


@case("fake.ratio", feature="fake", metric="ratio", against="slow", must=1.5, aim=5.0, preset="smoke")
def ratio(run):
    """A peer that needs twice the time, one that is wrong and one that is not installed."""

    def check(contender):
        return Check(1.0 if contender is wrong else 0.0, 0.5)

    def wrong():
        spin(0.001)

    return Timing(
        ours=lambda: spin(0.002),
        inputs=lambda: (),
        check=check,
        peers={
            "slow": Peer(make=lambda: lambda: spin(0.004), version="1.0"),
            "wrong": Peer(make=lambda: wrong),
            "absent": Peer(make=absent),
        },
        workload={"seconds": 0.002},
    )


@case("fake.wrong", feature="fake", metric="value", better="lower", must=1.0)
def wrong(run):
    """Our result is wrong."""
    return Timing(ours=lambda: 1 / 0, inputs=lambda: (), check=lambda contender: Check(float("nan"), 1.0))


@case("fake.operator", feature="fake", metric="fraction", must=0.01, preset="smoke")
def operator(run):
    """An operator on its own samples, backward alone."""
    return operator_timing(
        square,
        square,
        lambda: (torch.randn(256, 256, requires_grad=True),),
        mode="backward",
        peers={"torch eager": lambda x: x.square()},
        floor=Floor(bytes=3 * 4 * 256 * 256),
    )


@case("fake.unwritten", feature="fake", metric="fraction", must=0.01)
def unwritten(run):
    """An operator that leaves half of its output as it found it."""

    def forgetful(x):
        out = torch.empty_like(x)
        out[:128] = (x * x)[:128]
        return out

    return operator_timing(forgetful, square, lambda: (torch.randn(256, 256),), mode="forward")


@case("fake.counted", feature="fake", metric="value", unit="bytes", better="equal", must=24, preset="smoke")
def counted(run):
    """An exact figure."""
    return Counted(ours=24, floor=12, peers={"host": 48}, check=RIGHT)


@case("fake.paired", feature="fake", metric="ratio", against="host", better="higher", must=0.9, aim=2.5, unit="wall ms")
def paired(run):
    """Rounds that measure themselves."""
    costs = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 4.0), (1.5, 3.0)])

    def one_round():
        ours, host = next(costs)
        return {"ours": ours, "host": host}

    return Paired(round=one_round, check=RIGHT)


@case("fake.noisy", feature="fake", metric="value", better="lower", must=100.0, unit="CPU s")
def noisy(run):
    """Figures that scatter by more than 15 %."""
    costs = iter([9.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    return Paired(round=lambda: {"ours": next(costs)}, check=RIGHT)


@case("fake.best", feature="fake", metric="value", better="lower", must=1.0, unit="CPU s")
def best(run):
    """The same with a minimum, which noise cannot lower."""
    costs = iter([9.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    return Paired(round=lambda: {"ours": next(costs)}, check=RIGHT, statistic="min")


@case("fake.skipped", feature="fake", metric="value")
def skipped(run):
    """Cannot run here."""
    raise Skip("needs 2 devices")


@case("fake.broken", feature="fake", metric="value")
def broken(run):
    """Raises."""
    raise RuntimeError("no such model")


@case("fake.hang", feature="fake", metric="value")
def hang(run):
    """Never ends."""
    time.sleep(600)


@case("fake.gpu", feature="fake", metric="value", devices=("cuda",))
def gpu(run):
    """Another device's case."""
    raise AssertionError("must not be called")
