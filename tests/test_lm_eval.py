"""The adaptor to lm-evaluation-harness: alone, on a stand-in where that is not installed, and in a task of its own."""

import json
import math
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sparsekit.diffusion import OrderedSampler

ALPHABET = "abcde "
MASK = len(ALPHABET)
PROBABILITIES = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


@pytest.fixture(scope="module")
def adaptor():
    """The module, with a stand-in for the harness's class of models where the harness is not installed."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    installed = find_spec("lm_eval") is not None
    if not installed:
        for name in names:
            sys.modules[name] = ModuleType(name)
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {})
    try:
        from sparsekit.integrations import lm_eval

        yield lm_eval
    finally:
        if not installed:
            for name in (*names, "sparsekit.integrations.lm_eval"):
                sys.modules.pop(name, None)


def encode(text):
    return [ALPHABET.index(letter) for letter in text]


def decode(tokens):
    return "".join(ALPHABET[token] for token in tokens)


def letters(tokens, asked):
    """A model of letters that do not depend on each other."""
    return PROBABILITIES.log().expand(int(asked.sum()), -1)


def after_a(tokens, asked):
    """A model in which the letter after a visible ``a`` is ``b``, and every other one as above."""
    before = torch.nn.functional.pad(tokens, (1, 0), value=MASK)[:, :-1]
    found = PROBABILITIES.log().repeat(*tokens.shape, 1)
    found[before == 0] = torch.tensor([0.0, 1.0, 0, 0, 0, 0]).log()
    return found[asked]


def request(*args):
    return SimpleNamespace(args=args)


def lm_of(adaptor, model=letters, **options):
    return adaptor.MaskedLM(model, MASK, encode, decode, **{"length": 8, **options})


def likelihood(text):
    return sum(math.log(PROBABILITIES[token]) for token in encode(text))


def test_log_likelihoods_of_a_known_model(adaptor):
    requests = [request("ab", "cd"), request("ab ", "a"), request("", "aa"), request("b", "")]
    found = lm_of(adaptor, draws=2000, batch_size=500).loglikelihood(requests)
    expected = [likelihood("cd"), likelihood(" a"), likelihood("aa"), 0]
    assert [nats for nats, _ in found] == pytest.approx(expected, rel=0.02)
    assert found[2][0] == pytest.approx(expected[2], rel=1e-6)  # tokens that are as hard: every draw finds the same
    assert [greedy for _, greedy in found] == [False, False, True, True]
    ((nats, greedy),) = lm_of(adaptor, after_a).loglikelihood([request("ba", "b")])
    assert nats == 0 and greedy


def test_long_texts_are_measured_once_a_token(adaptor):
    lm, text = lm_of(adaptor, draws=2), 21 * "b"
    assert lm.loglikelihood_rolling([request(text)]) == pytest.approx([likelihood(text)], rel=1e-6)
    assert lm.loglikelihood([request(text, text)])[0][0] == pytest.approx(likelihood(text), rel=1e-6)


def test_likelihoods_do_not_depend_on_other_requests(adaptor):
    requests = [request("ab", "cab"), request("aa", "ba"), request("e", "abab")]
    lm = lm_of(adaptor, after_a)
    assert [lm.loglikelihood([each])[0] for each in requests] == lm.loglikelihood(requests)


def test_a_letter_that_joins_the_next_is_not_given(adaptor):
    def pairs(text):  # "ab" is one token, of the number 4
        return encode(text.replace("ab", "e"))

    lm = adaptor.MaskedLM(letters, MASK, pairs, decode, length=8)
    assert lm.loglikelihood([request("ca", "b")])[0][0] == pytest.approx(math.log(0.06), rel=1e-6)


def test_texts_do_not_depend_on_other_requests(adaptor):
    lm = lm_of(adaptor, sampler=OrderedSampler([*range(1, 8), 0]), length=16)  # a list has no hash
    drawn, again = ({"do_sample": drawn, "max_gen_toks": 7} for drawn in (True, False))
    requests = [request("a", drawn), request("b", drawn), request("b", drawn), request("c", again)]
    found = lm.generate_until(requests)
    assert [lm.generate_until([each])[0] for each in requests[:2]] == found[:2] and len({*found}) == 4
    assert lm.generate_until(requests[3:]) == found[3:]


def test_a_continuation_that_is_not_greedy_ends_at_its_first_token(adaptor):
    calls = []

    def model(tokens, asked):
        calls.append(tokens)
        return letters(tokens, asked)

    lm = lm_of(adaptor, model, draws=2)
    assert not lm.loglikelihood([request("", "eeeeee")])[0][1] and len(calls) == 2
    assert lm.loglikelihood([request("", "aaaaaa")])[0][1] and len(calls) == 2 + 7


def test_texts_are_generated_up_to_an_end(adaptor):
    lm = lm_of(adaptor, after_a, sampler=OrderedSampler(), length=16)
    options = {"until": [" "], "max_gen_toks": 8, "do_sample": True}
    requests = [request("a", dict(options)), request("ca", dict(options)), request("ba", {"max_gen_toks": 3})]
    found = lm.generate_until(requests)
    assert [text[0] for text in found] == ["b", "b", "b"]
    assert all(" " not in text and len(text) <= 8 for text in found[:2]) and len(found[2]) == 3
    assert lm.generate_until(requests) == found
    greedy = lm_of(adaptor, eos="a").generate_until([request("b", {"until": "e"})])
    assert greedy == [""]  # the likeliest letter is a, which ends a text
    with pytest.raises(ValueError, match=r"temperature must be 1 where do_sample is set, got 0\.7"):
        lm.generate_until([request("a", {"do_sample": True, "temperature": 0.7})])


@pytest.mark.slow
def test_a_task_of_the_harness(adaptor, tmp_path):
    if not hasattr(lm_eval := sys.modules["lm_eval"], "__path__"):
        pytest.skip("lm-evaluation-harness is not installed")
    documents = [{"text": "ca", "choices": ["b", "e"], "answer": 0}, {"text": "b", "choices": ["e", "a"], "answer": 1}]
    path = tmp_path / "documents.json"
    path.write_text("\n".join(map(json.dumps, documents)), "utf-8")
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(lm_of(adaptor, after_a), tasks=[task], bootstrap_iters=0)
    assert found["results"]["letters"]["acc,none"] == 1.0
