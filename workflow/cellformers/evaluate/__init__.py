"""Evaluation: tasks, splits, metrics and the baselines every score stands beside.

`make_cell_split` and `make_gene_split` write a split once; `evaluate_cells` and `evaluate_genes` score one method
on it; `summarise` puts all scores into one table. In the workflow: `cellformers split`, `evaluate` and `summarize`.
"""
