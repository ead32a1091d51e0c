"""The config.json of a Hugging Face BERT encoder, validated field by field.

    config = Config.from_dict(json.loads(text))
    text = json.dumps(for_layout(json.loads(text), "te"))      # the same model in the other layout of weights

Written for the classes of transformers that publish such models and for NVIDIA's exports of the same.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cellformers.errors import UserError, did_you_mean

# Larger than any published encoder of cells by a wide margin; what lies outside is a damaged file.
_LIMITS = {
    "vocab_size": (3, 2_000_000),
    "hidden_size": (1, 32_768),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 512),
    "intermediate_size": (1, 262_144),
    "max_position_embeddings": (1, 1_048_576),
    "type_vocab_size": (1, 1_024),
    "pad_token_id": (0, 2_000_000),
}
_FRACTIONS = {
    "layer_norm_eps": (0.0, 1e-2),
    "hidden_dropout_prob": (0.0, 0.99),
    "classifier_dropout": (0.0, 0.99),
    "attention_probs_dropout_prob": (0.0, 0.99),
    "initializer_range": (0.0, 10.0),
}
_ACTIVATIONS = ("relu", "gelu")
# What stands on the encoder, by the class that published it. NVIDIA's export of Geneformer keeps the names of
# transformers; its exports of other encoders put TE or NV before them, so that is understood too.
HEADS = {
    "BertForMaskedLM": "masked",
    "BertForSequenceClassification": "cell",
    "BertForTokenClassification": "gene",
    "GeneformerMultiTask": "tasks",
    "BertModel": "none",
}
POOLINGS = ("first", "attention")
MAX_LABELS = 100_000

# Variants of BERT whose weights have the same names but mean something else.
_VARIANTS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "qkv_weight_interleaved": True,  # TransformerEngine: rows as [heads, 3, head_dim]; else [3, heads, head_dim]
}
_PROBLEM = "single_label_classification"

# What only the TransformerEngine layout has in its config: what its reader needs, and what else exports carry.
_TE_NEEDS = {"use_te_layers": True, "fuse_qkv_params": True}
_TE_ONLY = (
    *_TE_NEEDS, "auto_map", "framework", "micro_batch_size", "max_seq_length", "attn_input_format",
    "encoder_activation", "qkv_weight_interleaved",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of a Geneformer; field names and defaults are those of transformers' BertConfig."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    type_vocab_size: int = 2
    pad_token_id: int = 0
    head: str = "masked"  # a value of HEADS
    labels: tuple[str, ...] = ()  # classes of a cell or gene classifier, by id
    tasks: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (name, classes) of each task
    pooling: str = "first"  # of tasks: see POOLINGS
    classifier_dropout: float | None = None

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier: its own, else that of the hidden states."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def from_dict(cls, data: Any, *, path: str | Path | None = None) -> Self:
        """Validate the content of a config.json; keys this package has no use for are passed over.

        Raises
        ------
        UserError
            If it is no BERT encoder's config, a field is missing, of the wrong type, or out of bounds.
        """
        if not isinstance(data, Mapping) or data.get("model_type") != "bert":
            kind = data.get("model_type") if isinstance(data, Mapping) else type(data).__name__
            raise UserError(
                f"not the config of a BERT encoder (model_type is {kind!r})", path=path,
                fix="a Geneformer's config.json has model_type 'bert'",
            )  # fmt: skip
        for name, value in _VARIANTS.items():
            if data.get(name, value) not in (value, None):
                raise UserError(
                    f"{name} {data[name]!r} is not supported", path=path, fix=f"only {value!r} is"
                )
        values = _head(data, path)
        for field in fields(cls):
            if field.name in values:
                continue
            if field.name in data and data[field.name] is not None:
                values[field.name] = _checked(field.name, data[field.name], path)
            elif field.name in _LIMITS and field.name not in ("type_vocab_size", "pad_token_id"):
                raise UserError(f"lacks {field.name}", path=path, fix=did_you_mean(field.name, data))
        config = cls(**values)
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                f"{config.num_attention_heads}",
                path=path,
            )
        if config.pad_token_id >= config.vocab_size:
            raise UserError(f"pad_token_id {config.pad_token_id} is outside the vocabulary", path=path)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers loads as the class of the head."""
        own = ("head", "labels", "tasks", "pooling", "classifier_dropout")
        values = {
            "architectures": [next(name for name, head in HEADS.items() if head == self.head)],
            "model_type": "bert",
            **{name: value for name, value in asdict(self).items() if name not in own},
            "is_decoder": False,
            "tie_word_embeddings": True,
        }
        if self.classifier_dropout is not None:
            values["classifier_dropout"] = self.classifier_dropout
        if self.labels:
            values["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            values["label2id"] = {label: i for i, label in enumerate(self.labels)}
        if self.tasks:
            tasks = {name: list(labels) for name, labels in self.tasks}
            values["cellformers"] = {"tasks": tasks, "pooling": self.pooling}
        return values

    def depth(self, layer: int) -> int:
        """Encoder layers to compute for `layer` (0 = last, -1 = second to last); UserError if there is none."""
        if not -self.num_hidden_layers <= layer <= 0:
            raise UserError(
                f"no layer {layer} in a model of {self.num_hidden_layers} layers",
                fix=f"choose 0 (last) to {-self.num_hidden_layers} (embedding layer)",
            )
        return self.num_hidden_layers + layer


def _head(data: Mapping[str, Any], path: str | Path | None) -> dict[str, Any]:
    """Fields of the head: which, and its classes."""
    named = data.get("architectures") or ["BertForMaskedLM"]
    name = named[0] if isinstance(named, list) and isinstance(named[0], str) else ""
    head = HEADS.get(name.removeprefix("TE").removeprefix("NV"))
    if head is None:
        raise UserError(
            f"architectures {named!r} is not supported", path=path, fix=f"supported: {', '.join(HEADS)}"
        )
    values: dict[str, Any] = {"head": head}
    if head in ("cell", "gene"):
        if data.get("problem_type") not in (None, _PROBLEM):
            raise UserError(
                f"problem_type {data['problem_type']!r} is not supported",
                path=path,
                fix=f"only {_PROBLEM} is",
            )
        values["labels"] = _labels(data.get("id2label") or _unnamed(data.get("num_labels", 2), path), path)
    elif head == "tasks":
        own = data.get("cellformers")
        tasks = own.get("tasks") if isinstance(own, Mapping) else None
        if not isinstance(own, Mapping) or not isinstance(tasks, Mapping) or not tasks:
            raise UserError("lacks the tasks of its heads", path=path, fix="fine-tune it again")
        values["pooling"] = own.get("pooling", "first")
        if values["pooling"] not in POOLINGS:
            raise UserError(f"no pooling {values['pooling']!r}", path=path, fix=did_you_mean("", POOLINGS))
        values["tasks"] = tuple(
            (str(task), _labels(dict(enumerate(labels)) if isinstance(labels, list) else labels, path))
            for task, labels in tasks.items()
        )
    return values


def _unnamed(number: Any, path: str | Path | None) -> dict[int, str]:
    """The names that transformers gives to classes that have none."""
    if not isinstance(number, int) or not 0 <= number <= MAX_LABELS:
        raise UserError(f"num_labels is {number!r}, not a number of classes", path=path)
    return {i: f"LABEL_{i}" for i in range(number)}


def _labels(found: Any, path: str | Path | None) -> tuple[str, ...]:
    """Classes in the order of their ids, which have to be 0, 1, 2, ..."""
    ok = isinstance(found, Mapping) and 2 <= len(found) <= MAX_LABELS
    by_id = {str(key): value for key, value in found.items()} if ok else {}
    if not by_id or set(by_id) != {str(i) for i in range(len(by_id))}:
        raise UserError("id2label does not number two classes or more from 0", path=path)
    labels = tuple(str(by_id[str(i)]) for i in range(len(by_id)))
    if len(set(labels)) != len(labels):
        raise UserError("id2label names a class twice", path=path)
    return labels


def _checked(name: str, value: Any, path: str | Path | None) -> Any:
    if name == "hidden_act":
        if value not in _ACTIVATIONS:
            raise UserError(f"hidden_act {value!r} is not supported", path=path, fix="relu and gelu are")
        return value
    whole = name in _LIMITS
    low, high = _LIMITS[name] if whole else _FRACTIONS[name]
    ok = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not ok or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {value!r}, not {kind} from {low} to {high}", path=path)
    return value


def for_layout(data: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """The content of the same model's config.json when its weights are in another layout, "hf" or "te".

    Every other key stays, whether this package uses it or not. What only the TransformerEngine layout has is put
    aside under "cellformers" in the "hf" layout, so that the way there and back gives the same content.
    """
    own = _mapping(data.get("cellformers"))
    kept = {name: value for name, value in data.items() if name not in (*_TE_ONLY, "cellformers")}
    special = _mapping(own.pop("te", None)) | {name: data[name] for name in _TE_ONLY if name in data}
    if layout == "te":
        kept |= special | _TE_NEEDS
    elif special and special != _TE_NEEDS:
        own["te"] = special
    return {**kept, "cellformers": own} if own else kept


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
