"""`alf-moe export` and `alf-moe import`: out as a stock model, in again as a run, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

from launch import cli, prepare
from moe.config import load, resolve
from moe.interop.hf import Checkpoint, HfError, check_tokenizer
from moe.observe.sinks import read_metrics
from moe.train.contents import MODEL, read_tensors
from moe.train.loop import Run, train
from tests.launch.test_prepare import documents, write_jsonl
from tests.tiny import ALONE


@pytest.fixture
def out(trained, tmp_path):
    assert cli.main(["export", str(trained), str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def alf_moe(capsys, *words):
    capsys.readouterr()
    code = cli.main([*map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, code, *words):
    """The one sentence of a refusal."""
    found, _, err = alf_moe(capsys, *words)
    assert found == code and err.startswith("error: ") and err.count("\n") == 1, (found, err)
    return err


def test_the_folder_is_a_stock_model_with_its_tokenizer_and_a_card(trained, out, capsys):
    transformers = pytest.importorskip("transformers")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing beside it
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and model.dtype == torch.float32
    saved = read_tensors(trained / "checkpoints/step-00000004", lambda name: name.endswith("expert_bias_E"))
    for name, bias in saved.items():
        layer = model.model.layers[int(name.removeprefix(MODEL).split(".")[1])]
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, bias) and bias.any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    text = "the quick notes of a river"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] <= ids.shape[1] + 8
    card = (out / "README.md").read_text()
    val = [row for row in read_metrics(trained / "metrics.jsonl") if "val/ce" in row][-1]
    for part in (
        "1,024 (4 steps of 256)",
        "`sign`, rate 0.01",
        f"| {val['val/ce']:.4f} |",
        f"{val['val/bits_per_byte']:.4f}",
    ):
        assert part in card, part
    assert str(trained.parent) not in card  # no path of this machine


def test_an_imported_run_goes_on_from_the_exported_one(trained, out, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    assert transformers  # the folder is as it was exported; alf-moe reads it without
    code, said, _ = alf_moe(capsys, "import", out, "--out", tmp_path / "from.toml")
    assert code == 0 and "deepseek_v3" in said
    tree = tomllib.loads((tmp_path / "from.toml").read_text())
    assert tree["run"] == {"start_from": str(out)} and tree["model"]["kv_lora_rank"] == 16
    (tmp_path / "mine.toml").write_text(
        f'[data]\npath = "{trained.parent / "data"}"\nseq_len = 32\n[optim]\nlr = 1e-9\nweight_decay = 0.0\n'
        '[train]\nsteps = 1\nbatch_size = 8\n[balance]\nmethod = "none"\n[observe]\nwandb = "off"\nregret_every = 0\n'
    )
    again = resolve(load([str(tmp_path / "from.toml"), str(tmp_path / "mine.toml")]))
    (tmp_path / "again").mkdir()
    begun = Run(again, ALONE, tmp_path / "again", False)
    state = {name.removeprefix(MODEL): t for name, t in read_tensors(trained / "checkpoints/step-00000004").items()}
    for name, value in begun.engine.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert train(again, ALONE, tmp_path / "whole", False).code == 0  # at a rate of nothing: the same loss
    before, after = (read_metrics(path / "metrics.jsonl")[-1] for path in (trained, tmp_path / "whole"))
    assert after["val/ce"] == pytest.approx(before["val/ce"], rel=1e-6) and after["train/step"] == 1
    assert after["moe/maxvio_val/max"] == pytest.approx(before["moe/maxvio_val/max"], rel=1e-6)


def test_a_checkpoint_of_the_run_can_be_named_and_the_card_says_what_its_metrics_are_of(trained, tmp_path, capsys):
    code, said, _ = alf_moe(
        capsys, "export", trained / "checkpoints/step-00000002", tmp_path / "two", "--dtype", "bfloat16"
    )
    assert code == 0 and "bfloat16" in said and "step-00000002" in said
    assert "none: the run was not evaluated" in (tmp_path / "two/README.md").read_text()
    assert Checkpoint(tmp_path / "two").config["dtype"] == "bfloat16"


def test_prepare_takes_the_tokenizer_of_a_checkpoint(trained, out, tmp_path, capsys):
    write_jsonl(tmp_path / "more.jsonl", documents(100, seed=5))
    words = ["prepare", "--text", tmp_path / "more.jsonl", "--tokenizer", out, "--out", tmp_path / "data"]
    assert alf_moe(capsys, *words)[0] == 0
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    theirs = json.loads((trained.parent / "data/meta.json").read_text())
    assert meta["tokenizer"] == theirs["tokenizer"] and meta["eos_id"] == theirs["eos_id"]
    assert meta["vocab_size"] == theirs["vocab_size"]
    # Byte for byte what the tokenizer makes of the text, documents ended by its own token.
    from tokenizers import Tokenizer

    tokens = np.concatenate([np.fromfile(tmp_path / f"data/more-{part}.bin", "<u2") for part in ("train", "val")])
    expected = [
        i for d in documents(100, seed=5) for i in [*Tokenizer.from_file(str(out / "tokenizer.json")).encode(d).ids, 0]
    ]
    assert tokens.tolist() == expected
    assert alf_moe(capsys, *words)[0] == 0  # ready
    assert "was prepared with" in refused(capsys, 3, *words[:3], "--out", tmp_path / "data")
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "holds no tokenizer.json" in refused(capsys, 3, *words[:3], "--tokenizer", broken, "--out", tmp_path / "x")
    (broken / "tokenizer.json").write_text((out / "tokenizer.json").read_text().replace('"ByteLevel"', '"Fuse"'))
    said = refused(capsys, 3, *words[:3], "--tokenizer", broken, "--out", tmp_path / "x")
    assert "not a byte-level BPE" in said or "cannot be read" in said
    shutil.copy(out / "tokenizer.json", broken / "tokenizer.json")
    (broken / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert "no token '</s>'" in refused(capsys, 3, *words[:3], "--tokenizer", broken, "--out", tmp_path / "x")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_bad_words_are_one_sentence(trained, out, tmp_path, capsys):
    assert "exists" in refused(capsys, 2, "export", trained, out)
    assert "holds no checkpoint" in refused(capsys, 2, "export", tmp_path, tmp_path / "x")
    assert "has no meta.json" in refused(capsys, 3, "export", trained, tmp_path / "x", "--data", tmp_path)
    assert "cannot be written" in refused(capsys, 2, "export", trained, "/proc/no/x")
    assert "has no config.json" in refused(capsys, 5, "import", tmp_path)
    assert "belong together" in refused(capsys, 2, "import", out, "--experts", "8")
    assert "is a sparse one" in refused(capsys, 2, "import", out, "--experts", "8", "--top-k", "2")
    assert "exists" in refused(capsys, 2, "import", out, "--out", out / "config.json")
    assert "no folder" in refused(capsys, 2, "import", out, "--out", tmp_path / "no/x.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_data_is_refused_because_its_tokenizer_would_not_fit(trained, tmp_path, capsys):
    write_jsonl(tmp_path / "other.jsonl", documents(400, seed=9))
    assert prepare.prepare("text", str(tmp_path / "other"), 300, [str(tmp_path / "other.jsonl")]) == 0
    said = refused(capsys, 2, "export", trained, tmp_path / "out", "--data", tmp_path / "other")
    assert "not what the run was trained on" in said and not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(out):
    check_tokenizer(out / "tokenizer.json", 300)
    with pytest.raises(HfError, match=r"has a token 299, and model\.vocab_size = 299 ends at 298"):
        check_tokenizer(out / "tokenizer.json", 299)


def test_a_damaged_checkpoint_is_refused_before_anything_is_unpickled(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "tiny")
    file = sorted((tmp_path / "tiny/checkpoints/step-00000004/state").glob("*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is damaged" in refused(capsys, 5, "export", tmp_path / "tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["write_checkpoint", "write_tokenizer"])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failure_at_any_stage_leaves_nothing(trained, tmp_path, monkeypatch, capsys, stage, error):
    import moe.interop.hf as hf

    real = getattr(hf, stage)

    def fail(*arguments):
        real(*arguments)  # its files are there
        raise error

    monkeypatch.setattr(hf, stage, fail)
    if isinstance(error, OSError):
        assert "No space left" in refused(capsys, 2, "export", trained, tmp_path / "out")
    else:
        with pytest.raises(KeyboardInterrupt):
            cli.main(["export", str(trained), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder_of_that_name_and_the_next_one_succeeds(trained, tmp_path, capsys):
    code = (
        "import moe.interop.hf as hf, time, sys; from launch import cli; real = hf.write_tokenizer\n"
        "def slow(*a): real(*a); print('here', flush=True); time.sleep(60)\n"
        "hf.write_tokenizer = slow; cli.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "export", str(trained), str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".partial-out"]
    assert alf_moe(capsys, "export", trained, tmp_path / "out")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
