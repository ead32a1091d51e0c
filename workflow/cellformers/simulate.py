"""A small atlas and a second dataset with known truth, in the formats of real deposits.

    cellformers simulate -o demo --seed 0

writes `atlas.h5ad` (AnnData, CSR), `second.loom` (written by loompy; other donors, another platform),
`gene_labels.csv` (which transcription factors are dosage-sensitive) and `truth.json` (everything that was drawn).

The model. Cell c has type t(c), donor d(c) and library b(d); gene g is one of G.

Genes. 13 mitochondrial genes; 2 J transcription factors in J pairs (one sensitive, one insensitive); stable
genes; and the rest, the targets. Targets and pairs are divided among Q programmes.

Network. Factor f regulates k_f targets,

    log k_f ~ Normal(log 40, 0.45^2) if f is sensitive, Normal(log 8, 0.5^2) if it is not,

about half of them in its own programme. Edge weights w_fg are w s_fg v_fg with log v_fg ~ Normal(0, 0.3^2) and sign
s_fg = +1 with probability 0.75. Dosage sensitivity is nothing but a large out-degree; the two distributions overlap.

Activity. Each factor has an activity of mean 0 and variance 1,

    a_cf = sqrt(r_T) T_{t(c),f} + sqrt(r_D) D_{d(c),f} + sqrt(r_H) h_{c,q(f)} + sqrt(r_E) e_cf,     r_T + r_D + r_H + r_E = 1,

with independent standard normal terms, except that T follows a tree (lineages, types, close subtypes) and that the
levels of programmes 0 and 1 are the coordinates of a cell cycle, sqrt(2) (cos, sin) of a uniform phase.

Expression. The log rate of gene g, and its share of the cell's transcripts,

    eta_cg = b_g + u a_cg [g is a factor] + sum_f a_cf w_fg + B_{b,g} + B_{d,g} + P_g,      p_cg = (1 - m_c) exp(eta_cg) / sum_g' exp(eta_cg'),

where B are gene-wise effects of library and donor, P the efficiency of the platform (0 in the atlas), and m_c the
mitochondrial share: logit m_c ~ Normal(logit 0.07 + donor effect, 0.4^2), spread over the 13 genes in fixed proportions.

Counts. Negative binomial as a gamma-Poisson mixture with depth L_c (log-normal) and gene-wise dispersion phi_g,

    lambda_cg = L_c p_cg,   x_cg ~ Poisson(lambda_cg Gamma(1 / phi_g, phi_g)),   Var x_cg = lambda_cg + phi_g lambda_cg^2.

Droplets. A few are dying cells (high m_c, half the depth), doublets (the transcripts of two cells of one donor)
or nearly empty (a handful of counts of the donor's mean profile).

Why nothing but the network tells sensitive from insensitive. The two factors of a pair share b, phi, T, D, B, P and the
programme, and the distribution of e; factors aren't regulated by factors. So every cell's expected rate has the same
distribution for both, hence the same mean and detection rate; positions and names are shuffled.

The same seed gives the same bytes (one machine and one set of library versions).
"""
