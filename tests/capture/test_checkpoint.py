"""Loading models as Hugging Face users expect: every option, from folders and without a network."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture.checkpoint import load_model, quantization
from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.observe import observe
from tests.capture.tiny import TRANSFORMERS_4, batch

IDS = batch([12])[0]


def bhlog(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    """The demo's model in a folder of the user's."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(str(files("bhlog.capture.demo") / name), folder / name)
    return folder


def test_attention_is_the_one_asked_for(demo):
    model = load_model("demo", attn="eager").model
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), logits(demo.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_spreads_the_model(demo, device_map, tmp_path):
    pytest.importorskip("accelerate")
    model = load_model("demo", device_map=device_map, dtype="float32").model
    assert {p.device.type for p in model.parameters()} == {"cpu"} or torch.cuda.is_available()
    with observe(model, tmp_path / "run"):
        found = logits(model)
    torch.testing.assert_close(found.cpu(), logits(demo.model), atol=1e-4, rtol=1e-4)
    assert open_log(tmp_path / "run").manifest.totals.tokens == IDS.numel()


@pytest.mark.slow
def test_a_quantized_model_is_observed(tmp_path):
    pytest.importorskip("optimum.quanto")
    model = load_model("demo", quantize="quanto:weights=int8").model
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QLinear"
    with observe(model, tmp_path / "run"):
        logits(model)
    assert open_log(tmp_path / "run").manifest.totals.tokens == IDS.numel()


@pytest.mark.skipif(TRANSFORMERS_4, reason="its configs need the quantizer's package")
def test_quantizers_are_those_of_transformers():
    four = quantization("bitsandbytes_4bit:bnb_4bit_quant_type=nf4,bnb_4bit_use_double_quant=true")
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant is True
    assert quantization("bitsandbytes_8bit").load_in_8bit
    assert quantization("fp8").quant_method == "fp8"


def test_every_quantizer_of_transformers_has_a_config_or_an_error_in_a_line():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    built = []
    for name in AUTO_QUANTIZATION_CONFIG_MAPPING:
        try:
            quantization(name)
            built.append(name)
        except RouterLogError as error:
            assert str(error).startswith(f"quantizer {name}: ") and "\n" not in str(error)
    assert len(built) > len(AUTO_QUANTIZATION_CONFIG_MAPPING) / 2


@pytest.mark.parametrize(
    "words, says",
    [
        ("quant", "no quantizer 'quant'.*quanto"),
        ("quanto:weights", "expected option=value, got 'weights'"),
        ("quanto:weight=int8", "no option 'weight'"),
        ("quanto:weights=int3", "quanto: .*int3"),
    ],
)
def test_a_quantizer_that_is_none_is_refused(words, says):
    with pytest.raises(InvalidOption, match=says):
        quantization(words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's calls of transformers
def test_an_adapter_is_put_on_the_model(demo, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(load_model("demo").model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("To be, or not to be")
    command = ["capture", "demo", "--text", tmp_path / "text.txt", "--out", tmp_path / "run"]
    bhlog(*command, "--adapter", str(tmp_path / "adapter"))
    log = open_log(tmp_path / "run")
    assert log.manifest.options["adapter"] == str(tmp_path / "adapter")
    model = load_model("demo", adapter=str(tmp_path / "adapter")).model
    assert torch.equal(logits(model), logits(adapted))
    assert not torch.equal(logits(model), logits(demo.model))
    with pytest.raises(RouterLogError, match="the adapter cannot be loaded"):
        load_model("demo", adapter=str(tmp_path))


CODE = """
from transformers import OlmoeConfig, OlmoeForCausalLM

class Config(OlmoeConfig):
    model_type = "mine"

class Model(OlmoeForCausalLM):
    config_class = Config
"""


def test_code_of_the_model_runs_only_if_it_is_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE)
    with pytest.raises(RouterLogError, match="code of its own; trust_remote_code"):
        load_model(str(folder))
    model = load_model(str(folder), trust_remote_code=True).model
    assert type(model).__name__ == "Model" and type(model).__module__.endswith("mine")
    with observe(model, tmp_path / "run"):
        logits(model)


def test_another_tokenizer_is_read_from_its_folder_and_noted(folder, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 7}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    for tokenizer, ids in ((tmp_path / "words", [7]), ("bytes", list(text.read_bytes()))):
        out = tmp_path / f"run-{Path(tokenizer).name}"
        command = ["capture", folder, "--text", text, "--tokenizer", tokenizer, "--out", out]
        bhlog(*command)
        log = open_log(out)
        assert log.manifest.origin.tokenizer == str(tokenizer)
        assert log.tokens(["token_id"])["token_id"].to_pylist() == ids


@pytest.mark.parametrize(
    "options, says",
    [
        ({"device": "cpu", "device_map": "auto"}, "give it or device, not both"),
        ({"attn": "kernels-community/flash-attn"}, "code from the hub: it needs trust"),
        ({"attn": "nothing"}, "the model cannot be loaded"),
        ({"tokenizer": "./nothing"}, "a tokenizer's folder"),
        ({"adapter": "./nothing"}, "a PEFT adapter's folder"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(options, says):
    with pytest.raises(RouterLogError, match=says) as error:
        load_model("demo", **options)
    assert "\n" not in str(error.value)
