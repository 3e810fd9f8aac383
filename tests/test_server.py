"""What real servers do: names for a cut, thoughts, refusals, hidden errors, quotas. Over real HTTP, with the real client."""

import json
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from json_server import JsonServer

from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.data.examples import Example
from kd_notes.generation.completions import (
    completion_row,
    Decoding,
    manifest_path,
    without_thoughts,
)
from kd_notes.generation.server import OpenAIBackend
from kd_notes.methods.rationales import extract, parse_completion, rationale_decoding

LABELS = ("entailment", "neutral", "contradiction")
GOOD = "The sentence says so.\nAnswer: neutral"


class Server(JsonServer):
    "An OpenAI-compatible server; `answer(body, call)` returns status, headers and body."

    def __init__(self, answer):
        self.answer = answer
        self.calls = []
        self.times = []
        super().__init__()

    def respond(self, path, asked):
        self.calls.append(asked)
        self.times.append(time.monotonic())
        return self.answer(asked, len(self.calls))


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def chat(content, finish="stop", tokens=(5, 5), **message):
    usage = tokens and {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def error(message, **more):
    return {"error": {"message": message} | more}


def backend(server, retries=1, concurrency=1, **options):
    return OpenAIBackend(
        server.url, "m", chat=True, retries=retries, concurrency=concurrency, **options
    )


def examples(count=6):
    return [
        Example(f"e{i}", "nli", f"Premise: number {i}. Hypothesis: odd.", "neutral")
        for i in range(count)
    ]


def asks_for(body, number):
    return f"number {number}." in json.dumps(body)


def outcomes(path):
    return {row["id"]: row["outcome"] for row in read_jsonl(path)}


def one(server, **options):
    (completion,) = backend(server, **options).generate([("a", "one two")], Decoding(32))
    return completion


# ---------------------------------------------------------------- how an answer ended


@pytest.mark.parametrize(
    "reason",
    ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens", "token_limit"]
    + ["max_new_tokens", "model_context_window_exceeded", "incomplete", None, "", "unknown"],
)
def test_an_answer_that_used_up_its_limit_is_cut_whatever_the_server_calls_it(
    serve, tmp_path, reason
):
    server = serve(lambda body, n: (200, {}, chat("Sixty.\nAnswer: 12", reason, (5, 32))))
    sum_of = [Example("e", "gsm8k", "Question: how many?", "120")]
    (row,) = extract(sum_of, backend(server), rationale_decoding(32), tmp_path / "a.jsonl")
    assert row["finish"] == "length" and row["outcome"] == "truncated"


@pytest.mark.parametrize(
    "reason",
    ["abort", "cancelled", "timeout", "interrupted", "network_error", "pause_turn", "repetition"]
    + ["insufficient_system_resource", "malformed_function_call", "FinishReason.MAX_TOKENS"],
)
def test_an_answer_that_something_ended_is_cut_though_tokens_were_left(serve, reason):
    server = serve(lambda body, n: (200, {}, chat("Sixty.\nAnswer: 12", reason, (5, 8))))
    assert one(server).finish == "length"


@pytest.mark.parametrize(
    "reason", ["stop", "end_turn", "eos_token", "stop_sequence", "STOP", "COMPLETE", "", None]
)
def test_an_answer_that_ended_by_itself_is_whole(serve, reason):
    server = serve(lambda body, n: (200, {}, chat(GOOD, reason, (5, 9))))
    assert one(server).finish == "stop"


@pytest.mark.parametrize("used, finish", [("x" * 90, "length"), ("So.", "stop")])
def test_without_reason_and_count_the_length_of_the_text_decides(serve, used, finish):
    server = serve(lambda body, n: (200, {}, chat(used, None, None)))
    assert one(server).finish == finish


# ---------------------------------------------------------------- what belongs to the answer


@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>\nA number.\n\nSo it is open.\nAnswer: entailment\n</think>\n\n",
        "<thinking>A number.\n\nOpen.</thinking>\n",
        "A number, and the prompt had opened the mark.\n\n</think>\n\n",
        "[THINK]A number.\n\n[/THINK]",
        "◁think▷A number.\n\n◁/think▷",
        "<|channel|>analysis<|message|>A number.\n\n<|end|><|channel|>final<|message|>",
        "<think></think>\n\n<think>Again.\n\n</think>",
        "<seed:think>A number.\n\n</seed:think>",
        "<|START_THINKING|>A number.\n\n<|END_THINKING|>",
        "<|begin_of_thought|>A number.\n\n<|end_of_thought|>",
        "<unused94>thought\nA number.\n\n<unused95>",
    ],
)
def test_thoughts_are_neither_rationale_nor_a_place_to_stop(serve, tmp_path, thoughts):
    def answer(body, n):  # a server that honours stop texts
        text = thoughts + GOOD
        places = [text.find(stop) for stop in body.get("stop") or [] if stop in text]
        return 200, {}, chat(text[: min(places, default=len(text))])

    rows = extract(
        examples(2), backend(serve(answer)), rationale_decoding(32), tmp_path / "a.jsonl"
    )
    assert {row["outcome"] for row in rows} == {"ok"}
    assert {row["rationale"] for row in rows} == {"The sentence says so."}
    assert parse_completion(thoughts + GOOD, labels=LABELS) == parse_completion(GOOD, labels=LABELS)


def test_thoughts_without_an_end_are_no_answer():
    assert without_thoughts("<think>The answer may be\nAnswer: neutral") == ""
    cut = parse_completion("<think>So\nAnswer: neutral\n", "length", labels=LABELS)
    assert cut.outcome == "truncated"
    assert parse_completion("<think>So\nAnswer: neutral", labels=LABELS).outcome == "no_rationale"


def test_a_text_about_thinking_is_left_alone():
    text = "  We think that x < think > y holds."
    assert without_thoughts(text) == text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_field_of_their_own_are_left_out(serve, field):
    server = serve(lambda body, n: (200, {}, chat(GOOD, **{field: "hm, let me see"})))
    assert one(server).text == GOOD


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": GOOD}],
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": GOOD}],
        [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": GOOD}],
        [GOOD[:5], GOOD[5:]],
        [None, 3, {"type": "text", "text": GOOD}],
        {"type": "text", "text": GOOD},
        [{"type": "text", "text": {"value": GOOD}}],
    ],
)
def test_content_may_be_a_list_of_blocks(serve, content):
    server = serve(lambda body, n: (200, {}, chat(content)))
    assert one(server).text == GOOD


@pytest.mark.parametrize("content", [3, [], [3], [{"type": "text", "text": None}], {}, ""])
def test_content_without_a_text_is_an_empty_answer(serve, content):
    assert one(serve(lambda body, n: (200, {}, chat(content)))).text == ""


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "5",
        5,
        {},
        {"completion_tokens": "many"},
        {"completion_tokens": {}},
        {"prompt_tokens": None},
    ],
)
def test_tokens_that_a_server_cannot_count_end_no_work(serve, usage):
    server = serve(lambda body, n: (200, {}, chat(GOOD) | {"usage": usage}))
    made = one(server)
    assert (made.text, made.finish, made.completion_tokens) == (GOOD, "stop", 0)


def test_a_finish_reason_that_is_no_text_is_an_unknown_one(serve):
    assert one(serve(lambda body, n: (200, {}, chat(GOOD, 3)))).finish == "stop"


@pytest.mark.parametrize("status", [500, None])
def test_the_last_row_may_be_the_one_that_the_server_cannot_answer(serve, tmp_path, status):
    "No later answer shows that the server is well; the error of its own does."

    def answer(body, n):
        if not asks_for(body, 5):
            return 200, {}, chat(GOOD)
        return (status, {}, error("crash")) if status else (200, {}, error("upstream"))

    path = tmp_path / "a.jsonl"
    extract(examples(), backend(serve(answer), retries=0), rationale_decoding(32), path)
    assert outcomes(path) == {f"e{i}": "ok" for i in range(5)} | {"e5": "refused"}


def test_a_row_whose_thoughts_used_up_the_limit_is_an_outcome_and_the_others_go_on(serve, tmp_path):
    def answer(body, n):
        if asks_for(body, 1):
            return 200, {}, chat(None, "length", (5, 32), reasoning_content="hm")
        return 200, {}, chat(GOOD)

    server = serve(answer)
    path = tmp_path / "a.jsonl"
    for _ in range(2):
        extract(examples(), backend(server), rationale_decoding(32), path)
    assert outcomes(path) == {f"e{i}": "truncated" if i == 1 else "ok" for i in range(6)}
    assert len(server.calls) == 6


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ud83d\\ud83d"])
def test_half_a_character_in_an_answer_is_replaced(serve, tmp_path, half):
    def answer(body, n):
        good = json.dumps(chat(GOOD.replace("The", "HALF The")))
        return (
            200,
            {},
            good.replace("HALF", half if asks_for(body, 1) else "\\ud83d\\ude00").encode(),
        )

    extract(examples(3), backend(serve(answer)), rationale_decoding(32), tmp_path / "a.jsonl")
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert len(rows) == 3 and rows[0]["text"].startswith("😀 The")
    assert rows[1]["text"].startswith("\ufffd")


def test_half_a_character_in_a_prompt_is_an_error_that_names_the_request(serve):
    server = serve(lambda body, n: (200, {}, chat(GOOD)))
    with pytest.raises(UserError, match="request b.*half a character|half a character.*request b"):
        list(backend(server).generate([("a", "so"), ("b", "so \ud83d")], Decoding(4)))


# ---------------------------------------------------------------- a request that is refused


@pytest.mark.parametrize(
    "status, refusal",
    [
        (400, error("flagged", code="content_filter")),
        (400, error("maximum context length is 4096 tokens", code="context_length_exceeded")),
        (400, error("bad request")),
        (413, error("too large")),
        (422, error("unprocessable")),
        (403, error("flagged by moderation")),
        (500, error("the model crashed on this prompt")),
        (200, error("upstream failed")),
        (200, {"choices": []}),
        (200, chat(None, None)),
        (200, chat("I", "content_filter")),
        (200, chat("", "SAFETY")),
        (200, chat(None, "stop", refusal="I can't help with that.")),
    ],
)
def test_a_row_that_the_server_will_not_answer_is_an_outcome_of_that_row(
    serve, tmp_path, status, refusal
):
    server = serve(
        lambda body, n: (status, {}, refusal) if asks_for(body, 1) else (200, {}, chat(GOOD))
    )
    path = tmp_path / "a.jsonl"
    extract(examples(), backend(server), rationale_decoding(32), path)
    assert outcomes(path) == {f"e{i}": "refused" if i == 1 else "ok" for i in range(6)}
    (row,) = [row for row in read_jsonl(path) if row["id"] == "e1"]
    assert row["error"]
    extract(examples(), backend(server), rationale_decoding(32), path)
    assert len(read_jsonl(path)) == 6


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_request_that_every_row_is_refused_for_is_an_error_and_soon(serve, status):
    server = serve(lambda body, n: (status, {}, error("no such parameter: top_q")))
    with pytest.raises(UserError, match="top_q"):
        list(backend(server, retries=5).generate([(str(i), "so") for i in range(50)], Decoding(4)))
    assert len(server.calls) <= 3


def test_a_server_that_goes_down_ends_the_work_and_no_row_is_blamed(serve, tmp_path):
    server = serve(
        lambda body, n: (200, {}, chat(GOOD)) if n <= 2 else (503, {}, error("overloaded"))
    )
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="overloaded.*start the same command again"):
        extract(examples(), backend(server, retries=0), rationale_decoding(32), path)
    assert outcomes(path) == {"e0": "ok", "e1": "ok"}


# ---------------------------------------------------------------- errors that hide, waits that have a bound


@pytest.mark.parametrize("code, calls", [(502, 2), (None, 2), (404, 1), ("400", 1)])
def test_the_words_of_an_error_inside_a_200_reach_the_user(serve, code, calls):
    server = serve(lambda body, n: (200, {}, error("model teacher-9b is not loaded", code=code)))
    with pytest.raises(UserError, match="teacher-9b"):
        one(server)
    assert len(server.calls) == calls


@pytest.mark.parametrize(
    "body",
    [
        {"error": "model teacher-9b is not loaded"},
        {"error": {"message": None, "detail": "teacher-9b"}},
        b'{"id": "teacher-9b',
        b"<html>teacher-9b</html>",
    ],
)
def test_other_forms_of_an_error_inside_a_200(serve, body):
    with pytest.raises(UserError, match="teacher-9b"):
        one(serve(lambda asked, n: (200, {}, body)), retries=0)


@pytest.mark.parametrize("wait", ["86400", "3600"])
def test_a_quota_that_is_spent_is_told_and_not_waited_for(serve, wait):
    server = serve(lambda body, n: (429, {"Retry-After": wait}, error("Daily limit reached")))
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"Daily limit.*{int(wait) / 3600:.1f} hours"):
        one(server, retries=6)
    assert time.monotonic() - start < 5 and len(server.calls) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {
            "Retry-After": format_datetime(
                datetime.now(timezone.utc) + timedelta(days=2), usegmt=True
            )
        },
        {"retry-after-ms": "172800000"},
        {"Retry-After": "172800.5"},
    ],
    ids=["date", "milliseconds", "fraction"],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_of_days_is_told_in_hours_however_it_is_written(serve, headers, status):
    server = serve(lambda body, n: (status, headers, error("maintenance")))
    with pytest.raises(UserError, match=r"in 1 attempt .*asked again in 4[78]\.\d hours"):
        one(server, retries=6)
    assert len(server.calls) == 1


@pytest.mark.parametrize("wait", ["-5", "soon", "nan", "0", "", "99999999999999999999", "inf"])
def test_a_wait_that_makes_no_sense_is_no_hang(serve, wait):
    server = serve(lambda body, n: (429, {"Retry-After": wait}, error("slow down")))
    start = time.monotonic()
    with pytest.raises(UserError, match="slow down"):
        one(server)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached"])
def test_no_retry_where_it_cannot_help(serve, code):
    server = serve(lambda body, n: (429, {}, error("You exceeded your quota", code=code)))
    with pytest.raises(UserError, match="exceeded your quota"):
        one(server, retries=6)
    assert len(server.calls) == 1


@pytest.mark.parametrize("header", ["Retry-After", "retry-after-ms"])
def test_the_client_waits_as_long_as_a_busy_server_asks_for(serve, header):
    value = "900" if header.endswith("ms") else "1"
    server = serve(
        lambda body, n: (
            (429, {header: value}, error("slow down")) if n == 1 else (200, {}, chat("so"))
        )
    )
    assert one(server).text == "so"
    assert 0.9 <= server.times[1] - server.times[0] < 3


def test_a_server_that_never_answers_is_left_after_the_time_out(serve):
    silent = threading.Event()
    server = serve(lambda body, n: (silent.wait(8), (200, {}, chat("so")))[1])
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer in time"):
        one(server, retries=1, timeout=0.5)
    silent.set()
    assert time.monotonic() - start < 5


def test_an_interrupted_program_ends_though_a_request_waits_for_its_next_attempt(serve):
    server = serve(lambda body, n: (503, {"Retry-After": "100"}, error("busy")))
    code = (
        "from kd_notes.generation.completions import Decoding\n"
        "from kd_notes.generation.server import OpenAIBackend\n"
        f"list(OpenAIBackend({server.url!r}, 'm').generate([('a', 'so')], Decoding(4)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert "100 seconds" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert rest.strip().endswith("KeyboardInterrupt") and "pending" not in rest


# ---------------------------------------------------------------- other parameters


def test_a_model_that_wants_other_parameters_gets_them(serve):
    def answer(body, n):
        for name, value in (("max_tokens", None), ("temperature", 1)):
            if body.get(name, value) != value:
                message = f"Unsupported parameter: '{name}'"
                return 400, {}, error(message, code="unsupported_parameter", param=name)
        return 200, {}, chat("so")

    server = serve(answer)
    with pytest.raises(UserError, match="max_tokens.*limit_name.*parameters"):
        one(server)
    options = {"limit_name": "max_completion_tokens"}
    options["parameters"] = {"temperature": None, "reasoning_effort": "low", "stop": ["\n\n"]}
    assert one(server, **options).text == "so"
    sent = server.calls[-1]
    assert sent["max_completion_tokens"] == 32 and sent["reasoning_effort"] == "low"
    assert "temperature" not in sent and sent["stop"] == ["\n\n"]
    described = backend(server, **options).describe()
    assert described["parameters"] == options["parameters"]
    assert "parameters" not in backend(server).describe()


def test_a_refusal_survives_its_row(serve):
    refusal = error("flagged", code="content_filter")
    answers = {1: (200, {}, chat("so")), 2: (400, {}, refusal)}
    server = serve(lambda body, n: answers[n])
    made = list(backend(server).generate([("a", "so"), ("b", "so")], Decoding(4)))
    row = completion_row(made[1], "so")
    assert row["finish"] == "refused" and "flagged" in row["error"]
    assert "error" not in completion_row(made[0], "so")


# ---------------------------------------------------------------- names of files


def test_outputs_whose_names_differ_after_a_dot_have_manifests_of_their_own(serve, tmp_path):
    server = serve(lambda body, n: (200, {}, chat(GOOD)))
    for name, tokens in (("qwen2.5-a", 32), ("qwen2.5-b", 33)):
        extract(examples(2), backend(server), rationale_decoding(tokens), tmp_path / name)
    stored = [read_json(manifest_path(tmp_path / name)) for name in ("qwen2.5-a", "qwen2.5-b")]
    assert [m["decoding"]["max_new_tokens"] for m in stored] == [32, 33]


def test_names_of_outputs_never_share_a_manifest():
    names = [
        "a",
        "a.jsonl",
        "a.b",
        "a.b.jsonl",
        "a.json",
        "a.manifest",
        "a.manifest.json",
        ".jsonl",
    ]
    names += ["a.jsonl.jsonl", "qwen2.5-a", "qwen2.5-b", "{a} %s b.jsonl"]
    manifests = {str(manifest_path(name)) for name in names}
    assert len(manifests) == len(names)
    assert manifest_path("sub/a.jsonl").as_posix() == "sub/a.manifest.json"


def test_a_file_with_and_one_without_an_ending_stay_apart(serve, tmp_path):
    server = serve(lambda body, n: (200, {}, chat(GOOD)))
    for name, tokens in (("a", 32), ("a.jsonl", 33), ("a", 32)):
        extract(examples(2), backend(server), rationale_decoding(tokens), tmp_path / name)
    assert len(server.calls) == 4
