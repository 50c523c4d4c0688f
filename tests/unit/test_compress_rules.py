"""Which parameter is compressed how."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.arrays import BFLOAT16
from hpc_dl.compress import Limits, Policy, Rule, Scheme, make, only, policy_of, warmup
from hpc_dl.compress.rules import MIN_BYTES
from hpc_dl.compress.signs import OneBit
from hpc_dl.compress.topk import TopK
from hpc_dl.errors import OptionError

F32 = np.dtype(np.float32)
LARGE = (1000, 1000)


def scheme_for(policy: Policy, name: str, shape: tuple[int, ...] = LARGE) -> Scheme | None:
    return policy.travel(name, shape, F32).scheme


def test_small_parameters_and_vectors_stay_dense() -> None:
    policy = policy_of("topk")
    least = MIN_BYTES // 4
    assert scheme_for(policy, "w", (least // 128, 128)) == make("topk")
    assert scheme_for(policy, "w", (least // 128 - 1, 128)) is None
    assert scheme_for(policy, "w", (10 * least,)) is None
    assert scheme_for(policy, "w", ()) is None


def test_bytes_are_those_of_the_gradient() -> None:
    shape = (MIN_BYTES // 4 // 128, 128)
    assert policy_of("topk").travel("w", shape, np.float16).scheme is None
    assert policy_of("topk").travel("w", shape, np.float64).scheme is not None


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.bool_, np.uint8])
@pytest.mark.parametrize("spec", ["topk", "fp16", "bf16", "none"])
def test_only_real_floats_are_compressed(dtype: Any, spec: str) -> None:
    assert policy_of(spec).travel("w", LARGE, dtype) == (np.dtype(dtype), None)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_what_is_compressed_travels_from_float32(dtype: Any) -> None:
    travel = policy_of("onebit").travel("w", LARGE, dtype)
    assert travel == (F32, make("onebit"))


@pytest.mark.parametrize(("spec", "wire"), [("fp16", np.float16), ("bf16", BFLOAT16)])
@pytest.mark.parametrize("shape", [(), (1,), LARGE])
def test_a_cast_is_for_all_and_needs_no_exchange(
    spec: str, wire: Any, shape: tuple[int, ...]
) -> None:
    policy = policy_of(spec)
    assert policy.travel("w", shape, F32) == (np.dtype(wire), None)
    assert policy.cast == spec
    assert not policy.lossy


@pytest.mark.parametrize("spec", ["fp16:error_feedback=fp32", "bf16:warmup=10"])
def test_a_cast_that_remembers_is_no_plain_cast(spec: str) -> None:
    policy = policy_of(spec)
    assert policy.travel("w", LARGE, F32) == (F32, make(spec))
    assert policy.lossy
    assert policy.cast is None


@pytest.mark.parametrize("given", ["none", {"name": "none"}, [], [("*", "none")], make("none")])
def test_nothing_is_compressed(given: Any) -> None:
    policy = policy_of(given)
    assert policy.rules == ()
    assert policy.cast == "none"
    assert policy.describe() == ""
    assert policy.describe_type(np.dtype(np.float16)) == "float16"


@pytest.mark.parametrize(
    "given",
    [
        "topk:ratio=0.5",
        {"name": "topk", "ratio": 0.5},
        TopK(0.5),
        make("topk:ratio=0.5"),
        [("*", "topk:ratio=0.5")],
        (("*", TopK(0.5)),),
        only("*", "topk:ratio=0.5"),
        [only("*", TopK(0.5))],
    ],
)
def test_all_ways_to_say_the_same(given: Any) -> None:
    policy = policy_of(given)
    assert policy.rules == (Rule(make("topk:ratio=0.5")),)
    assert policy_of(policy) is policy
    assert policy.describe() == policy_of("topk:ratio=0.5").describe()


def test_the_first_rule_that_matches_counts() -> None:
    policy = policy_of(
        [
            ("head.*", "none"),
            only("embed.*", "int8", min_bytes=0, min_ndim=1),
            ("*", warmup(OneBit(), 7)),
        ]
    )
    assert scheme_for(policy, "head.weight") is None
    assert scheme_for(policy, "embed.scale", (3,)) == make("int8")
    assert scheme_for(policy, "body.weight") == make("onebit:warmup=7")
    assert scheme_for(policy, "body.bias", (3,)) is None
    assert scheme_for(policy, "HEAD.weight") == make("onebit:warmup=7")
    assert policy.lossy
    assert policy.cast is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "give a name"),
        (None, "give a name"),
        ("topkk", "unknown compression 'topkk'"),
        (["topk"], "compression rule 'topk'"),
        ([("*", "topk", 3)], "give only"),
        ([(3, "topk")], "give only"),
        ([("*", 3)], "give a name"),
    ],
)
def test_bad_rules(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        policy_of(given)


@pytest.mark.parametrize("options", [{"min_bytes": -1}, {"min_ndim": -1}])
def test_bad_bounds(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="give 0 or more"):
        only("*", "topk", **options)


specs = st.sampled_from(["topk", "topk:ratio=0.5", "onebit", "int8:error_feedback=bf16", "fp16"])
rules = st.lists(st.tuples(st.sampled_from(["*", "a*", "*.w"]), specs), min_size=1, max_size=3)


@given(rules, rules)
def test_descriptions_are_the_same_for_equal_policies_only(one: Any, two: Any) -> None:
    """Ranks compare them to find out that they were given different ones."""
    same = policy_of(one) == policy_of(two)
    assert (policy_of(one).describe() == policy_of(two).describe()) == same


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"limits": Limits(every=7)}], ids=["seed", "limits"]
)
def test_descriptions_tell_what_else_must_be_the_same(other: dict[str, Any]) -> None:
    """Ranks with other seeds draw different numbers; with other limits they wait in vain."""
    policy = policy_of("topk")
    assert policy._replace(**other).describe() != policy.describe()


# --- the guard's limits, and the seed ---------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"name": "onebit", "limits": {"every": 10, "pause": 5}, "seed": 7},
        {"name": "onebit", "limits": Limits(every=10, pause=5), "seed": 7},
        policy_of("onebit", limits={"every": 10, "pause": 5}, seed=7),
        policy_of([("*", "onebit")], limits=Limits(every=10, pause=5), seed=7),
        policy_of(policy_of("onebit", seed=3, limits={"pause": 5, "every": 10}), seed=7),
    ],
)
def test_all_ways_to_give_limits_and_a_seed(given: Any) -> None:
    policy = policy_of(given)
    assert policy == policy_of("onebit")._replace(limits=Limits(every=10, pause=5), seed=7)
    assert hash(policy) == hash(policy_of(given))
    assert policy.describe() != policy_of("onebit").describe()


def test_what_is_given_is_not_changed() -> None:
    given = {"name": "onebit", "limits": {"every": 10}, "seed": 7}
    before = dict(given)
    policy_of(given)
    assert given == before


def test_an_automatic_choice_has_limits_too() -> None:
    policy = policy_of("auto", limits={"every": 10})
    assert policy.auto is not None
    assert policy.limits == Limits(every=10)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"evry": 1}, "unknown option 'evry' for limits; valid: every, max_loss"),
        ({"every": -1}, "every=-1; give a whole number from 0"),
        ({"every": 2.5}, "every=2.5"),
        ({"every": True}, "every=True"),
        ({"pause": 0}, "pause=0; give a whole number from 1"),
        ({"tries": 0}, "tries=0; give a whole number from 1"),
        ({"min_cosine": 1.5}, "min_cosine=1.5; give a number from -1 to 1"),
        ({"min_cosine": float("nan")}, "min_cosine=nan"),
        ({"min_cosine": "0.5"}, "min_cosine='0.5'"),
        ({"max_residual": 0}, "max_residual=0; give a number above 0"),
        ({"max_residual": float("nan")}, "max_residual=nan"),
        ({"max_loss": 1}, "max_loss=1; give a number above 1"),
        (3, "limits=3; give a mapping"),
    ],
)
def test_bad_limits(limits: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        policy_of("onebit", limits=limits)
    with pytest.raises(OptionError, match=said):
        policy_of({"name": "onebit", "limits": limits})
    if isinstance(limits, dict) and "evry" not in limits:
        with pytest.raises(OptionError, match=said):
            Limits(**limits)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "x"])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(OptionError, match="give a whole number from 0 to 4294967295"):
        policy_of("onebit", seed=seed)


limits = st.builds(
    Limits,
    every=st.integers(0, 3),
    min_cosine=st.sampled_from([-1, 0.5, 1]),
    max_loss=st.sampled_from([1.5, float("inf")]),
    pause=st.integers(1, 2),
)


@given(limits, limits, st.integers(0, 2), st.integers(0, 2))
def test_ranks_see_other_limits_and_seeds(one: Limits, two: Limits, seed: int, other: int) -> None:
    policies = (
        policy_of("onebit", limits=one, seed=seed),
        policy_of("onebit", limits=two, seed=other),
    )
    same = policies[0] == policies[1]
    assert (policies[0].describe() == policies[1].describe()) == same


def test_where_momentum_is_taken_before_compression_all_gradients_get_it() -> None:
    """The optimizer has none, so those that are not compressed would have none at all."""
    policy = policy_of([("*.cast", "fp16"), ("*.level", "int8"), ("*", "dgc:momentum=0.8")])
    large, small = (1000, 1000), (10,)
    for name, shape, compressor in (
        ("a.weight", large, "dgc"),
        ("a.bias", small, "none"),
        ("a.cast", large, "fp16"),
        ("a.level", large, "int8"),
    ):
        scheme = policy.travel(name, shape, "float32").scheme
        assert scheme is not None
        assert (scheme.name, scheme.momentum) == (compressor, 0.8)
    assert policy.travel("a.count", small, "int64").scheme is None


@pytest.mark.parametrize("spec", ["topk", "demo", "fp16"])
def test_otherwise_small_gradients_travel_as_they_are(spec: str) -> None:
    travel = policy_of(spec).travel("a.bias", (10,), "float32")
    assert travel.scheme is None
