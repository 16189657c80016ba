"""Check that a memento restores everything that operations on real adapters change, and refuses the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

from peftcheck.memento import Memento, Unrestorable

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PLAIN = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, types.ModuleType)


def fingerprint(*roots: object) -> dict[int, tuple]:
    """Reduce everything reachable to comparable values, by the identity of the object that holds them."""
    seen: dict[int, tuple] = {}
    pending = list(roots)

    def token(value: object) -> tuple:
        if type(value) in PLAIN:
            return (type(value), repr(value))
        pending.append(value)
        return (type(value), id(value))

    while pending:
        value = pending.pop()
        if type(value) in PLAIN or isinstance(value, type) or id(value) in seen:
            continue
        parts: list[object] = [type(value)]
        seen[id(value)] = ()
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                storage = value.untyped_storage()
                content = bytes(storage.tolist()) if storage.nbytes() else b""
                layout = (value.dtype, value.shape, value.stride(), value.storage_offset())
                parts += [storage._cdata, content, *layout, value.requires_grad, value.grad_fn]
                hooks = (value._backward_hooks, value._post_accumulate_grad_hooks)
                parts += [token(item) for item in (value.grad, *hooks)]
        elif isinstance(value, dict):
            parts += [(token(key), token(item)) for key, item in value.items()]
            parts += [token(getattr(value, "default_factory", None))]
        elif isinstance(value, (set, frozenset)):
            parts += [frozenset(token(member) for member in value)]
        elif isinstance(value, (list, tuple)):
            parts += [token(member) for member in value]
        elif isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            parts += [token(value.__defaults__), token(value.__kwdefaults__)]
            parts += [token(cell.cell_contents) if has_content(cell) else "empty" for cell in cells]
        elif isinstance(value, types.MethodType):
            parts += [token(value.__self__)]
        elif isinstance(value, functools.partial):
            parts += [token(value.func), token(value.args), token(value.keywords)]
        elif isinstance(value, weakref.ref):
            parts += [token(value())]
        if hasattr(value, "__dict__"):
            parts += [token(vars(value))]
        seen[id(value)] = tuple(parts)
    return seen


def has_content(cell: types.CellType) -> bool:
    try:
        return (cell.cell_contents, True)[1]
    except ValueError:
        return False


def differences(before: dict[int, tuple], after: dict[int, tuple]) -> list[object]:
    return [(before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)]


# --- real adapters -----------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Feed one input through named layers, all of which can be adapted."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def linears() -> tuple[nn.Module, torch.Tensor]:
    return Stack(a=nn.Linear(8, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 8, bias=False)), torch.randn(3, 8)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    model = Stack(a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, (1, 2)))
    return model, torch.randn(2, 4, 6, 7)


def square_convolutions() -> tuple[nn.Module, torch.Tensor]:
    return Stack(a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 6, 7)


def embeddings() -> tuple[nn.Module, torch.Tensor]:
    return Stack(a=nn.Embedding(10, 8), b=nn.Linear(8, 8)), torch.tensor([[1, 2, 9]])


def tied() -> tuple[nn.Module, torch.Tensor]:
    model, x = Stack(a=nn.Embedding(10, 8), b=nn.Linear(8, 10, bias=False)), torch.tensor([[1, 2, 9]])
    model.b.weight = model.a.weight
    return model, x


AB = {"target_modules": ["a", "b"]}
CASES = {
    "lora": (linears, lambda: peft.LoraConfig(r=4, lora_dropout=0.1, **AB)),
    "lora-bias": (linears, lambda: peft.LoraConfig(r=4, bias="all", modules_to_save=["norm"], **AB)),
    "lora-conv2d": (convolutions, lambda: peft.LoraConfig(r=4, **AB)),
    "lora-embedding": (embeddings, lambda: peft.LoraConfig(r=4, **AB)),
    "lora-tokens": (
        embeddings,
        lambda: peft.LoraConfig(r=4, target_modules=["b"], trainable_token_indices={"a": [1]}),
    ),
    "lora-tied": (tied, lambda: peft.LoraConfig(r=4, target_modules=["b"])),
    "lora-parameter": (
        linears,
        lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["b.weight"]),
    ),
    "dora": (linears, lambda: peft.LoraConfig(r=4, use_dora=True, **AB)),
    "dora-conv2d": (convolutions, lambda: peft.LoraConfig(r=4, use_dora=True, **AB)),
    "dora-embedding": (embeddings, lambda: peft.LoraConfig(r=4, use_dora=True, **AB)),
    "pissa": (linears, lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **AB)),
    "ia3": (linears, lambda: peft.IA3Config(feedforward_modules=["b"], **AB)),
    "ia3-conv2d": (convolutions, lambda: peft.IA3Config(feedforward_modules=["b"], **AB)),
    "loha": (linears, lambda: peft.LoHaConfig(r=4, **AB)),
    "loha-conv2d": (convolutions, lambda: peft.LoHaConfig(r=4, use_effective_conv2d=True, **AB)),
    "lokr": (linears, lambda: peft.LoKrConfig(r=4, **AB)),
    "lokr-conv2d": (convolutions, lambda: peft.LoKrConfig(r=4, **AB)),
    "oft": (linears, lambda: peft.OFTConfig(oft_block_size=4, **AB)),
    "oft-conv2d": (square_convolutions, lambda: peft.OFTConfig(oft_block_size=4, **AB)),
    "boft": (linears, lambda: peft.BOFTConfig(boft_block_size=4, **AB)),
    "boft-conv2d": (square_convolutions, lambda: peft.BOFTConfig(boft_block_size=2, **AB)),
    "vera": (linears, lambda: peft.VeraConfig(r=4, **AB)),
    "hra": (linears, lambda: peft.HRAConfig(r=4, **AB)),
    "adalora": (linears, lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **AB)),
    "ln_tuning": (linears, lambda: peft.LNTuningConfig(target_modules=["norm"])),
    "trainable_tokens": (
        embeddings,
        lambda: peft.TrainableTokensConfig(target_modules=["a"], token_indices=[1, 2]),
    ),
    "fourierft": (linears, lambda: peft.FourierFTConfig(n_frequency=5, **AB)),
    "vblora": (linears, lambda: peft.VBLoRAConfig(num_vectors=4, vector_length=4, topk=1, **AB)),
    "randlora": (linears, lambda: peft.RandLoraConfig(r=4, **AB)),
    "osf": (linears, lambda: peft.OSFConfig(target_modules=["a", "b"], effective_rank=4)),
    "shira": (linears, lambda: peft.ShiraConfig(r=2, **AB)),
    "miss": (linears, lambda: peft.MissConfig(r=4, **AB)),
    "road": (linears, lambda: peft.RoadConfig(group_size=8, **AB)),
    "c3a": (linears, lambda: peft.C3AConfig(block_size=4, **AB)),
    "delora": (linears, lambda: peft.DeloraConfig(r=4, **AB)),
    "hira": (linears, lambda: peft.HiraConfig(r=4, **AB)),
    "gralora": (linears, lambda: peft.GraloraConfig(r=4, gralora_k=2, **AB)),
    "waveft": (linears, lambda: peft.WaveFTConfig(n_frequency=5, **AB)),
    "pvera": (linears, lambda: peft.PveraConfig(r=4, **AB)),
    "frod": (linears, lambda: peft.FrodConfig(**AB)),
    "peanut": (linears, lambda: peft.PeanutConfig(**AB)),
    "tinylora": (linears, lambda: peft.TinyLoraConfig(r=2, **AB)),
    "psoft": (linears, lambda: peft.PsoftConfig(r=4, **AB)),
    "lily": (linears, lambda: peft.LilyConfig(r=4, **AB)),
}  # fmt: skip


def attach(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    build, config = CASES[name]
    model, x = build()
    model = peft.get_peft_model(model, config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, x


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def noise(model, x):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))


def swap_data(model, x):
    for parameter in model.parameters():
        parameter.data = torch.randn(3, 2, dtype=torch.float64)


def replace_parameters(model, x):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros_like(parameter))


def add_hooks(model, x):
    model.register_forward_hook(lambda *_: None)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.register_hook(lambda grad: grad * 2)
        parameter.register_post_accumulate_grad_hook(lambda tensor: None)


def replace_forward(model, x):
    for module in model.modules():
        module.forward = functools.partial(lambda bound, *args: bound(*args), module.forward)
        module.__class__ = type("Renamed", (type(module),), {})


def backward(model, x):
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    run(model, x).square().sum().backward()


def optimise(model, x):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model, x)
    optimizer.step()


def prune_attributes(model, x):
    for module in list(model.modules()):
        vars(module).clear()


def empty_storages(model, x):
    for parameter in model.parameters():
        parameter.data.untyped_storage().resize_(0)


def parametrize(model, x):
    for module in list(model.modules()):
        if isinstance(module._parameters.get("weight"), nn.Parameter):
            nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())


def merge_twice(model, x):
    model.merge_adapter()
    model.merge_adapter()
    run(model, x)


def round_trip(model, x):
    model.merge_adapter()
    model.unmerge_adapter()


def rescale(model, x):
    for module in model.modules():
        if hasattr(module, "scaling"):
            for name in module.scaling:
                module.scaling[name] = 7.5
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def two_adapters(model, x):
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    model.delete_adapter("default")


# Whatever the variant, these change something, so that a memento that records nothing cannot pass.
CHANGING = {
    "noise": noise, "swap_data": swap_data, "replace_parameters": replace_parameters, "add_hooks": add_hooks,
    "replace_forward": replace_forward, "optimise": optimise, "prune_attributes": prune_attributes,
    "empty_storages": empty_storages, "parametrize": parametrize, "backward": backward,
    "double": lambda model, x: model.double(),
    "train": lambda model, x: model.train(),
    "freeze": lambda model, x: model.requires_grad_(False),
    "assign": lambda model, x: model.load_state_dict(
        {key: torch.zeros_like(value) for key, value in model.state_dict().items()}, assign=True
    ),
    "unload": lambda model, x: model.unload(),
    "disable": lambda model, x: model.base_model.disable_adapter_layers(),
}  # fmt: skip
# These a variant may refuse or leave without effect.
OTHERS = {
    "forward": run, "merge_twice": merge_twice, "round_trip": round_trip, "rescale": rescale,
    "two_adapters": two_adapters,
    "merge": lambda model, x: model.merge_adapter(),
    "safe_merge": lambda model, x: model.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda model, x: model.merge_and_unload(),
    "safe_merge_and_unload": lambda model, x: model.merge_and_unload(safe_merge=True),
    "add_adapter": lambda model, x: model.add_adapter("other", model.peft_config["default"]),
    "delete_adapter": lambda model, x: model.delete_adapter("default"),
    "no_adapter": lambda model, x: model.set_adapter("absent"),
}  # fmt: skip
OPERATIONS = CHANGING | OTHERS


def apply(operation: str, model: nn.Module, x: torch.Tensor) -> None:
    if operation in CHANGING:
        OPERATIONS[operation](model, x)
        return
    # A variant may refuse or crash halfway, which is one more state to come back from.
    with contextlib.suppress(Exception):
        OPERATIONS[operation](model, x)


def assert_restores(model: nn.Module, x: torch.Tensor, walks: list[list[str]], pristine: bool = True) -> None:
    run(model, x)  # caches that fill up on first use
    tree = [(name, type(module)) for name, module in model.named_modules()]
    before = fingerprint(model)
    memento = Memento([model])
    assert not differences(before, fingerprint(model)), "recording changed something"
    expected = output(model, x)
    keys = list(model.state_dict())  # after recording: of a packed bitsandbytes layer it changes the weight
    memento.restore()
    for walk in walks:
        for operation in walk:
            apply(operation, model, x)
        if pristine and walk[0] in CHANGING:
            assert differences(before, fingerprint(model)), f"{walk} has no effect"
        memento.restore()
        assert not differences(before, fingerprint(model)), walk
        assert [(name, type(module)) for name, module in model.named_modules()] == tree, walk
        assert torch.equal(output(model, x), expected), walk
        assert list(model.state_dict()) == keys, walk
        memento.restore()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(model, x)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_undone(name):
    model, x = attach(name)
    assert_restores(model, x, [[operation] for operation in OPERATIONS])


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "lora-embedding", "lora-tied", "adalora"])
def test_random_walks_are_undone(name):
    model, x = attach(name)
    draw = random.Random(0)
    gentle = [*OTHERS, "noise", "train", "freeze", "disable", "double", "unload"]
    walks = [[*draw.sample(gentle, 3), draw.choice(list(OTHERS))] for _ in range(20)]
    assert_restores(model, x, walks)


@pytest.mark.parametrize("start", ["merge", "backward", "disable", "add_hooks", "two_adapters"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "lokr"])
def test_a_start_that_is_not_pristine_is_restored(name, start):
    model, x = attach(name)
    apply(start, model, x)
    model.eval()
    walks = [[operation] for operation in (*OTHERS, "noise", "backward", "add_hooks")]
    assert_restores(model, x, walks, pristine=False)


@pytest.mark.parametrize("name", ["lora-tied", "lora", "dora", "vera"])
def test_a_restored_model_learns_as_the_first_time(name):
    model, x = attach(name)
    memento = Memento([model])
    weights = []
    for _ in range(3):
        torch.manual_seed(1)
        optimise(model, x)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        add_hooks(model, x)
        memento.restore()
    assert all(map(torch.equal, weights[0], weights[1])) and all(map(torch.equal, weights[0], weights[2]))


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_layers_are_restored(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    kind = functools.partial(bnb.nn.Linear8bitLt, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit
    model = Stack(a=kind(64, 64), b=kind(64, 64)).to("cpu")
    setattr(model, f"is_loaded_in_{bits}bit", True)
    x = torch.randn(2, 64)
    for layer in model.children():
        layer.weight = type(layer.weight)(torch.randn(64, 64), requires_grad=False).to("cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **AB)).eval()
    assert any(type(parameter).__module__.startswith("bitsandbytes") for parameter in model.parameters())
    walks = [["merge"], ["round_trip"], ["merge_and_unload"], ["unload"], ["forward"], ["merge_twice"]]
    assert_restores(model, x, walks)


def test_transformers_models_are_restored():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config), peft.LoraConfig(r=2, target_modules=["c_attn", "wte"])
    ).eval()
    x = torch.tensor([[1, 2, 3]])
    model(x)
    before = fingerprint(model)
    memento = Memento([model])
    for operation in ("merge", "unload", "noise", "merge_and_unload", "add_adapter", "replace_parameters"):
        apply(operation, model, x)
        model.config.use_cache = not model.config.use_cache
        memento.restore()
        assert not differences(before, fingerprint(model)), operation


# --- tensors -----------------------------------------------------------------------------------------------


def test_tied_parameters_stay_tied_and_replaced_ones_come_back():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    tied, values = first.weight, first.weight.detach().clone()
    memento = Memento([first, second])
    second.weight = nn.Parameter(torch.zeros(2, 2))
    first.weight.data = torch.zeros(5)
    memento.restore()
    assert first.weight is tied and second.weight is tied and torch.equal(tied, values)


def test_views_keep_their_storage_offsets_and_strides():
    base = torch.arange(12.0)
    views = [base[3:6], base.view(3, 4).t(), base[:1].expand(4), base.view(torch.int32)]
    layouts = [(v.data_ptr(), v.shape, v.stride(), v.dtype) for v in views]
    memento = Memento([views, base])
    for view in views:
        view.data = view.clone()
        view.zero_()
    base.fill_(-1)
    memento.restore()
    assert [(v.data_ptr(), v.shape, v.stride(), v.dtype) for v in views] == layouts
    assert torch.equal(base, torch.arange(12.0)) and torch.equal(views[1], torch.arange(12.0).view(3, 4).t())
    base[0] = 7
    assert torch.equal(views[2], torch.full((4,), 7.0))


def test_a_shared_storage_is_recorded_once():
    base = torch.arange(64.0)
    memento = Memento([base, *base.split(4), base.view(torch.int32), nn.Parameter(base)])
    assert sum(copy.nbytes for copy in memento._bytes_then) == base.nbytes


def test_an_expanded_tensor_is_recorded_by_its_storage_not_its_shape():
    huge = torch.ones(1).expand(10**6, 10**6)
    memento = Memento([huge])
    huge.data.untyped_storage()[0] = 0
    memento.restore()
    assert huge[5, 5] == 1 and huge.untyped_storage().nbytes() == 4


def test_bytes_are_restored_even_where_values_compare_unequal_or_equal():
    values = torch.tensor([float("nan"), -0.0, 5e-324], dtype=torch.float64)
    payload = values.view(torch.int64)[0] + 3  # a NaN with a payload
    values.view(torch.int64)[0] = payload
    bits = values.view(torch.int64).clone()
    memento = Memento([values])
    values.copy_(torch.tensor([float("nan"), 0.0, 0.0]))
    memento.restore()
    assert torch.equal(values.view(torch.int64), bits)


def test_gradients_come_back_as_the_same_objects_with_the_same_bytes():
    layer = nn.Linear(2, 2)
    layer.weight.grad = grad = torch.ones(2, 2)
    memento = Memento([layer])
    for disturb in (
        lambda: layer(torch.ones(1, 2)).sum().backward(),
        lambda: layer.zero_grad(),
        lambda: layer.double()(torch.ones(1, 2).double()).sum().backward(),
        lambda: setattr(grad, "data", torch.zeros(7)),
    ):
        disturb()
        memento.restore()
        assert layer.weight.grad is grad and torch.equal(grad, torch.ones(2, 2)) and layer.bias.grad is None
        assert layer.weight.dtype == torch.float32


def test_a_buffer_that_joined_a_graph_leaves_it():
    layer = nn.Linear(2, 2)
    layer.register_buffer("mean", torch.zeros(2, 2))
    memento = Memento([layer])
    layer.mean.add_(layer.weight)
    assert layer.mean.grad_fn is not None
    memento.restore()
    assert layer.mean.grad_fn is None and not layer.mean.requires_grad and not layer.mean.any()


def test_a_view_that_joined_a_graph_is_reported():
    view = torch.zeros(4)[1:]
    memento = Memento([view])
    view.add_(torch.ones(3, requires_grad=True))
    with pytest.raises(Unrestorable, match="cannot be put back"):
        memento.restore()


def test_a_tensor_that_moved_to_another_device_for_good_is_reported():
    parameter = nn.Parameter(torch.ones(2))
    memento = Memento([parameter])
    torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones(2, device="meta")))
    with pytest.raises(Unrestorable, match="cannot be put back"):
        memento.restore()


def test_a_tensor_keeps_its_class_and_attributes():
    class Marked(nn.Parameter):
        pass

    parameter, plain = nn.Parameter(torch.ones(2)), torch.ones(2)
    parameter.mark = marks = ["first"]
    memento = Memento([parameter, plain])
    parameter.__class__ = Marked
    plain.__class__ = nn.Parameter
    marks.append("second")
    del parameter.mark
    plain.mark = 1
    memento.restore()
    assert type(parameter) is nn.Parameter and type(plain) is torch.Tensor
    assert parameter.mark == ["first"] and not hasattr(plain, "mark")


def test_tensor_hooks_come_back_and_go_away():
    kept, added = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    handle = kept.register_hook(lambda grad: grad * 2)
    memento = Memento([kept, added])
    handle.remove()
    added.register_hook(lambda grad: grad * 3)
    added.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    memento.restore()
    (kept + added).sum().backward()
    assert kept.grad.tolist() == [2, 2] and added.grad.tolist() == [1, 1]


def test_resized_storages_and_meta_and_inference_tensors():
    with torch.inference_mode():
        inference = torch.ones(3)
    resized, empty, meta = torch.ones(3), torch.empty(0), torch.empty(3, device="meta")
    tensors = [resized, empty, meta, inference]
    memento = Memento(tensors)
    resized.untyped_storage().resize_(0)
    empty.resize_(4)
    meta.data = torch.empty(5, device="meta")
    with torch.inference_mode():
        inference.zero_()
    memento.restore()
    assert [tuple(t.shape) for t in tensors] == [(3,), (0,), (3,), (3,)]
    assert torch.equal(resized, torch.ones(3)) and torch.equal(inference, torch.ones(3))


# --- objects and containers --------------------------------------------------------------------------------


class Anything:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def forward(self) -> object:
        return self.state


class Stubborn(dict):
    """Forbid its own mutation, as immutable mappings of libraries do."""

    def clear(self):
        raise TypeError

    update = __setitem__ = clear


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    members: list


def test_containers_are_restored_in_place_with_their_order():
    ordered = OrderedDict(a=1, b=2)
    factory = defaultdict(list, x=[1])
    stubborn = Stubborn(k=[1])
    state = Anything(order=ordered, factory=factory, stubborn=stubborn, items=[1, [2]])
    state.some, state.none = {1, 2}, set()
    inner = state.items[1]
    memento = Memento([state, (frozenset([Sealed]), Sealed(inner))])
    for _ in range(3):
        ordered.move_to_end("a")
        factory.default_factory = None
        factory["x"].append(2)
        dict.clear(stubborn)
        inner.append(3)
        state.items[:] = []
        state.some ^= {2, 3}
        state.none.add(1)
        state.__dict__ = {"new": 1}
        state.__class__ = type("Other", (Anything,), {})
        memento.restore()
        assert type(state) is Anything
        assert list(vars(state)) == ["order", "factory", "stubborn", "items", "some", "none"]
        assert list(ordered) == ["a", "b"] and state.order is ordered
        assert factory == {"x": [1]} and factory.default_factory is list
        assert stubborn == {"k": [1]} and state.items == [1, [2]] and state.items[1] is inner
        assert state.some == {1, 2} and state.none == set()


def test_state_behind_functions_methods_partials_and_weak_references_is_restored():
    def counter():
        count, log = 0, []

        def step(extra=[0], *, unit=1):  # noqa: B006
            nonlocal count
            count += unit
            log.append(count)
            extra[0] += 1
            return count, len(log), extra[0]

        return step

    step = counter()
    step.label = "first"
    held = [Anything(state=[value]) for value in range(3)]
    module = nn.Linear(1, 1)
    module.forward = held[0].forward
    module.call = functools.partial(print, held[1], sep=held[1].state)
    module.link = weakref.ref(held[2])
    module.step = step
    memento = Memento([module])
    for _ in range(2):
        assert step() == (1, 1, 1)
        step.label = "second"
        step.__defaults__, step.__kwdefaults__ = ([5],), {"unit": 9}
        for holder in held:
            holder.state.append("more")
            holder.state = None
        module.call.keywords.clear()
        memento.restore()
        assert [holder.state for holder in held] == [[0], [1], [2]] and step.label == "first"
        assert module.call.keywords == {"sep": [1]}


def test_a_closure_variable_without_a_value_is_left_without_one():
    def outer():
        def inner():
            return later

        def assign():
            nonlocal later
            later = 1

        if False:
            later = None
        return inner, assign

    inner, assign = outer()
    memento = Memento([inner])
    assign()
    assert inner() == 1
    memento.restore()
    with pytest.raises(NameError):
        inner()


def test_what_belongs_to_the_process_is_left_alone():
    memento = Memento([Anything(act=nn.functional.relu, kind=nn.Linear, method=Anything.forward, lib=torch)])
    Anything.forward.mark = 1
    memento.restore()
    assert Anything.forward.mark == 1
    del Anything.forward.mark


def test_cycles_and_deep_graphs_are_recorded():
    chain: list = []
    for _ in range(5000):
        chain = [chain]
    state = Anything(chain=chain)
    state.me = state
    memento = Memento([state])
    del state.me
    memento.restore()
    assert state.me is state


# --- what it cannot see into -------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("state",)


class SlottedModule(nn.Module):
    __slots__ = ("state",)


class SlottedList(list):
    __slots__ = ("state",)


class Wrapper(torch.Tensor):
    """Keep the values in another tensor, as quantized tensor subclasses do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def closure_over(value: object):
    return lambda: value


OPAQUE = {
    "slots": Slotted, "module with slots": SlottedModule, "list with slots": SlottedList, "deque": deque,
    "generator": lambda: (i for i in ()), "iterator": lambda: iter([1]), "lock": threading.Lock,
    "thread-local": threading.local, "bytearray": bytearray, "random state": random.Random,
    "torch random state": torch.Generator, "cached function": lambda: functools.lru_cache(lambda: 1),
    "exception": lambda: ValueError([1]), "numpy array": lambda: torch.zeros(2).numpy(),
    "storage": lambda: torch.zeros(2).untyped_storage(), "map": lambda: map(str, []),
    "graph": lambda: torch.ones(2, requires_grad=True) * 2, "sparse": lambda: torch.eye(2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "lazy": lambda: nn.LazyLinear(2), "wrapper": lambda: Wrapper(torch.ones(2)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "closure": lambda: closure_over(deque()), "method": lambda: deque().append,
    "weak": lambda: weakref.WeakMethod(KEPT.forward), "dict key": lambda: {Slotted(): 1},
    "default": lambda: functools.partial(print, deque()),
}  # fmt: skip
KEPT = Anything()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPAQUE)
def test_an_object_it_cannot_see_into_is_refused(name):
    opaque = OPAQUE[name]()
    with pytest.raises(Unrestorable, match=r"cannot see into \S+ at roots\[0\]"):
        Memento([opaque])
    with pytest.raises(Unrestorable, match=r"at roots\[1\]\.branch\[0\]\['key'\]"):
        Memento([Anything(), Anything(branch=[{"key": opaque}])])


def test_the_refusal_names_type_and_path():
    layer = nn.Linear(2, 2)
    layer.queue = {"calls": (1, deque())}
    with pytest.raises(Unrestorable) as refusal:
        Memento([nn.Sequential(layer)])
    assert "collections.deque at roots[0]._modules['0'].queue['calls'][1]" in str(refusal.value)
