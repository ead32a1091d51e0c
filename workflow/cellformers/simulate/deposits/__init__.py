"""Small public deposits with known truth, in the exact formats of the real ones, and a mirror that serves them.

    cellformers simulate --deposit all -o sim
    python -m http.server --directory sim/www --bind 127.0.0.1 8765 &
    export CELLFORMERS_MIRROR=http://127.0.0.1:8765 CELLFORMERS_RESOURCES=sim/resources CELLFORMERS_HOME=sim/home
    cellformers download gse155468

writes

    www/<host>/<path>         what the registered URLs stand for; any HTTP server of static files will do
    resources/datasets/*.yaml the package's entries with the sizes and digests of the simulated files
    resources/checkpoints.yaml, with --deposit all: two tiny published models and their dictionaries
    home/manual/<deposit>/    what a user has to fetch by hand
    truth/<deposit>.json      what was drawn

The model is that of `cellformers.simulate` with one genome for all deposits: the same genes, the same network of
dosage-sensitive and insensitive factors, the same dispersions and base rates β. A state e (a cell type, a disease,
a day, an organ) of strength s_e is a set of 30 markers among the targets and an activity T_e of every pair of factors,
both drawn from its name, so that a cardiomyocyte is the same cell in every deposit. With w_ce the weight of state e
in cell c (0 or 1; days of a differentiation lie between),

    a_cf = Σ_e w_ce 0.5 s_e T_e[j(f)] + √0.05 D[d(c), j(f)] + √0.08 H[c, q(f)] + √0.62 ε[c, f],
    η_cg = β_g + 0.9 a_cg [g is a factor] + Σ_f a_cf w_fg + Σ_e w_ce s_e M_e[g] + B[b, g] + B'[d, g] + P_g,

M_e[g] = ± exp(Normal(0, 0.3²)) for markers (+ in four of five), else 0. The rest is as there: what tells a
sensitive factor from its insensitive twin is the network alone, and no cell type is told by a gene that isn't
found in others. Droplets are cells: none is empty, dying or a doublet.

The deposits have what is troublesome in the real ones: names that differ between counts and labels, headers one
field short, repeated genes, outdated symbols, unlabelled cells, cells of another species.
"""

from cellformers.simulate.deposits.run import SIMULATED, simulate_deposits

__all__ = ["SIMULATED", "simulate_deposits"]
