"Lower layers that read a text once: the same loss, gradients and model as with all layers."

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_notes.core import UserError
from kd_notes.models.frozen_layers import KeptStates, upper_layers, with_upper
from kd_notes.training.batches import causal_batch, target_nll

PAD = 0
KINDS = ("llama", "qwen2", "qwen3", "olmo", "mistral", "smollm3", "phi3", "gemma")
ROWS = [([5, 6, 7, 8], [9, 10, 1]), ([5, 6], [11, 12, 13, 14, 1]), ([20, 21, 22], [PAD])]


def model_of(kind, **more):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, pad_token_id=PAD)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(sizes | heads | {"eos_token_id": 1} | more))
    )
    with torch.no_grad():
        for parameter in model.parameters():  # away from their defaults
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [1, 3])
def test_loss_and_gradients_are_those_of_the_whole_model(kind, frozen):
    whole = model_of(kind)
    upper = upper_layers(whole, frozen, PAD).eval()
    batch = causal_batch(ROWS, PAD)
    losses = [target_nll(model, batch) for model in (whole, upper)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.sum().backward()
    for mine, theirs in zip(upper.model.layers, whole.model.layers[frozen:], strict=True):
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)
    learning = {name for name, p in upper.named_parameters() if p.requires_grad}
    assert all(name.startswith(("model.layers.", "model.norm.")) for name in learning)


def test_neighbours_and_padding_change_no_number():
    upper = upper_layers(model_of("llama"), 2, PAD).eval()
    together = target_nll(upper, causal_batch(ROWS, PAD)).split([3, 5, 1])
    for row, expected in zip(ROWS, together, strict=True):
        fresh = upper_layers(model_of("llama"), 2, PAD).eval()
        torch.testing.assert_close(target_nll(fresh, causal_batch([row], PAD)), expected)


def test_a_text_is_read_once():
    class Counting(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.texts = model, 0

        def forward(self, input_ids, **inputs):
            self.texts += len(input_ids)
            return self.model(input_ids, **inputs)

    lower = Counting(model_of("llama").model)
    states = KeptStates(lower, PAD)
    ids = torch.tensor([[4, 5, 6, PAD], [7, 8, 9, 10]])
    first = states(ids)
    again = states(ids[:, [0, 1, 2, 3]].flip(0))
    wider = states(torch.cat([ids, torch.full((2, 3), PAD)], 1))
    assert lower.texts == 2
    assert torch.equal(first, again.flip(0)) and torch.equal(first, wider[:, :4])
    assert not wider[:, 4:].any() and not first[0, 3].any()
    assert not list(states.parameters()) and not states.state_dict()


def test_trained_layers_go_back_into_one_model(tmp_path):
    whole, untouched = model_of("llama"), model_of("llama")
    upper = upper_layers(whole, 3, PAD).train()
    batch = causal_batch(ROWS, PAD)
    optimiser = torch.optim.SGD([p for p in upper.parameters() if p.requires_grad], lr=0.1)
    target_nll(upper, batch).sum().backward()
    optimiser.step()
    with torch.no_grad():
        wanted = target_nll(upper.eval(), batch)
        joined = with_upper(whole, upper)
        torch.testing.assert_close(target_nll(joined, batch), wanted)
        joined.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(target_nll(loaded, batch), wanted)
    for place in range(3):
        old, new = untouched.model.layers[place], joined.model.layers[place]
        assert all(map(torch.equal, old.parameters(), new.parameters()))


@pytest.mark.parametrize("frozen", [0, 4, 5, -1])
def test_a_number_of_layers_that_is_not_possible_is_refused(frozen):
    with pytest.raises(UserError, match=f"{frozen} of 4 layers cannot be frozen"):
        upper_layers(model_of("llama"), frozen, PAD)


def test_models_that_scale_their_embeddings_are_refused():
    "Granite multiplies what its embedding returns; kept states would be scaled as well."
    with pytest.raises(UserError, match="cannot be cut into a frozen and a trained part"):
        upper_layers(model_of("granite", embedding_multiplier=3.0), 2, PAD)
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=4, n_head=4)
    )
    with pytest.raises(UserError, match="other names"):
        upper_layers(gpt2, 2, PAD)
