"""Hugging Face checkpoint folders: ours to theirs (`write_checkpoint`) and theirs to ours (`Checkpoint`).

    config.json   generation_config.json   model-00001-of-0000N.safetensors   model.safetensors.index.json
    tokenizer.json   tokenizer_config.json   README.md

Needs torch and safetensors, not transformers; runs no code of a checkpoint and unpickles nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.config import ModelSection
from moe.interop.hf_config import ARCHITECTURES, HfError, architecture_of, from_hf, is_interleaved, to_hf
from moe.interop.hf_weights import Row, apart, empty_shapes, rows, together
from moe.model.experts import local_part
from moe.model.transformer import Transformer
from moe.observe.cost import ParameterCounts, parameter_counts
from moe.parallel import Ranks

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READ = {"F32", "BF16", "F16"}

Read = Callable[[list[str]], Mapping[str, Tensor]]
"""Gives some of our tensors by name, whole, on the CPU."""


# -- out ---------------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, m: ModelSection, read: Read, eos_id: int, seq_len: int, dtype: str = "float32", biased: bool = True
) -> str:
    """config.json, generation_config.json, the shards and their index, into an existing folder; the model_type.

    m: resolved. read: by names of `Transformer.state_dict`; a layer at a time, so that one layer and one shard are in memory.
    dtype: float32 (bit by bit) or bfloat16; the expert bias is float32 in both. biased: whether any bias is not 0.
    Raises HfError when no architecture fits.
    """
    model_type = architecture_of(m, biased)
    config = to_hf(m, model_type, seq_len, eos_id, dtype)
    writer = _Shards(folder)
    for group in rows(m, model_type, ARCHITECTURES[model_type].interleaved):
        ours = read(sorted({row.ours for row in group}))
        for row in group:
            tensor = ours[row.ours] if row.expert is None else ours[row.ours][row.expert]
            kept = torch.float32 if row.ours.endswith("expert_bias_E") else DTYPES[dtype]
            for name, part in zip(row.theirs, apart(row, tensor.detach()), strict=True):
                writer.add(name, part.to(kept).contiguous().clone())
    for name, shape in empty_shapes(m, model_type).items():
        writer.add(name, torch.empty(shape, dtype=DTYPES[dtype]))
    writer.finish()
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos_id, "pad_token_id": eos_id})
    return model_type


class _Shards:
    """Collects tensors into files of at most SHARD_BYTES (or of one tensor)."""

    def __init__(self, folder: Path):
        self.folder, self.held, self.bytes = folder, {}, 0
        self.files: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > SHARD_BYTES:
            self._flush()
        self.held[name] = tensor
        self.bytes, self.total = self.bytes + size, self.total + size

    def _flush(self) -> None:
        self.files.append(list(self.held))
        file = self.folder / f"shard-{len(self.files)}"
        save_file(self.held, file, {"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        """Their final names, which count all of them, and the index."""
        self._flush()
        where = {}
        for number, names in enumerate(self.files, start=1):
            file = f"model-{number:05d}-of-{len(self.files):05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        _write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": where})


def write_tokenizer(folder: Path, tokenizer: Path, vocab_size: int, eos_id: int, seq_len: int) -> None:
    """tokenizer.json, byte for byte, and tokenizer_config.json. Raises HfError when it does not fit the model."""
    check_tokenizer(tokenizer, vocab_size)
    eos = next((token for token, index in _vocabulary(tokenizer).items() if index == eos_id), None)
    if eos is None:
        raise HfError(
            f"{tokenizer} has no token {eos_id}, which ends the documents of the data: name its own data folder"
        )
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": seq_len}
    _write_json(folder / "tokenizer_config.json", about | {"clean_up_tokenization_spaces": False})


def check_tokenizer(tokenizer: Path, vocab_size: int) -> None:
    """Raises HfError unless every token has a row of the embedding."""
    largest = max(_vocabulary(tokenizer).values(), default=-1)
    if largest >= vocab_size:
        raise HfError(
            f"{tokenizer} has a token {largest}, and model.vocab_size = {vocab_size} ends at {vocab_size - 1}: "
            "name the tokenizer that the model was trained with"
        )


def _vocabulary(tokenizer: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises bare Exceptions
        raise HfError(f"{tokenizer} is not a tokenizer that can be read ({error}): restore the file") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- in ----------------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A folder of safetensors, whose files, names, shapes and dtypes are checked when it is opened; tensors are read when
    asked for. model: its [model] section, resolved. sparse: False for a dense one, which is upcycled.

    experts: see `from_hf`. Raises HfError, and ConfigError for sizes that the model cannot have.
    """

    def __init__(self, folder: Path, experts: dict[str, int] | None = None):
        self.folder = folder
        if not folder.is_dir():
            raise HfError(f"{folder} is not a folder: name the folder of a Hugging Face checkpoint in safetensors")
        self.config = self._json("config.json")
        self._ours = from_hf(self.config, experts)
        self.model = self._ours.model
        self.sparse = ARCHITECTURES[self.config["model_type"]].takes_experts
        self._files = self._find_files()
        self.rows = [row for group in self._rows(self.model) for row in group]
        self._check_tensors()
        self._check_shapes()
        if (tokenizer := folder / "tokenizer.json").exists():
            check_tokenizer(tokenizer, self.model.vocab_size)

    def _rows(self, m: ModelSection):
        return rows(m, self.config["model_type"], is_interleaved(self.config))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise HfError(
                f"{self.folder} has no {name}: name the folder of a Hugging Face checkpoint in safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise HfError(f"{self.folder / name} cannot be read ({error}): restore the file") from None
        if not isinstance(found, dict):
            raise HfError(f"{self.folder / name} is not a JSON object: restore the file")
        return found

    def _find_files(self) -> dict[str, Any]:
        """{tensor: opened file}."""
        if (self.folder / INDEX).exists():
            where = self._json(INDEX).get("weight_map")
            names = sorted(set(where.values())) if isinstance(where, dict) else []
            if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise HfError(f"{self.folder / INDEX} does not map tensors to files beside it: restore the file")
        else:
            names = ["model.safetensors"]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise HfError(
                f"{self.folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more of its {len(names)} files" if len(missing) > 1 else "")
                + ": fetch it again (safetensors only: pickled weights are not read)"
            )
        files = {}
        for name in names:
            try:
                opened = safe_open(self.folder / name, "pt")
            except (SafetensorError, OSError) as error:
                raise HfError(f"{self.folder / name} is damaged ({error}): fetch it again") from None
            files |= dict.fromkeys(opened.keys(), opened)
        return files

    def _check_tensors(self) -> None:
        wanted = [name for row in self.rows for name in row.theirs]
        if missing := [name for name in wanted if name not in self._files]:
            raise HfError(
                f"{self.folder} has no tensor {missing[0]}"
                + (f" ({len(missing)} of {len(wanted)} are missing)" if len(missing) > 1 else "")
                + ": fetch its files again"
            )
        known = set(wanted) | {"lm_head.weight"} if self.model.tie_embeddings else set(wanted)
        for name in sorted(self._files.keys() - known):
            empty = 0 in self._files[name].get_slice(name).get_shape()
            if not (empty or name.endswith("rotary_emb.inv_freq") or self._is_extra(name)):
                raise HfError(
                    f"{self.folder} has a tensor {name}, which this model has no place for: choose another checkpoint"
                )
        for name in wanted:
            dtype = self._files[name].get_slice(name).get_dtype()
            if name.endswith("e_score_correction_bias") and dtype != "F32":
                raise HfError(
                    f"{name} is {dtype}, and an expert bias must be F32 (in BF16 a step of 1e-3 is lost above 0.5): take the "
                    "checkpoint that it was converted from"
                )
            if dtype not in READ:
                raise HfError(
                    f"{name} is {dtype}, and weights are read from {', '.join(sorted(READ))}: convert the checkpoint first"
                )

    def _is_extra(self, name: str) -> bool:
        """Of a layer of multi-token prediction, behind the last one: left out."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        extra = self.config.get("num_nextn_predict_layers")
        first = self.model.num_layers
        return layer is not None and isinstance(extra, int) and first <= int(layer[1]) < first + extra

    def counts(self) -> ParameterCounts:
        """Of the model that it makes."""
        return parameter_counts(self._ours)

    def read(self, row: Row) -> Tensor:
        """The numbers of a row in our shape, float32."""
        return together(row, [self._files[name].get_tensor(name).float() for name in row.theirs])

    def _check_shapes(self) -> None:
        with torch.device("meta"):
            shapes = {
                name: t.shape
                for name, t in Transformer(self._ours, Ranks(0, 1, torch.device("cpu"))).state_dict().items()
            }
        for row in self.rows:
            shape = shapes[row.ours] if row.expert is None else shapes[row.ours][1:]
            for name, part in zip(row.theirs, apart(row, torch.empty(shape, device="meta")), strict=True):
                found = self._files[name].get_slice(name).get_shape()
                if found != list(part.shape):
                    raise HfError(
                        f"{name} of {self.folder} is {found}, and its config.json makes it {list(part.shape)}: restore that file"
                    )

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Write everything into our tensors, whole or DTensors, by name of `Transformer.state_dict`, in place: each rank its
        part. What a dense checkpoint does not have keeps its value."""
        for row in self.rows:
            target = state[row.ours]
            local, first = local_part(target)
            if row.expert is not None:
                at = row.expert - first[0]
                if not 0 <= at < len(local):
                    continue
                local, first = local[at], first[1:]
            whole = self.read(row)
            local.copy_(whole[tuple(slice(at, at + size) for at, size in zip(first, local.shape, strict=True))])
