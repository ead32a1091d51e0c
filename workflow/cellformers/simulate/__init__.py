"""A small atlas and a second dataset with known truth, in the formats of real deposits.

    cellformers simulate -o demo --seed 0

writes `atlas.h5ad` (AnnData, CSR), `second.loom` (written by loompy: other donors, another platform),
`gene_labels.csv` (which transcription factors are dosage-sensitive), `out_degrees.csv` (the truth
behind them) and `truth.json` (all that was drawn).

The model. Cell c has type t(c), donor d(c) and library b(d). The numbers are the defaults of `Model`.

Genes. 13 mitochondrial genes; J pairs of transcription factors, one sensitive and one insensitive; stable
genes that nothing regulates; and targets. Pairs and targets are divided evenly among Q programmes.

Network. Factor f regulates k_f targets, drawn without replacement, about half from its own programme:

    log k_f ~ Normal(log 40, 0.45²) if f is sensitive, Normal(log 8, 0.5²) if it is insensitive.

To be dosage-sensitive is to have a large out-degree and nothing else, and the two distributions overlap. The
effect of f on target g is w_fg = s · 0.45 · exp(Normal(0, 0.3²)) with s = +1 in three of four, else -1.

Activity. Every factor has an activity of mean 0 and variance 1 over types, donors and cells,

    a_cf = √0.25 T[t(c), j(f)] + √0.05 D[d(c), j(f)] + √0.08 H[c, q(f)] + √0.62 ε[c, f],

j(f) its pair and q(f) its programme. All terms are standard normal; T follows a tree, √s · lineage + √(1 - s) · own
with s from `CELL_TYPES`; programmes 0 and 1 are the cell cycle, H = √2 (cos θ, sin θ) with θ uniform.

Expression. The log rate of gene g and its share of the cell's transcripts are

    η_cg = β_g + 0.9 a_cg [g is a factor] + Σ_f a_cf w_fg + B[b, g] + B'[d, g] + P_g,
    p_cg = (1 - m_c) exp(η_cg) / Σ exp(η_cg'),

with gene-wise effects of library and donor, and P_g the efficiency of the platform (0 in the atlas). The
mitochondrial share, logit m_c ~ Normal(logit 0.07 + donor effect, 0.4²), is split in fixed proportions.

Counts. Negative binomial (gamma-Poisson) with log-normal depth L_c and gene-wise dispersion φ_g:

    λ_cg = L_c p_cg,   x_cg ~ Poisson(λ_cg · Gamma(1/φ_g, φ_g)),   E x = λ,   Var x = λ + φ_g λ².

Droplets. A few hold a dying cell (m_c about a half, half the depth), a doublet (the transcripts of two cells of a
donor) or next to nothing (a handful of counts in the mean proportions of the donor).

What may tell sensitive from insensitive. The two factors of a pair share β, φ, T, D, B, B', P and their programme;
ε has the same distribution, and no factor regulates a factor. So expected rates, hence means, detection rates and
profiles over cell types, are alike for both; only the network differs. Ids and names are given out at random.

One seed gives the same bytes on one machine with one set of libraries.
"""

from cellformers.simulate.write import simulate

__all__ = ["simulate"]
