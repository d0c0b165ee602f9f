"""Folders whose weights are not those of their config.json are refused, and the refusal names what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.specs.model_preset import model_preset

UP = "model.layers.0.mlp.up_proj.weight"
MASK = torch.ones(1, 1, 64, 64, dtype=torch.bool)
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def make(model, tmp_path):
    """A function that writes a folder with random weights of a kind of model, and the tiny model's tokenizer."""

    def make(kind: str = "llama", shard: str = "1GB", **config: object) -> Path:
        torch.manual_seed(0)
        config = {"vocab_size": len(model.tokenizer), **(LLAMA if kind == "llama" else {}), **config}
        folder = tmp_path / kind
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(
            folder, max_shard_size=shard
        )
        model.tokenizer.save_pretrained(folder)
        return folder

    return make


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(folder: Path, **by_kind: object) -> None:
    """Set tensors of model.safetensors by name."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **by_kind}, path, metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    into = folder.parent / "x.nemo"
    with pytest.raises(ModelError, match=message):
        create_base_model(model_preset(str(folder)), into, 1)
    assert not into.exists()


def made(folder: Path) -> LanguageModel:
    into = folder.parent / "made.nemo"
    create_base_model(model_preset(str(folder)), into, 1)
    return LanguageModel.load(into)


def test_a_head_of_its_own_in_a_model_that_ties_it_is_refused(make):
    folder = make(tie_word_embeddings=False)
    configure(folder, tie_word_embeddings=True)
    refused(
        folder,
        r"llama: config\.json: tie_word_embeddings is true, so that lm_head\.weight is model\.embed_tokens\.weight, but"
        r".*lm_head\.weight in model\.safetensors, model\.embed_tokens\.weight in model\.safetensors; set tie_word_emb",
    )


def test_a_tied_head_that_is_in_the_file_too_is_taken(make):
    folder = make(tie_word_embeddings=True)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embeddings.clone()})
    assert torch.equal(made(folder).lm.lm_head.weight, embeddings)


def test_a_layer_that_the_configuration_does_not_have_is_refused(make):
    folder = make()
    configure(folder, num_hidden_layers=2)
    refused(
        folder, r"llama: .*\(LlamaForCausalLM\) does not have: model\.layers\.2\.\S+ in model\.safetensors, .* 4 more"
    )


def test_a_layer_that_the_file_does_not_have_is_refused(make):
    folder = make()
    configure(folder, num_hidden_layers=4)
    refused(
        folder, r"llama: the weights lack model\.layers\.3\.input_layernorm\.weight, .* and 4 more, which the model"
    )


def test_a_part_that_is_not_trained_here_is_refused(make):
    folder = make()
    change(folder, **{"v_head.weight": torch.ones(1, 32)})
    refused(folder, r"does not have: v_head\.weight in model\.safetensors")


@pytest.mark.parametrize(
    ("dtype", "named"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_quantized_tensors_without_a_word_of_it_are_refused(make, dtype, named):
    folder = make()
    weights = load_file(folder / "model.safetensors")[UP]
    change(folder, **{UP: (weights * 100).to(dtype)})
    refused(folder, rf"llama: weights that are not floating point numbers: {UP} is {named} in model\.safetensors")


def test_integers_in_a_torch_checkpoint_are_refused(make):
    folder = make()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert made(folder).lm.config.num_hidden_layers == 3
    torch.save({**weights, UP: weights[UP].to(torch.int8)}, folder / "pytorch_model.bin")
    refused(folder, rf"{UP} is torch\.int8 in pytorch_model\.bin")


def test_scales_of_fp8_are_refused_by_name(make):
    folder = make()
    change(folder, **{f"{UP}_scale_inv": torch.ones(1, 1)})
    refused(folder, rf"does not have: {UP}_scale_inv in model\.safetensors")


def test_fp8_that_the_configuration_tells_of_becomes_the_numbers_that_it_stands_for(make):
    folder = make(hidden_size=128, intermediate_size=256)
    weights = load_file(folder / "model.safetensors")
    scale = torch.tensor([[0.003], [0.002]])
    quantized = (weights[UP] / scale.repeat_interleave(128, 0)).to(torch.float8_e4m3fn)
    change(folder, **{UP: quantized, f"{UP}_scale_inv": scale})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    configure(folder, quantization_config=fp8)
    expected = quantized.float() * scale.repeat_interleave(128, 0)
    torch.testing.assert_close(made(folder).lm.model.layers[0].mlp.up_proj.weight, expected)


def test_mxfp4_that_the_configuration_tells_of_becomes_the_numbers_that_it_stands_for(make):
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat(
        [values, -values]
    )  # https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 32}
    folder = make("gpt_oss", **{**LLAMA, **EXPERTS, **sizes})
    path = folder / "model.safetensors"
    weights, expected = load_file(path), {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        fours = torch.randint(16, (experts, outer, inner // 32, 32))
        exponents = torch.randint(120, 128, (experts, outer, inner // 32, 1))
        weights[f"{name}_blocks"] = (fours[..., 0::2] | fours[..., 1::2] << 4).to(torch.uint8)
        weights[f"{name}_scales"] = exponents[..., 0].to(torch.uint8)
        expected[name] = (values[fours] * 2.0 ** (exponents - 127)).reshape(experts, outer, inner).mT
    save_file(weights, path, metadata={"format": "pt"})
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": others})
    found = made(folder).lm.state_dict()
    assert len(expected) == 6
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_weights_that_are_quantized_otherwise_are_refused_by_the_method(make, method):
    folder = make()
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(folder, rf"llama: config\.json: quantization_config: quant_method: {method!r}: these weights are quantized")


def test_weights_of_another_shape_are_refused_with_both_shapes(make):
    folder = make()
    configure(folder, intermediate_size=64)
    refused(
        folder,
        r"llama: the weights are not those of.*model\.layers\.0\.mlp\.down_proj\.weight has shape \(32, 48\) in"
        r" model\.safetensors, expected \(32, 64\).* and 4 more; use config\.json and weights of the same model",
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, rf"mixtral: the weights lack {EXPERT}, which other experts have"),
        (
            torch.ones(24, 32),
            rf"mixtral: {EXPERT} in model\.safetensors has shape \(24, 32\), other experts' have \(48, 32\)",
        ),
        (torch.ones(48, 32, dtype=torch.int8), rf"not floating point numbers: {EXPERT} is I8"),
        (
            torch.full((48, 32), float("nan")),
            r"model\.layers\.1\.mlp\.experts\.gate_up_proj: 1,536 of 12,288 weights are NaN",
        ),
    ],
    ids=["missing", "shape", "int8", "nan"],
)
def test_an_expert_that_does_not_fit_is_refused_by_name(make, changed, message):
    folder = make("mixtral", **{**LLAMA, **EXPERTS})
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[EXPERT]
    save_file({**weights, **({} if changed is None else {EXPERT: changed})}, path, metadata={"format": "pt"})
    refused(folder, message)


def test_experts_are_taken_as_they_are(make):
    folder = make("mixtral", **{**LLAMA, **EXPERTS})
    ours = made(folder).lm.eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(make, value):
    folder = make()
    weights = load_file(folder / "model.safetensors")[UP]
    weights[3, 4] = value
    change(folder, **{UP: weights})
    refused(folder, rf"llama: {UP} in model\.safetensors: 1 of 1,536 weights are NaN or infinite: .*download it again")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_from_what_it_stands_for(make, file):
    folder = make()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
    (folder / file).write_text(pointer)
    refused(folder, rf"{file}: is a Git LFS pointer of {len(pointer)} bytes; .* 123,456 bytes, .*`git lfs pull`")


def test_a_missing_shard_is_named_with_what_it_should_hold(make):
    folder = make(shard="50KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(
        folder,
        rf"llama: {shard.name} is missing, with \d+ of the 30 tensors in model\.safetensors\.index\.json"
        r" \(model\.\S+.*\); copy or download it too",
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../a"}}'])
def test_an_index_that_is_none_is_refused(make, content):
    folder = make(shard="50KB")
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, r"model\.safetensors\.index\.json: ")


def test_a_file_that_was_cut_off_is_refused(make):
    path = make() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(
        path.parent, r"model\.safetensors: the weights cannot be read: SafetensorError.*truncated: copy or download"
    )


@pytest.mark.parametrize(
    ("kind", "config", "constants"),
    [
        ("gpt2", GPT, {"transformer.h.0.attn.bias": MASK.to(torch.uint8)}),
        (
            "gpt2",
            GPT,
            {"transformer.h.0.attn.bias": MASK.float(), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
        ),
        ("gptj", {**GPT, "rotary_dim": 8}, {"transformer.h.0.attn.bias": MASK.to(torch.uint8)}),
        ("openai-gpt", GPT, {"transformer.position_ids": torch.arange(64)[None]}),
        ("gpt_bigcode", GPT, {"transformer.h.0.attn.bias": MASK[0, 0]}),
        ("gpt_neox", LLAMA, {"gpt_neox.layers.0.attention.bias": MASK}),
        ("llama", {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        (
            "xglm",
            {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48, "max_position_embeddings": 64},
            {"model.embed_positions.weights": torch.ones(66, 32)},
        ),
    ],
)
def test_constants_that_older_files_hold_are_no_part_of_the_model(make, kind, config, constants):
    folder = make(kind, **config)
    before = {name: tensor.clone() for name, tensor in made(folder).state_dict().items()}
    change(folder, **constants)
    after = made(folder).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_integers_that_a_model_has_itself_are_taken(make):
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    folder = make("deepseek_v4", **{**LLAMA, **sizes, "num_hidden_layers": 2, "num_key_value_heads": 1})
    stored = load_file(folder / "model.safetensors")["model.layers.0.ffn.gate.tid2eid"]
    assert stored.dtype == torch.int64
    found = [tensor for name, tensor in made(folder).state_dict().items() if name.endswith("layers.0.mlp.gate.tid2eid")]
    assert len(found) == 1
    assert torch.equal(found[0], stored)


def test_a_models_own_weights_are_looked_at_without_a_folder_too(model):
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(model.tokenizer), **LLAMA))
    lm.config.tie_word_embeddings = True
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from lm\.model\.embed_tokens\.weight"):
        LanguageModel.wrap(lm, model.tokenizer, max_length=64)
    lm.config.tie_word_embeddings = False
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"^model\.norm\.weight: 1 of 32 weights are NaN or infinite"):
        LanguageModel.wrap(lm, model.tokenizer, max_length=64)
