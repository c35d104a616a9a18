"""What both sampling commands share: the published flags, and the rule that they choose."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from config import device_of
from load_model import load_model
from torch import Tensor
from tqdm import tqdm

from sparsekit.diffusion import (
    ConfidenceSampler,
    DiffusionSampler,
    LogLinearNoise,
    OrderedSampler,
    TokenSample,
)
from sparsekit.diffusion.token_sampler import TokenSampler

LINE = "=" * 80


@dataclass
class Sampling:
    """What both sampling commands take."""

    model_path: str = "JingyangOu/radd-lambda-dce"  # the folder of a run, or published weights as a file, folder or id
    batch_size: int = 1
    length: int = 1024
    steps: int = 1024  # of euler and tweedie
    method: Literal["tweedie", "euler", "forward", "backward", "random", "confidence"] = "tweedie"
    strategy: Literal["direct", "top_p", "top_k"] = "direct"
    strategy_para: float = 0.8  # p of top_p, k of top_k, and the confidence of confidence
    seed: int = 0  # of the first row; a row does not depend on the others
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")

    def sampler(self) -> TokenSampler:
        """Returns the sampler of the method."""
        if self.method == "confidence":
            return ConfidenceSampler(self.strategy_para)
        choice: dict[str, Any] = {}
        if self.strategy == "top_p":
            choice = {"top_p": self.strategy_para}
        if self.strategy == "top_k":
            choice = {"top_k": int(self.strategy_para)}
        if self.method in ("tweedie", "euler"):
            return DiffusionSampler(self.steps, noise=LogLinearNoise(), method=self.method, **choice)
        return OrderedSampler(order=self.method, **choice)


def draw(settings: Sampling, prefix: str = "", suffix: str = "") -> tuple[list[str], TokenSample]:
    """Draws texts that begin and end as given.

    Raises:
        ValueError: the given parts leave nothing to draw.
    """
    model, tokenizer = load_model(settings.model_path, device_of(settings.device))
    first, last = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (prefix, suffix))
    if len(first) + len(last) >= settings.length:
        raise ValueError(
            f"--length {settings.length} leaves nothing to draw between {len(first)} and {len(last)} tokens"
        )
    start = torch.full((settings.batch_size, settings.length), model.mask_token)
    start[:, : len(first)] = torch.tensor(first, dtype=torch.long)
    start[:, settings.length - len(last) :] = torch.tensor(last, dtype=torch.long)
    seeds = range(settings.seed, settings.seed + settings.batch_size)
    found = settings.sampler().sample(
        model,
        start.to(device_of(settings.device)),
        model.mask_token,
        seeds,
        progress=lambda turns: tqdm(turns, "sample", leave=False, disable=None),
    )
    return texts(tokenizer, found.tokens), found


def texts(tokenizer: Any, tokens: Tensor) -> list[str]:
    return list(tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False))


def show(drawn: list[str], found: TokenSample) -> None:
    for text in drawn:
        print(text, LINE, sep="\n")
    calls = found.evaluations.double()
    print(f"{len(drawn)} rows, the model evaluated {calls.mean():.1f} times for each")
