"""Judges texts by a causal language model: their perplexity by it, together with the entropy of their tokens.

    python examples/radd/generative_perplexity.py --samples out/train/samples/iter_2000/sample_0.txt --judge gpt2-large

A perplexity alone says little: a text that repeats itself has a low one. The entropy of the tokens of a text tells.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from config import DATA, device_of
from sampling import LINE
from tqdm import tqdm
from train import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = DATA / "ckpt_stories260K" / "hf"  # a model of stories, if it is at hand


@dataclass
class Judging:
    """What generative_perplexity.py takes."""

    samples: Path  # texts, with a line of = between them
    judge: str = "gpt2-large"  # a folder or an id of the hub
    device: str = "auto"


@torch.no_grad()
def judge_texts(texts: list[str], judge: str, device: str = "auto") -> dict[str, float]:
    """Returns the perplexity of texts by token of the judge, its standard error over texts, and the mean entropy.

    A text counts as far as the judge can read, but for its first token. The entropy is that of the frequencies of its
    tokens, in nats.

    Raises:
        ValueError: the judge cannot be loaded, or there is no text of two tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(judge)
        model = AutoModelForCausalLM.from_pretrained(judge).to(device_of(device)).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--judge {judge} could not be loaded: {str(error).splitlines()[0]}") from error
    longest = getattr(model.config, "max_position_embeddings", None)  # tokens that the judge can read
    losses, entropies = [], []
    for text in tqdm(texts, "judge", leave=False, disable=None):
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:longest], device=device_of(device))
        if len(tokens) < 2:
            continue
        scores = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(1, tokens[1:, None]).mean())
        entropies.append(torch.special.entr(tokens.bincount().double() / len(tokens)).sum())
    if not losses:
        raise ValueError("there is no text of at least two tokens to judge")
    nats = torch.stack(losses)
    error = nats.std().item() / math.sqrt(len(nats)) if len(nats) > 1 else 0.0
    perplexity = nats.mean().exp().item()
    return {
        "perplexity": perplexity,
        "standard_error": perplexity * error,
        "entropy": torch.stack(entropies).mean().item(),
        "texts": len(nats),
    }


def main(settings: Judging) -> dict[str, Any]:
    texts = [text.strip() for text in settings.samples.read_text("utf-8").split(LINE)]
    found = judge_texts([text for text in texts if text], settings.judge, settings.device)
    print(
        f"{found['texts']} texts: perplexity {found['perplexity']:.2f} +- {found['standard_error']:.2f}, "
        f"entropy {found['entropy']:.3f} nats"
    )
    return found


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Judging, description=__doc__)))
