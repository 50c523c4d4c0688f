"""Which compressors go with which optimizers, and how shared momentum travels."""

import pytest

from hpc_dl.compress import Auto, Policy, make, names, only, pairs, policy_of, unchecked
from hpc_dl.compress.pairs import Optimizer, fit
from hpc_dl.compress.shared_momentum import shared_momentum
from hpc_dl.errors import OptionError

SGD = Optimizer("SGD", "sgd")
MOMENTUM = Optimizer("SGD", "sgd", momentum=0.9)
ADAM = Optimizer("AdamW", "adaptive")
LION = Optimizer("Lion", "sign")
OTHER = Optimizer("LBFGS", "other")
SHARED = Optimizer("OneBitAdam", "adaptive", shared_momentum=0.9)

#: Names of classes of torch, of Keras, and of packages of optimizers.
ADAPTIVE = """
    Adam AdamW NAdam RAdam Adamax FusedAdam AdamP AdamW8bit GaLoreAdamW SparseAdam
    DAdaptAdam Adagrad Adadelta RMSprop RMSpropTF Adafactor Lamb Ftrl Adan AdaBelief
    AdaBound Adahessian ADOPT SophiaG Shampoo DistributedShampoo SOAP Prodigy NovoGrad
    NvNovoGrad MADGRAD LaProp Yogi CAME Ranger21 DiffGrad AdEMAMix ScheduleFreeAdamW
    AdaSmooth
"""
#: Optimizer, compression, and what the error names as the remedy.
REFUSED = [
    (MOMENTUM, "dgc", "momentum=0"),
    (MOMENTUM, "demo", "momentum=0"),
    (MOMENTUM, "topk:momentum=0.5", "momentum=0"),
    (Optimizer("Muon", "other", momentum=0.95), "dgc", "momentum=0"),
    (ADAM, "dgc", "SGD with momentum=0"),
    (ADAM, "demo", "SGD with momentum=0"),
    (LION, "dgc", "SGD with momentum=0"),
    (LION, "demo", "SGD with momentum=0"),
    (ADAM, "onebit", "OneBitAdam"),
    (ADAM, "onebit:error_feedback=int8", "OneBitAdam"),
    (SHARED, "onebit", "the compression that they bring along"),
    (SGD, shared_momentum("onebit", 0.9, 5), "the compression that they bring along"),
    (SHARED, shared_momentum("onebit", 0.8, 5), "the compression that they bring along"),
    (SHARED, shared_momentum("signsgd", 0.9, 5), "'onebit'"),
    (SHARED, shared_momentum("demo", 0.9, 5), "without momentum"),
]
ALLOWED = [
    (SGD, "dgc"),
    (SGD, "demo"),
    (OTHER, "dgc"),
    (MOMENTUM, "dgc:momentum=0"),
    (MOMENTUM, "onebit"),
    (MOMENTUM, "powersgd:rank=2"),
    (OTHER, "onebit"),
    (MOMENTUM, "signsgd"),
    (LION, "int8"),
    (LION, "fp16"),
    (ADAM, "int8"),
    (ADAM, "none"),
    (SHARED, shared_momentum("onebit", 0.9, 5)),
    (SHARED, shared_momentum("none", 0.9, 5)),
    (SHARED, shared_momentum("topk:ratio=0.1", 0.9, 5)),
]


def described(value: object) -> str:
    return value.name if isinstance(value, Optimizer) else ""


@pytest.mark.parametrize(("optimizer", "compression", "remedy"), REFUSED, ids=described)
def test_pairs_that_do_not_converge_are_refused_with_a_remedy(optimizer, compression, remedy):
    with pytest.raises(OptionError, match=r"hpc_dl\.compress\.unchecked") as refusal:
        fit(optimizer, policy_of(compression))
    assert remedy in str(refusal.value)
    policy = unchecked(compression)
    assert fit(optimizer, policy) == (policy, [])


@pytest.mark.parametrize(("optimizer", "compression"), ALLOWED, ids=described)
def test_other_pairs_pass_as_they_are(optimizer, compression):
    policy = policy_of(compression)
    assert fit(optimizer, policy) == (policy, [])


@pytest.mark.parametrize("name", names())
def test_the_defaults_of_every_compressor_go_with_some_optimizer(name):
    pairs.check(policy_of(name))
    fit(SGD, policy_of(name))


@pytest.mark.parametrize("name", [n for n in names() if make(n).compressor.needs_feedback])
def test_what_needs_error_feedback_is_refused_without_it(name):
    policy = policy_of(f"{name}:error_feedback=off")
    for refuse in (pairs.check, lambda p: fit(SGD, p), lambda p: fit(OTHER, p)):
        with pytest.raises(OptionError, match="leave error_feedback at its default"):
            refuse(policy)
    pairs.check(unchecked(policy))


@pytest.mark.parametrize("spec", ["int4:stochastic=true", "randomk:scale=true", "qsgd", "int8"])
def test_what_is_right_in_the_mean_needs_none(spec):
    pairs.check(policy_of(f"{spec},error_feedback=off" if ":" in spec else spec))


def test_signs_without_a_scale_are_refused_with_error_feedback():
    with pytest.raises(OptionError, match="'onebit'"):
        pairs.check(policy_of("signsgd:error_feedback=fp32"))
    pairs.check(policy_of("signsgd"))


def test_one_bad_rule_is_enough():
    with pytest.raises(OptionError, match="'onebit'"):
        fit(ADAM, policy_of([("*.bias", "none"), only("head.*", "onebit"), ("*", "int8")]))


@pytest.mark.parametrize("spec", ["topk", "powersgd", "int8:error_feedback=fp32"])
def test_other_error_feedback_with_adaptive_optimizers_is_a_warning(spec):
    policy = policy_of([("a*", spec), ("b*", spec)])
    same, warnings = fit(ADAM, policy)
    assert same == policy
    (text,) = warnings
    assert "linear in the gradient" in text
    assert fit(MOMENTUM, policy_of(spec))[1] == []


@pytest.mark.parametrize("optimizer", [ADAM, LION])
def test_signs_without_a_scale_leave_nothing_to_adapt_to(optimizer):
    """Adam divides a sign by the root mean square of signs, which is one: it is allowed."""
    policy = policy_of("signsgd")
    same, warnings = fit(optimizer, policy)
    assert same == policy
    (text,) = warnings
    assert f"{optimizer.name} with compression='signsgd'" in text
    assert "learning rate" in text
    assert fit(optimizer, unchecked("signsgd"))[1] == []


@pytest.mark.parametrize("spec", ["onebit", "topk", "powersgd"])
def test_error_feedback_with_an_optimizer_that_takes_signs_is_a_warning(spec):
    same, (text,) = fit(LION, policy_of(spec))
    assert same == policy_of(spec)
    assert "linear in the gradient; Lion is not" in text
    assert "OneBitAdam" not in text  # it stands for Adam, not for this one


def test_an_automatic_choice_leaves_out_what_does_not_fit():
    policy, _ = fit(ADAM, policy_of("auto"))
    assert policy.auto is not None
    left_out = set(Auto().candidates) - set(policy.auto.candidates)
    assert left_out == {"onebit"}
    assert fit(MOMENTUM, policy_of("auto"))[0] == policy_of("auto")
    with pytest.raises(OptionError, match="none of the candidates"):
        fit(ADAM, policy_of(Auto(candidates=("onebit", "dgc"))))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "adaptive") for name in ADAPTIVE.split()),
        *((name, "sgd") for name in ("SGD", "ASGD", "FusedSGD", "SGDP", "ScheduleFreeSGD")),
        *((name, "sign") for name in ("Lion", "Lion8bit", "SignSGD", "Signum", "Tiger", "Rprop")),
        *((name, "other") for name in ("LBFGS", "Muon", "Lookahead", "Camera")),
    ],
)
def test_families_go_by_the_names_of_classes(name, family):
    assert pairs.family_of(["MyOwn", name, "Optimizer", "object"]) == family


def test_shared_momentum_is_of_all_parameters():
    policy = shared_momentum("onebit", 0.9, 7)
    scheme = policy.travel("bias", (1,), "float64").scheme
    assert scheme is not None
    assert (scheme.name, scheme.residual) == ("onebit", "fp32")
    assert (scheme.warmup, scheme.shared_momentum) == (7, 0.9)
    # Even where nothing is compressed it is momentum that travels.
    assert shared_momentum("none", 0.9, 7).travel("bias", (1,), "float32").scheme is not None
    assert shared_momentum("fp16", 0.9, 7).travel("bias", (1,), "float32").scheme is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("onebit", 0.0, 5), "beta=0"),
        (("onebit", 1.0, 5), "beta=1"),
        (("onebit", 0.9, 0), "freeze_step=0"),
        (("onebit:warmup=3", 0.9, 5), "give freeze_step only"),
        (("auto", 0.9, 5), "'auto'"),
        ((Auto(), 0.9, 5), "'auto'"),
        (("nothing", 0.9, 5), "unknown compression"),
    ],
)
def test_bad_options_of_shared_momentum(options, said):
    with pytest.raises(OptionError, match=said):
        shared_momentum(*options)


def test_a_policy_is_checked_unless_it_says_otherwise():
    assert Policy(()).checked
    assert not unchecked("topk").checked
    assert unchecked("topk")._replace(checked=True) == policy_of("topk")
    assert fit(ADAM, unchecked("topk")) == (unchecked("topk"), [])
