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

from cellformers.models import layers
from cellformers.models.attention import HALF, Packing, packing
from cellformers.models.bert_config import Config
from cellformers.models.heads import ACTIVATIONS, MaskedHead, make_head

# fp32 matrix products of under about 12 rows take another path through the BLAS and round differently, so a
# short cell alone would not equal the same cell in a batch; with 16 rows or more they agree.
MIN_ROWS = 16
FP8_ROWS = 32  # products in fp8 take rows by the 16 (by the 32 in block formats)


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward, each followed by residual sum and layer norm."""

    def __init__(self, config: Config, backend: str = "sdpa") -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.dropout = config.num_attention_heads, config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]
        self.qkv = layers.linear(backend, width, 3 * width)  # rows as [heads, 3, head_dim]
        self.attention = layers.attention(
            backend, self.heads, width // self.heads, dropout=self.attention_dropout
        )
        self.attention_out = layers.linear(backend, width, width)
        self.attention_norm = layers.norm(backend, width, eps=eps)
        self.up = layers.linear(backend, width, inner)
        self.down = layers.linear(backend, inner, width)
        self.output_norm = layers.norm(backend, width, eps=eps)

    def forward(
        self, x: Tensor, keys: Packing, queries: Packing | None, rows: Tensor | None, backend: str
    ) -> Tensor:
        """x [tokens, width] to [tokens, width], or to [len(rows), width] where only those rows are wanted."""
        qkv = self.qkv(x).view(x.shape[0], self.heads, 3, -1)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = self.attention(qkv, keys, queries, rows, backend=backend, dropout=dropout)
        if rows is not None:
            x = x[rows]
        x = self.attention_norm(x + self._drop(self.attention_out(mixed)))
        return self.output_norm(x + self._drop(self.down(self._expand(x))))

    def _expand(self, x: Tensor) -> Tensor:
        """activation(up(x)); for inference on a GPU the bias and the ReLU within the matrix product."""
        up, fits = self.up, x.is_cuda and x.dtype in HALF and not torch.is_grad_enabled()
        if fits and type(up) is nn.Linear and up.weight.dtype == x.dtype and self.activation is F.relu:
            return torch._addmm_activation(up.bias, x, up.weight.t())
        return self.activation(up(x))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's initial values, for which it imports its compiler: seconds, for what is replaced at once."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # type: ignore[no-untyped-call]


class Geneformer(nn.Module):
    """The network: packed encoder and, in `head`, what the config puts on it. Parameters are on one device.

    Made by `layouts.assemble` or `random_model`, which give it its weights.

    `backend` (see `attention`) decides what the layers are made of; between "varlen" and "sdpa" it may be changed
    later. With `fp8` ("te" only) the encoder's matrix products are in fp8.
    """

    def __init__(self, config: Config, *, backend: str = "sdpa", fp8: bool = False) -> None:
        super().__init__()
        if fp8:
            layers.check_fp8(config)
        self.config, self.backend, self.fp8 = config, backend, fp8
        width, eps = config.hidden_size, config.layer_norm_eps
        self.words = _embedding(config.vocab_size, width)
        self.positions = _embedding(config.max_position_embeddings, width)
        self.types = _embedding(config.type_vocab_size, width)
        self.norm = layers.norm(backend, width, eps=eps)
        self.layers = nn.ModuleList(Layer(config, backend) for _ in range(config.num_hidden_layers))
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
            wanted = F.pad(rows, (0, self._padding(n_wanted))).to(device, non_blocking=True)
        x = self._embed(tokens, keys)
        with layers.in_fp8(self.fp8):
            for number in range(depth):
                last = number == depth - 1
                x = self.layers[number](
                    x, keys, queries if last else None, wanted if last else None, self.backend
                )
        if depth == 0 and wanted is not None:
            x = x[wanted]
        return x[:n_wanted]

    def _padding(self, rows: int) -> int:
        """Rows to put behind so many: they belong to no sequence and are cut off in the end."""
        unit = FP8_ROWS if self.fp8 else 1
        return -(-max(rows, MIN_ROWS) // unit) * unit - rows

    def _embed(self, tokens: Tensor, keys: Packing) -> Tensor:
        """The embedding layer, [T, hidden_size] and padding behind it; positions are counted on the device."""
        starts = torch.repeat_interleave(
            keys.cu_seqlens[:-1], keys.cu_seqlens.diff(), output_size=keys.bounds[-1]
        )
        places = torch.arange(keys.bounds[-1], device=starts.device) - starts
        rows = tokens.shape[0] + self._padding(tokens.shape[0])
        tokens, places = F.pad(tokens, (0, rows - len(tokens))), F.pad(places, (0, rows - len(places)))
        # the order of this sum is transformers', so that it rounds alike
        x = self.norm(self.words(tokens) + self.types.weight[0] + self.positions(places))
        if self.training and self.config.hidden_dropout_prob:
            x = F.dropout(x, self.config.hidden_dropout_prob)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [n, vocab_size], from hidden states [n, hidden_size] of the last layer."""
        assert isinstance(self.head, MaskedHead)
        return self.head(hidden, self.words.weight)
