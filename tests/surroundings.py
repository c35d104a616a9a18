"""The verbs that change a model, the surroundings in which people call them, and the checks after each call."""

import contextvars
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info, masked_parameters

SETTING = contextvars.ContextVar("setting", default="lost")
WIDTH, TOKENS = 32, 48


class Block(nn.Module):
    """A residual block that records what it sees of its caller's surroundings."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, dtype=torch.float32, device="cpu") for _ in range(2))
        self.seen: set[tuple[str, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.add(ambient())
        return x + self.down(self.up(x).relu())


class Imaged(Block):
    """The same of convolutions, of what it takes for images of 2x2."""

    def __init__(self) -> None:
        super().__init__()
        options = {"padding": 1, "dtype": torch.float32, "device": "cpu"}
        self.up, self.down = (nn.Conv2d(WIDTH // 4, WIDTH // 4, 3, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, WIDTH // 4, 2, 2)).flatten(1)


def ambient() -> tuple[str, ...]:
    """Returns the state of the caller that code in a forward pass can see."""
    return (
        SETTING.get(),
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        str(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")),
        str(torch.are_deterministic_algorithms_enabled()),
    )


def make(seed: int = 0, block: type[Block] = Block) -> nn.Sequential:
    """Returns a model of two blocks and a head in fp32 on the CPU, whatever the defaults are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(WIDTH, 4, dtype=torch.float32, device="cpu")
        model = nn.Sequential(block(), block(), head)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") / 6
                )
    return model.eval()


def inputs(seed: int = 1) -> Tensor:
    """Returns inputs whose columns differ widely in size."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return x * torch.logspace(-1, 1, WIDTH, dtype=torch.float32, device="cpu")


def pruned(block: type[Block] = Block) -> nn.Sequential:
    model = make(block=block)
    sk.prune_(model, sk.Magnitude("2:4"))
    return model


def packed() -> nn.Sequential:
    model = pruned()
    for name in ("0.up", "2"):
        model.set_submodule(name, sk.nn.Linear24.from_linear(model.get_submodule(name)))
    model[0].down = sk.nn.Int8Linear.from_linear(model[0].down)
    for name, inputs in (("up", "int8"), ("down", "float")):
        setattr(model[1], name, sk.nn.QuantizedLinear24.from_linear(getattr(model[1], name), inputs=inputs))
    return model


def packed_images() -> nn.Sequential:
    model = pruned(Imaged)
    model[0].up = sk.nn.Conv2d24.from_conv2d(model[0].up)
    model[1].down = sk.nn.PrepackedConv2d.from_conv2d(model[1].down)
    return model


@dataclass(frozen=True)
class Verb:
    """A call that changes a model: its initial model, the call, and whether its result is the same bits everywhere."""

    start: Callable[[], nn.Sequential]
    act: Callable[[nn.Sequential, Path], object]
    exact: bool = True


def prune(method: Any, model: nn.Sequential, _: Path) -> object:
    return sk.prune_(model, method, [inputs(), inputs(2)])


def tiers(model: nn.Sequential, _: Path) -> object:
    step = sk.tiers.Step(1, sk.tiers.Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 0.0)
    return sk.tiers.progressive_tiers(model, [step], [inputs()], lambda model, step: None)


def finish(model: nn.Sequential, _: Path) -> object:
    training = sk.sparse_training_(model)
    with torch.no_grad():
        model(inputs())
    training.finish()
    return training


def keep(model: nn.Sequential, _: Path) -> object:
    return sk.keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1))


def slim(model: nn.Sequential, _: Path) -> object:
    units = sk.find_units(model, inputs())
    kept = {each.reader: range(each.units // 4, each.units) for each in units.branches}
    return sk.slim_(model, units.keep(kept), [inputs()])


def unslim(model: nn.Sequential, _: Path) -> object:
    slim(model, _)
    return sk.unslim_(model)


def mask_units(model: nn.Sequential, _: Path) -> object:
    units = sk.find_units(model, inputs())
    scores = sk.slim.unit_scores(model, units)
    return sk.mask_units_(model, sk.slim.choose_units(model, units, scores, 0.4, round_to=8))


def reload(model: nn.Sequential, folder: Path) -> object:
    sk.load(model, folder / "saved.safetensors")
    return None


METHODS = {
    "magnitude": sk.Magnitude("2:4"),
    "scores": sk.Scores("2:4", {name: each.cos() for name, each in make(7).named_parameters() if each.dim() == 2}),
    "wanda": sk.Wanda("2:4"),
    "ria": sk.RIA("2:4"),
    "sparsegpt": sk.SparseGPT("2:4"),
    "admm": sk.ADMM("2:4"),
    "swaps": sk.Swaps(sk.Wanda("2:4")),
    "least_squares": sk.LeastSquares(sk.Wanda("2:4")),
}
VERBS = {
    **{
        f"prune-{name}": Verb(make, partial(prune, each), name in ("magnitude", "scores"))
        for name, each in METHODS.items()
    },
    "compress": Verb(pruned, lambda model, _: sk.compress_(model, inputs())),
    "compress-int8": Verb(pruned, lambda model, _: sk.compress_(model, inputs(), precision="int8")),
    "quantize": Verb(pruned, lambda model, _: sk.quantize_(model, "nf4")),
    "quantize-24": Verb(pruned, lambda model, _: sk.quantize_(model, "2:4 int4")),
    "compress-conv": Verb(lambda: pruned(Imaged), lambda model, _: sk.compress_(model, inputs())),
    "decompress-conv": Verb(packed_images, lambda model, _: sk.decompress_(model)),
    "decompress": Verb(packed, lambda model, _: sk.decompress_(model)),
    "keep_masks": Verb(pruned, keep),
    "sparse_training": Verb(make, finish),
    "tiers": Verb(make, tiers, exact=False),
    "slim": Verb(make, slim, exact=False),
    "unslim": Verb(make, unslim, exact=False),
    "mask_units": Verb(make, mask_units),
    "mask_rows": Verb(make, lambda model, _: sk.slim.mask_rows_(model, 0.3)),
    "save": Verb(packed, lambda model, folder: sk.save(model, folder / "written.safetensors")),
    "load": Verb(lambda: make(3), reload),
}


class Seen(TorchDispatchMode):
    """A dispatch mode of the caller that changes nothing, as that of a profiler or a counter of operations."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return op(*args, **(kwargs or {}))


@contextmanager
def setting(set_: Callable[[Any], object], get: Callable[[], Any], value: Any):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def default_dtype(dtype: torch.dtype):
    return setting(torch.set_default_dtype, torch.get_default_dtype, dtype)


def deterministic():
    return setting(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True)


@contextmanager
def variable():
    token = SETTING.set("mine")
    try:
        yield
    finally:
        SETTING.reset(token)


SURROUNDINGS = {
    "autocast-bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast-fp16": lambda: torch.autocast("cpu", torch.float16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default-float64": lambda: default_dtype(torch.float64),
    "default-bfloat16": lambda: default_dtype(torch.bfloat16),
    "device-meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "contextvar": variable,
    "one-thread": lambda: setting(torch.set_num_threads, torch.get_num_threads, 1),
    "four-threads": lambda: setting(torch.set_num_threads, torch.get_num_threads, 4),
    "dispatch-mode": Seen,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "thread": nullcontext,
}


def run(verb: Verb, surrounding: str, folder: Path) -> tuple[nn.Sequential, object]:
    """Returns the model after a verb in a surrounding, and the result of the verb."""
    model, returned = verb.start(), []

    def act() -> None:
        with SURROUNDINGS[surrounding]() if surrounding else nullcontext():
            returned.append(verb.act(model, folder))

    if surrounding == "thread":
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    else:
        act()
    assert returned, "the verb failed in its thread"
    return model, returned[0]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the dense weights and biases, with compressed ones unpacked."""
    found = {}
    for name, module in model.named_modules():
        for key in ("weight", "bias"):
            if isinstance(tensor := getattr(module, key, None), Tensor):
                found[f"{name}.{key}"] = tensor.detach().clone().float()
    return found


def masks(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{name}.{parameter}": get_mask(module, parameter)
        for name, module in model.named_modules()
        for parameter in masked_parameters(module)
    }


def state_of(model: nn.Module) -> dict[str, Any]:
    """Returns everything that a failed call must not change, tensors as bytes; no computed weight is read."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        found[name] = (
            id(module),
            type(module),
            module.training,
            {key: None if tensor is None else bits(tensor) for key, tensor in own.items()},
            {key: id(tensor) for key, tensor in module._parameters.items()},
            {key: tensor.requires_grad for key, tensor in module._parameters.items() if tensor is not None},
            list(module._modules),
            sorted(module.__dict__.keys() - {"seen"}),
            {
                key: len(value)
                for key, value in vars(module).items()
                if key.endswith("_hooks") and isinstance(value, dict)
            },
            [get_mask_info(module, key) for key in masked_parameters(module)],
        )
    return found


def bits(tensor: Tensor) -> Any:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
        return str(tensor.device)
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def assert_usable(model: nn.Module) -> None:
    """Trains one step and evaluates, outside of every surrounding."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cpu", name
        assert not parameter.is_inference(), name
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    optimizer.step()
    model.eval()
    assert torch.isfinite(model(inputs())).all()
    with torch.inference_mode():
        model(inputs())
