"""Architectures of transformers behind the protocol: what they say packed, forked, padded and cached is what they say
alone, their logits are those of their own forward, and adapters on them are PEFT's."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fourbit
from fourbit.errors import InputError
from fourbit.models.finite import first_nonfinite
from fourbit.models.foreign import States, TransformersLM, as_causal_lm

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {f"linear_{what}": n for what, n in (("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 8))}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {  # none of them is built in
    "Cohere2ForCausalLM": {"sliding_window": 4, "logit_scale": 0.3},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Qwen3NextForCausalLM": SPARSE | LINEAR | {"shared_expert_intermediate_size": 32},
    "FalconH1ForCausalLM": MAMBA | {"mamba_n_groups": 1, "lm_head_multiplier": 0.4},
    "Exaone4ForCausalLM": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "MambaForCausalLM": {"state_size": 8, "time_step_rank": 4},
    "VaultGemmaForCausalLM": {"sliding_window": 4, "final_logit_softcapping": 3.0},
}
APART = {"Qwen3NextForCausalLM", "FalconH1ForCausalLM", "MambaForCausalLM"}  # their layers mix the texts of a row
SCALED = {"Cohere2ForCausalLM": 0.3, "FalconH1ForCausalLM": 0.4}  # logits are not what the output layer gives
IDS = torch.randint(3, 61, (20,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def built(name: str, **settings: Any) -> Any:
    """A random model of that class in which every matrix counts."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES | MODELS.get(name, {}) | settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=MODELS)
def whole(request: pytest.FixtureRequest, made: dict[str, Any]) -> Any:
    """Each architecture, built once."""
    if request.param not in made:
        made[request.param] = built(request.param)
    return made[request.param]


def states(whole: Any, *ids: Tensor) -> Tensor:
    """The body's own last hidden states [T, D] of one text alone, by the scale of logits."""
    with torch.no_grad():
        own = getattr(whole, whole.base_model_prefix)(input_ids=torch.cat(ids)[None]).last_hidden_state[0]
    return own * SCALED.get(type(whole).__name__, 1.0)


def test_packed_and_forked_texts_are_what_they_are_alone(whole: Any) -> None:
    model = as_causal_lm(whole)
    assert model.packs == (type(whole).__name__ not in APART)
    with torch.no_grad():
        packed = model.hidden(IDS[None], spans=((0, 5), (5, 13), (13, 20)))[0]
        tree = (0, 3), (3, 9, 0), (9, 11, 0), (11, 14, 2), (14, 20)
        forked = model.hidden(IDS.view(2, 10), spans=tree).flatten(0, 1)
        masked = model.hidden(IDS.view(2, 10), mask=torch.arange(20).view(2, 10) >= 4)[0]
    close = {"rtol": 1e-3, "atol": 1e-4}
    for start, end in pairwise((0, 5, 13, 20)):
        torch.testing.assert_close(packed[start:end], states(whole, IDS[start:end]), **close)
    torch.testing.assert_close(forked[:9], states(whole, IDS[:9]), **close)
    torch.testing.assert_close(forked[9:14], states(whole, IDS[:3], IDS[9:14])[3:], **close)
    torch.testing.assert_close(forked[14:], states(whole, IDS[14:]), **close)
    torch.testing.assert_close(masked[4:], states(whole, IDS[4:10]), **close)


def test_logits_are_those_of_its_own_forward(whole: Any) -> None:
    model = as_causal_lm(whole)
    assert model.logit_softcap == (3.0 if type(whole).__name__ == "VaultGemmaForCausalLM" else 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None]), whole(input_ids=IDS[None]).logits, rtol=1e-4, atol=1e-5)
    assert first_nonfinite(whole, IDS[None]) is None


def test_equal_prompts_are_read_once(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = as_causal_lm(whole), list[int]()
    first, second = IDS[:9].tolist(), IDS[3:7].tolist()
    wanted = fourbit.generate(model, [first, second], max_new_tokens=4)
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest, **how: seen.append(len(ids)) or hidden(ids, *rest, **how))
    assert fourbit.generate(model, [first, second, first, first], max_new_tokens=4) == [*wanted, wanted[0], wanted[0]]
    assert seen[:: len(seen) // 4] == [2, 4, 4, 4]  # without a cache a pass is one over the texts, which asks again


def test_generation_is_the_plain_loop(whole: Any) -> None:
    """Prompts longer than a window, of one beginning, and shorter ones: batched, padded, dropped when done."""
    assert (as_causal_lm(whole).new_cache().states is None) == (type(whole).__name__ == "MambaForCausalLM")
    prompts = [IDS[:3].tolist(), IDS[:9].tolist(), IDS[:3].tolist() + IDS[12:20].tolist(), IDS[7:8].tolist()]
    plain = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                text.append(int(whole(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        plain.append(text[len(prompt) :])
    stop = plain[1][2]
    wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in plain]
    assert fourbit.generate(whole, prompts, max_new_tokens=6, stop_ids=[stop]) == wanted


def test_a_cache_goes_on_with_several_tokens(whole: Any) -> None:
    model = as_causal_lm(whole)
    cache = model.new_cache()
    with torch.no_grad():
        read = torch.cat([model.hidden(part[None], cache=cache) for part in IDS.split([9, 7, 4])], dim=1)[0]
    torch.testing.assert_close(read, states(whole, IDS), rtol=1e-3, atol=1e-4)


def test_modules_are_the_models_own(whole: Any, tmp_path: Path) -> None:
    """Names, weights, modes and copies; an adapter that is put on either is on both."""
    whole = copy.deepcopy(whole)
    model = as_causal_lm(whole)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert as_causal_lm(model) is model and model.config is whole.config and not model.training
    attached = fourbit.attach(whole, fourbit.LoRAConfig(rank=2, alpha=4), seed=0)
    assert attached == [*fourbit.lora.layer.adapter_layers(model)]
    twin = copy.deepcopy(model)
    assert next(twin.whole.parameters()) is next(twin.parameters()) is not next(model.parameters())
    model.checkpointing = True
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(IDS[None]), model.eval()(IDS[None]))
    assert model.checkpointing == whole.supports_gradient_checkpointing
    model.checkpointing = False
    assert not model.checkpointing


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["GptOssForCausalLM", "FalconH1ForCausalLM"])
def test_adapters_are_pefts(name: str, tmp_path: Path) -> None:
    import peft

    whole = built(name)
    fourbit.attach(whole, fourbit.LoRAConfig(rank=4, alpha=8, target="attn"), seed=0)
    for adapter in fourbit.lora.layer.adapters_of(whole).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    fourbit.save_adapter(as_causal_lm(whole), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours").eval()
    with torch.no_grad():
        logits = theirs(input_ids=IDS[None]).logits
        torch.testing.assert_close(as_causal_lm(whole).eval()(IDS[None]), logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = as_causal_lm(built(name))
    fourbit.load_adapter(again, tmp_path / "theirs", tell=lambda text: None)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS[None]), logits, rtol=1e-5, atol=1e-5)


def test_what_is_tried_sees_faults() -> None:
    """A leak between texts, and a cache that mixes rows up."""

    class Leaks(TransformersLM):
        def _packed(self, ids: Tensor, spans: Any) -> Tensor:
            return self.run(ids)

    class Mixes(States):
        def select(self, rows: Tensor) -> None: ...

    whole = built("Exaone4ForCausalLM")
    assert not Leaks(whole).packs and TransformersLM(whole).packs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fourbit.models.foreign.States", Mixes)
        assert TransformersLM(whole).new_cache().states is None


class Offset(transformers.Exaone4ForCausalLM):
    """Its logits are made of more than its body's last hidden states."""

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        output = super().forward(input_ids=input_ids, **given)
        output.logits = output.logits + (0 if input_ids is None else input_ids[..., None])
        return output


def test_small_logits_do_not_hide_a_cap() -> None:
    """Far below its cap, a model's logits are nearly what they are without it."""
    kind = transformers.VaultGemmaForCausalLM
    model = as_causal_lm(
        kind(kind.config_class(**SIZES | {"final_logit_softcapping": 30.0, "initializer_range": 1e-3}))
    )
    assert model.logit_softcap == 30.0


def test_a_model_that_bitsandbytes_quantised(tmp_path: Path) -> None:
    built("Exaone4ForCausalLM", hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"})
    whole = fourbit.from_bitsandbytes(theirs)
    fourbit.attach(whole, fourbit.LoRAConfig(rank=2, alpha=4), seed=0)
    loss, _ = fourbit.Run(whole).forward_backward({"input_ids": IDS[None], "labels": IDS[None]})
    with torch.no_grad():
        assert loss.item() == pytest.approx(whole(input_ids=IDS[None], labels=IDS[None]).loss.item(), abs=1e-4)


class Fails(transformers.Exaone4ForCausalLM):
    def forward(self, *given: Any, **named: Any) -> Any:
        raise RuntimeError("sizes do not fit")


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"Fails cannot read 12 tokens .RuntimeError: sizes do not fit"):
        fourbit.generate(Fails(built("Exaone4ForCausalLM").config), [[3, 4]])
    with pytest.raises(InputError, match="Offset makes its logits in an unknown way"):
        fourbit.generate(Offset(built("Exaone4ForCausalLM").config), [[3, 4]])
    both = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES))
    with pytest.raises(InputError, match="BertLMHeadModel lets tokens see what follows them"):
        fourbit.generate(both, [[3, 4]])
    with pytest.raises(InputError, match="Qwen3Model is no causal language model"):
        fourbit.Run(transformers.Qwen3Model(transformers.Qwen3Config(**SIZES)))
    model = as_causal_lm(built("Exaone4ForCausalLM"))
    with pytest.raises(ValueError, match="neither cache nor mask"):
        model.hidden(IDS[None], spans=((0, 20),), cache=model.new_cache())
    with pytest.raises(ValueError, match="spans"):
        model.hidden(IDS[None], spans=((0, 19),))
