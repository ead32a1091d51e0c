"""What stands on the encoder: the masked-gene head, and the heads of fine-tuned classifiers.

The layouts are Hugging Face's: BertForMaskedLM, BertForSequenceClassification (a label a cell, from a pooler on the
first token), BertForTokenClassification (a label a gene). Several labels a cell with one encoder are this
package's own: one linear layer a task on a vector they share.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellformers.models.bert_config import Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class MaskedHead(nn.Module):
    """Scores of every token at a position; the last matrix is that of the word embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """[n, hidden_size] and the word embeddings [vocab_size, hidden_size] to logits [n, vocab_size]."""
        return F.linear(self.norm(self.activation(self.transform(hidden))), words, self.bias)


class CellHead(nn.Module):
    """Logits of a cell from the hidden state of its first token: dense, tanh, dropout, dense."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, first: Tensor) -> Tensor:
        """[cells, hidden_size], the first token's, to [cells, labels]."""
        pooled = torch.tanh(self.pooler(first))
        return self.classifier(F.dropout(pooled, self.dropout, self.training))


class GeneHead(nn.Module):
    """Logits of a gene in a cell from its hidden state."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] to [tokens, labels]."""
        return self.classifier(F.dropout(hidden, self.dropout, self.training))


class TaskHeads(nn.Module):
    """Logits of several tasks about a cell from one vector: the first token's, or a learned weighted mean.

    Attention pooling weighs the tokens of a cell with softmax(h w): there is no padding that could be attended.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.attention = nn.Linear(config.hidden_size, 1) if config.pooling == "attention" else None
        self.names = [name for name, _ in config.tasks]
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, len(labels)) for _, labels in config.tasks
        )

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attention-pooled vectors [cells, hidden_size] of packed hidden states [tokens, hidden_size].

        `cu_seqlens` is int [cells + 1] on the host, the last one the number of tokens; no cell is empty.
        """
        assert self.attention is not None
        score = self.attention(hidden)[:, 0].float()
        n = len(cu_seqlens) - 1
        owner = torch.repeat_interleave(torch.arange(n), cu_seqlens.diff()).to(hidden.device)
        # softmax within each cell, shifted by the cell's largest score
        top = torch.full((n,), -torch.inf, device=hidden.device).scatter_reduce(
            0, owner, score.detach(), "amax"
        )
        weight = torch.exp(score - top[owner])
        total = torch.zeros(n, device=hidden.device).index_add(0, owner, weight)
        share = (weight / total[owner])[:, None]
        # summed in single precision, whatever the hidden states are in
        pooled = torch.zeros(n, hidden.shape[1], device=hidden.device).index_add(
            0, owner, share * hidden.float()
        )
        return pooled.to(hidden.dtype)

    def forward(self, pooled: Tensor) -> Mapping[str, Tensor]:
        """[cells, hidden_size] to {task: [cells, labels of the task]}."""
        pooled = F.dropout(pooled, self.dropout, self.training)
        return {name: layer(pooled) for name, layer in zip(self.names, self.classifiers, strict=True)}


Head = MaskedHead | CellHead | GeneHead | TaskHeads


def make_head(config: Config) -> Head | None:
    """The head that a config asks for; None for a bare encoder."""
    kinds: dict[str, type[Head]] = {
        "masked": MaskedHead, "cell": CellHead, "gene": GeneHead, "tasks": TaskHeads
    }  # fmt: skip
    return kinds[config.head](config) if config.head in kinds else None
