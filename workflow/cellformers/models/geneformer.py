"""Geneformer: a post-norm BERT encoder over ranked genes, on packed sequences.

Computes what transformers computes with the same weights, without padding, without a head unless asked, and
without the layers behind the one that is wanted:

    model = checkpoints.load("models/gf", dtype=torch.float32)
    hidden = model(tokens, cu_seqlens, layer=-1)        # [len(tokens), hidden_size]

Layers are counted as the field does: 0 is the last, -1 the second to last, -n_layers the embedding layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellformers.models.attention import Packing, attend, packing
from cellformers.models.bert_config import Config
from cellformers.models.heads import ACTIVATIONS, MaskedHead, make_head

# fp32 matrix products of under about 12 rows take another path through the BLAS and round differently, so a
# short cell alone would not equal the same cell in a batch; with 16 rows or more they agree.
MIN_ROWS = 16


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward, each followed by residual sum and layer norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.dropout = config.num_attention_heads, config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]
        self.qkv = nn.Linear(width, 3 * width)  # rows as [heads, 3, head_dim]
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, keys: Packing, queries: Packing | None, rows: Tensor | None) -> Tensor:
        """x [tokens, width] to [tokens, width], or to [len(rows), width] where only those rows are wanted."""
        query, key, value = self.qkv(x).view(x.shape[0], self.heads, 3, -1).unbind(2)
        if rows is not None:
            x, query = x[rows], query[rows]
        mixed = attend(
            query, key, value, queries=queries or keys, keys=keys,
            dropout=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        x = self.attention_norm(x + self._drop(self.attention_out(mixed.reshape(x.shape))))
        return self.output_norm(x + self._drop(self.down(self.activation(self.up(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Geneformer(nn.Module):
    """The network: packed encoder and, in `head`, what the config puts on it. Parameters are on one device."""

    def __init__(self, config: Config, *, backend: str = "sdpa") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        width, eps = config.hidden_size, config.layer_norm_eps
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = make_head(config)

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, *, layer: int = 0, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states of one layer.

        Parameters
        ----------
        tokens
            int64 [T] on the model's device: the sequences one after the other.
        cu_seqlens
            int [n + 1] on the host: 0, then the cumulative lengths, the last one T.
        layer
            0 (last) to -n_layers (embedding layer); those behind it are not computed.
        rows
            int64, ascending, on the host: the positions of the flat batch that are wanted (default: all). The
            last computed layer then computes its queries and what follows for these alone.

        Returns
        -------
        Tensor
            [T, hidden_size], or [len(rows), hidden_size].
        """
        device = self.words.weight.device
        keys = packing(cu_seqlens, device)
        depth = self.config.depth(layer)
        queries, wanted, n_wanted = None, None, tokens.shape[0]
        if rows is not None:
            queries = packing(torch.searchsorted(rows, cu_seqlens.to(torch.int64)), device)
            n_wanted = rows.shape[0]
            wanted = F.pad(rows, (0, max(0, MIN_ROWS - n_wanted))).to(device, non_blocking=True)
        places = torch.arange(tokens.shape[0]) - torch.repeat_interleave(
            cu_seqlens[:-1].to(torch.int64), torch.as_tensor(keys.lengths)
        )
        shortfall = (0, max(0, MIN_ROWS - tokens.shape[0]))
        tokens, places = F.pad(tokens, shortfall), F.pad(places.to(device, non_blocking=True), shortfall)

        # the order of this sum is transformers', so that it rounds alike
        x = self.norm(self.words(tokens) + self.types.weight[0] + self.positions(places))
        if self.training and self.config.hidden_dropout_prob:
            x = F.dropout(x, self.config.hidden_dropout_prob)
        for number in range(depth):
            last = number == depth - 1
            x = self.layers[number](x, keys, queries if last else None, wanted if last else None)
        if depth == 0 and wanted is not None:
            x = x[wanted]
        return x[:n_wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [n, vocab_size], from hidden states [n, hidden_size] of the last layer."""
        assert isinstance(self.head, MaskedHead)
        return self.head(hidden, self.words.weight)
