"""Settings, options and counts of the wrong type: the number that is meant, or an error that names the setting."""

from collections.abc import Mapping
from typing import Any

import pytest
from test_whitebox import QUICK, other, place, student, teacher  # noqa: F401  (fixtures)

from kd_notes.checks import check_arguments, check_count, typed
from kd_notes.core import UserError
from kd_notes.data.rows import load_rows
from kd_notes.experiments.extraction import extract_rationales
from kd_notes.generation.backends import open_backend
from kd_notes.generation.completions import Decoding
from kd_notes.methods.rationales import few_shot
from kd_notes.methods.seqkd import Writing
from kd_notes.products.distill import distill
from kd_notes.products.settings import (
    check_objective,
    check_read,
    distill_settings,
    DistillSettings,
    on_policy_config,
)
from kd_notes.training.state import TrainConfig


@pytest.mark.parametrize(
    "value, annotation, read",
    [
        ("1e-4", float, 1e-4), (3, float, 3), ("3", int, 3), (200.0, int, 200), ("2e2", int, 200),
        ("no", bool, False), ("On", bool, True), (True, bool, True), (None, int | None, None),
        ("5", str, "5"), ((0.9, 0.99), tuple, (0.9, 0.99)), ([1], tuple, (1,)), ({"a": 1}, dict, {"a": 1}),
        ({"a": 1}, Mapping[str, Any] | None, {"a": 1}), ("inductor", bool | str, "inductor"), (object, Any, object),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_annotation_wants_it(value, annotation, read):
    got = typed(value, annotation, "x")
    assert got == read and type(got) is type(read)


@pytest.mark.parametrize(
    "value, annotation",
    [
        ("high", float), (True, float), ("nan", float), (float("inf"), float), (None, float), ([1], float),
        ("ten", int), (2.5, int), (True, int), ("2.5", int), ("maybe", bool), (1, bool), ("", bool),
        (5, str), (True, str | None), (8, dict | None), (True, dict), ([8], dict), (0.9, tuple), ("ab", tuple),
        ("1" * 400, float),
    ],
)  # fmt: skip
def test_a_value_of_another_type_names_setting_and_value(value, annotation):
    with pytest.raises(UserError, match="setting x: .*is not"):
        typed(value, annotation, "x")


SETTINGS = {
    "n": (-1, "five", 2.5, True), "validation": ("some", True, None), "epochs": ("x", 0, -1), "max_steps": ("ten", -1, True),
    "batch_size": (0, -1, 2.5, "many"), "gradient_accumulation_steps": (0, "x"), "lr": ("high", True, float("nan"), None),
    "warmup": ("x",), "sft_weight": ("half",), "temperature": ("hot",), "options": ([1], "beta"), "max_length": ("short", -1),
    "system": (5, True), "evaluations": (-1, "x"), "top_k": (0, -1), "max_new_tokens": (0, "x"), "top_p": ("x",),
    "width": (0, "x"), "seed": ("x", 0.5), "dtype": (32,), "precision": (True,), "device": (0,),
    "lora": (True, 8, "all", [8]), "gradient_checkpointing": ("maybe", 1),
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in SETTINGS.items() for v in vs])
def test_a_setting_of_distill_names_itself(name, value):
    with pytest.raises(UserError, match=name):
        distill_settings("cpu", **{name: value})


def test_numbers_and_switches_may_be_text():
    made = distill_settings("cpu", lr="1e-4", batch_size="2", gradient_checkpointing="false")
    assert (made.lr, made.batch_size, made.gradient_checkpointing) == (1e-4, 2, False)


@pytest.mark.parametrize("beta", ["x", "0.3", True, None])
def test_an_option_of_a_divergence_names_itself(beta):
    with pytest.raises(UserError, match="beta"):
        check_objective("jsd", {"beta": beta})


@pytest.mark.parametrize(
    "change",
    [
        {"lr": "high"}, {"max_steps": True}, {"batch_size": 2.5}, {"betas": 0.9}, {"lora": [1]}, {"lora": {"r": "x"}},
        {"lora": {"r": 0}}, {"lora": {"alpha": "x"}}, {"lora": {"dropout": 2}}, {"lora": {"targets": 5}},
    ],
)  # fmt: skip
def test_a_setting_of_a_training_names_itself(change):
    (name,) = change
    with pytest.raises(UserError, match=name):
        TrainConfig(**{"max_steps": 1, "batch_size": 1, "lr": 1e-3} | change)


def test_adapters_take_numbers_as_text():
    cfg = TrainConfig(max_steps=1, batch_size=1, lr="1e-3", lora={"r": "4"})
    assert cfg.lr == 1e-3 and cfg.lora == {"r": 4}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Writing("beam", width=0), lambda: Writing(temperature="x"), lambda: Writing(max_new_tokens=-1),
        lambda: Decoding(4, temperature="x"), lambda: Decoding(4, top_p="x"), lambda: Decoding(4, stop=5),
        lambda: Decoding(4, temperature=True), lambda: Decoding(4, n="two"), lambda: Decoding(4, seed="x"),
    ],
)  # fmt: skip
def test_decoding_of_another_type_is_refused(wrong):
    with pytest.raises(UserError, match="setting|decoding parameter"):
        wrong()


SERVER = "openai:http://127.0.0.1:9/v1#m"
BACKEND_OPTIONS = {
    "concurrency": ("x", 0, -1), "retries": ("x", -1), "timeout": ("x", 0, -1), "requests_per_minute": ("x", -1),
    "parameters": (5, "x"), "limit_name": (5,), "key_env": (True,),
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BACKEND_OPTIONS.items() for v in vs])
def test_an_option_of_a_server_names_itself(name, value):
    with pytest.raises(UserError, match=name):
        open_backend(SERVER, **{name: value})


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": "x"}, {"cache_gib": "x"}, {"chat": "maybe"}]
)
def test_an_option_of_a_local_model_names_itself(place, options):  # noqa: F811
    with pytest.raises(UserError, match=next(iter(options))):
        open_backend(str(place / "teacher"), **options)


def test_chat_false_in_words_is_false(place):  # noqa: F811
    assert open_backend(str(place / "teacher"), chat="false").chat is False
    assert check_arguments(open_backend, {"dtype": "float32"}) == {"dtype": "float32"}


@pytest.mark.parametrize("count", [-1, 0, 2.5, True, "all"])
def test_a_count_never_means_all_but_the_last(place, tmp_path, count):  # noqa: F811
    with pytest.raises(UserError, match="setting n"):
        load_rows(place / "chats.jsonl", count)
    with pytest.raises(UserError, match="setting limit"):
        extract_rationales("nli", tmp_path / "e.jsonl", teacher=str(place / "teacher"), limit=count)
    with pytest.raises(UserError, match="setting least"):
        check_count(count, "least", 1)


@pytest.mark.parametrize("shots", [-1, "x", True])
def test_shots_are_counted(shots):
    with pytest.raises(UserError, match="setting shots"):
        few_shot("nli", [], shots)


@pytest.mark.parametrize("n", [-1, "-1"])
def test_distill_refuses_a_negative_number_of_rows(place, tmp_path, n):  # noqa: F811
    with pytest.raises(UserError, match="setting n"):
        distill(
            place / "chats.jsonl",
            str(place / "teacher"),
            "layers:1",
            "sft",
            tmp_path / "o",
            **QUICK | {"n": n},
        )


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_one_clear_error(place, tmp_path, device):  # noqa: F811
    with pytest.raises(UserError, match="device"):
        distill(
            place / "chats.jsonl",
            str(place / "teacher"),
            "layers:1",
            "sft",
            tmp_path / "o",
            **QUICK | {"device": device},
        )


OTHERS = {"temperature": 0.7, "sft_weight": 0.0, "top_p": 0.9, "top_k": 3, "width": 9}
OTHERS |= {"server": {"concurrency": 9}}
KINDS = {
    "sft": (),
    "symmetric_cross_entropy": (),
    "seqkd": ("temperature", "top_p"),
    "seqkd_beam": ("width",),
    "uld": ("temperature", "sft_weight"),
    "spans_matched": ("temperature", "sft_weight"),
    "forward_kl": ("temperature", "sft_weight"),
    "label_revision": ("temperature", "sft_weight"),
    "cached_forward_kl": ("temperature", "sft_weight", "top_k"),
    "minillm": (),
}


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("setting", OTHERS)
def test_every_kind_of_objective_takes_the_settings_that_it_reads_and_no_others(objective, setting):
    chosen = DistillSettings(**{setting: OTHERS[setting]})
    if setting in KINDS[objective]:
        check_read(objective, chosen)
    else:
        with pytest.raises(UserError, match=f"setting {setting}: {objective} does not read it"):
            check_read(objective, chosen)
    by_rows = DistillSettings(rows="paraphrase:copies=2", **{setting: OTHERS[setting]})
    if setting in ("temperature", "top_p"):
        check_read(objective, by_rows)  # the teacher writes with them
    if setting in ("top_k", "server"):
        check_read(objective, chosen, served=True)


@pytest.mark.parametrize(
    "setting, value", [("temperature", 0.7), ("sft_weight", 0.0), ("top_p", 0.9)]
)
@pytest.mark.parametrize("objective", ["gkd", "minillm", "dpkd"])
def test_a_setting_that_an_on_policy_objective_does_not_read_is_refused(
    tmp_path, objective, setting, value
):
    "It is said before a model is looked for: there is none here."
    call = ([{"prompt": "a", "completion": "b"}] * 9, "no/teacher", "no/student", objective)
    with pytest.raises(UserError, match=f"setting {setting}: {objective} does not read it"):
        distill(*call, tmp_path / "out", **{setting: value})
    check_read(objective, DistillSettings(rows="paraphrase:copies=2", temperature=0.7, top_p=0.9))
    read = DistillSettings(max_new_tokens=9)
    assert on_policy_config(objective, read, 8, corpus=False).max_new_tokens == 9
