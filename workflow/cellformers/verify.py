"""Whether this package computes what transformers computes: the same cells, layer by layer, in every backend.

    report = verify("models/gf", "verify.json", n_cells=8)
    print(table(report))

transformers runs in float32 on padded batches with an attention mask; the backends run on packed sequences. A layer
passes in float32 where no number differs by more than 5e-5, in lower precision where the norm of the difference is a
small part of the norm of the whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellformers.errors import UserError
from cellformers.io.files import temporary_folder, write_json
from cellformers.models.attention import available_backends, choose
from cellformers.models.batches import pick_precision, precision_name
from cellformers.models.bert_config import Config
from cellformers.models.checkpoints import load, read_config
from cellformers.models.devices import pick_device
from cellformers.models.directory import VOCABULARY, check_fit, convert, model_digest
from cellformers.models.geneformer import Geneformer
from cellformers.models.heads import CellHead, GeneHead, MaskedHead
from cellformers.models.layouts import detect
from cellformers.models.weight_files import WEIGHTS_FILE, open_tensors
from cellformers.tokens import check_vocabulary, read_tokens
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

MAX_ABSOLUTE = 5e-5  # float32: hidden states; logits relative to their largest value
MAX_RELATIVE = {"bfloat16": 4e-2, "float16": 4e-2, "fp8": 0.2}  # norm of the difference / norm
PADDED_TOKENS = 8192  # of a batch of transformers
POSITIONS = 4  # of a cell at which the masked-gene head is compared: all of them would be gigabytes

# the class of transformers for each head of `Config`; tasks have none, their encoder is compared
CLASSES = {"masked": "MaskedLM", "cell": "SequenceClassification", "gene": "TokenClassification"}


class Difference:
    """Largest and mean difference of two tensors that come in pieces, and the size of the reference."""

    def __init__(self) -> None:
        self.count, self.largest, self.total, self.scale = 0, 0.0, 0.0, 0.0
        self.squares, self.whole = 0.0, 0.0

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Take in another piece: tensors of one shape on one device, any dtype."""
        theirs = theirs.double()
        gap = (mine.double() - theirs).abs()
        self.count += gap.numel()
        # as plain maxima a NaN would be lost
        self.largest = max(self.largest, float(gap.max())) if bool(gap.isfinite().all()) else math.inf
        self.total += float(gap.sum())
        self.scale = max(self.scale, float(theirs.abs().max()))
        self.squares += float(gap.square().sum())
        self.whole += float(theirs.square().sum())

    def row(self, layer: str, dtype: str) -> dict[str, Any]:
        """The line of a report: numbers that are not finite become None, and do not pass."""
        relative = math.sqrt(self.squares / self.whole) if self.whole else math.inf
        limit = MAX_ABSOLUTE * (max(1.0, self.scale) if layer == "logits" else 1.0)
        passed = self.largest <= limit if dtype == "float32" else relative <= MAX_RELATIVE[dtype]
        numbers = {
            "max_abs": self.largest, "mean_abs": self.total / max(1, self.count), "relative": relative,
            "scale": self.scale,
        }  # fmt: skip
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"layer": layer, **finite, "passed": passed and math.isfinite(self.largest)}


def verify(
    model_dir: str | Path,
    output: str | Path,
    *,
    tokens: str | Path | None = None,
    n_cells: int = 8,
    backends: Sequence[str] = (),
    dtype: str | None = None,
    accelerator: str = "cpu",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare hidden states of every layer and logits with those of transformers; write and return the report.

    Parameters
    ----------
    tokens
        A tokens file whose first cells are taken; otherwise cells of random genes, short to as long as may be.
    backends
        Names of attention backends (default: all that work here).
    dtype
        Precision of this package's side (default: float32 where a backend takes it, else bfloat16).
    progress
        Called with the number of cells done, now and then.

    Returns
    -------
    dict
        model (digest), config, transformers (its version), accelerator, n_cells, n_tokens, passed, backends: {name:
        {dtype, layers: [{layer, max_abs, mean_abs, relative, scale, passed}], passed}}. The layers run from
        "embedding" through 1, 2, ... to "logits".

    Raises
    ------
    UserError
        If transformers is not installed or does not load the model, or the model, tokens or a backend don't do.
    """
    model_dir = Path(model_dir)
    config = read_config(model_dir)
    vocabulary = _vocabulary(model_dir, config)
    device = pick_device(accelerator)
    chosen = _choose(backends, dtype, device)
    cells = _read_cells(tokens, vocabulary, config, n_cells) if tokens is not None else (
        random_cells(vocabulary, config, n_cells=n_cells, seed=seed)
    )  # fmt: skip
    with temporary_folder(output) as folder:
        theirs, version = _reference(_as_published(model_dir, folder / "hf"), config)
    theirs = theirs.to(device)
    ours = {
        name: load(model_dir, device=device, backend=name, **pick_precision(kind)._asdict())
        for name, kind in chosen.items()
    }
    found = _compare(theirs, ours, config, cells, progress)
    backends_found = {name: _backend(found[name], kind) for name, kind in chosen.items()}
    report = {
        "model": model_digest(model_dir),
        "config": summary(config),
        "transformers": version,
        "accelerator": accelerator,
        "n_cells": len(cells),
        "n_tokens": sum(map(len, cells)),
        "backends": backends_found,
        "passed": all(backend["passed"] for backend in backends_found.values()),
    }
    write_json(report, output)
    return report


def _compare(
    theirs: Any, ours: dict[str, Geneformer], config: Config, cells: Sequence[Array],
    progress: Callable[[int], None] | None,
) -> dict[str, list[Difference]]:  # fmt: skip
    """For every backend the differences by layer: embedding layer first, logits last."""
    found = {name: [Difference() for _ in range(config.num_hidden_layers + 2)] for name in ours}
    with torch.inference_mode():
        for batch in _batches(cells):
            wanted = _their_states(theirs, config, batch)
            for name, network in ours.items():
                for number, (mine, reference) in enumerate(
                    zip(our_states(network, batch), wanted, strict=True)
                ):
                    found[name][number].add(mine, reference)
            if progress is not None:
                progress(len(batch))
    return found


def _backend(found: list[Difference], dtype: str) -> dict[str, Any]:
    names = ["embedding", *map(str, range(1, len(found) - 1)), "logits"]
    rows = [d.row(name, dtype) for name, d in zip(names, found, strict=True) if d.count]
    return {"dtype": dtype, "layers": rows, "passed": all(row["passed"] for row in rows)}


def summary(config: Config) -> dict[str, Any]:
    """The size of a network, for a report."""
    return {
        "head": config.head,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
    }


def _vocabulary(folder: Path, config: Config) -> Vocabulary:
    if not (folder / VOCABULARY).is_dir():
        raise UserError(
            "the model carries no vocabulary/", path=folder, fix="cellformers import-model adds one"
        )
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    check_fit(vocabulary, config, folder)
    return vocabulary


def _choose(requested: Sequence[str], dtype: str | None, device: torch.device) -> dict[str, str]:
    """The backends to run and the dtype of each; one that was asked for and can't is an error."""
    names = list(requested) or [name for name, why in available_backends().items() if why is None]
    chosen = {}
    for name in names:
        # the kernels behind sdpa take any dtype, the others half precision only
        kind = precision_name(dtype or ("float32" if name == "sdpa" else "bfloat16"))
        try:
            choose(name, device, **pick_precision(kind)._asdict())
        except UserError:
            if requested:
                raise
            continue
        chosen[name] = kind
    if not chosen:
        raise UserError(f"no backend here computes in {dtype}", fix="cellformers doctor lists the backends")
    return chosen


# --- cells ------------------------------------------------------------------------------------------------


def random_cells(vocabulary: Vocabulary, config: Config, *, n_cells: int, seed: int) -> list[Array]:
    """Cells of random genes, int64 tokens each, from a few genes to as many as the model takes."""
    special = vocabulary.special_tokens if vocabulary.has_cls else {}
    room = min(vocabulary.context_length, config.max_position_embeddings) - (2 if special else 0)
    most = min(room, len(vocabulary.token_ids))
    rng = np.random.default_rng(seed)
    cells = []
    for length in np.geomspace(min(7, most), most, n_cells).round().astype(int):
        genes = rng.permutation(vocabulary.token_ids)[:length].astype(np.int64)
        cells.append(np.concatenate([[special["<cls>"]], genes, [special["<eos>"]]]) if special else genes)
    return cells


def _read_cells(path: str | Path, vocabulary: Vocabulary, config: Config, n_cells: int) -> list[Array]:
    """The first cells of a tokens file that have any token."""
    check_vocabulary(path, vocabulary)
    cells: list[Array] = []
    for block in read_tokens(path, cells=n_cells):
        parts = [block.tokens[a:b].astype(np.int64) for a, b in pairwise(block.offsets)]
        cells += [part for part in parts if len(part)]
        if len(cells) >= n_cells:
            break
    if not cells:
        raise UserError("has no cell with a token", path=path)
    longest = max(map(len, cells))
    if longest > config.max_position_embeddings:
        raise UserError(
            f"has a cell of {longest} tokens, the model takes {config.max_position_embeddings}", path=path,
            fix="tokenize with the vocabulary of the model",
        )  # fmt: skip
    return cells[:n_cells]


def _batches(cells: Sequence[Array]) -> Iterator[list[Array]]:
    """Successive cells, as many as fill a padded batch, so that some of them are padded."""
    batch: list[Array] = []
    for cell in cells:
        if batch and max(*map(len, batch), len(cell)) * (len(batch) + 1) > PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(cell)
    if batch:
        yield batch


def _positions(length: int) -> list[int]:
    """Where in a cell the logits of masked genes are compared: evenly from the first to the last token."""
    return sorted(set(np.linspace(0, length - 1, POSITIONS).round().astype(int).tolist()))


# --- the two sides ----------------------------------------------------------------------------------------


def _as_published(model_dir: Path, folder: Path) -> Path:
    """A folder that transformers loads: the model's own, or else `folder`, into which it is converted."""
    with open_tensors(model_dir) as tensors:
        if tensors.path.name == WEIGHTS_FILE and detect(tensors.shapes) == "hf":
            return model_dir
    convert(model_dir, folder, layout="hf")
    return folder


def _reference(folder: Path, config: Config) -> tuple[Any, str]:
    """The model as transformers loads it, in float32, and the version of transformers."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("verify compares with transformers", fix="pip install transformers") from error
    name = f"AutoModelFor{CLASSES[config.head]}" if config.head in CLASSES else "BertModel"
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"transformers does not load it ({reason})", path=folder) from error
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key or config.head == "cell")
    if missing:
        raise UserError(f"transformers finds no {missing[0]} in it", path=folder)
    return model.float().eval(), transformers.__version__


def _their_states(theirs: Any, config: Config, batch: list[Array]) -> list[Tensor]:
    """Hidden states of every layer [tokens, d], embedding layer first, without padding; then logits if any."""
    longest, device = max(map(len, batch)), theirs.device
    ids = torch.full((len(batch), longest), config.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, cell in enumerate(batch):
        ids[row, : len(cell)] = torch.from_numpy(cell)
        mask[row, : len(cell)] = 1
    encoder = theirs.bert if config.head in CLASSES else theirs
    done = encoder(ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
    real = mask.bool().to(device)
    states = [state[real] for state in done.hidden_states]
    last = done.hidden_states[-1]
    if config.head == "masked":
        rows = [last[row, _positions(len(cell))] for row, cell in enumerate(batch)]
        states.append(theirs.cls(torch.cat(rows)))
    elif config.head == "cell":
        states.append(theirs.classifier(done.pooler_output))
    elif config.head == "gene":
        states.append(theirs.classifier(states[-1]))
    return states


def our_states(network: Geneformer, batch: Sequence[Array]) -> list[Tensor]:
    """The same of this package, from one forward pass over the packed cells (int64 tokens each)."""
    device = network.words.weight.device
    bounds = torch.tensor([0, *map(len, batch)]).cumsum(0)
    flat = torch.from_numpy(np.concatenate(batch)).to(device)
    states: list[Tensor] = []
    parts = [network.norm, *network.layers]
    hooks = [part.register_forward_hook(lambda _m, _i, out: states.append(out)) for part in parts]
    try:
        network(flat, bounds)
    finally:
        for hook in hooks:
            hook.remove()
    states = [state[: len(flat)] for state in states]
    last, head = states[-1], network.head
    if isinstance(head, MaskedHead):
        rows = [int(a) + p for a, b in pairwise(bounds.tolist()) for p in _positions(b - a)]
        states.append(network.logits(last[torch.tensor(rows, device=device)]))
    elif isinstance(head, CellHead):
        states.append(head(last[bounds[:-1].to(device)]))
    elif isinstance(head, GeneHead):
        states.append(head(last))
    return states


# --- for people -------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as text: a line a layer for every backend."""
    lines = [
        f"against transformers {report['transformers']} in float32: {report['n_cells']} cells, "
        f"{report['n_tokens']} tokens, {report['accelerator']}"
    ]
    for name, backend in report["backends"].items():
        lines += ["", f"{name}, {backend['dtype']}"]
        lines.append(f"{'layer':>9}  {'max diff':>9}  {'mean diff':>9}  {'relative':>9}  {'largest':>9}")
        for row in backend["layers"]:
            numbers = [row[key] for key in ("max_abs", "mean_abs", "relative", "scale")]
            shown = "  ".join(f"{'not finite':>9}" if n is None else f"{n:>9.2e}" for n in numbers)
            lines.append(f"{row['layer']:>9}  {shown}" + ("" if row["passed"] else "  too large"))
    return "\n".join([*lines, "", "passed" if report["passed"] else "NOT PASSED"])
