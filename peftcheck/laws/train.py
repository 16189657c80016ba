"""Training starts where the base is, reaches all that is trained, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftcheck.implementation import Op
from peftcheck.law import law
from peftcheck.laws.plain import forward_holds
from peftcheck.measurement import NOTHING, Measurement, broken, compare, identical, worst
from peftcheck.oracle import Base
from peftcheck.oracle.layers import layer_output
from peftcheck.recording import Record
from peftcheck.rounding import Bounded, leaf
from peftcheck.stage import Stage
from peftcheck.training import UNTRAINED, backward, descend, feeds, fresh_site, matters, parameters, start_fresh, stored

_STEPS = 3  # a factor that starts dead because its partner is zero lives at the second; one more for a chain of two


def drops(stage: Stage) -> float:
    """Return the probability of the case's dropout (all adapters of a case have the same)."""
    return float(stage.case.adapters[0].option("dropout", 0.0))


@law(
    "train.identity_at_init",
    "abs(fresh adapters(x) - base(x)) <= bounds of either computation, and of computing and storing the start",
    (Op.FORWARD,),
    "a fine-tuning that starts elsewhere than at the base: PiSSA and CorDA with a base that was not replaced",
    structural=True,
    concerns=lambda variant: not variant.starts or variant.starts_when is not None,
    logic=True,
    on="methods",
)
def identity_at_init(stage: Stage) -> Measurement | None:
    """Give every tensor back its fresh value and compare the adapted outputs with the pristine ones.

    Budget: the running error bounds of the closed form at the fresh values and of the plain layer. Fresh values are
    known as stored only, so each carries the bound of its start (see `training.stored`); where attaching rewrites the
    base, so does the base.
    """
    elsewhere = stage.variant.starts_when
    if stage.case.profile in UNTRAINED - {"graded"} or (elsewhere and any(map(elsewhere, stage.case.adapters))):
        return None
    if not forward_holds(stage):
        return NOTHING
    start_fresh(stage)
    found, seen = [], stage.run()
    for spec in (stage.spec(name) for name in stage.targeted):
        x, y = seen[spec.name].x, seen[spec.name].y
        if y.dim() > stage.pristine_outputs[spec.name].dim():
            found.append(_untouched(stage, spec.name, seen[spec.name]))
            continue
        base, x = stage.base(spec.name), stage.activation(spec.name, x)
        if stage.variant.rewrites_base:
            base = {key: stored(stage, t, stage.start[f"{spec.name}.{key}"].dtype) for key, t in base.items()}
        plain = layer_output(
            stage.machine.base, spec, {key: leaf(stage.pristine[f"{spec.name}.{key}"]) for key in base}, x
        )
        if stage.sound(plain):
            budget = plain.bound + _start_bound(stage, spec.name, base, x, plain)
            # in a whole model the input itself may have moved by what the layers before have
            due = plain.value if stage.case.whole else stage.pristine_outputs[spec.name]
            found.append(compare(f"{spec.name}:output", y, due, budget))
    return worst(found) if found else None


def _untouched(stage: Stage, name: str, seen: Record) -> Measurement:
    """Compare what a layer is given with what comes to it, the first of what is stacked (see `Watches`)."""
    sites = [fresh_site(stage, index, name) for index in stage.adapters_on(name)]
    form = stage.formula.forward(stage.machine, sites, stage.base(name), stage.activation(name, seen.x))
    return compare(f"{name}:output", seen.y[0], seen.x[0].double(), form.bound[0])


def _start_bound(stage: Stage, name: str, base: Base, x: Bounded, plain: Bounded) -> Tensor:
    """Return the bound of the adapted output at the start, every tensor of which is known to a bound.

    Where no bound comes of all of them together (what is orthogonalized may be anything), the sum of those that come
    of one role each: what has none is exact, and the others start from it. Where there is none at all, that of computing
    with the start as it is stored (two reflections by one vector cancel, however coarse it is); and where that has none
    either (0 / 0, which the library keeps clear of) the plain layer's is what is left.
    """

    def bound(only: str | None) -> Bounded:
        sites = [fresh_site(stage, index, name, only) for index in stage.adapters_on(name)]
        return stage.formula.forward(stage.machine, sites, base, x)

    together = bound(None)
    if stage.sound(together):
        return together.bound
    roles = dict.fromkeys(role for index in stage.adapters_on(name) for role in fresh_site(stage, index, name).tensors)
    apart = [one.bound for one in map(bound, roles) if stage.sound(one)]
    if apart:
        return torch.stack(apart).sum(0)
    as_stored = bound("")  # no role's
    return as_stored.bound if stage.sound(as_stored) else plain.bound


@law(
    "train.live_gradients",
    "every trained tensor that the closed form depends on has a finite gradient, not zero throughout the first steps",
    (Op.FORWARD,),
    "(IA)^3 gates that a detach or a saddle of two zeros kept from ever moving",
    structural=True,
    logic=True,
    on="methods",
)
def live_gradients(stage: Stage) -> Measurement | None:
    """Train the fresh adapters for three steps and look for tensors that no gradient reached.

    Which gradients are due is asked of the closed form, in fp64 (see `training.matters`). Dropout could drop all of a small
    layer: where the case has any, the steps are taken in evaluation.
    """
    if stage.case.profile in UNTRAINED or (stage.case.whole and stage.case.batch[-1] == 1):
        return None  # in a sentence of one token queries and keys decide nothing
    if not forward_holds(stage):
        return NOTHING
    roles = {role for name in stage.names for _, role in stage.attached.adapter_tensors(name)}
    if all(stage.formula.hints.get(role) == "keep" for role in roles):
        return None  # a bias path alone, on layers without bias: nothing but zeros, which are no values to train
    start_fresh(stage)
    stage.attached.train(drops(stage) == 0)
    data = feeds(stage)
    wanted = _trained(stage)
    if not any(stage.attached.trainable(name) for name in stage.names):
        return broken(":adapter", "untrained", f"no tensor of '{stage.names[0]}' is trained")
    alive: set[int] = set()
    for _ in range(_STEPS):
        if not backward(stage, data):
            break
        for identity, tensor in parameters(stage).items():
            if tensor.grad is None:
                continue
            if not bool(torch.isfinite(tensor.grad).all()):
                if tensor.dtype == torch.float16:
                    return None  # where gradients overflow: one that trains in it scales the loss
                role = next((f"{s}:{r}" for s, r, _, ids in wanted if ids == identity), ":base")
                return broken(role, "non-finite gradient", "a gradient is not finite")
            if bool((tensor.grad != 0).any()):
                alive.add(identity)
        if all(identity in alive for _, _, _, identity in wanted):
            break
        descend(stage)
    dead = [w for w in wanted if w[3] not in alive]
    return worst(_missed(site, role) for site, role, index, _ in dead if matters(stage, index, site, role, data))


def _trained(stage: Stage) -> list[tuple[str, str, int, int]]:
    """Return site, role, adapter index and id of every trained tensor with elements."""
    found = []
    # of a base that attaching rewrites a second adapter starts from what the first one left, which may be nothing
    for index, name in enumerate(stage.names[:1] if stage.variant.rewrites_base else stage.names):
        held = stage.attached.adapter_tensors(name)
        own = sorted(stage.attached.trainable(name))
        found += [(site, role, index, id(held[site, role])) for site, role in own if held[site, role].numel()]
    return found


def _missed(site: str, role: str) -> Measurement:
    return broken(f"{site}:{role}", "dead gradient", f"no gradient reached {role} within {_STEPS} steps")


@law(
    "train.base_frozen",
    "after training steps the base and the inactive adapters are bit-equal, and only trained tensors moved",
    (Op.FORWARD,),
    "an embedding unfrozen by the first adapter stays so; a weight tied to a trained head moves with it",
    structural=True,
    logic=True,
    on="methods",
)
def base_frozen(stage: Stage) -> Measurement | None:
    """Activate the first adapter alone, take two steps over all that requires a gradient, and compare bit for bit."""
    if stage.case.profile in UNTRAINED:
        return None
    if not forward_holds(stage):
        return NOTHING
    active, *inactive = stage.names
    if inactive:
        stage.attached.activate((active,))
    stage.attached.train(True)
    trained = stage.attached.trainable(active)
    shared = {id(stage.attached.adapter_tensors(active)[key]) for key in trained}
    data = feeds(stage)
    for _ in range(2):
        if not backward(stage, data):
            break
        descend(stage)
    found = []
    for key, tensor in stage.attached.base_tensors().items():
        role = f"{key.rpartition('.')[0]}:{key.rpartition('.')[2]}"
        found.append(identical(role, tensor, stage.start[key], "trained"))
        if tensor.grad is not None:
            found.append(broken(role, "gradient", "a gradient accumulates in the base"))
    for name in stage.names:
        for (site, role), tensor in stage.attached.adapter_tensors(name).items():
            running = not isinstance(tensor, nn.Parameter)  # a buffer that a forward in training may update
            if (site, role) not in trained and not running if name == active else id(tensor) not in shared:
                label = f"{site}:{role} of {'the active' if name == active else 'an inactive'} adapter"
                found.append(identical(label, tensor, stage.start_adapters[name][site, role], "trained"))
    return worst(found)
