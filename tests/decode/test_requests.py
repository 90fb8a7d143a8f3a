"""What may be asked: each value is checked and normalised once, whoever gives it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.defaults import decoding
from decode import Options, Sampling, Truncation, job
from decode.requests import Request, as_schedule
from proxy_jax.errors import InputError

FREE = Options(sampling=Sampling(1.0))


@pytest.mark.parametrize(
    "nothing", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}, {"top_p": 1}, {"min_p": 0.0}], ids=str
)
def test_values_that_change_nothing(nothing):
    """They are left out of the program: no truncation, not the most likely token alone."""
    assert Options(sampling=Sampling(1.0, Truncation(**nothing))) == FREE
    if "top_k" not in nothing:
        assert Options(base_filter=Truncation(**nothing)).base_filter is None
    config = decoding()
    config.sampling.temperature = 1.0
    for name, value in nothing.items():
        config.sampling[name] = value
    assert job.options(config).sampling == FREE.sampling


def test_temperature_0_is_greedy():
    zeros: list[Any] = [0, 0.0, None, np.float32(0)]
    for temperature in zeros:
        assert Options(sampling=Sampling(temperature)) == Options()


def test_numbers_of_numpy_and_jax():
    numbers: list[Any] = [np.float32(0.5), np.int64(3), jnp.float32(0.25), np.int64(2)]
    half, three, quarter, two = numbers
    sampling = Sampling(half, Truncation(three, quarter))
    options = Options(batch_size=two, sampling=sampling, alpha=half)
    assert options.batch_size == 2
    assert options.sampling == Sampling(0.5, Truncation(3, 0.25))
    assert as_schedule(options.alpha) == ((0, 0.5),)
    assert as_schedule(np.asarray([[0, 1.5], [4, 0.0]])) == ((0, 1.5), (4, 0.0))


def test_a_string_is_one_string():
    config = ConfigDict(decoding().to_dict() | {"stop": "END"})
    assert job.options(config).stop == ("END",)
    for name in ("stop", "banned", "banned_first", "banned_tokens", "banned_first_tokens"):
        fields: dict[str, Any] = {name: "END"}
        assert getattr(Options(**fields), name) == ("END",)


SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"top_k": -2}, "sampling: top_k must be between -1 and 2147483647, not -2"),
    ({"top_k": 2.5}, "sampling: top_k must be an integer, not 2.5"),
    ({"top_k": 2**31}, "sampling: top_k must be between"),
    ({"top_p": 0.0}, "sampling: top_p must be above 0, not 0.0"),
    ({"top_p": 1.5}, "sampling: top_p must be between 0 and 1, not 1.5"),
    ({"top_p": "0.9"}, "sampling: top_p must be a number, not '0.9'"),
    ({"top_p": True}, "sampling: top_p must be a number, not True"),
    ({"min_p": -0.1}, "sampling: min_p must be between 0 and 1, not -0.1"),
    ({"min_p": math.nan}, "sampling: min_p must be finite, not nan"),
    ({"temperature": -1.0}, "sampling: temperature must be at least 0, not -1.0"),
    ({"temperature": math.inf}, "sampling: temperature must be finite, not inf"),
    ({"temperature": 1e39}, "sampling: temperature must be 0 or between 1e-30 and 1e+30"),
    ({"temperature": 1e-38}, "sampling: temperature must be 0 or between 1e-30 and 1e+30"),
    ({"temperature": 10**400}, "sampling: temperature is out of range"),
    ({"temperature": "hot"}, "sampling: temperature must be a number, not 'hot'"),
]


@pytest.mark.parametrize(("values", "message"), SAMPLING, ids=str)
def test_sampling_that_is_refused(values, message):
    given = dict(values)
    sampling = Sampling(given.pop("temperature", 1.0), Truncation(**given))
    with pytest.raises(InputError) as error:
        Options(sampling=sampling)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed must be between 0 and 4294967295, not -1"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295, not 4294967296"),
        ({"seed": 10**100}, "seed must be between 0 and 4294967295, not an integer of more"),
        ({"seed": 1.5}, "seed must be an integer, not 1.5"),
        ({"samples": 10**7}, "samples must be between 1 and 1048576, not 10000000"),
        ({"samples": True}, "samples must be an integer, not True"),
        ({"batch_size": 10**9}, "batch_size must be between"),
        ({"chunk_steps": 2**40}, "chunk_steps must be between"),
        ({"max_new_tokens": 2**31}, "max_new_tokens must be between 1 and 2147483647"),
        ({"max_new_tokens": None}, "max_new_tokens is missing"),
        ({"min_new_tokens": "4"}, "min_new_tokens must be an integer, not '4'"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be between 1e-30 and 1e"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be finite, not nan"),
        ({"beta": 1e39}, "beta must be between"),
        ({"beta": None}, "beta is missing"),
        ({"trace": 1}, "trace must be true or false, not 1"),
        ({"stop": 5}, "stop must be a list, not 5"),
        ({"stop": ("a", 5)}, "stop must hold str values, not 5"),
        ({"stop": ("a\ud800",)}, r"stop: not valid Unicode: 'a\\ud800'"),
        ({"banned": ("\udcff",)}, "banned: not valid Unicode"),
        ({"banned_first": ("",)}, "banned_first takes non-empty strings"),
        ({"eos_ids": (-1,)}, "eos_ids must be ids, not -1"),
        ({"eos_ids": (True,)}, "eos_ids must hold int values, not True"),
        ({"eos_ids": (2**31,)}, "eos_ids must be ids, not 2147483648"),
        ({"eos_ids": 2}, "eos_ids must be a list, not 2"),
        ({"sampling": None}, "sampling must be a Sampling, not None"),
        ({"sampling": Sampling(1.0, 0.9)}, "sampling: not a Truncation: 0.9"),  # type: ignore[arg-type]
        ({"base_filter": 0.9}, "base_filter must be a Truncation, not 0.9"),
        ({"base_filter": Truncation(top_p=0.0)}, "base_filter: top_p must be above 0"),
    ],
    ids=str,
)
def test_options_that_are_refused(fields, message):
    with pytest.raises(InputError, match=message) as error:
        Options(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ("01", "alpha must be a number or a list of .* not '01'"),
        (["01"], r"alpha must be a number or a list of .* not \['01'\]"),
        (True, "alpha must be a number or a list of .* not True"),
        (None, "alpha must be a number or a list of .* not None"),
        (math.nan, "alpha: coefficient must be finite, not nan"),
        (1e39, "alpha: coefficient must be between"),
        (((0, "1"),), "alpha: coefficient must be a number, not '1'"),
        (((0, True),), "alpha: coefficient must be a number, not True"),
        (((0, None),), "alpha: coefficient is missing"),
        (((0, 1.0), (2.7, 0.0)), "alpha: step must be an integer, not 2.7"),
        (((False, 1.0),), "alpha: step must be an integer, not False"),
        (((0, 1.0), (2**31, 0.0)), "alpha: step must be between"),
        (((-1, 1.0),), "alpha: step must be between 0 and"),
        (((0, 1.0), (0, 2.0)), r"alpha: the steps of a schedule rise from 0, not \[0, 0\]"),
        (((1, 1.0),), "alpha: the steps of a schedule rise from 0"),
        (((0, 1.0, 2.0),), "alpha must be a number or a list of"),
        ((), "alpha: the steps of a schedule rise from 0"),
    ],
    ids=str,
)
def test_schedules_that_are_refused(alpha, message):
    with pytest.raises(InputError, match=message):
        as_schedule(alpha)


def test_requests_that_are_refused():
    request = Request(2**32 - 1, {"base": [1]}, ((0, 1.0),), 4)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"row": 2**32}, "request: row must be between 0 and 4294967295"),
        ({"row": -1}, "request: row must be between"),
        ({"max_new_tokens": 0}, "request: max_new_tokens must be between 1 and"),
        ({"max_new_tokens": 2**31}, "request: max_new_tokens must be between"),
    ]
    for fields, message in refused:
        with pytest.raises(InputError, match=message):
            dataclasses.replace(request, **fields)
