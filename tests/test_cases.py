"""Faults of the field, modelled on public reports: which report, and which test holds it. And the tests that belong nowhere else."""

import ast
import contextlib
import copy
import gzip
import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_tokenizers
import torch
from safetensors.torch import load_file, save_file
from test_architectures import COMMON, FAMILIES, GEMMA, tiny, VISION
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from kd_notes.core import read_jsonl, UserError
from kd_notes.data.answers import exact_match
from kd_notes.data.dialogues import encode_row
from kd_notes.data.examples import Example
from kd_notes.data.rows import load_rows, read_row
from kd_notes.data.task_file import OwnTask
from kd_notes.evaluation.calibration import ece, reliability
from kd_notes.evaluation.statistics import hierarchical_bootstrap, holm
from kd_notes.evaluation.text import distinct_n, references_of
from kd_notes.evaluation.validation import Validation
from kd_notes.experiments.instruction_sets import question
from kd_notes.generation.backends import LocalBackend
from kd_notes.generation.completions import Decoding, manifest_path, stream_jsonl
from kd_notes.generation.responses import completion_of, hidden_status
from kd_notes.generation.sampling import greedy
from kd_notes.methods.cache_writer import Recipe
from kd_notes.methods.logit_kd import KD
from kd_notes.methods.rationales import extract, Parsed, parse_completion, rationale_decoding
from kd_notes.models.layer_drop import layer_drop
from kd_notes.models.pretrained import context_of, load_pretrained
from kd_notes.products.distill import distill, read_corpus
from kd_notes.products.instructions import asked_rows
from kd_notes.products.predict import evaluate_rows, predict_rows
from kd_notes.products.request import expected_memory, Request
from kd_notes.products.settings import check_objective, distill_settings, hold_out, on_policy_config
from kd_notes.runner.notebooks import Parameter
from kd_notes.runner.profiles import parse_sets, plain_settings
from kd_notes.training.batches import causal_batch, target_logits
from kd_notes.training.loop import train
from kd_notes.training.state import Callback, TrainConfig

CASES = [  # name (a sibling behind the colon), subject of the public report, test
    ("arch_bart_start", "transformers#5212, #7719, #7961: decoder start tokens", "test_architectures.test_a_decoder_is_trained_from_the_token_it_starts_with"),
    ("arch_gemma3_composite", "trl#6340, axolotl#3354: vocab_size in text_config", "test_cases.test_distill_takes_composite_and_expert_models"),
    ("arch_layer_drop_lists", "optipfair#20: lists with an entry per layer", "test_models.test_lists_with_an_entry_per_layer_are_cut_with_the_layers"),
    ("arch_left_padding_pass", "nnsight#673, unsloth#3699: positions behind left padding", "test_cases.test_prompts_of_a_batch_are_answered_as_alone"),
    ("arch_logit_transforms_pass", "trl#5575, unsloth#11277: soft caps and scales behind the head", "test_architectures.test_logits_and_loss_of_a_batch_are_the_models_own"),
    ("arch_moe_student", "torch ao#2425, torchtitan#1367: experts in bfloat16", "test_cases.test_distill_takes_composite_and_expert_models"),
    ("cache_row_mismatch_pass", "AiDotNet#437, RLCSD#6: targets joined by position", "test_logit_cache.test_an_example_with_another_encoding_or_id_is_refused"),
    ("cli_set_bool", "vllm-tgis-adapter#96, transformers#9823: the text false is true", "test_reproduce.test_a_setting_of_the_command_line_has_the_value_that_is_meant"),
    ("cli_set_bool: in Python", "the same", "test_settings.test_chat_false_in_words_is_false"),
    ("cli_set_types", "LlamaFactory#4149, h2o-llmstudio#699: numbers as text", "test_settings.test_a_setting_of_distill_names_itself"),
    ("cli_set_types: of a training", "the same", "test_settings.test_a_setting_of_a_training_names_itself"),
    ("cli_set_types: of a back end", "the same", "test_settings.test_an_option_of_a_server_names_itself"),
    ("data_bytes_pass", "jsonlines#53, datalad#3523: line ends, byte order marks", "test_cases.test_rows_end_at_newlines_only"),
    ("data_lone_surrogate", "inspect_ai#3802: half a character", "test_core.test_json_that_would_lose_data_later_is_refused_where_it_is_read"),
    ("data_lone_surrogate: rows in Python", "the same", "test_importer.test_half_a_character_in_a_row_is_one_clear_error"),
    ("data_lone_surrogate: names twice", "the same kind: JSON that loses data", "test_core.test_json_that_would_lose_data_later_is_refused_where_it_is_read"),
    ("data_negative_count", "gradslam#62: -1 drops the last row", "test_settings.test_a_count_never_means_all_but_the_last"),
    ("data_negative_count: shots", "the same", "test_settings.test_shots_are_counted"),
    ("data_null_columns", "datasets#7222, Megatron-Bridge#5660: null in columns of other rows", "test_importer.test_a_column_that_only_other_rows_use_is_absent"),
    ("data_null_columns: tasks", "the same", "test_data.test_null_in_a_column_of_other_tasks_is_absent"),
    ("ece_edges_pass", "torchmetrics#3510, #1646: confidences at the edges of bins", "test_cases.test_no_confidence_is_lost_at_an_edge"),
    ("extract_dotted_name", "InvokeAI#8352, torchtune#2146: with_suffix on dotted names", "test_server.test_names_of_outputs_never_share_a_manifest"),
    ("fused_upstream_gradient_pass", "Liger-Kernel#968, #1298: gradients computed in forward", "test_fused.test_scaled_repeated_and_recomputed_gradients"),
    ("install_extra_missing_at_end", "ctlearn#232: a library missing after the work", "test_cases.test_a_missing_library_is_named_before_the_work"),
    ("lora_kd_pass", "axolotl#3206, #3207: divergences through adapters", "test_cases.test_the_report_of_an_adapted_student_is_true_of_its_folder"),
    ("lora_tied_head", "peft#2018, #2972: adapters on tied heads", "test_train.test_a_merged_student_is_the_one_that_was_trained"),
    ("lora_tied_head: BART, T5", "the same", "test_train.test_a_merged_encoder_decoder_is_the_one_that_was_trained"),
    ("lora_tied_head: unread adapters", "the same", "test_train.test_an_adapter_that_would_never_be_read_is_refused"),
    ("masked_padding_pass", "trl#5594, ms-swift#9767: NaN in masked positions", "test_divergences.test_4_padding_and_what_stands_in_it_change_nothing"),
    ("notebook_braces_in_path", "papermill#392, #343: braces in paths", "test_reproduce.test_a_book_in_a_folder_with_an_odd_name"),
    ("notebook_braces_in_path: outputs", "the same", "test_whitebox.test_an_output_with_an_odd_name"),
    ("notebook_kernel_killed_pass", "papermill#125: a kernel that dies", "test_reproduce.test_a_kernel_that_ends_by_itself_is_no_success"),
    ("notebook_quotes_pass", "papermill#83: quotes in parameters", "test_reproduce.test_a_text_parameter_arrives_letter_by_letter"),
    ("oa_broken_answers_pass", "garak#1737, langchain#32252: choices null, pages instead of JSON", "test_server.test_other_forms_of_an_error_inside_a_200"),
    ("oa_broken_answers_pass: counts", "the same", "test_server.test_tokens_that_a_server_cannot_count_end_no_work"),
    ("oa_content_null_blocks", "vllm#35230, sglang#33154: content null", "test_server.test_a_row_whose_thoughts_used_up_the_limit_is_an_outcome_and_the_others_go_on"),
    ("oa_content_null_blocks: blocks", "the same", "test_server.test_content_may_be_a_list_of_blocks"),
    ("oa_content_null_blocks: the last row", "the same", "test_server.test_the_last_row_may_be_the_one_that_the_server_cannot_answer"),
    ("oa_error_hidden_in_200", "xaibo#36, langchain#35236: an error inside a 200", "test_server.test_the_words_of_an_error_inside_a_200_reach_the_user"),
    ("oa_error_hidden_in_200: many rows", "the kind: a failing row is no end of the work", "test_server.test_rows_whose_attempts_are_used_up_are_outcomes_and_asked_again_by_the_next_call"),
    ("oa_error_hidden_in_200: a spent quota", "the kind: rows blamed for the server", "test_server.test_a_server_that_ends_in_the_middle_blames_no_row"),
    ("oa_finish_reason_other_names", "inspect_ai#5143, litellm#25825: names for a cut", "test_server.test_an_answer_that_used_up_its_limit_is_cut_whatever_the_server_calls_it"),
    ("oa_finish_reason_other_names: aborts", "the same", "test_server.test_an_answer_that_something_ended_is_cut_though_tokens_were_left"),
    ("oa_new_parameter_names", "gollm#33: max_completion_tokens", "test_server.test_a_model_that_wants_other_parameters_gets_them"),
    ("oa_reasoning_tags", "reasoning models: thoughts before the answer", "test_server.test_thoughts_are_neither_rationale_nor_a_place_to_stop"),
    ("oa_retry_after_hours", "opencode#4135, lobehub#13572: waits of a day", "test_server.test_a_quota_that_is_spent_is_told_and_not_waited_for"),
    ("oa_retry_after_hours: dates", "the same", "test_server.test_a_wait_of_days_is_told_in_hours_however_it_is_written"),
    ("oa_retry_after_hours: nonsense", "the same", "test_server.test_a_wait_that_makes_no_sense_is_no_hang"),
    ("oa_surrogate_answer", "strands-env#211: half a character in an answer", "test_server.test_half_a_character_in_an_answer_is_replaced"),
    ("out_folder_other_teacher", "lighteval#1364: results kept by a name", "test_whitebox.test_a_model_changed_in_place_is_another_request"),
    ("out_folder_other_teacher: weights", "the same", "test_cases.test_a_folder_made_with_other_weights_is_refused"),
    ("out_folder_other_teacher: templates", "the same", "test_whitebox.test_another_template_of_a_tokenizer_object_is_another_request"),
    ("out_folder_other_teacher: answers", "the same", "test_whitebox.test_answers_of_a_teacher_with_other_ends_are_not_continued"),
    ("parse_markdown_answer", "azureml-assets#5274, inspect_ai#5055: bold answers", "test_rationales.test_markdown_around_the_answer_is_no_part_of_rationale_or_label"),
    ("parse_markdown_answer: two labels", "the same", "test_rationales.test_an_answer_that_names_more_than_a_label_is_not_guessed"),
    ("parse_number_formats", "opencompass#2647: $1,234.50 and its like", "test_evaluate.test_numbers_as_people_write_them"),
    ("parse_number_formats: of a teacher", "the same", "test_rationales.test_numbers_in_a_teachers_form_are_its_label"),
    ("resume_other_objective", "transformers#18070, #29255: resumed as another run", "test_train.test_a_checkpoint_of_another_objective_or_teacher_is_refused"),
    ("resume_other_settings_pass", "transformers#21271: resumed with other settings", "test_train.test_a_checkpoint_of_another_run_is_refused"),
    ("rouge_other_scripts", "adk-python#3111, rouge#51: Rouge beyond a-z", "test_measure.test_rouge_in_other_scripts"),
    ("save_generation_config_pass", "transformers#29988: a config that cannot be saved", "test_cases.test_an_odd_generation_config_does_not_lose_the_student"),
    ("tok_bos", "trl#3520, lm-evaluation-harness#1465: the start token", "test_tokenizers.test_a_text_begins_as_its_tokenizer_begins_it"),
    ("tok_id_gap", "tokenizers#1085: holes in a vocabulary", "test_tokenizers.test_a_hole_in_the_vocabulary_is_counted_by_the_largest_id"),
    ("tok_named_templates", "Automodel#1696: a dictionary of templates", "test_tokenizers.test_of_named_templates_the_default_is_meant"),
    ("tok_no_eos", "ru-gpts#28, trl#3822: no end token", "test_tokenizers.test_no_end_token_is_a_clear_error_before_anything_is_computed"),
    ("tok_student_extra_token", "transformers#12763: a token beyond the teacher's", "test_tokenizers.test_a_token_that_only_the_student_has"),
    ("tok_turn_end", "trl#7039, lighteval#1279: ends of turns", "test_tokenizers.test_an_answer_stops_at_every_end_that_the_model_declares"),
    ("resume_other_config", "transformers#18070: the same weights compute something else", "test_train.test_a_checkpoint_of_the_same_weights_that_compute_or_learn_something_else_is_refused"),
    ("resume_other_config: answers", "the same", "test_whitebox.test_answers_of_the_same_weights_with_another_config_are_not_continued"),
    ("resume_other_config: logits", "the same", "test_logit_cache.test_the_same_weights_with_another_config_are_another_teacher"),
    ("resume_other_precision", "the same, of on-policy training", "test_rollouts.test_a_checkpoint_of_a_teacher_in_another_precision_is_refused"),
    ("resume_other_ends", "the same, of on-policy training", "test_rollouts.test_a_checkpoint_of_a_student_with_other_ends_is_refused"),
    ("resume_long_tensors", "streamlit#14622, hamilton#1616: abbreviated data in a hash", "test_train.test_long_tensors_in_rows_are_told_apart_by_all_their_numbers"),
    ("peft_prompt_learning", "trl#6530: virtual tokens left out of the loss", "test_train.test_adapters_outside_of_the_layers_are_refused"),
    ("peft_student", "trl#3926, trl#4081: what of an adapted model is trained", "test_whitebox.test_an_adapted_student_learns_in_its_adapter_alone"),
    ("frozen_student", "the same, without adapters", "test_whitebox.test_what_the_caller_has_frozen_stays_as_it_is"),
    ("teacher_train_mode", "TaCL#11, trl#5862: dropout in the teacher", "test_rollouts.test_a_teacher_in_training_mode_speaks_without_dropout"),
    ("rollout_padded_ids", "vllm#13175, verl#7882: ids that no tokenizer has", "test_rollouts.test_ids_beyond_the_tokenizer_are_never_drawn"),
    ("rollout_no_pad", "ru-gpts#28, of on-policy training", "test_rollouts.test_a_tokenizer_without_padding_trains_on_its_own_text"),
    ("rollout_cut_gold", "transformers#19742: an end behind a cut text", "test_rollouts.test_a_completion_that_was_cut_has_no_end_to_learn"),
    ("tok_bos_corpus", "trl#1709, trl#1392: a corpus without start tokens", "test_tokenizers.test_a_corpus_text_begins_as_its_tokenizer_begins_it"),
    ("tok_two_spaces", "catwalk#156, composer#2178: the tokenizer's space and the text's", "test_tokenizers.test_a_completion_that_begins_with_a_space_has_one"),
    ("tok_template_header", "the kind of tok_turn_end: a template that ignores add_generation_prompt", "test_tokenizers.test_a_template_that_forgets_the_header_of_an_answer_is_said_once"),
    ("tok_template_errors", "the kind of tok_named_templates: whatever a template raises", "test_tokenizers.test_whatever_a_template_raises_is_one_clear_error"),
    ("tok_turn_end: changed", "the kind of tok_turn_end", "test_tokenizers.test_the_end_of_a_turn_follows_the_end_token"),
    ("generation_config_answers", "transformers#15559, fairseq#4273: forced tokens and penalties", "test_architectures.test_answers_do_not_depend_on_penalties_and_forced_tokens_of_a_config"),
    ("files: damaged weights", "the kind of data_bytes: no file makes a traceback", "test_whitebox.test_damaged_weights_are_one_clear_error"),
    ("files: outputs", "the same", "test_whitebox.test_an_output_that_is_a_file_is_one_clear_error"),
    ("tok_bos: ends behind prompts", "the same kind: tokenizers that end every text", "test_cases.test_a_prompt_does_not_end_where_the_tokenizer_ends_every_text"),
    ("files: configs", "the kind of data_bytes: quantized models, shapes that differ, unknown names", "test_cases.test_a_model_that_cannot_be_built_is_one_clear_error"),
    ("arch_moe_student: any length", "the kind: an estimate that ends the command", "test_cases.test_an_estimate_of_a_limit_that_no_model_has_takes_no_memory"),
    ("arch_layer_drop_lists: other lists", "the same: ends, and layers that are named by number", "test_cases.test_of_a_config_only_what_belongs_to_layers_is_cut"),
    ("arch_layer_drop_lists: no cut", "the same: models whose layers cannot be taken out one by one", "test_cases.test_a_model_that_cannot_be_cut_is_one_clear_error"),
    ("arch_left_padding_pass: no cache", "the same kind: models that keep no keys and values", "test_cases.test_a_model_without_keys_and_values_is_not_asked_for_a_text"),
    ("arch_logit_transforms_pass: Llama 4", "the same: a model without one below its head", "test_cases.test_a_model_without_one_below_its_head_gives_its_own_logits"),
    ("data_null_columns: columns that are not null", "the kind: Dolly's context, a system message, earlier turns", "test_cases.test_a_column_that_belongs_to_the_prompt_is_read_or_refused"),
    ("data_bytes_pass: other files", "the same kind: packed files, tables, lists and UTF-16", "test_cases.test_a_file_of_another_kind_is_told_with_what_to_do"),
    ("oa_broken_answers_pass: no message", "the same: a choice without a message is no empty answer", "test_cases.test_a_choice_without_a_message_is_no_answer_of_the_teacher"),
    ("files: damaged numbers", "the kind of ANCHORS' NaN: weights that are not finite", "test_cases.test_a_model_that_computes_nan_is_named"),
    ("tok_turn_end: nothing said", "the kind: a teacher that says nothing", "test_cases.test_a_teacher_that_says_nothing_is_told"),
    ("parse_markdown_answer: other titles", "the same: answers under another title, in JSON, as Minerva ends", "test_cases.test_an_answer_under_another_title_is_found_and_no_piece_of_it_stays"),
    ("parse_number_formats: LaTeX and twice", "the same", "test_cases.test_more_numbers_as_teachers_write_them"),
    ("resume_other_settings_pass: validation", "the kind of resume_other_objective: what chooses the best weights", "test_cases.test_a_run_is_not_resumed_with_another_validation"),
    ("files: checkpoints", "the kind of data_bytes: no file of a run makes a traceback", "test_cases.test_a_checkpoint_that_is_not_whole_is_named"),
    ("cli_set_types: of on-policy objectives and caches", "the same", "test_cases.test_numbers_as_text_are_numbers_everywhere"),
    ("cli_set_types: twice", "the same: a setting that is given twice", "test_cases.test_a_setting_is_given_once"),
    ("files: answers", "the same: rows that were damaged or doubled", "test_cases.test_a_damaged_row_of_answers_is_named"),
    ("cli_set_types: of predict", "the same", "test_cases.test_a_setting_of_predict_names_itself"),
    ("rouge_other_scripts: distinct-n", "the same kind: words and letters of other scripts", "test_cases.test_words_of_other_scripts_are_counted_and_compared"),
    ("ece_edges_pass: impossible outcomes", "the same kind: numbers that are no outcomes and no p-values", "test_cases.test_numbers_that_are_no_outcomes_are_refused"),
    ("tok_turn_end: of the pair", "ms-swift#9526: a teacher that ends or lays out answers in another way", "test_cases.test_a_teacher_with_another_end_or_template_is_warned_of"),
    ("data_bytes_pass: corpus", "the same: line ends of a corpus", "test_cases.test_a_corpus_is_split_at_blank_lines_however_lines_end"),
    ("tok_template_errors: of a back end", "the same kind, of extraction through a chat template", "test_cases.test_a_chat_template_that_a_back_end_cannot_use_is_one_clear_error"),
    ("arch_gemma3_composite: context", "the same: the context of the language model", "test_cases.test_the_context_of_any_config_is_known"),
    ("files: damaged numbers of a back end", "half precision that overflows", "test_cases.test_a_back_end_that_computes_nan_writes_nothing"),
    ("out_folder_other_teacher: no weights", "the kind: a finished folder that is not whole", "test_cases.test_a_finished_folder_without_weights_or_request_is_not_finished"),
    ("data_null_columns: texts beside a prompt", "the kind: what a row or a message says in another field", "test_cases.test_what_a_row_says_beside_its_prompt_is_not_lost"),
    ("data_null_columns: names of answers", "the kind: an answer under another name", "test_cases.test_an_answer_is_found_under_any_of_its_names"),
    ("data_null_columns: of sets", "the same, of evaluation sets", "test_cases.test_an_empty_input_hides_no_context_of_an_instruction"),
    ("data_null_columns: thoughts", "reasoning models: thoughts and calls beside the content", "test_cases.test_what_a_message_says_beside_its_content_is_not_lost"),
    ("files: config of another model", "the kind of damaged weights: a config that leaves layers out", "test_cases.test_a_config_that_leaves_weights_of_its_checkpoint_out_is_no_model"),
    ("arch_layer_drop_lists: lists of results", "the kind: a layer that returns a list", "test_cases.test_the_first_gpt_is_cut_like_any_other"),
]  # fmt: skip
TOK = test_tokenizers.tokenizer_of()
FAST = test_tokenizers.FAST
ROWS = test_tokenizers.ROWS


def test_every_case_is_held_by_a_test():
    folder = Path(__file__).parent
    names = [name for name, *_ in CASES]
    assert len(set(names)) == len(names) >= 44
    for name, _, place in CASES:
        module, function = place.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in found, f"{name}: there is no {place}"


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Qwen 3", "Mistral", "Gemma 2", "GPT-NeoX"])
def test_prompts_of_a_batch_are_answered_as_alone(name):
    model = tiny(name)
    prompts = [list(range(5, 25)), [20, 21, 22], [30, 31, 32, 33, 34, 35]]
    made = greedy(model, prompts, 6, stop_ids=(1,)).response_ids
    for prompt, mine in zip(prompts, made):
        ids = torch.tensor([prompt])
        alone = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )
        assert mine == alone[0, len(prompt) :].tolist()


def saved(model, folder):
    model.save_pretrained(folder)
    TOK.save_pretrained(folder)
    return str(folder)


def sized(name, **more):
    "A model of a family with room for the ids of TOK."
    kind, settings, _ = FAMILIES[name]
    config = AutoConfig.for_model(kind, **settings | more)
    config.get_text_config().vocab_size = len(TOK)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["Gemma 3 with images", "Mixtral", "Qwen 2 MoE"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_distill_takes_composite_and_expert_models(tmp_path, name, side):
    odd = saved(sized(name), tmp_path / "odd")
    plain = saved(test_tokenizers.llama(len(TOK)), tmp_path / "plain")
    teacher, student = (odd, plain) if side == "teacher" else (plain, odd)
    report = distill(ROWS, teacher, student, "forward_kl", tmp_path / "out", **FAST)
    assert report["rows"] == 10 and (tmp_path / "out" / "model.safetensors").is_file()


def test_rows_end_at_newlines_only(tmp_path):
    rows = [
        json.dumps({"prompt": f"a{c}b", "response": "r"}, ensure_ascii=False)
        for c in "\u2028\u2029\x85c"
    ]
    path = tmp_path / "x.jsonl"
    first = "\r\n".join(rows[:2])
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\n   \n{rows[2]}\n{rows[3]}".encode())
    assert [row.prompt for row in load_rows(path)] == ["a\u2028b", "a\u2029b", "a\x85b", "acb"]
    path.write_bytes(f"{rows[3]}\n\ufeff{rows[3]}".encode())
    with pytest.raises(UserError, match="x.jsonl:2"):
        load_rows(path)


def test_no_confidence_is_lost_at_an_edge():
    assert ece([0.95, 1.0], [1, 0]) == pytest.approx(0.475)
    assert ece([1.0, 1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1, 1], bins=2) == pytest.approx(0.6)
    assert ece([0.0], [1]) == 1.0
    assert sum(row["n"] for row in reliability([0.0, 0.1, 0.2, 0.5, 0.9, 1.0], [1] * 6)) == 6


@pytest.mark.parametrize(
    "library, settings", [("matplotlib", {}), ("peft", {"lora": {"r": 2}}), ("accelerate", {})]
)
def test_a_missing_library_is_named_before_the_work(tmp_path, monkeypatch, library, settings):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a)
    )
    pair = (test_tokenizers.llama(len(TOK)), TOK)
    with pytest.raises(UserError, match=f"{library} is not installed.*pip install"):
        distill(ROWS, pair, "layers:1", "sft", tmp_path / "out", **FAST, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "objective, own",
    [("forward_kl", {"sft_weight": 0.0}), ("reverse_kl", {"sft_weight": 0.5}), ("seqkd", {})],
)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head", "down_proj"]])
def test_the_report_of_an_adapted_student_is_true_of_its_folder(tmp_path, objective, own, targets):
    pair = (test_tokenizers.llama(len(TOK)), TOK)
    settings = FAST | {"max_steps": 10, "lr": 5e-2} | own
    settings["lora"] = {"r": 4, "alpha": 8, "targets": targets}
    report = distill(ROWS, pair, "layers:2", objective, tmp_path / "out", **settings)
    model, tokenizer = load_pretrained(tmp_path / "out", device="cpu")
    held = hold_out(ROWS, 2, 0)[1]
    rows = [
        encode_row(row | {"id": str(i)}, tokenizer, max_length=64)
        for i, row in enumerate(chats(held))
    ]
    real = Validation(rows, tokenizer.pad_token_id)(model)["nll"]
    assert report["results"]["student"]["nll"] == pytest.approx(real, abs=1e-3)


def chats(rows):
    "Rows as chats, which is how distill reads them."
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in rows
    ]


def test_a_folder_made_with_other_weights_is_refused(tmp_path):
    out = tmp_path / "out"
    one, two = (
        saved(test_tokenizers.llama(len(TOK), seed=s), tmp_path / f"{s}/final") for s in (1, 2)
    )
    distill(ROWS, one, "layers:1", "sft", out, **FAST)
    with pytest.raises(UserError, match="another teacher_weights"):
        distill(ROWS, two, "layers:1", "sft", out, **FAST)
    saved(test_tokenizers.llama(len(TOK), seed=3), one)
    with pytest.raises(UserError, match="another teacher_weights"):
        distill(ROWS, one, "layers:1", "sft", out, **FAST)


@pytest.mark.parametrize("student", ["folder", "layers:1"])
def test_an_odd_generation_config_does_not_lose_the_student(tmp_path, student):
    base = saved(test_tokenizers.llama(len(TOK)), tmp_path / "base")
    config = tmp_path / "base" / "generation_config.json"
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    distill(
        ROWS, base, base if student == "folder" else student, "forward_kl", tmp_path / "out", **FAST
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>", "<s> $A"])
def test_a_prompt_does_not_end_where_the_tokenizer_ends_every_text(single):
    tokenizer = test_tokenizers.tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend = LocalBackend(test_tokenizers.llama(len(tokenizer)), tokenizer, revision="r")
    own = TOK.encode("the cat")
    assert backend.encode("the cat") == [1] * single.startswith("<s>") + own


@pytest.mark.parametrize(
    "change, said",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"vocab_size": 310}, "other shapes than config.json"), ({"hidden_size": 64}, "other shapes"),
        ({"num_attention_heads": "four"}, "num_attention_heads"), ({"num_attention_heads": 3}, "attention heads"),
        ({"hidden_act": "zork"}, "zork"), ({"rope_scaling": {"rope_type": "zork", "factor": 2.0}}, "zork"),
        ({"dtype": "float7"}, "float7"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_one_clear_error(tmp_path, change, said):
    base = saved(test_tokenizers.llama(len(TOK)), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=f"base: the model could not be loaded: .*{said}"):
        load_pretrained(base, device="cpu")
    with pytest.raises(UserError, match="could not be loaded"):
        distill(ROWS, base, "layers:1", "sft", tmp_path / "out", **FAST)


@pytest.mark.parametrize("context", [256, 0])
def test_an_estimate_of_a_limit_that_no_model_has_takes_no_memory(tmp_path, context):
    model = test_tokenizers.llama(len(TOK))
    model.config.max_position_embeddings = context
    sources = ((model, TOK), (model, TOK))
    settings = distill_settings(max_length=10**12, batch_size=8)
    request = Request([], *sources, "forward_kl", tmp_path, settings)
    memory = expected_memory(request)
    assert memory["length"] == (context or 10**12)
    assert memory["total"] < 1e9 or not context


EXPERT_LAYERS = {
    "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
}  # fmt: skip


def with_layers(kind, **more):
    "A model of four layers."
    settings = COMMON | {"num_hidden_layers": 4} | more
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_of_a_config_only_what_belongs_to_layers_is_cut():
    llama = with_layers("llama", eos_token_id=[1, 3, 5, 7])
    assert layer_drop(llama, [1, 2]).config.eos_token_id == [1, 3, 5, 7]
    dense = with_layers("glm4_moe", head_dim=8, first_k_dense_replace=2, **EXPERT_LAYERS)
    assert [layer_drop(dense, k).config.first_k_dense_replace for k in ([0, 2], [2, 3], 2)] == [
        1,
        0,
        1,
    ]
    some = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    some |= {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0, 3]}
    assert layer_drop(with_layers("qwen2_moe", **some), [1, 3]).config.mlp_only_layers == [1]
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 4, "vocab_size": 64, "max_seq_len": 64}
    assert layer_drop(with_layers("mpt", **mpt), [0, 3]).config.n_layers == 2


@pytest.mark.parametrize(
    "kind, more",
    [
        ("jamba", {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                   "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
        ("gemma3", {"text_config": COMMON | GEMMA, "vision_config": VISION | {"num_hidden_layers": 2}}),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_cut_is_one_clear_error(kind, more):
    model = with_layers(kind, **more)
    with pytest.raises(UserError, match="keep_layers: .* cannot be cut"):
        layer_drop(model, [1, 3])


@pytest.mark.parametrize(
    "kind, more",
    [
        ("rwkv", {"attention_hidden_size": 32}), ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ],
)  # fmt: skip
def test_a_model_without_keys_and_values_is_not_asked_for_a_text(kind, more):
    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="only causal models with attention layers"):
        greedy(model, [[5, 6, 7]], 2)


def test_the_first_gpt_is_cut_like_any_other():
    settings = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **settings))
    student = layer_drop(model, [1, 3])
    assert torch.equal(
        student.transformer.h[1].mlp.c_fc.weight, model.transformer.h[3].mlp.c_fc.weight
    )


def test_a_model_without_one_below_its_head_gives_its_own_logits():
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
    model = with_layers("llama4_text", head_dim=8, num_experts_per_tok=1, **experts)
    rows = [([2, 5, 6, 7], [9, 10, 1]), ([2, 5], [9, 10, 11, 1])]
    with torch.no_grad():
        mine = target_logits(model, causal_batch(rows, 0))
        own = [model(torch.tensor([a + b])).logits[0, len(a) - 1 : -1] for a, b in rows]
    torch.testing.assert_close(mine, torch.cat(own), atol=1e-4, rtol=1e-4)


def test_a_column_that_belongs_to_the_prompt_is_read_or_refused(tmp_path):
    dolly = {"instruction": "Who ran?", "context": "A dog ran.", "response": "A dog."}
    assert read_row(dolly).prompt == "Who ran?\n\nA dog ran."
    assert read_row(dolly | {"context": " "}).prompt == "Who ran?"
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Who ran?"}
    answer = {"role": "assistant", "content": "A dog."}
    for name in ("system", "system_prompt"):
        for row in (
            {"instruction": "Who ran?", "input": "", "output": "A dog."},
            {"prompt": "Who ran?", "response": " A dog."},
            {"messages": [user, answer]},
        ):
            made = read_row(row | {name: "Be brief."}, chat=True)
            assert made.prompt == (system, user) and made.completion == "A dog."
            assert read_row(row | {name: ""}, chat=True).prompt == (user,)
            assert read_row(row | {name: None}, chat=True).prompt == (user,)
        own = {"role": "system", "content": "Be long."}
        assert read_row({"messages": [own, user, answer], name: "Be brief."}).prompt == (own, user)
    with pytest.raises(UserError, match="'system' is not text"):
        read_row({"prompt": "a", "response": "b", "system": 5})
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(dolly | {"history": [["Who sat?", "A cat."]]}) + "\n")
    with pytest.raises(UserError, match="x.jsonl:1: the field 'history'.*messages"):
        load_rows(path)
    path.write_text(json.dumps(dolly | {"history": []}) + "\n")
    assert len(load_rows(path)) == 1


LOST = [  # of "Who ran?", which does not hold it
    "It ran.", ["Who ran?", "It ran."], ("It ran.",), np.array(["It ran."]),
    [{"title": "Dogs", "text": "It ran."}], {"sentences": [["Who ran?"], ["It ran."]]},
]  # fmt: skip
HELD = [" Who \r\n  ran? \n", "", None, ["Who ran?"], [{"title": "Dogs", "text": "Who"}]]


def test_what_a_row_says_beside_its_prompt_is_not_lost():
    "A text in another column belongs to the question, or the question holds it already."
    user = {"role": "user", "content": "Who ran?"}
    answer = {"role": "assistant", "content": "A dog."}
    asked = {"prompt": "Who ran?", "response": "A dog."}
    for row, name in (
        (asked, "context"), (asked, "input"), (asked, "instruction"), (asked, "question"),
        ({"input": "Who ran?", "label": "A dog."}, "context"), ({"input": "Who ran?", "output": "A dog."}, "question"),
        ({"messages": [user, answer]}, "context"), ({"messages": [user, answer]}, "instruction"),
    ):  # fmt: skip
        for lost in LOST:
            with pytest.raises(UserError, match=f"'{name}' holds text that is not in the prompt"):
                read_row(row | {name: lost})
        for held in HELD:
            assert read_row(row | {name: held}) == read_row(row)
    assert read_row(asked | {"context": {"page": 3}}) == read_row(asked)  # about the row: no text
    with pytest.raises(UserError, match="'context' holds text"):
        read_row(SimpleNamespace(**asked, context="It ran."))
    brief = SimpleNamespace(**asked, system="Be brief.")
    assert read_row(brief, chat=True).prompt[0]["role"] == "system"
    tools = [{"type": "function", "function": {"name": "run"}}]
    for some in (tools, json.dumps(tools)):
        with pytest.raises(UserError, match="'tools'"):
            read_row({"messages": [user, answer], "tools": some})
    for none in ("[]", "null", " ", [], None, np.array([])):
        assert read_row({"messages": [user, answer], "tools": none}).completion == "A dog."


def test_an_answer_is_found_under_any_of_its_names():
    for asked in ("prompt", "instruction", "input"):
        for answered in ("completion", "response", "output", "label"):
            row = {asked: "Who ran?", answered: "A dog."}
            assert read_row(row).completion == "A dog."
            assert read_row(row, needs_completion=False).completion == "A dog."
    assert read_row({"prompt": "Who ran?", "label": 3}, needs_completion=False).completion == ""
    own = {"prompt": "Who ran?", "response": "A dog.", "label": "animal"}
    assert read_row(own).completion == "A dog."


def test_an_answer_that_is_not_to_be_learnt_is_refused():
    row = {"prompt": "2 + 2?", "completion": "It is 4."}
    for second in ({"response": "5"}, {"output": "5"}):
        (name,) = second
        with pytest.raises(UserError, match=f"'{name}' holds text that is not in the answer"):
            read_row(row | second)
    assert read_row(row | {"response": " 4."}) == read_row(row)
    with pytest.raises(UserError, match="'output'"):
        read_row({"input": "Is it so?", "label": "yes", "output": "because it is"})
    asked, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    with pytest.raises(UserError, match="'completion'"):
        read_row({"messages": [asked, answer], "completion": "5"})
    only = {"messages": [asked], "completion": "4"}
    assert read_row(only, needs_completion=False).completion == ""
    both = {"prompt": [asked], "completion": [answer, asked, answer]}
    assert read_row(both).completion == "4"
    with pytest.raises(UserError, match="label false"):
        read_row(row | {"label": False})
    assert read_row(row | {"label": True}) == read_row(row | {"label": 0}) == read_row(row)
    assert read_row({"prompt": "2 + 2?", "label": False}, needs_completion=False).completion == ""
    for weight in (0, 0.0):
        with pytest.raises(UserError, match="message 2.*weight 0"):
            read_row({"messages": [asked, answer | {"weight": weight}]})
    earlier = [asked, answer | {"weight": 0}, asked, answer | {"weight": 1}]
    assert read_row({"messages": earlier}).completion == "4"


def test_what_a_message_says_beside_its_content_is_not_lost():
    user, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A dog."}
    for more in (
        {"reasoning_content": "It ran."}, {"reasoning": "It ran."}, {"thinking": "It ran."},
        {"reasoning_details": [{"text": "It ran."}]}, {"function_call": {"name": "run"}},
        {"tool_calls": [{"function": {"name": "run", "arguments": "{}"}}]},
    ):  # fmt: skip
        (name,) = more
        with pytest.raises(UserError, match=f"message 2.*'{name}'"):
            read_row({"messages": [user, answer | more]})
        for nothing in (None, "\n\n", [], float("nan"), False):
            assert read_row({"messages": [user, answer | {name: nothing}]}).completion == "A dog."
        # the templates of reasoning models leave the thoughts of earlier turns out as well
        earlier = [user, answer | more, user, answer]
        if "call" not in name:
            assert read_row({"messages": earlier}) == read_row({"messages": [user, answer] * 2})
    assert read_row({"messages": [user, answer | {"name": "Rex"}]}).completion == "A dog."
    row = {"prompt": "Who?", "response": "<think>It ran.</think>A dog."}
    assert read_row(row | {"reasoning": "It ran."}) == read_row(row)
    with pytest.raises(UserError, match="'reasoning' holds text that is not in the answer"):
        read_row({"prompt": "Who?", "response": "A dog.", "reasoning": "It ran."})


def test_an_empty_input_hides_no_context_of_an_instruction(tmp_path):
    row = {"instruction": "Who ran?", "input": "", "context": "A dog ran.", "response": "A dog."}
    (asked,) = question(row | {"system": ""}, "0", "row").messages
    assert asked["content"] == "Who ran?\n\nA dog ran."
    system, asked = question(row | {"system": "Be brief."}, "0", "row").messages
    assert system["content"] == "Be brief."
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = asked_rows(str(path), "alpaca")
    assert "### Input:\nA dog ran.\n" in read.prompt
    path.write_text(json.dumps(row | {"system": "Be brief."}) + "\n")
    with pytest.raises(UserError, match="rows.jsonl:1: .*no place for a system message"):
        asked_rows(str(path), "alpaca")


@pytest.mark.parametrize(
    "change, extra, lost",
    [
        ({"num_hidden_layers": 1}, "", "layers.1"),
        ({"attention_bias": False}, "", "proj.bias"),
        ({}, "model.layers.0.input_layernorm.bias", "input_layernorm.bias"),
        ({}, "model.layers.0.self_attn.q_proj.weight_scale_inv", "weight_scale_inv"),
        ({}, "model.layers.2.mlp.gate_proj.weight", "layers.2"),
    ],
)
def test_a_config_that_leaves_weights_of_its_checkpoint_out_is_no_model(
    tmp_path, change, extra, lost
):
    model = tiny("Llama", vocab_size=512, attention_bias=True)
    model.save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # a further layer that predicts two tokens ahead
    further = ("model.layers.2.enorm.weight", "model.layers.2.mlp.down_proj.weight")
    fine = {name: torch.ones(3) for name in ("score.weight", "visual.blocks.0.norm.bias", *further)}
    save_file(weights | fine, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_pretrained(str(tmp_path), device="cpu")
    more = {extra: torch.ones(3)} if extra else {}
    save_file(weights | more, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"config leaves out .*{lost}"):
        load_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "data, said",
    [
        (gzip.compress(b'{"prompt": "a", "response": "b"}\n'), "gzip: unpack"), (b"PAR1\x15\x04", "Parquet"),
        (b"PK\x03\x04", "zip archive"), ('{"prompt": "a"}\n'.encode("utf-16"), "UTF-16: save it as UTF-8"),
        (b'[{"prompt": "a", "response": "b"}]\n', "without a list"), (b'[\n {"prompt": "a"}\n]\n', "without a list"),
        (b'{\n "prompt": "a",\n "response": "b"}\n', "on one line"), (b"prompt,response\na,b\n", "Correct or delete"),
        (b'{"prompt": "a", "response": "b"\n', "Correct or delete"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_with_what_to_do(tmp_path, data, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    for read in (load_rows, read_jsonl, lambda path: list(stream_jsonl(path))):
        with pytest.raises(UserError, match=f"x.jsonl:1: .*{said}"):
            read(path)
    with pytest.raises(UserError, match="cannot be read"):
        list(stream_jsonl("a\0b"))


def test_a_choice_without_a_message_is_no_answer_of_the_teacher():
    def status(**choice):
        return hidden_status(json.dumps({"choices": [{"index": 0} | choice]}).encode())

    assert status(finish_reason="stop") == 502
    assert status(finish_reason="stop", message=None) == 502
    assert status(finish_reason="length") == 502
    assert status(finish_reason="content_filter") is None
    assert status(finish_reason="length", message={"content": None}) is None
    assert status(finish_reason="stop", message={"content": ""}) is None
    assert status(finish_reason="stop", text="So.") is None
    delta = {"index": 0, "finish_reason": "stop", "delta": {"content": "So."}}
    assert hidden_status(json.dumps({"choices": [delta]}).encode()) is None
    answer = completion_of({"choices": [delta]}, ("a", 0, "?"), Decoding(9), 0.1)
    assert (answer.text, answer.finish) == ("So.", "stop")


@pytest.mark.parametrize(
    "side, said", [(0, "the nll of the teacher is nan"), (1, "student is nan")]
)
def test_a_model_that_computes_nan_is_named(tmp_path, side, said):
    pair = [test_tokenizers.llama(len(TOK), seed=s) for s in (1, 2)]
    with torch.no_grad():
        pair[side].model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    teacher, student = ((model, TOK) for model in pair)
    with pytest.raises(UserError, match=f"{said}.*check its weights"):
        distill(ROWS, teacher, student, "forward_kl", tmp_path / "out", **FAST)


class Silent(test_tokenizers.LlamaForCausalLM):
    "Ends at once, or only behind a prompt with the token `loud`."

    loud = None

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        speaks = (ids == self.loud).any(1) if self.loud is not None else ids[:, 0] < 0
        ends = torch.where(speaks, 8, 2)[:, None, None].expand(-1, out.logits.shape[1], 1)
        out.logits = torch.full_like(out.logits, -20.0).scatter(-1, ends, 20.0)
        return out


def test_a_teacher_that_says_nothing_is_told(tmp_path, capsys):
    teacher = test_tokenizers.llama(len(TOK), kind=Silent)
    student = test_tokenizers.llama(len(TOK))
    with pytest.raises(UserError, match="all 10 answers of the teacher are empty"):
        distill(ROWS, (teacher, TOK), (student, TOK), "seqkd", tmp_path / "a", **FAST)
    teacher.loud = TOK.encode("the cat")[-1]
    report = distill(ROWS, (teacher, TOK), (student, TOK), "seqkd", tmp_path / "b", **FAST)
    assert 0 < report["rows"] < 10
    assert f"{10 - report['rows']} of the teacher's 10 answers are empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ["Label: neutral", "**Label:** neutral", "### Conclusion: **neutral**", "Final verdict: Neutral.", "Prediction: neutral"]
    + ["The correct label: neutral", "Classification： neutral", "Result: neutral", "Réponse: neutral", "(Answer: neutral)"]
    + ["[Answer: neutral]", "**Answer:**\n\n- neutral", "Answer: neutral!", '{"answer": "neutral"}', '```json\n{"Answer": "Neutral"}\n```']
    + ["Final Answer: The final answer is $\\boxed{neutral}$. I hope it is correct."],
)  # fmt: skip
def test_an_answer_under_another_title_is_found_and_no_piece_of_it_stays(line):
    labels = ("entailment", "neutral", "contradiction")
    parsed = parse_completion(f"The sentence says so.\n{line}", labels=labels)
    assert parsed == Parsed("ok", "The sentence says so.", "neutral")


@pytest.mark.parametrize(
    "text",
    ["It is open.\nLabel: unclear", "Label: neutral\nSo it is open.", "It is open.\nThe hypothesis: neutral"]
    + ['It is {"answer": "open"}.', "It is open.\nLabel: neutral or contradiction"],
)  # fmt: skip
def test_a_title_that_announces_no_answer_is_a_part_of_the_reasoning(text):
    labels = ("entailment", "neutral", "contradiction")
    assert parse_completion(text, labels=labels).outcome == "no_label"


def test_a_json_object_is_split_into_reasoning_and_answer():
    text = '{"reasoning": "They add up.", "answer": 42}'
    assert parse_completion(text, metric="equation") == Parsed("ok", "They add up.", "42")
    assert parse_completion(text).label == "42"
    assert parse_completion("Result: 42").outcome == "no_label"  # any text would be an answer


@pytest.mark.parametrize(
    "written, label",
    [
        ("42^\\circ", "42"), ("$42\\%$", "42"), ("forty-two (42)", "42"), ("42 (forty-two)", "42"), ("forty-two (43)", None),
        ("x = 5, y = 3", None), ("a = 5 and b = 3", None), ("20 + 22 = 40 + 2 = 42", "20 + 22"), ("$20 + $22 = $42", "42"),
        ("The final answer is $42$. I hope it is correct.", "42"), ("1,234 = 1,234", "1234"),
    ],
)  # fmt: skip
def test_more_numbers_as_teachers_write_them(written, label):
    parsed = parse_completion(f"They add up.\nAnswer: {written}", metric="equation")
    assert (parsed.label if parsed.outcome == "ok" else None) == label


class Stop(Callback):
    "Ends a training as a kill does, after two steps."

    def on_step(self, state):
        if state.step == 2:
            raise KeyboardInterrupt


ENCODED = [encode_row(row | {"id": str(i)}, TOK) for i, row in enumerate(ROWS)]


def begin_and_go_on(folder, first, second, damage=None):
    "Train two of four steps, and then the rest."
    settings = {"max_steps": 4, "batch_size": 4, "lr": 1e-3, "device": "cpu", "save_every": 1}
    cfg = TrainConfig(**settings, eval_every=1, keep_best=first is not None)
    pair = [test_tokenizers.llama(len(TOK), seed=s) for s in (1, 2)]
    for validate, callbacks in ((first, [Stop()]), (second, [])):
        with contextlib.suppress(KeyboardInterrupt):
            model = copy.deepcopy(pair[1])
            result = train(
                model, KD(TOK, pair[0]), ENCODED[:8], cfg, run_dir=folder, validate=validate, callbacks=callbacks
            )  # fmt: skip
        if callbacks and damage:
            damage(next((folder / "checkpoints").iterdir()))
    return result


@pytest.mark.parametrize("change", ["rows", "score", "teacher", "none"])
def test_a_run_is_not_resumed_with_another_validation(tmp_path, change):
    judge, other = (test_tokenizers.llama(len(TOK), seed=s) for s in (1, 3))
    first = Validation(ENCODED[8:], 0, judge, score="forward_kl")
    again = Validation(ENCODED[8:], 0, judge, score="forward_kl", batch_size=1)
    assert begin_and_go_on(tmp_path / "same", first, again).steps == 4
    second = {
        "rows": Validation(ENCODED[9:], 0, judge, score="forward_kl"),
        "score": Validation(ENCODED[8:], 0, judge, score="reverse_kl"),
        "teacher": Validation(ENCODED[8:], 0, other, score="forward_kl"),
        "none": None,
    }[change]
    with pytest.raises(UserError, match="a run with other validation"):
        begin_and_go_on(tmp_path / "other", first, second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "state.json").write_text("{}"), lambda step: (step / "state.json").write_text("[]"),
        lambda step: save_file({"x": torch.zeros(2)}, step / "model.safetensors"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_named(tmp_path, damage):
    with pytest.raises(UserError, match="step-0000001.*the checkpoint.*Delete its folder"):
        begin_and_go_on(tmp_path, None, None, damage)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the file could not be written"):
        begin_and_go_on(tmp_path / "file", None, None)


def test_numbers_as_text_are_numbers_everywhere():
    settings = distill_settings(options={"rollouts": "8", "length_norm": "no"})
    config = on_policy_config("minillm", settings, 8, corpus=True)
    assert (config.rollouts, config.length_norm) == (8, False)
    for wrong in ("many", True, 2.5):
        with pytest.raises(UserError, match="setting rollouts: .* is not a whole number"):
            check_objective("minillm", {"rollouts": wrong})
    assert Recipe(k="8", temperature="2").k == 8
    with pytest.raises(UserError, match="Recipe.k: 'many'"):
        Recipe(k="many")


def test_a_setting_is_given_once():
    with pytest.raises(UserError, match="lr is set twice"):
        plain_settings(["lr=1e-4", "lr=1e-3"])
    assert plain_settings(["x=" + "[" * 5000])["x"].startswith("[[")
    known = {"toy": {"n": Parameter("n", 1)}}
    assert parse_sets(["n=2", "toy.n=3"], known) == {"toy": {"n": 3}}
    with pytest.raises(UserError, match="toy.n is set twice"):
        parse_sets(["toy.n=2", "toy.n=3"], known)


OWN = OwnTask("own", "own", labels=("yes", "no"), template="{text}")
OWN_ROWS = [{"id": str(i), "text": f"the cat {i}", "label": "yes"} for i in range(3)]


def test_a_damaged_row_of_answers_is_named(tmp_path):
    base = saved(test_tokenizers.llama(len(TOK)), tmp_path / "base")
    examples = [Example(str(i), "nli", f"Premise: {i} Hypothesis: b") for i in range(3)]
    path, other = tmp_path / "predicted.jsonl", tmp_path / "extracted.jsonl"
    backend = LocalBackend(load_pretrained(base, device="cpu")[0], TOK, revision="r")
    calls = {
        path: lambda: predict_rows(base, OWN_ROWS, path, OWN, max_new_tokens=2, device="cpu"),
        other: lambda: extract(examples, backend, rationale_decoding(2), other),
    }
    for file, call in calls.items():
        call()
        whole = file.read_text()
        first, *rest = whole.splitlines()
        for name in ("id", "outcome", "prompt_hash"):
            row = {key: value for key, value in json.loads(first).items() if key != name}
            file.write_text("\n".join([*rest, json.dumps(row)]) + "\n")
            with pytest.raises(UserError, match=f"row 3: the row has no '{name}'"):
                call()
        file.write_text(whole)
        call()
        manifest_path(file).write_text("[]")
        with pytest.raises(UserError, match="manifest.json: the manifest is not whole"):
            call()
    manifest_path(other).unlink()
    other.unlink()
    calls[other]()
    other.write_text(other.read_text() + other.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="an answer is in the file twice"):
        calls[other]()


@pytest.mark.parametrize(
    "setting, value",
    [("batch_size", 0), ("batch_size", 1.5), ("batch_size", "two"), ("max_new_tokens", 0)]
    + [("max_new_tokens", -1), ("max_new_tokens", "many"), ("max_new_tokens", 256)],
)
def test_a_setting_of_predict_names_itself(tmp_path, setting, value):
    base = saved(test_tokenizers.llama(len(TOK)), tmp_path / "base")
    settings = {"max_new_tokens": 2, "device": "cpu"}
    with pytest.raises(UserError, match=f"setting {setting}"):
        predict_rows(base, OWN_ROWS, tmp_path / "a.jsonl", OWN, **settings | {setting: value})
    with pytest.raises(UserError, match=f"setting {setting}"):
        evaluate_rows(base, OWN_ROWS, None, OWN, **settings | {setting: value})
    text = {name: str(number) for name, number in (("batch_size", 2), ("max_new_tokens", 2))}
    assert (
        predict_rows(base, OWN_ROWS, tmp_path / "a.jsonl", OWN, device="cpu", **text)["rows"] == 3
    )


def test_words_of_other_scripts_are_counted_and_compared():
    assert distinct_n(["你好你好你好你好"], 2) == pytest.approx(2 / 7)
    assert distinct_n(["नमस्ते दुनिया नमस्ते दुनिया"], 1) == 0.5
    assert distinct_n(["Der Café, der Cafe\u0301."], 1) == 0.5
    assert distinct_n(["a_b a_b don't"], 1) == 0.75  # as before, in ASCII
    assert exact_match("caf\u00e9", " cafe\u0301") and not exact_match("cafe", "caf\u00e9")
    assert references_of(
        [{"references": [None, "a"]}, {"references": float("nan"), "response": "b"}]
    ) == [["a"], ["b"]]
    for row in ({"label": 5}, {"references": "", "response": ""}, {"references": [None]}):
        with pytest.raises(UserError, match="row 0"):
            references_of([row])
    for texts, n in (([None], 1), (["a b"], 1.5), (["a b"], 0)):
        with pytest.raises(UserError, match="distinct_n"):
            distinct_n(texts, n)


def test_numbers_that_are_no_outcomes_are_refused():
    for right in ([2], [-1], [float("nan")]):
        with pytest.raises(UserError, match="reliability"):
            ece([0.5], right)
    for table in ([[1, 2], [1]], ["a"], [[0.5, None], [1]]):
        with pytest.raises(UserError, match="outcomes"):
            hierarchical_bootstrap(table)
    for p in ([0.1], {"a": 1.5}, {"a": float("nan")}):
        with pytest.raises(UserError, match="holm"):
            holm(p)


OTHER_END = "{% for m in messages %}{{ m['role'] + m['content'] + '<turn_end>' }}{% endfor %}"
OTHER_LAYOUT = "{% for m in messages %}{{ m['role'] + m['content'] + '</s>' }}{% endfor %}"


@pytest.mark.parametrize(
    "teacher, objective, said",
    [
        ({"eos": "<turn_end>"}, "forward_kl", "'</s>' and the teacher with '<turn_end>'"),
        ({"template": OTHER_END}, "reverse_kl", "'</s>' and the teacher with '<turn_end>'"),
        ({"template": OTHER_LAYOUT}, "forward_kl", "different chat templates"),
        ({"template": OTHER_LAYOUT}, "seqkd", ""), ({}, "forward_kl", ""),
    ],
)  # fmt: skip
def test_a_teacher_with_another_end_or_template_is_warned_of(tmp_path, teacher, objective, said):
    pair = [test_tokenizers.llama(len(TOK), seed=s) for s in (1, 2)]
    tokenizers = (test_tokenizers.tokenizer_of(**teacher), test_tokenizers.tokenizer_of())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        distill(ROWS, *zip(pair, tokenizers), objective, tmp_path / "out", **FAST)
    told = [str(w.message) for w in heard if "the student's layout" in str(w.message)]
    assert (len(told) == 1 and said in told[0]) if said else not told


@pytest.mark.parametrize(
    "data", [b"a b\n\nc d", b"a b\r\n\r\nc d", b"\xef\xbb\xbfa b\n \t\nc d\r\n\r\n"]
)
def test_a_corpus_is_split_at_blank_lines_however_lines_end(tmp_path, data):
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    assert read_corpus(path) == ("a b", "c d")
    for name in ("corpus.JSONL", "corpus.ndjson", "corpus.json"):
        path = tmp_path / name
        path.write_text('{"text": "a b"}\n{"text": "c d"}\n')
        if name.endswith(".json"):
            with pytest.raises(UserError, match="corpus.json: .*jsonl"):
                read_corpus(path)
        else:
            assert read_corpus(path) == ("a b", "c d")
    for wrong in (5, ["a", ""], ["a", None], []):
        with pytest.raises(UserError, match="corpus"):
            read_corpus(wrong)


def asked(model, tokenizer=None, prompt="the cat", new=2, **options):
    backend = LocalBackend(model, tokenizer or TOK, revision="r", **options)
    return [done.text for done in backend.generate([("a", prompt)], Decoding(new))]


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "no chat template"), ("{{ raise_exception('bad') }}", "refuses .*: bad"), ("{% for %}", "refuses"),
        ("{{ 1 + 'a' }}", "refuses"), ("{{ '' }}", "request a: the prompt has no tokens"),
    ],
)  # fmt: skip
def test_a_chat_template_that_a_back_end_cannot_use_is_one_clear_error(template, said):
    tokenizer = test_tokenizers.tokenizer_of(template=template)
    with pytest.raises(UserError, match=said):
        asked(test_tokenizers.llama(len(tokenizer)), tokenizer, chat=True)


def test_the_context_of_any_config_is_known():
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 300, "max_seq_len": 48}
    mpt = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **mpt)).eval()
    for model, context in ((sized("Gemma 3 with images"), 64), (mpt, 48)):
        assert context_of(model) == context and context_of(model, limit=20) == 20
        with pytest.raises(UserError, match=f"context of {context}"):
            asked(model.eval(), prompt="the cat " * 40)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_back_end_that_computes_nan_writes_nothing(temperature):
    model = test_tokenizers.llama(len(TOK))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    backend = LocalBackend(model, TOK, revision="r")
    with pytest.raises(UserError, match="request a: the model computes NaN"):
        list(backend.generate([("a", "the cat")], Decoding(4, temperature=temperature)))
    with pytest.raises(UserError, match="stop"):
        Decoding(4, stop=(5,))


def test_a_finished_folder_without_weights_or_request_is_not_finished(tmp_path):
    base = saved(test_tokenizers.llama(len(TOK)), tmp_path / "base")
    out = tmp_path / "out"
    distill(ROWS, base, "layers:1", "sft", out, **FAST)
    weights = (out / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(UserError, match="out: the folder has a report, and no weights"):
        distill(ROWS, base, "layers:1", "sft", out, **FAST)
    weights.rename(out / "model.safetensors")
    assert distill(ROWS, base, "layers:1", "sft", out, **FAST)["rows"] == 10
    (out / "request.json").write_text("[]")
    with pytest.raises(UserError, match="request.json: the file does not say"):
        distill(ROWS, base, "layers:1", "sft", out, **FAST)


@pytest.mark.parametrize(
    "written, label",
    [
        ("\\fbox{5}", "5"),
        ("\\boxed 5", "5"),
        ("$5.00/hour", "5.00"),
        ("about five", "5"),
        ("about 5", "5"),
    ],
)
def test_some_more_dress_of_numbers(written, label):
    assert parse_completion(f"So.\nAnswer: {written}", metric="equation").label == label
    assert parse_completion("So.\nAnswer: 5/x", metric="equation").outcome == "label_not_allowed"


@pytest.mark.parametrize("answer", ["It's the cat", "option B: the cat", "Choice (B): the cat"])
def test_some_more_dress_of_choices(answer):
    parsed = parse_completion(f"So.\nAnswer: {answer}", labels=("a dog", "the cat", "option"))
    assert parsed == Parsed("ok", "So.", "the cat")
