"""Knowledge distillation of language models: losses, methods, one training loop, one-call products.

`from kd_notes import forward_kl, KD, train` works for every name below. A name is imported when it
is first used, so `import kd_notes` costs nothing and needs no torch.
"""

__version__ = "0.1.0"

# module -> the names that it gives; `nbdev_export` writes the version above and nothing else
_NAMES = {
    "core": "UserError",
    "data.dialogues": "encode_row load_prompts",
    "data.examples": "Example load_split",
    "data.rows": "TextRow load_rows read_row read_rows",
    "data.task_file": "OwnTask read_task task_examples",
    "evaluation.calibration": "ece",
    "evaluation.divergence": "exposure_bias kl_per_position",
    "evaluation.statistics": "hierarchical_bootstrap holm paired",
    "evaluation.text": "distinct_n rouge_l",
    "evaluation.validation": "Validation",
    "generation.sampling": "sample",
    "losses.adaptive": "adaptive_kl",
    "losses.cross_tokenizer": "aligned_span_loss check_tokenizers uld",
    "losses.decoupled": "atkd dkd",
    "losses.divergences": (
        "DIVERGENCES cross_entropy forward_kl get_divergence jsd next_token_labels reverse_kl "
        "token_divergence"
    ),
    "losses.families": "symmetric_kl",
    "losses.fused": "fused_cross_entropy fused_linear_divergence",
    "losses.sparse": "topk_divergence",
    "methods.dpkd": "DPKD",
    "methods.logit_cache": "LogitCache write_cache",
    "methods.logit_kd": "KD LiveTeacher OtherTokenizer TeacherSignal hidden_states",
    "methods.minillm": "MiniLLM MiniLLMConfig",
    "methods.rationales": "with_rationales",
    "methods.registry": "onpolicy_method",
    "methods.seqkd": "Writing write_responses",
    "methods.step_by_step": "StepByStep predict step_rows",
    "models.layer_drop": "layer_drop make_student",
    "models.mini": "load_mini_tokenizer mini_model",
    "models.pretrained": "count_parameters load_pretrained load_teacher",
    "products.distill": "distill",
    "products.predict": "evaluate_rows predict_rows",
    "products.settings": "OBJECTIVES DistillSettings",
    "products.stepwise": "stepwise",
    "products.stepwise_plan": "StepwiseSettings",
    "training.batches": "causal_batch seq2seq_batch target_logits",
    "training.loop": "TrainResult train",
    "training.method": "Method SFT",
    "training.state": "Callback TrainConfig",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    "Import the module of a name when the name is first used (PEP 562)."
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
