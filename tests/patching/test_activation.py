import argparse
import itertools
import pickle
from dataclasses import dataclass

import pytest

from mindspeed.errors import ConfigError, TargetError
from mindspeed.host.events import Events
from mindspeed.patching import Change, Feature, Problem, flag, wrap
from mindspeed.patching import activation as steps
from mindspeed.patching.idle import idle_flags
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.overview import show
from mindspeed.patching.resolve import load
from mindspeed.runtime import enabled
from tests.patching.conftest import TOY


@dataclass(frozen=True, kw_only=True)
class FasterFlags:
    faster: bool = flag(False, "Be faster.")
    faster_by: int = flag(2, "By how much.", at_least=1)


class Faster(Feature):
    """Be faster."""

    flags = FasterFlags
    conflicts = {"smaller": "both rewrite the same memory"}

    def normalise(self, flags, run):
        if run.seq_length > 100:
            yield Change("faster_by", 4, "--seq-length is above 100")

    def check(self, flags, run):
        if run.seq_length % 2:
            yield Problem("--seq-length", run.seq_length, "must be even", "use an even one")

    def patches(self, flags, host):
        yield wrap(f"{TOY}:double", lambda original, x: original(x) * flags.faster_by)
        yield wrap("training:report", lambda original: original(), optional=True)

    def subscribe(self, flags, host):
        host.events.on("step_end", lambda iteration: host.seen.append(iteration))


@dataclass(frozen=True, kw_only=True)
class SmallerFlags:
    smaller: str | None = flag(None, "Be smaller in this way.", choices=("a", "b"))


class Smaller(Feature):
    """Be smaller."""

    flags = SmallerFlags
    needs = ("even-smaller",)

    def host_overrides(self, flags, run):
        return {"seq_length": 1, "only_here": True}


@dataclass(frozen=True, kw_only=True)
class EvenSmallerFlags:
    even_smaller: bool = flag(False, "Be even smaller.")


class EvenSmaller(Feature):
    """Be even smaller; derives the flag of another feature."""

    flags = EvenSmallerFlags

    def normalise(self, flags, run):
        if run.get("smaller") is None:
            yield Change("smaller", "a", "--even-smaller is given")


class Always(Feature):
    """On at every level."""

    level = 0


class Kernels(Feature):
    """On from level 1."""

    level = 1


class AboutHost(Feature):
    """On when the host's own flag says so."""

    def why(self, flags, run):
        return "--context-parallel-size 2" if run.context_parallel_size > 1 else ""


FEATURES = (Faster(), Smaller(), EvenSmaller(), Always(), Kernels(), AboutHost())


class ToyHost:
    kind = "toy"

    def __init__(self, args):
        self.args, self.events, self.seen = args, Events(), []

    def target(self, logical):
        if logical.startswith("training:"):
            raise TargetError(f"{logical} is absent")
        return logical

    load = staticmethod(load)


def args(**values):
    return argparse.Namespace(**{"seq_length": 8, "context_parallel_size": 1, **values})


def names(active):
    return [one.name for one in active]


def check(namespace, features=FEATURES):
    return steps.check(features, namespace, platform="cpu")


def problems_of(namespace, features=FEATURES):
    with pytest.raises(ConfigError) as caught:
        check(namespace, features)
    return [str(problem) for problem in caught.value.problems]


# --- choose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "on"), [(0, ["always"]), (1, ["always", "kernels"]), (2, ["about-host", "always", "kernels"])]
)
def test_levels(level, on):
    assert names(steps.choose(FEATURES, args(optimization_level=level, context_parallel_size=2), platform="cpu")) == on


def test_reasons_name_the_flag():
    active = steps.choose(FEATURES, args(faster=True, smaller="b"), platform="cpu")
    assert {one.name: one.why for one in active} == {
        "always": "always",
        "faster": "--faster",
        "kernels": "--optimization-level 1 or higher",
        "smaller": "--smaller b",
    }


def test_a_flag_above_the_level_is_refused_and_not_dropped():
    (problem,) = problems_of(args(faster=True, optimization_level=0))
    assert problem == "--faster: needs --optimization-level 2 (given 0). Give it or remove --faster."


def test_level_itself_is_checked():
    assert "--optimization-level 3: must be one of 0, 1, 2" in problems_of(args(optimization_level=3))[0]


def test_values_that_no_parser_saw_are_converted_and_checked():
    active = steps.choose(FEATURES, args(faster=True, faster_by="3"), platform="cpu")
    assert next(one.flags.faster_by for one in active if one.name == "faster") == 3
    for bad, words in ((0, "must be at least 1"), ("x", "cannot be read"), (1.5, "expected int")):
        assert words in problems_of(args(faster=True, faster_by=bad))[0]


# --- normalise --------------------------------------------------------------------------------------------


def test_derived_values_are_written_once_with_reasons(caplog):
    namespace = args(faster=True, seq_length=200)
    with caplog.at_level("INFO", logger="mindspeed.patching.activation"):
        active = steps.settle(FEATURES, namespace, platform="cpu")
    line = "--faster-by: 2 -> 4 because --seq-length is above 100"
    assert namespace.faster_by == 4 and [record.message for record in caplog.records] == [line]
    assert namespace.mindspeed.derived == [line] and namespace.mindspeed.original == {"faster_by": 2}
    assert namespace.mindspeed.requested == {"faster": True, "seq_length": 200, "context_parallel_size": 1}
    assert next(one.flags.faster_by for one in active if one.name == "faster") == 4
    pickle.dumps(namespace)  # plain data: hosts save it in checkpoints


def test_a_derived_value_may_switch_a_feature_on():
    namespace = args(even_smaller=True)
    assert "smaller" in names(steps.settle(FEATURES, namespace, platform="cpu")) and namespace.smaller == "a"


def test_two_features_deriving_different_values_are_refused():
    class Other(Feature):
        """Derives something else."""

        level = 0

        def normalise(self, flags, run):
            yield Change("faster_by", 7, "it likes seven")

    with pytest.raises(ConfigError, match="--faster-by: is set to .* by .* and to .* by"):
        steps.settle((*FEATURES, Other()), args(faster=True, seq_length=200), platform="cpu")


def test_overrides_are_seen_inside_only_even_after_an_error():
    namespace = args(smaller="a", even_smaller=True)
    before = dict(vars(namespace))
    active = steps.choose(FEATURES, namespace, platform="cpu")
    with pytest.raises(RuntimeError, match="host"), steps.overridden(namespace, active, platform="cpu"):
        assert namespace.seq_length == 1 and namespace.only_here
        namespace.seq_length = 99  # a host may write, too
        raise RuntimeError("the host's validation failed")
    assert vars(namespace) == before


# --- check ------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once():
    problems = problems_of(args(faster=True, faster_by=2, seq_length=7, smaller="c", optimization_level=2))
    assert [problem.split(":")[0] for problem in problems] == ["--smaller c", "--seq-length 7"]


def test_needs_and_conflicts_do_not_depend_on_order():
    namespace = args(faster=True, smaller="a")
    found = {tuple(problems_of(namespace, order)) for order in itertools.permutations(FEATURES[:3])}
    (problems,) = found
    assert problems == (
        "--smaller a: needs the feature even-smaller, which is off. Add --even-smaller.",
        "--faster: cannot be combined with --smaller a: both rewrite the same memory. Remove --faster or --smaller a.",
    )


def test_a_need_names_what_switches_it_on_and_is_not_told_beside_a_refusal():
    class Base(Feature):
        """Is switched on by a number."""

        name = "base"
        switch = "--width above 1"

        def why(self, flags, run):
            return ""

    class Above(Feature):
        """Builds on it."""

        name = "above"
        needs = ("base",)

        def why(self, flags, run):
            return "--above"

        def check(self, flags, run):
            return [Problem("--above", None, "is refused", "remove it")] if run.faster else []

    def told(faster):
        with pytest.raises(ConfigError) as caught:
            steps.check((Base(), Above()), argparse.Namespace(faster=faster), platform="cpu")
        return [str(problem) for problem in caught.value.problems]

    assert told(False) == ["--above: needs the feature base, which is off. Give --width above 1."]
    assert told(True) == ["--above: is refused. Remove it."]


def test_an_argument_that_the_run_lacks_is_a_problem_and_no_traceback():
    namespace = argparse.Namespace(faster=True)
    texts = problems_of(namespace)
    assert (
        "--faster: needs the run's 'seq_length', which is not known here. Add seq_length to what you pass to mindspeed.enable."
        in texts
    )


def test_refusal_changes_no_argument():
    namespace = args(faster=True, seq_length=7, smaller="a")
    before = dict(vars(namespace))
    problems_of(namespace)
    assert vars(namespace) == before


# --- activate ---------------------------------------------------------------------------------------------


def test_activation_patches_subscribes_and_shows(toy, capsys):
    host, ledger = ToyHost(args(faster=True, faster_by=5)), Ledger()
    active = check(host.args)
    steps.activate(active, host, ledger)
    assert toy.double(1) == 10 and [(row.owner, row.flag) for row in ledger] == [("faster", "--faster")]
    host.events.fire("step_end", iteration=3)
    assert host.seen == [3]
    show(active, ledger, host.args)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("faster", "--faster", "wrap double", "kernels"))
    ledger.revert()


def test_required_function_of_the_loop_that_is_absent_is_refused(toy):
    class Demanding(Feature):
        """Needs the loop."""

        level = 0

        def patches(self, flags, host):
            yield wrap("training:train_step", lambda original: original())

    with pytest.raises(TargetError, match="'demanding' .*function train_step, which a program with its own loop does not have"):
        steps.plan_for(steps.choose((Demanding(),), args(), platform="cpu"), ToyHost(args()))


def test_failed_activation_leaves_no_subscription(toy):
    class Failing(Feature):
        """Cannot be applied."""

        level = 0

        def subscribe(self, flags, host):
            host.events.on("step_end", print)

        def patches(self, flags, host):
            yield wrap(f"{TOY}:gone", print)

    host, ledger = ToyHost(args(faster=True)), Ledger()
    with pytest.raises(TargetError):
        steps.activate(check(host.args, (*FEATURES, Failing())), host, ledger)
    assert not host.events.wanted("step_end") and len(ledger) == 0


# --- flags of features that are off -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RingFlags:
    window: int = flag(1, "Ranks per window.")
    positions: str = flag("none", "The host's own flag.", choices=("none", "slopes"), of_host=True)
    must: bool = flag(False, "Cannot be dropped.")


class Ring(Feature):
    """On when the host's own flag says so, with flags of its own."""

    flags = RingFlags
    switch = "--context-parallel-size above 1"

    def why(self, flags, run):
        return "--context-parallel-size 2" if run.context_parallel_size > 1 else ""

    def check_off(self, flags, run):
        if flags.must:
            yield Problem("--must", None, "needs --context-parallel-size above 1", "remove it")


def idle(namespace, *features):
    return [str(one) for one in idle_flags(features, steps.choose(features, namespace, platform="cpu"), namespace)]


def test_a_flag_of_a_feature_that_is_off_is_told():
    line = "--window 4 has no effect because the feature ring is off; it needs --context-parallel-size above 1"
    assert idle(args(window=4, positions="slopes"), Ring(), Always()) == [line]
    assert idle(args(window=1), Ring()) == [] and idle(args(window=4, context_parallel_size=2), Ring()) == []


def test_a_flag_that_another_feature_reads_is_not_idle():
    class Other(Feature):
        """Reads the same flags, and is on."""

        flags, level = RingFlags, 0

    assert idle(args(window=4), Ring(), Other()) == []


def test_a_feature_that_is_off_may_refuse_its_flags():
    assert check(args(window=4), (Ring(),)) == []
    (problem,) = problems_of(args(must=True), (Ring(),))
    assert problem == "--must: needs --context-parallel-size above 1. Remove it."
    assert names(check(args(must=True, context_parallel_size=2), (Ring(),))) == ["ring"]


def test_the_runtime_logs_idle_flags(caplog):
    with enabled(cp_window_size=2, attention_mask_type="general", position_embedding_type="rope"):
        pass
    told = [record.message for record in caplog.records if "no effect" in record.message]
    assert told == [
        "--attention-mask-type general has no effect because the feature context-parallel is off; it needs --context-parallel-size above 1",
        "--cp-window-size 2 has no effect because the feature context-parallel is off; it needs --context-parallel-size above 1",
    ]
