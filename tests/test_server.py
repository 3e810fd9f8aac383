"""What real servers do: names for a cut, thoughts, refusals, hidden errors, quotas. Over real HTTP, with the real client."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from helpers import free_port
from json_server import JsonServer

from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.data.examples import Example
from kd_notes.experiments.extraction import extract_rationales, extract_stream
from kd_notes.generation.backends import open_backend
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
    + ["insufficient_system_resource", "malformed_function_call", "FinishReason.MAX_TOKENS"]
    + ["failed", "deadline_exceeded", "kv_cache_full", "modelUnloaded", "userStopped", "OTHER"]
    + ["input_too_long", "contextLengthReached", "disconnect"],
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
        "<mm:think>A number.\n\n</mm:think>",
        "<think >A number.\n\n</think >",
        "<|think|>A number.\n\n<|/think|>",
        "<scratchpad>A number.\n\n</scratchpad>",
        "<think>A <think>number.</think>\n\nStill.</think>",
        "analysisA number.\n\nassistantfinal",
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
        {"completion_tokens": float("inf")},
        {"completion_tokens": -1},
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
    assert outcomes(path) == {f"e{i}": "ok" for i in range(5)} | {"e5": "unanswered"}


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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer",
    ["One thing.\n\nAnswer: neutral", "**Reasoning:**\n\nOne thing.\n\n**Answer:**\n\nneutral\n\nDone."],
)  # fmt: skip
def test_a_chat_may_put_blank_lines_into_its_answer(serve, tmp_path, answer, stream):
    server = serve(lambda body, n: (200, {}, chat(answer)))
    path = tmp_path / "a.jsonl"
    how = (backend(server), rationale_decoding(32), path)
    if stream:
        extract_stream(examples(2), *how, task="nli")
    else:
        extract(examples(2), *how)
    rows = read_jsonl(path)
    assert [(r["outcome"], r["rationale"], r["label"]) for r in rows] == [
        ("ok", "One thing.", "neutral")
    ] * 2


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
        (200, chat("I", "content_filter")),
        (200, chat("", "SAFETY")),
        (200, chat("I cannot.", "guardrail_intervened")),
        (200, chat("", "MODEL_ARMOR")),
        (200, chat("", "ERROR_TOXIC")),
        (400, error("This model's maximum context length is 4096 tokens.", type="BadRequestError")),
        (400, error("the request exceeds the available context size", code=400)),
        (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 4096"}),
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
    asked = len(server.calls)
    extract(examples(), backend(server), rationale_decoding(32), path)
    assert len(read_jsonl(path)) == 6 and len(server.calls) == asked


CRASHED = (500, {}, error("the model crashed on this prompt"))


def poisoned(rows, failure=CRASHED):
    "Answer as a server that fails for these rows, however often it is asked."
    return lambda body, n: (
        failure if any(asks_for(body, i) for i in rows) else (200, {}, chat(GOOD))
    )


def unanswered(rows, count=10):
    return {f"e{i}": "unanswered" if i in rows else "ok" for i in range(count)}


def ask(server, path, count=10, **options):
    options = {"retries": 0} | options
    return extract(examples(count), backend(server, **options), rationale_decoding(32), path)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(
    "failure",
    [
        CRASHED,
        (503, {}, error("overloaded")),
        (200, {}, error("upstream failed")),
        (200, {}, {"choices": []}),
        (200, {}, chat(None, None)),
    ],
)
def test_rows_whose_attempts_are_used_up_are_outcomes_and_asked_again_by_the_next_call(
    serve, tmp_path, failure, concurrency
):
    bad = range(2, 7)
    server = serve(poisoned(bad, failure))
    path = tmp_path / "a.jsonl"
    rows = ask(server, path, concurrency=concurrency)
    assert [row["outcome"] for row in rows] == list(unanswered(bad).values())
    assert outcomes(path) == unanswered(bad) and all(rows[i]["error"] for i in bad)
    manifest = read_json(manifest_path(path))
    assert manifest["status"] == "done"
    assert manifest["totals"]["outcomes"] == {"ok": 5, "unanswered": 5}
    server.answer = lambda body, n: (200, {}, chat(GOOD))
    asked = len(server.calls)
    rows = ask(server, path)
    assert outcomes(path) == unanswered([]) and len(read_jsonl(path)) == len(rows) == 10
    assert len(server.calls) == asked + len(bad)


@pytest.mark.parametrize("bad", [range(5), range(4, 10), [*range(9)]])
def test_it_does_not_matter_where_the_rows_stand_that_a_server_cannot_answer(serve, tmp_path, bad):
    ask(serve(poisoned(bad)), tmp_path / "a.jsonl")
    assert outcomes(tmp_path / "a.jsonl") == unanswered(bad)


def test_rows_that_fail_again_are_the_same_outcomes_and_no_error(serve, tmp_path):
    "Also when nothing but such rows is left, more than a server without an answer may have."
    bad = range(25)
    server = serve(poisoned(bad, (503, {}, error("overloaded"))))
    path = tmp_path / "a.jsonl"
    turned = [*reversed(examples(40))]  # the others come first
    for _ in range(2):
        rows = extract(turned, backend(server, retries=0), rationale_decoding(32), path)
        assert outcomes(path) == unanswered(bad, 40) and len(rows) == len(read_jsonl(path)) == 40


def test_a_row_at_which_the_server_hangs_is_an_outcome_of_that_row(serve, tmp_path):
    bad, free = range(1, 5), threading.Event()

    def answer(body, n):
        if any(asks_for(body, i) for i in bad):
            free.wait(10)
        return 200, {}, chat(GOOD)

    ask(serve(answer), tmp_path / "a.jsonl", 6, timeout=0.4, concurrency=2)
    free.set()
    assert outcomes(tmp_path / "a.jsonl") == unanswered(bad, 6)


def test_a_stream_has_the_same_outcomes_and_asks_again(serve, tmp_path):
    bad = range(2, 7)
    server = serve(poisoned(bad))
    path = tmp_path / "a.jsonl"
    how = {"task": "nli", "window": 4}
    for healed in (False, True):
        if healed:
            server.answer = lambda body, n: (200, {}, chat(GOOD))
        teacher = backend(server, retries=0)
        tally = extract_stream(examples(10), teacher, rationale_decoding(32), path, **how)
        wanted = unanswered([] if healed else bad)
        assert outcomes(path) == wanted and len(read_jsonl(path)) == 10
        assert tally.outcomes == Counter(wanted.values())


def test_the_report_of_an_extraction_counts_the_rows_without_an_answer(serve, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    lines = [{"id": e.id, "input": e.input, "label": e.label} for e in examples(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = serve(poisoned(range(3, 7)))
    spec = f"openai-chat:{server.url}#m"
    out = tmp_path / "a.jsonl"
    how = {"source": path, "teacher": spec, "retries": 0, "concurrency": 1}
    for stream in (False, True):
        made = extract_rationales("nli", out, **how, stream=stream)
        assert made["rows"] == 8 and made["outcomes"] == {"ok": 4, "unanswered": 4}
        assert "4 of 8 rows have no answer" in capfd.readouterr().err


def test_a_server_that_answers_no_row_is_an_error_after_some_though_it_answers_a_greeting(serve):
    server = serve(poisoned(range(60)))
    asked = [(e.id, e.input) for e in examples(60)]
    with pytest.raises(UserError, match="crashed on this prompt"):
        list(backend(server, retries=0).generate(asked, Decoding(4)))
    assert 15 <= len(server.calls) <= 25


@pytest.mark.parametrize(
    "failure",
    [
        (429, {}, error("You exceeded your quota", code="insufficient_quota")),
        (401, {}, error("the key has expired")),
        (403, {}, error("your quota is used up")),
        (503, {}, error("overloaded")),
    ],
)
def test_a_server_that_ends_in_the_middle_blames_no_row(serve, tmp_path, failure):
    "Neither as refused, which would be for ever, nor as unanswered."
    server = serve(lambda body, n: (200, {}, chat(GOOD)) if n <= 2 else failure)
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=failure[2]["error"]["message"]):
        ask(server, path)
    assert outcomes(path) == {"e0": "ok", "e1": "ok"} and len(server.calls) <= 6
    server.answer = lambda body, n: (200, {}, chat(GOOD))
    ask(server, path)
    assert outcomes(path) == unanswered([])


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_request_that_every_row_is_refused_for_is_an_error_and_soon(serve, status):
    server = serve(lambda body, n: (status, {}, error("no such parameter: top_q")))
    with pytest.raises(UserError, match="top_q"):
        list(backend(server, retries=5).generate([(str(i), "so") for i in range(50)], Decoding(4)))
    assert len(server.calls) <= 4  # three rows and a greeting


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


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_server_will_never_do_is_asked_for_once(serve, status):
    server = serve(lambda body, n: (status, {}, error("not implemented")))
    with pytest.raises(UserError, match="not implemented"):
        one(server, retries=6)
    assert len(server.calls) == 1


class Socket:
    "A server that hangs up on some requests without an answer."

    def __init__(self, hangs_up):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.hangs_up = hangs_up
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(1 << 16)
                while b"}]" not in asked and (more := connection.recv(1 << 16)):
                    asked += more
                if self.hangs_up(asked):
                    continue
                body = json.dumps(chat(GOOD)).encode()
                head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def close(self):
        self.listener.close()


def test_a_row_at_which_the_server_hangs_up_is_an_outcome_of_that_row(tmp_path):
    server = Socket(lambda asked: b"number 1." in asked)
    path = tmp_path / "a.jsonl"
    extract(examples(4), backend(server, retries=1), rationale_decoding(32), path)
    assert outcomes(path) == unanswered([1], 4)
    server.close()


def test_what_the_network_said_is_told():
    asked = OpenAIBackend(f"http://127.0.0.1:{free_port()}/v1", "m", retries=0)
    with pytest.raises(UserError, match="Errno|refused|failed"):
        list(asked.generate([("a", "x")], Decoding(4)))


def test_requests_that_are_all_too_long_are_an_error_after_some(serve):
    server = serve(lambda body, n: (400, {}, error("maximum context length is 5 tokens")))
    made = []
    with pytest.raises(UserError, match="maximum context length"):
        for completion in backend(server).generate(
            [(str(i), "so") for i in range(60)], Decoding(4)
        ):
            made.append(completion.finish)
    assert set(made) == {"refused"} and len(server.calls) <= 24


@pytest.mark.parametrize(
    "body, words",
    [
        (b"<html><style>p {}</style><title>Attention Required!</title></html>", "403: Attention Required!"),
        ([{"error": {"code": 403, "message": "quota of the project"}}], "403: quota of the project"),
    ],
)  # fmt: skip
def test_pages_and_lists_of_errors_are_told_in_words(serve, body, words):
    with pytest.raises(UserError, match=words):
        one(serve(lambda asked, n: (403, {}, body)), retries=0)


# ---------------------------------------------------------------- keys and addresses


class Addressed(Server):
    "A server that remembers the paths and the keys that it was asked with."

    def respond(self, path, asked):
        self.paths = [*getattr(self, "paths", []), path]
        return super().respond(path, asked)


@pytest.mark.parametrize(
    "given, asked",
    [
        ("/v1", "/v1/chat/completions"), ("/v1/", "/v1/chat/completions"), ("", "/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"), ("/v1/completions/", "/v1/chat/completions"),
        ("/openai/deployments/d?api-version=1", "/openai/deployments/d/chat/completions?api-version=1"),
        ("/v1/?a=1&b=x%20y", "/v1/chat/completions?a=1&b=x+y"), ("/v1 ", "/v1/chat/completions"),
    ],
)  # fmt: skip
def test_addresses_as_people_write_them(given, asked):
    server = Addressed(lambda body, n: (200, {}, chat("so")))
    url = server.url.removesuffix("/v1") + given
    (made,) = OpenAIBackend(url, "m", chat=True, retries=0).generate([("a", "x")], Decoding(4))
    assert made.text == "so" and server.paths[0].replace("%20", "+") == asked
    server.close()


def test_what_stands_in_an_address_is_not_told(serve):
    server = serve(lambda body, n: (400, {}, error("no")))
    asked = OpenAIBackend(f"{server.url}?key=hidden", "m", retries=0)
    with pytest.raises(UserError) as caught:
        list(asked.generate([("a", "x")], Decoding(4)))
    assert "hidden" not in str(caught.value) + repr(asked) + json.dumps(asked.describe())


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://h:abc/v1", "http://h:99999/v1", "http:///v1"]
)
def test_an_address_that_is_none_is_one_clear_error(url):
    with pytest.raises(UserError, match="base URL"):
        OpenAIBackend(url, "m")


def test_a_models_name_may_hold_a_hash():
    made = open_backend("openai-chat:http://127.0.0.1:9/v1#org/model#main")
    assert (made.base_url, made.name) == ("http://127.0.0.1:9/v1", "org/model#main")


def test_the_spec_says_whether_it_is_a_chat():
    assert open_backend("openai-chat:http://127.0.0.1:9/v1#m", chat=True).chat
    with pytest.raises(UserError, match="chat"):
        open_backend("openai:http://127.0.0.1:9/v1#m", chat="yes")


@pytest.mark.parametrize("key", ["sk-secret\n", " sk-secret\r\n"])
def test_a_key_from_a_file_works(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(
        lambda body, n: (200, {}, chat("so")) if n == 1 else (401, {}, error("bad key sk-secret"))
    )
    assert one(server, retries=0).text == "so"
    with pytest.raises(UserError, match=r"bad key \*\*\*"):
        one(server, retries=0)


@pytest.mark.parametrize("key", ["sk-s\u00e9cret", "\ufeffsk-secret", "sk-secret\nX: y"])
def test_a_key_that_no_header_can_hold_is_named_by_its_variable_and_not_shown(
    serve, monkeypatch, key
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(lambda body, n: (200, {}, chat("so")))
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        one(server, retries=0)
    assert "cret" not in str(caught.value) and not server.calls


def test_a_blank_key_is_none(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert one(serve(lambda body, n: (200, {}, chat("so")))).text == "so"


def test_a_key_in_place_of_its_variable_is_not_shown():
    with pytest.raises(UserError, match="key_env") as caught:
        OpenAIBackend("http://127.0.0.1:9/v1", "m", key_env="sk-secret")
    assert "secret" not in str(caught.value)


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
