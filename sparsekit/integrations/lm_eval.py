"""Models of masked tokens in the tasks of lm-evaluation-harness."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any
from zlib import crc32

import torch
from lm_eval.api.model import LM  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn

from ..diffusion import ConfidenceSampler, DiffusionSampler, evaluate_bound
from ..diffusion._inferring import inferring
from ..diffusion.absorbing import MaskedModel, predict
from ..diffusion.token_sampler import TokenSampler


class MaskedLM(LM):  # type: ignore[misc, unused-ignore]
    """A model of masked tokens as lm-evaluation-harness calls it::

        lm = MaskedLM(model, model.mask_token, tokenizer.encode, tokenizer.decode)
        lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

    A log-likelihood is minus the bound that ``evaluate_bound`` measures, so at most the true one: perplexities are too
    high rather than too low. What counts as greedy is the likeliest token at the surest position, one after the other.
    A result depends on the seed and its own request, not on the other requests.

    Args:
        model: predicts masked tokens; see ``sparsekit.diffusion.absorbing``.
        mask_token: the number of the mask token.
        encode: returns the tokens of a text, without special ones.
        decode: returns the text of tokens.
        length: how many tokens the model sees. A longer text is measured in windows, each with as much context before
            it as fits; a longer context is cut at its start.
        draws: how many times the tokens to predict are masked, an even number; one token is predicted exactly.
        sampler: generates text, unless a request has ``do_sample``: then ``DiffusionSampler`` does, with a step for
            each token and the request's ``top_k`` and ``top_p``.
        eos: what ends a generated text in any case; None is nothing.
        batch_size: how many rows are predicted at once.
        seed: what is drawn from.
        progress: wraps the requests, such as tqdm.
    """

    def __init__(
        self,
        model: MaskedModel,
        mask_token: int,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[list[int]], str],
        *,
        length: int = 1024,
        draws: int = 32,
        sampler: TokenSampler | None = None,
        eos: str | None = None,
        batch_size: int = 16,
        seed: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        super().__init__()
        self.model, self.mask_token, self.encode, self.decode = model, mask_token, encode, decode
        self.length, self.draws, self.sampler, self.eos = length, draws, sampler or ConfidenceSampler(), eos
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self._device = torch.device("cpu") if first is None else first.device

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns for each ``(context, continuation)`` its log-likelihood, and whether it is the greedy one."""
        results = []
        for request in self.progress(requests):
            context, continuation = request.args
            whole = [*self.encode(context + continuation)]
            kept = context.rstrip()  # a space belongs to the word after it
            given = _common(self.encode(kept) if kept else [], whole)
            windows = self._windows(whole, given)
            results.append((-sum(map(self._nats, windows)), all(map(self._is_greedy, windows))))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Returns the log-likelihood of each whole text."""
        return [
            -sum(self._nats(window) for window in self._windows([*self.encode(request.args[0])], 0))
            for request in self.progress(requests)
        ]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the text that follows each context, up to the first of the texts in ``until``.

        At most half of the length is generated, and ``max_gen_toks`` tokens, 256 by default.

        Raises:
            ValueError: a request wants a temperature other than 1.
        """
        alike: dict[Any, list[tuple[int, list[int], int]]] = defaultdict(list)  # what can be one batch
        earlier: Counter[str] = Counter()
        for index, request in enumerate(requests):
            context, options = request.args
            count = min(options.get("max_gen_toks", 256), self.length // 2)
            given = [*self.encode(context)][-(self.length - count) :]
            seed = self.seed + crc32(context.encode()) + (earlier[context] << 32)
            earlier[context] += 1
            alike[len(given), count, _choice(options)].append((index, given, seed))
        texts: dict[int, str] = {}
        batches = [
            (self._sampler(choice, count), count, rows[i : i + self.batch_size])
            for (_, count, choice), rows in alike.items()
            for i in range(0, len(rows), self.batch_size)
        ]
        for sampler, count, rows in self.progress(batches):
            start = self._rows([given + count * [self.mask_token] for _, given, _ in rows])
            drawn = sampler.sample(self.model, start, self.mask_token, [seed for *_, seed in rows]).tokens.tolist()
            for (index, given, _), row in zip(rows, drawn, strict=True):
                texts[index] = self._cut(self.decode(row[len(given) :]), requests[index].args[1])
        return [texts[index] for index in range(len(requests))]

    def _windows(self, tokens: list[int], given: int) -> list[tuple[Tensor, Tensor]]:
        """Returns rows to measure, which predict every token after the first ``given`` once; True is what is given."""
        windows = []
        for start in range(given, len(tokens), self.length):
            end = min(start + self.length, len(tokens))
            low = max(0, end - self.length)
            row = self._rows([tokens[low:end]])
            windows.append((row, torch.arange(low, end, device=row.device)[None] < start))
        return windows

    def _nats(self, window: tuple[Tensor, Tensor]) -> float:
        row, given = window
        draws = self.draws if (~given).sum() > 1 else 2
        found = evaluate_bound(
            self.model,
            row,
            self.mask_token,
            draws=draws,
            given=given,
            batch_size=self.batch_size,
            seed=self.seed,
            group="alone",
        )
        return float(found.row_nats)

    def _is_greedy(self, window: tuple[Tensor, Tensor]) -> bool:
        row, given = window
        masked = ~given
        with inferring(self.model):
            while count := int(masked.sum()):
                found = predict(self.model, row.masked_fill(masked, self.mask_token), masked, count)
                sure, likeliest = found.max(1)
                surest = sure.argmax()
                if likeliest[surest] != row[masked][surest]:
                    return False
                masked[tuple(masked.nonzero()[surest])] = False
        return True

    def _sampler(self, choice: tuple[int | None, float | None] | None, count: int) -> TokenSampler:
        return self.sampler if choice is None else DiffusionSampler(count, top_k=choice[0], top_p=choice[1])

    def _rows(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _cut(self, text: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.split(self.eos)[0] if self.eos else text


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens at the start are the same in both."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _choice(options: dict[str, Any]) -> tuple[int | None, float | None] | None:
    """Returns ``top_k`` and ``top_p`` of a request that is to be drawn; None for one that is not."""
    if not options.get("do_sample"):
        return None
    if options.get("temperature", 1) != 1:
        raise ValueError(f"temperature must be 1 where do_sample is set, got {options['temperature']}")
    return options.get("top_k"), options.get("top_p")
