"""Samples of text follow from parameters, step and seed, and compile once."""

import dataclasses

import pytest

from nanochat_jax.lm.model import gpt, sampling
from nanochat_jax.lm.training import text_samples
from nanochat_jax.lm.training.run import make_run
from nanochat_jax.lm.training.text_samples import Sampler, make_sampler
from tiny import run_config


@pytest.fixture(scope="module")
def run():
    """A run whose ids are said to be bytes."""
    run = make_run(run_config(vocab_size=256, sample_tokens=8, sample_prompt="def"))
    corpus = dataclasses.replace(run.corpus, tokenizer="bytes")
    return dataclasses.replace(run, corpus=corpus)


@pytest.fixture(scope="module")
def params(run):
    return gpt.init(run.config, 0)[1]


def with_settings(run, **changes):
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


def test_a_sample_follows_from_the_step_and_the_seed_and_compiles_once(run, params):
    texts = {step: Sampler(run)(params, step) for step in (0, 1, 100)}
    compiled = sampling._next_token._cache_size()
    assert texts == {step: Sampler(run)(params, step) for step in texts}
    other = Sampler(with_settings(run, seed=1))
    assert len({*texts.values(), other(params, 0)}) == 4
    assert sampling._next_token._cache_size() == compiled
    assert all(text.startswith("def") for text in texts.values())
    assert all(3 < len(text) <= 3 + 8 for text in texts.values())


def test_a_sample_ends_with_the_context_and_an_empty_prompt_begins_a_document(
    run, params
):
    text = Sampler(with_settings(run, sample_prompt="", sample_tokens=99))(params, 3)
    assert 0 < len(text) <= 15


def test_a_sample_leaves_the_terminal_alone():
    assert (
        text_samples._printable("a\x1b[2J\x07\r\tb\nä🦊")
        == "a\ufffd[2J\ufffd\ufffd\tb\nä🦊"
    )


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_trained(run):
    with pytest.raises(ValueError, match=r"`sample_prompt` is 16 tokens long.*of 16"):
        make_sampler(with_settings(run, sample_prompt="x" * 16))


def test_there_is_no_sampler_where_there_is_no_text(run):
    assert make_sampler(run) is not None
    assert make_sampler(with_settings(run, sample_tokens=0)) is None
    other = dataclasses.replace(run.corpus, tokenizer=None)
    assert make_sampler(dataclasses.replace(run, corpus=other)) is None
