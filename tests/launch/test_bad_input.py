"""Bad inputs through the real command: the documented exit code, one sentence that names the setting and the way out,
and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import make_token_folder

TINY = ["--config", "configs/tiny.toml"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_token_folder(tmp_path_factory.mktemp("data") / "folder")


def alf_moe(*words):
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, timeout=120)


def refused(done, code, *says):
    assert done.returncode == code, (done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in says:
        assert part in errors[0], errors[0]


# settings over tiny.toml, what the sentence must contain
CONFIGURATION = [
    ("--model.top_k 17", "model.top_k = 17", "model.num_experts = 16", "at most 15"),
    ("--model.top_k 16", "model.top_k = 16", "at most 15"),  # p32: K = E
    ("--model.top_k 0", "model.top_k = 0", "> 0"),
    ("--model.top_k 2.5", "model.top_k = 2.5", "whole number"),
    ("--model.num_experts 15", "parallel.ep = 2", "model.num_experts = 15", "divisor"),  # p32
    ("--parallel.ep 3", "parallel.ep = 3", "2 ranks"),
    ("--parallel.ep 4 --nproc 2", "parallel.ep = 4", "2 ranks"),
    ("--parallel.ep 0", "parallel.ep = 0", "> 0"),
    ("--parallel.data sharded", "parallel.data = 'sharded'", "did you mean shard?"),
    ("--parallel.dispatch paded", "parallel.dispatch = 'paded'", "did you mean padded?"),
    ("--parallel.capacity_factor 0.5", "parallel.capacity_factor = 0.5", ">= 1"),
    (
        "--parallel.dispatch padded --observe.record_scores 4",
        "parallel.dispatch = 'padded'",
        "record_scores = 4",
        "exact",
    ),
    (
        "--parallel.data shard --parallel.ep 1 --nproc 3 --train.batch_size 9",
        "parallel.data = 'shard'",
        "16 experts",
        "model.dim = 128",
        "3 ranks",
        "replicate",
    ),
    ("--nproc 3 --parallel.ep 1", "train.batch_size = 8", "3 ranks"),
    ("--nproc 0", "--nproc 0", "whole number"),
    ("--nnodes 2", "--nnodes 2", "--rdzv-endpoint host:29400"),
    ("--nnodes 2 --rdzv-endpoint h:1 --parallel.ep 8", "parallel.ep = 8", "4 ranks"),
    ("--model.num_heads 5", "model.dim = 128", "model.num_heads = 5"),
    ("--model.num_kv_heads 3", "model.num_kv_heads = 3", "divisor"),
    ("--model.head_dim 33", "model.head_dim = 33", "even"),
    ("--model.expert_hidden_dim 100", "model.expert_hidden_dim = 100", "104"),
    ("--model.first_k_dense 4", "model.first_k_dense = 4", "no MoE layer"),  # p05: balancing on, nothing to balance
    ("--model.first_k_dense 5 --balance.method none", "model.first_k_dense = 5", "num_layers = 4"),
    ("--model.score_function sigmod", "model.score_function", "did you mean sigmoid?"),
    ("--train.kernels triton", "train.kernels = 'triton'", "set it to torch or auto"),
    ("--train.kernels cuda", "train.kernels = 'cuda'", "triton"),
    ("--model.attention mqa", "model.attention = 'mqa'", "did you mean mla?"),
    ("--model.attention mla", "model.num_kv_heads = 2", "model.attention = 'mla'", "leave it out"),
    ("--model.kv_lora_rank 64", "model.kv_lora_rank = 64", "model.attention = 'gqa'", "mla"),
    ("--model.norm_eps 0", "model.norm_eps = 0", "> 0"),
    ("--model.num_expert 8", "model.num_expert = 8", "did you mean model.num_experts?"),
    ("--balance.method signs", "balance.method = 'signs'", "did you mean sign?"),
    ("--balance.rate -1e-3", "balance.rate = -0.001", "> 0"),
    ("--balance.rate 0.0", "balance.rate = 0.0", "> 0"),
    ("--balance.rate auto", "balance.rate = 'auto'", "balance.method = 'sign'", "coordinate"),
    ("--balance.method quantile --balance.rate 2.5", "balance.rate = 2.5", "diverges", "0.1 to 1"),
    ("--balance.method coordinate --balance.rate 3.0", "balance.rate = 3.0", "more than 2"),
    ("--balance.schedule inverse --balance.schedule_offset -1", "balance.schedule_offset = -1", ">= 0"),
    ("--balance.method coordinate --balance.schedule inverse", "balance.schedule = 'inverse'", "a number"),
    ("--balance.schedule cosine", "balance.schedule = 'cosine'", "inverse_sqrt"),
    ("--balance.clip 0", "balance.clip = 0", "> 0"),
    ("--balance.method smebu --balance.momentum 1.0", "balance.momentum = 1.0", "< 1"),
    ("--balance.frozen_layers [7]", "balance.frozen_layers has 7", "0 to 3"),
    ("--balance.aux_scope batch", "balance.aux_scope = 'batch'", "global"),
    ("--balance.phi_loss 0.1 --balance.phi_rate 1.5", "balance.phi_rate = 1.5", "<= 1"),
    ("--balance.group_loss 0.1 --balance.group_loss_groups 3", "balance.group_loss_groups = 3", "divisor"),
    ("--balance.method sinkhorn", "balance.method = 'sinkhorn'", "2 ranks", "--nproc 1"),
    ("--balance.method base --nproc 1 --parallel.ep 1", "model.top_k = 2", "'base'", "set model.top_k to 1"),
    ("--model.num_groups 3", "model.num_groups = 3", "model.num_experts = 16", "divisor"),
    ("--model.num_groups 4 --model.group_top_k 5", "model.group_top_k = 5", "model.num_groups = 4"),
    ("--model.num_groups 8", "model.top_k = 2", "the 2 experts", "model.group_top_k"),
    ("--balance.method hash --model.num_groups 4 --model.group_top_k 2", "model.num_groups = 4", "set it to 1"),
    ("--balance.aux_selection unbiased", "balance.aux_selection = 'unbiased'", "sequence"),
    ("--balance.method bip --balance.rate 1.5", "balance.rate = 1.5", "'bip'", "0.1 to 1"),
    ("--observe.record_from 0", "observe.record_from = 0", "> 0"),
    ("--balance.rate nan", "balance.rate = nan", "finite"),
    ("--balance.aux_loss -1", "balance.aux_loss", ">= 0"),
    ("--optim.lr inf", "optim.lr = inf", "finite"),
    ("--optim.lr fast", "optim.lr = 'fast'", "number"),
    ("--optim.warmup_steps 5000", "optim.warmup_steps = 5000", "train.steps"),
    ("--optim.beta2 1.0", "optim.beta2 = 1.0", "< 1"),
    ("--optim.schedule linear", "optim.schedule = 'linear'", "cosine"),
    ("--train.steps 0", "train.steps = 0", "> 0"),
    ("--train.steps ten", "train.steps = 'ten'", "whole number"),
    ("--train.batch_size 7", "train.batch_size = 7", "multiple of 2"),
    ("--train.micro_batch_size 3", "train.micro_batch_size = 3", "divisor of 4"),
    ("--train.compute_dtype float16", "train.compute_dtype = 'float16'", "bfloat16"),
    ("--train.deterministic maybe", "train.deterministic = 'maybe'", "true or false"),
    ("--train.engine deepsped", "train.engine = 'deepsped'", "did you mean deepspeed?"),
    ("--train.engine deepspeed --deepspeed.zero_stage 4", "deepspeed.zero_stage = 4", "<= 3"),
    (
        "--train.engine deepspeed --deepspeed.zero_stag 1",
        "deepspeed.zero_stag = 1",
        "did you mean deepspeed.zero_stage?",
    ),
    (
        "--deepspeed.zero_stage 3",
        "deepspeed.zero_stage = 3",
        "train.engine = 'native'",
        "set train.engine to deepspeed",
    ),
    ("--train.engine deepspeed --parallel.data shard", "parallel.data = 'shard'", "deepspeed.zero_stage to 3"),
    ("--train.engine deepspeed --parallel.dispatch padded", "parallel.dispatch = 'padded'", "exact"),
    ("--train.engine deepspeed --parallel.ep 3", "parallel.ep = 3", "2 ranks"),
    ("--train.engine deepspeed --balance.method sinkhorn", "balance.method = 'sinkhorn'", "2 ranks"),
    (
        "--train.engine deepspeed --deepspeed.zero_stage 3 --deepspeed.offload_optimizer true",
        "deepspeed.offload_optimizer = true",
        "no GPU",
        "set it to false",
    ),
    ("--train.engine megatron", "train.engine = 'megatron'", "needs a GPU", "set it to native"),
    ("--train.engine megatron --parallel.dispatch padded", "parallel.dispatch = 'padded'", "exact"),
    ("--train.engine megatron --data.document_mask true", "data.document_mask = true", "set it to false"),
    (
        "--train.engine megatron --model.first_k_dense 4 --balance.method none",
        "model.first_k_dense = 4",
        "no MoE layer",
        "sparse models",
    ),
    (
        "--train.engine megatron --balance.aux_loss 0.1 --balance.aux_scope global",
        "balance.aux_scope = 'global'",
        "micro_batch or sequence",
    ),
    ("--train.engine megatron --balance.method hash", "balance.method = 'hash'", "coordinate"),
    ("--parallel.tp 2", "parallel.tp = 2", "train.engine to megatron"),
    ("--train.engine deepspeed --parallel.pp 2", "parallel.pp = 2", "train.engine to megatron"),
    ("--parallel.cp 2", "parallel.cp = 2", "train.engine = 'native'", "train.engine to megatron"),
    ("--train.engine deepspeed --parallel.cp 2", "parallel.cp = 2", "train.engine to megatron"),
    ("--train.engine megatron --parallel.tp 2 --parallel.pp 2", "2 * 2 * 1", "2 ranks", "multiple of 4"),
    ("--train.engine megatron --parallel.cp 4", "1 * 1 * 4", "2 ranks", "multiple of 4"),
    (
        "--train.engine megatron --parallel.cp 2 --data.seq_len 62",
        "data.seq_len = 62",
        "2 of 4 chunks",
        "multiple of 4",
    ),
    (
        "--nproc 6 --train.batch_size 6 --train.engine megatron --parallel.cp 2 --parallel.tp 3 --data.seq_len 64",
        "data.seq_len = 64",
        "parallel.tp = 3",
        "multiple of 12",
    ),
    ("--train.engine megatron --parallel.cp 2 --balance.aux_loss 0.1", "balance.aux_loss = 0.1", "parallel.cp = 2"),
    ("--train.engine megatron --parallel.cp 2 --balance.group_loss 0.1", "balance.group_loss = 0.1", "parallel.cp = 2"),
    (
        "--train.engine megatron --parallel.cp 2",
        "parallel.cp = 2",
        "Transformer Engine's",
        "transformer_engine[pytorch]",
    ),
    ("--train.engine megatron --parallel.pp 2 --model.num_layers 5", "model.num_layers = 5", "divisor of 5"),
    ("--train.engine megatron --parallel.pp 2 --parallel.ep 2", "parallel.ep = 2", "1 ranks of a stage"),
    (
        "--train.engine megatron --parallel.pp 2 --model.tie_embeddings true",
        "model.tie_embeddings = true",
        "parallel.pp = 2",
    ),
    (
        "--train.engine megatron --parallel.pp 2 --observe.record_scores 3",
        "observe.record_scores = 3",
        "parallel.pp to 1",
    ),
    ("--train.engine megatron --parallel.pp 2 --run.start_from m", "run.start_from = 'm'", "parallel.pp = 1"),
    ("--train.engine megatron --parallel.tp 2 --data.seq_len 63", "data.seq_len = 63", "parallel.tp = 2"),
    ("--train.engine megatron --parallel.tp 2 --model.num_kv_heads 1", "model.num_kv_heads = 1", "divisor"),
    ("--train.engine megatron --parallel.tp 2 --balance.aux_loss 0.1", "balance.aux_loss = 0.1", "whole sequences"),
    ("--trian.steps 5", "trian", "did you mean train?"),
    ("--data.mix 3", "data.mix = 3", "section"),
    ("--data.mix.wiki 0", "data.mix.wiki = 0", "> 0"),
    ("--checkpoint.keep 0", "checkpoint.keep = 0", "> 0"),
    ("--checkpoint.keep_every -1", "checkpoint.keep_every = -1", ">= 0"),
    ("--checkpoint.background maybe", "checkpoint.background = 'maybe'", "true or false"),
    ("--train.spike_sigma -1", "train.spike_sigma = -1", ">= 0"),
    ("--train.timeout_s 0", "train.timeout_s = 0", "> 0"),
    ("--run.name a/b", "run.name = 'a/b'", "folder name"),
    ("--observe.wandb of", "observe.wandb = 'of'", "did you mean off?"),
    ("--observe.wandb_group=", "observe.wandb_group = ''", "1 to 128"),
    (f"--observe.wandb_group {'g' * 129}", "129 characters", "1 to 128"),
    ("--train.steps", "--train.steps has no value"),
    ("--resume --clean", "--resume", "--clean"),
]


@pytest.mark.parametrize("case", CONFIGURATION, ids=[c[0] for c in CONFIGURATION])
def test_bad_configuration_is_one_sentence_and_exit_2(case, data, tmp_path):
    words, *says = case
    done = alf_moe("train", *TINY, "--data.path", str(data), "--run.folder", str(tmp_path / "runs"), *words.split())
    refused(done, 2, *says)
    assert not (tmp_path / "runs").exists()


def test_an_engine_that_is_not_installed_names_the_package_to_install(data, tmp_path):
    without = "import sys; sys.modules['deepspeed'] = None; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", *TINY, "--data.path", str(data), "--run.folder", str(tmp_path / "runs")]
    words += ["--train.engine", "deepspeed", "--deepspeed.zero_stage", "2"]
    done = subprocess.run([sys.executable, "-c", without, *words], capture_output=True, text=True, timeout=120)
    refused(done, 2, "train.engine = 'deepspeed'", "pip install 'alf-moe[deepspeed]'")


@pytest.mark.parametrize(("engine", "package"), [("megatron", "megatron")])
def test_missing_extra_is_one_sentence_and_exit_2(engine, package, data, tmp_path):
    hidden = (
        "import sys, importlib.util as u; real = u.find_spec; "
        f"u.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest); "
        "from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", *TINY, "--data.path", str(data), "--run.folder", str(tmp_path / "runs"), "--train.engine", engine]
    done = subprocess.run([sys.executable, "-c", hidden, *words], capture_output=True, text=True, timeout=120)
    refused(done, 2, f"train.engine = '{engine}'", f"pip install 'alf-moe[{engine}]'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model\n", "is not valid TOML"),
        ("model = 3\n", "model = 3"),
        ("[model]\nvocab_size = true\n", "model.vocab_size = True"),
        ("[model]\nvocab_size = 8\n", "model.dim is missing"),
    ],
)
def test_bad_file_is_one_sentence_and_exit_2(tmp_path, text, says):
    (tmp_path / "bad.toml").write_text(text)
    refused(alf_moe("train", "--config", str(tmp_path / "bad.toml")), 2, says)


def test_missing_file_is_one_sentence_and_exit_2():
    refused(alf_moe("train", "--config", "configs/tinny.toml"), 2, "configs/tinny.toml does not exist")
    refused(alf_moe("train"), 2, "--config is missing")


def spoil_hash(folder):
    file = folder / "text-train.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def spoil_meta(**fields):
    def spoil(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **fields}))

    return spoil


DATA = [
    (spoil_hash, "", "text-train.bin"),
    (lambda folder: (folder / "text-val.bin").unlink(), "", "text-val.bin"),
    (lambda folder: (folder / "meta.json").unlink(), "", "meta.json"),
    (lambda folder: (folder / "meta.json").write_text('{"format'), "", "meta.json"),
    (spoil_meta(format_version=99), "", "99"),
    (spoil_meta(vocab_size=9000), "", "model.vocab_size = 8192"),
    (lambda folder: None, "--data.seq_len 5000", "data.seq_len = 5000"),
    (lambda folder: None, "--train.batch_size 64", "train.batch_size = 64"),
    (lambda folder: None, "--data.mix.texts 1.0", "data.mix.texts"),
]


@pytest.mark.parametrize(("spoil", "words", "says"), DATA, ids=[d[2] + d[1] for d in DATA])
def test_bad_data_is_one_sentence_and_exit_3(spoil, words, says, tmp_path):
    folder = make_token_folder(tmp_path / "folder")
    spoil(folder)
    where = ["--data.path", str(folder), "--run.folder", str(tmp_path / "runs"), "--nproc", "1", "--parallel.ep", "1"]
    refused(alf_moe("train", *TINY, *where, *words.split()), 3, says)
    assert not list((tmp_path / "runs").glob("*/config.toml"))


def test_missing_data_is_one_sentence_and_exit_3(tmp_path):
    refused(alf_moe("train", *TINY, "--data.path", str(tmp_path / "none")), 3, "data.path", "alf-moe prepare")


def test_resume_without_a_whole_checkpoint_is_one_sentence_and_exit_5(data, tmp_path):
    run = tmp_path / "runs" / "tiny"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    words = ["--data.path", str(data), "--run.folder", str(tmp_path / "runs"), "--nproc", "1", "--parallel.ep", "1"]
    done = alf_moe("train", *TINY, *words, "--resume")
    refused(done, 5, "no whole checkpoint", "--clean")
    assert (run / "checkpoints" / "step-00000001").exists()


def test_prepare_refuses_in_one_sentence(tmp_path):
    out = ["--out", str(tmp_path / "out"), "--raw", str(tmp_path / "raw")]
    refused(alf_moe("prepare", "--text", str(tmp_path / "absent.txt"), *out), 3, "absent.txt")
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    refused(alf_moe("prepare", "--text", str(tmp_path / "bad.jsonl"), *out), 3, "line 1")
    assert not Path(out[1]).exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--methods signs", ("balance.method = 'signs'", "did you mean sign?")),
        ("--methods sign:-1", ("balance.rate = -1.0", "> 0")),
        ("--methods sign:auto", ("balance.rate = 'auto'", "'sign'")),
        ("--methods proportional:linear", ("linear schedule has no end",)),
        ("--methods quantile:3", ("balance.rate = 3.0", "diverges")),
        ("--methods sinkhorn", ("--methods sinkhorn", "moves no bias")),
        ("--streams fixd", ("--streams fixd", "fixed, iid")),
        ("--streams recorded=configs/tiny.toml", ("configs/tiny.toml", "no recording", "scores")),
        ("--streams recorded=nowhere.npz", ("recorded=nowhere.npz", "observe.record_scores")),
        ("--top-k 64", ("--top-k = 64", "--experts = 64", "63")),
        ("--tokens 0", ("--tokens = 0", "at least 1")),
        ("--steps 1", ("--steps = 1", "at least 2")),
        ("--out Makefile", ("--out Makefile", "folder")),
        ("--out Makefile/sub --steps 2", ("Makefile",)),
    ],
)
def test_theory_refuses_in_one_sentence(words, says, tmp_path):
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    refused(alf_moe("theory", *words.split(), *out), 2, *says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("lst runs", ("ckpt lst", "ls, verify, diff")),
        ("ls", ("ckpt ls takes one folder", "--help")),
        ("verify docs", ("docs holds no checkpoint", "runs/tiny")),
        ("diff docs tests", ("docs holds no checkpoint",)),
    ],
)
def test_ckpt_refuses_in_one_sentence(words, says):
    refused(alf_moe("ckpt", *words.split()), 2, *says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("report absent", ("absent does not exist", "runs/tiny")),
        ("report Makefile", ("Makefile is a file", "run folder")),
        ("report docs", ("docs holds no run", "alf-moe train")),
        ("report {run} {run}", ("is named twice",)),
        ("report {run} -o docs", ("--out docs is a folder", "docs/report.html")),
        ("report {run} -o nowhere/report.html", ("there is no folder nowhere",)),
        ("watch absent", ("absent does not exist", "runs/tiny")),
        ("watch Makefile --once", ("Makefile is a file", "run folder")),
        ("watch {run} --interval 0", ("--interval 0", "0.1 to 3600")),
        ("watch {run} --interval nan", ("--interval nan", "0.1 to 3600")),
    ],
)
def test_readers_of_a_run_refuse_in_one_sentence(words, says, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused(alf_moe(*words.format(run=tmp_path / "run").split()), 2, *says)
    assert not (tmp_path / "run" / "report.html").exists()
